"""Which numbers of a probed step are judged, and where each belongs: one a statistic, site and layer."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache, partial
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import xarray as xr
from jaxtyping import Float

from osp_diag.schema import KURTOSIS, OPTIMIZER, WEIGHTS, group_path, is_site, network_order, site_of_path

__all__ = [
    "Block",
    "Place",
    "block_of",
    "blocks_of",
    "is_judged_group",
    "is_judged_statistic",
    "numbers_of",
    "places_in_order",
]

NAMES_OF_THINGS = frozenset({"channel", "position", "token id", "token ids", "expert", "row"})
"""Units of numbers that say which one, not how much."""
PROFILES = frozenset(
    {"channel", "head_channel", "output_channel", "token_position", "key_position", "key_rank", "logit_bin"}
)
"""Dimensions of whole profiles, and of lists whose members change places.

Other statistics of the same site say how large and how concentrated they are."""


class Place(NamedTuple):
    """Where a number belongs."""

    site: str | None
    """a site, or a group such as ``optimizer:update``; None of a scalar of the series"""
    layer: int | None
    statistic: str
    part: str = ""
    """which matrix, which side of it …, beside the sites"""

    @property
    def words(self) -> str:
        """The place in a sentence: ``mlp_contribution, layer 1``."""
        parts = [self.site or "", "" if self.layer is None else f"layer {self.layer}", self.part]
        return ", ".join(part for part in parts if part)

    @property
    def full_name(self) -> str:
        """The number in a sentence: ``token_peak at mlp_contribution, layer 1``, or a scalar's own name."""
        return f"{self.statistic} at {self.words}" if self.words else self.statistic


@dataclass(frozen=True)
class Block:
    """One statistic of one site at some steps.

    Attributes
    ----------
    places : of the columns
    values : (step, place)
    floor : what Gaussian noise of that width scores, of the OSP kurtosis; None of others
    """

    places: tuple[Place, ...]
    values: Float[np.ndarray, "step place"]
    floor: float | None = None


def is_judged_group(group: str, declared: Iterable[str] = ()) -> bool:
    """Whether a group's numbers are judged: of sites, of weights and of optimizers."""
    return is_site(group, tuple(declared)) or group.split(":")[0] in (OPTIMIZER, WEIGHTS)


def is_judged_statistic(dims: Iterable[str], units: Any) -> bool:
    """Whether a statistic is a quantity of few numbers, not a name of something or a whole profile."""
    return not PROFILES.intersection(dims) and units not in NAMES_OF_THINGS


def block_of(
    group: str, statistic: str, array: xr.Variable | xr.DataArray, labels: Callable[[str], Iterable[Any]]
) -> Block:
    """The numbers of one statistic (step, …) as columns.

    Over all tokens where there are strata. Of heads, thresholds and ranks of a site the largest; matrices and
    sides of a group beside the sites stay apart.
    """
    dims, values = [str(dim) for dim in array.dims], np.asarray(array.values, np.float64)
    if "stratum" in dims:
        strata = [str(name) for name in labels("stratum")]
        values = np.take(values, strata.index("all") if "all" in strata else 0, axis=dims.index("stratum"))
        dims.remove("stratum")
    if is_site(group) or not group.startswith((OPTIMIZER, WEIGHTS)):
        others = tuple(axis for axis, dim in enumerate(dims) if dim not in ("step", "layer"))
        values = _largest(values, others)
        dims = [dim for dim in dims if dim in ("step", "layer")]
    names = [_labels_of(dim, size, labels) for dim, size in zip(dims[1:], values.shape[1:], strict=True)]
    places = _places(group, statistic, tuple(dims[1:]), tuple(names))
    floor = array.attrs.get("floor") if statistic == KURTOSIS else None
    return Block(places, values.reshape(len(values), -1), None if floor is None else float(floor))


def blocks_of(groups: Mapping[str, xr.Dataset], declared: Iterable[str] = ()) -> list[Block]:
    """The judged numbers of one step, of the Datasets that a probe labels (without ``step``)."""
    blocks, declared = [], tuple(declared)
    for path, dataset in groups.items():
        group = site_of_path(group_path(path))
        if not is_judged_group(group, declared):
            continue
        # Not through arrays of xarray, which would cost as much as the probe itself (docs/log.md).
        variables, labels = dataset.variables, cache(partial(_labels_in, dataset.variables))
        for name in dataset.data_vars:
            values = variables[name]
            dims = [str(dim) for dim in values.dims]
            if values.dtype.kind == "f" and is_judged_statistic(dims, values.attrs.get("units")):
                of_step = xr.Variable(("step", *values.dims), values.values[None], values.attrs)
                blocks.append(block_of(group, str(name), of_step, labels))
    return blocks


def numbers_of(blocks: Iterable[Block]) -> tuple[dict[Place, float], dict[Place, float]]:
    """The numbers of one step by place, and the floors of those that have one."""
    numbers: dict[Place, float] = {}
    floors: dict[Place, float] = {}
    for block in blocks:
        numbers |= zip(block.places, block.values[0].tolist(), strict=True)
        if block.floor is not None:
            floors |= dict.fromkeys(block.places, block.floor)
    return numbers, floors


def places_in_order(places: Iterable[Place]) -> list[Place]:
    """In network order; then the weights, the optimizers and the scalars."""
    places = list(places)
    at_sites = {(p.site, p.layer) for p in places if p.site is not None and p.layer is not None}
    rank = {
        place: index for index, place in enumerate(network_order((str(s), int(n or 0)) for s, n in at_sites))
    }
    beside = {WEIGHTS: 1, OPTIMIZER: 2}

    def position(place: Place) -> tuple[int, int, str]:
        if place.site is None:
            return (3, 0, place.statistic)
        group = beside.get(place.site.split(":")[0], 0)
        return (group, rank.get((place.site, place.layer if place.layer is not None else -1), -1), place.site)

    return sorted(places, key=position)


def _labels_in(variables: Mapping[Any, xr.Variable], dim: str) -> Sequence[Any]:
    return variables[dim].values.tolist() if dim in variables else ()


def _labels_of(dim: str, size: int, labels: Callable[[str], Iterable[Any]]) -> tuple[Any, ...]:
    known = tuple(labels(dim))
    return known if len(known) == size else tuple(range(size))


@lru_cache(maxsize=2**14)
def _places(
    group: str, statistic: str, dims: tuple[str, ...], names: tuple[tuple[Any, ...], ...]
) -> tuple[Place, ...]:
    """Of every combination of labels; they are the same at every probe."""
    places = []
    for combination in product(*names):
        by_dim = dict(zip(dims, combination, strict=True))
        layer = by_dim.pop("layer", None)
        part = " ".join(map(str, by_dim.values()))
        places.append(Place(group, None if layer is None else int(layer), statistic, part))
    return tuple(places)


def _largest(values: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """The largest along ``axes``; NaN where there is no number."""
    if not axes:
        return values
    filled = np.where(np.isnan(values), -np.inf, values).max(axis=axes)
    return np.where(np.isneginf(filled), np.nan, filled)
