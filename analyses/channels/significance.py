"""What of a comparison of channels is more than chance: a bootstrap over groups of token batches.

A run may keep some sums apart for each of G groups of batches (``run.token_groups``). Their weighted sums
are what a probe of other tokens would have given, so resampling the groups tells how far every number moves
with the tokens. Groups, and not tokens, are resampled: tokens of one sequence depend on each other.

With so few groups percentiles of the resamples would be too narrow. The standard error of the resamples,
times √(G / (G − 1)), goes into Student's t with G − 1 degrees of freedom instead. Where both runs were fed
the same tokens in the same groups, they are resampled together, and only what differs between the models
counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy.stats import false_discovery_control, t

from osp_diag.analyses.channels.profiles import decades, relative_rms
from osp_diag.errors import OspDiagError
from osp_diag.runs.run import Run

__all__ = ["LEVEL", "GroupSums", "group_sums", "no_significance_reason", "with_significance"]

LEVEL = 0.05
"""False discovery rate below which channels are said to differ; intervals hold 1 − ``LEVEL``."""
RESAMPLES = 1000
FEWEST_GROUPS = 3
"""Groups from which on anything can be said."""
_SEED = 20_251_122
_BYTES = 64 * 2**20
"""of one layer's resamples at a time"""

_FAMILY = "adjusted (Benjamini-Hochberg) over the compared {what} of the site"
_DEFINITIONS: dict[str, tuple[str, str]] = {
    "difference_margin": ("decades", "half the width of the 95% interval of `difference`"),
    "difference_q": ("1", "p of `difference` = 0, " + _FAMILY.format(what="layers and channels")),
    "different_channels": ("channels", f"channels with difference_q below {LEVEL:g}"),
    "top_share": ("1", "share of Σ_j s_j² in the largest channel, over the groups together"),
    "osp_excess_kurtosis": ("1", "OSP kurtosis, mean over tokens of the groups together"),
}
_STATISTICS = ("top_share", "osp_excess_kurtosis")


@dataclass(frozen=True)
class GroupSums:
    """Sums of one site of one run by group of batches, for one stratum; groups without tokens left out."""

    layers: list[int]
    count: Float[np.ndarray, "group layer"]
    square: Float[np.ndarray, "group layer channel"]
    kurtosis: Float[np.ndarray, "group layer"]
    """Σ over tokens of the OSP formula; NaN where it was not measured"""

    @property
    def groups(self) -> int:
        return len(self.count)

    def at(self, layers: Sequence[int]) -> GroupSums:
        """These layers, in this order."""
        places = [self.layers.index(layer) for layer in layers]
        arrays = (array[:, places] for array in (self.count, self.square, self.kurtosis))
        return GroupSums(list(layers), *arrays)


def group_sums(run: Run, site: str, step: int, stratum: str) -> GroupSums | None:
    """The sums by group that a run holds of a site; None where it holds none, or too few groups."""
    try:
        sums = run.token_groups(site)
    except (OspDiagError, KeyError, AttributeError):
        return None
    place = {"stratum": stratum, "step": step} if "step" in sums.dims else {"stratum": stratum}
    sums = sums.sel(place, drop=True).load()
    if "channel.square" not in sums:
        return None
    count = sums["token.count"].transpose("token_group", "layer").values.astype(float)
    with_tokens = (count > 0).all(axis=1)
    if with_tokens.sum() < FEWEST_GROUPS:
        return None
    square = sums["channel.square"].transpose("token_group", "layer", "channel").values.astype(float)
    kurtosis = np.full(count.shape, np.nan)
    if "osp_token_kurtosis.total" in sums:
        kurtosis = sums["osp_token_kurtosis.total"].transpose("token_group", "layer").values.astype(float)
    layers = [int(layer) for layer in sums["layer"].values]
    return GroupSums(layers, count[with_tokens], square[with_tokens], kurtosis[with_tokens])


def no_significance_reason(names: Sequence[str]) -> str:
    """Why no significance stands beside the distances, and how to get it."""
    return (
        "not given: a bootstrap over token batches needs the channel sums of groups of batches, which "
        f"{' and '.join(dict.fromkeys(names))} {'does' if len(set(names)) == 1 else 'do'} not keep for these "
        f"tokens; probe again with --token-groups 8 and at least {FEWEST_GROUPS} sequences (of a training "
        "run: export it and probe the checkpoint, or train with probe.token_groups=8)"
    )


def with_significance(
    data: xr.Dataset, first: GroupSums, second: GroupSums, pairs: Sequence[tuple[int, int]], *, paired: bool
) -> xr.Dataset:
    """Intervals and adjusted p-values beside the numbers of one compared site.

    Parameters
    ----------
    data : the site, of :func:`osp_diag.analyses.channels.comparison_data.compared_site`
    first, second : the sums by group of both runs
    pairs : the matched layers
    paired : whether both were fed the same tokens in the same groups

    Returns
    -------
    ``data`` with ``top_share``, ``osp_excess_kurtosis`` (run, layer), the half widths of their 95% intervals
    (``_margin``), and of the difference, first minus second: ``_difference``, ``_difference_margin`` and
    ``_difference_q``. Where the widths are equal also ``difference_margin``, ``difference_q`` (layer,
    channel) and ``different_channels`` (layer).
    """
    # Row i of either side is now the i-th pair of matched layers.
    first, second = (side.at([pair[place] for pair in pairs]) for place, side in enumerate((first, second)))
    rng = np.random.default_rng(_SEED)
    draws = [_weights(rng, side.groups) for side in (first, second)]
    if paired:
        draws[1] = draws[0]
    # G − 1 degrees of freedom; for a difference of two runs the smaller, which errs to the wide side.
    freedom = min(first.groups, second.groups) - 1
    columns: dict[str, list[Any]] = {}
    for layer in range(len(pairs)):
        statistics = _of_layer(first, second, layer, draws, paired=paired, freedom=freedom)
        for name, value in statistics.items():
            columns.setdefault(name, []).append(value)
    arrays = {name: np.stack(values) for name, values in columns.items()}
    return data.merge(_labelled(arrays, data))


def _weights(rng: np.random.Generator, groups: int) -> Float[np.ndarray, "draw group"]:
    """How often each group is drawn; the first row is the data themselves."""
    # Why groups of batches and not tokens: docs/decisions.md, Analyses.
    draws = rng.multinomial(groups, np.full(groups, 1 / groups), size=RESAMPLES)
    return np.concatenate([np.ones((1, groups)), draws]).astype(float)


def _of_layer(
    first: GroupSums,
    second: GroupSums,
    layer: int,
    draws: Sequence[Float[np.ndarray, "draw group"]],
    *,
    paired: bool,
    freedom: int,
) -> dict[str, Any]:
    """Margins and p-values of one pair of layers."""
    sides = list(zip((first, second), draws, strict=True))
    statistics: dict[str, Any] = {}
    for name in _STATISTICS:
        # Entry 0 is the estimate from the data, the rest are the resamples.
        resamples = [_statistic(name, side, layer, weights) for side, weights in sides]
        statistics[name] = np.array([values[0] for values in resamples])
        errors = [
            _error(values[1:], side.groups) for values, side in zip(resamples, (first, second), strict=True)
        ]
        statistics[f"{name}_margin"] = np.array(
            [_margin(error, side.groups - 1) for error, side in zip(errors, (first, second), strict=True)]
        )
        # Paired: the spread of the difference itself. Else √(e_A² + e_B²), for the runs vary independently.
        difference_error = (
            _error((resamples[0] - resamples[1])[1:], first.groups)
            if paired
            else float(np.hypot(errors[0], errors[1]))
        )
        statistics[f"{name}_difference"] = resamples[0][0] - resamples[1][0]
        statistics[f"{name}_difference_margin"] = _margin(difference_error, freedom)
        statistics[f"{name}_difference_p"] = _p(resamples[0][0] - resamples[1][0], difference_error, freedom)
    if first.square.shape[-1] == second.square.shape[-1]:
        estimate, error = _channels(sides, layer, paired=paired)
        statistics["difference_margin"] = _margin(error, freedom)
        statistics["difference_p"] = _p(estimate, error, freedom)
    return statistics


def _statistic(
    name: str, side: GroupSums, layer: int, weights: Float[np.ndarray, "draw group"]
) -> Float[np.ndarray, " draw"]:
    """One number of a layer for each draw of groups.

    Of draw b, with w_bg the times that group g is in it: Σ_g w_bg K_g / Σ_g w_bg n_g for the kurtosis, and
    max_j E_j / Σ_j E_j with E_j = Σ_g w_bg Σ x_gj² for the share of the largest channel.
    """
    if name == "osp_excess_kurtosis":
        return np.asarray(weights @ side.kurtosis[:, layer] / (weights @ side.count[:, layer]))
    energy = weights @ side.square[:, layer]
    total = energy.sum(axis=1)
    return np.divide(energy.max(axis=1), total, out=np.full(len(total), np.nan), where=total > 0)


def _channels(
    sides: Sequence[tuple[GroupSums, Float[np.ndarray, "draw group"]]], layer: int, *, paired: bool
) -> tuple[Float[np.ndarray, " channel"], Float[np.ndarray, " channel"]]:
    """Difference of log10 relative RMS by channel, and its standard error."""
    channels = sides[0][0].square.shape[-1]
    at_once = max(1, _BYTES // (8 * channels))
    estimate = np.subtract(*(_profile(side, layer, weights[:1])[0] for side, weights in sides))
    # Sums over resamples of the deviations δ from the data, and of δ², in chunks, since all resamples of all
    # channels would fill the memory. Unpaired, each run has its own.
    sums = np.zeros((2 if not paired else 1, 2, channels))
    for start in range(1, RESAMPLES + 1, at_once):
        profiles = [_profile(side, layer, weights[start : start + at_once]) for side, weights in sides]
        for place, part in enumerate([profiles[0] - profiles[1]] if paired else profiles):
            centre = estimate if paired else _profile(sides[place][0], layer, sides[place][1][:1])[0]
            sums[place] += np.stack([(part - centre).sum(axis=0), ((part - centre) ** 2).sum(axis=0)])
    # Var = (Σδ² − (Σδ)² / B) / (B − 1); times G / (G − 1) as in `_error`; variances of independent runs add.
    variance = (sums[:, 1] - sums[:, 0] ** 2 / RESAMPLES) / (RESAMPLES - 1)
    groups = np.array([side.groups for side, _ in sides][: len(variance)])[:, None]
    return estimate, np.sqrt((np.maximum(variance, 0.0) * groups / (groups - 1)).sum(axis=0))


def _profile(
    side: GroupSums, layer: int, weights: Float[np.ndarray, "draw group"]
) -> Float[np.ndarray, "draw channel"]:
    # s_j = √(Σ_g w_bg Σ x_gj² / Σ_g w_bg n_g), then log10 of s_j over the median channel.
    rms = np.sqrt(weights @ side.square[:, layer] / (weights @ side.count[:, layer])[:, None])
    return np.asarray(decades(relative_rms(rms)))


def _error(draws: Float[np.ndarray, " draw"], groups: int) -> float:
    """Standard error: that of the resamples, which is too small by √((G − 1) / G)."""
    return float(draws.std(ddof=1) * np.sqrt(groups / (groups - 1)))


def _margin(error: Any, freedom: int) -> Any:
    return t.isf(LEVEL / 2, freedom) * error


def _p(estimate: Any, error: Any, freedom: int) -> Any:
    """Two-sided p of no difference; 1 where there is none at all."""
    with np.errstate(divide="ignore", invalid="ignore"):
        # P(|T| ≥ |estimate| / error) of Student's t; without error and difference it is 0/0, and 1 below.
        p = 2 * t.sf(np.abs(estimate) / error, freedom)
    return np.where(np.asarray(estimate) == 0, 1.0, p)


def _labelled(arrays: dict[str, np.ndarray], data: xr.Dataset) -> xr.Dataset:
    """Names, dimensions and definitions; p-values are adjusted here, where all layers are known."""
    variables: dict[str, Any] = {}

    def add(name: str, dims: tuple[str, ...], values: np.ndarray, units: str, definition: str) -> None:
        variables[name] = (dims, values, {"units": units, "definition": definition})

    for name in _STATISTICS:
        units, definition = _DEFINITIONS[name]
        add(name, ("run", "layer"), arrays[name].T, units, definition)
        add(
            f"{name}_margin",
            ("run", "layer"),
            arrays[f"{name}_margin"].T,
            units,
            f"half the width of the 95% interval of {name}",
        )
        add(f"{name}_difference", ("layer",), arrays[f"{name}_difference"], units, "first minus second")
        add(
            f"{name}_difference_margin",
            ("layer",),
            arrays[f"{name}_difference_margin"],
            units,
            f"half the width of the 95% interval of {name}_difference",
        )
        add(
            f"{name}_difference_q",
            ("layer",),
            _adjusted(arrays[f"{name}_difference_p"]),
            "1",
            "p of no difference, " + _FAMILY.format(what="layers"),
        )
    if "difference_p" in arrays:
        q = _adjusted(arrays["difference_p"])
        for name, values in (("difference_margin", arrays["difference_margin"]), ("difference_q", q)):
            add(name, ("layer", "channel"), values.astype(np.float32), *_DEFINITIONS[name])
        counts = np.where(np.isnan(q).all(axis=1), np.nan, (q < LEVEL).sum(axis=1))
        add("different_channels", ("layer",), counts, *_DEFINITIONS["different_channels"])
    return xr.Dataset(variables).expand_dims(site=data["site"].values)


def _adjusted(p: Float[np.ndarray, "..."]) -> Float[np.ndarray, "..."]:
    """Benjamini-Hochberg over all of them; what is NaN stays so and does not count."""
    finite = np.isfinite(p)
    adjusted = np.full(p.shape, np.nan)
    if finite.any():
        adjusted[finite] = false_discovery_control(p[finite], method="bh")
    return adjusted
