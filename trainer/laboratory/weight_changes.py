"""How far parameters moved between two checkpoints, and which rows and columns did not move with the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import torch
import xarray as xr
from torch import Tensor

__all__ = ["weight_changes"]

VARIABLES = {
    "norm_ratio": ("1", "‖W₁‖_F / ‖W₀‖_F"),
    "row_deviation": ("1", "max |ln r_i − median ln r|, r_i = ‖row i of W₁‖ / ‖row i of W₀‖ (or of entries)"),
    "row": ("row", "the row of that deviation"),
    "row_ratio": ("1", "its r_i over the median r"),
    "row_cosine": ("1", "cosine between it before and after: 1 where it was scaled"),
    "rows_beyond": ("rows", "rows of more than half of that deviation"),
    "column_deviation": ("1", "the same of columns; 0 of a vector"),
    "column": ("column", "the column of that deviation"),
    "column_ratio": ("1", "its ratio over the median one"),
    "column_cosine": ("1", "cosine between it before and after"),
    "bfloat16_share": (
        "1", "share of the entries of W₁ that are bfloat16 numbers; NaN where they are stored in 16 bits",
    ),
    "is_same": ("1", "1 where W₁ is W₀ to the bit"),
}  # fmt: skip


LEAST = 1e-6
"""Ratio of a row that became zero."""
ALONG, TURNED = 0.999, 0.99
"""Cosines between a row before and after: it was at most scaled; it was not only scaled."""


@torch.no_grad()
def weight_changes(
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
    *,
    earlier: Callable[[str], Tensor | None] = lambda name: None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """What changed in every parameter that both have; a gain of one number counts as even over channels.

    Parameters
    ----------
    before, after : parameter → weights, W₀ and W₁; each is asked for once, and let go of
    earlier : gives, of parameters whose rows may wait for their first gradient (embeddings), the weights one
        checkpoint before: rows that stood still up to W₀, or only decayed, and turn now have no deviation
    progress : told (parameters done, in all)

    Returns
    -------
    Dataset (parameter) of :data:`VARIABLES`
    """
    shared: list[str] = []
    columns: dict[str, list[float]] = {name: [] for name in VARIABLES}
    both = [name for name in before if name in after]
    for place, name in enumerate(both):
        one, two = before[name], after[name]
        if _fits(one, two):
            first = earlier(name)
            shared.append(name)
            for key, value in _change(one, two, first).items():
                columns[key].append(value)
        if progress is not None:
            progress(place + 1, len(both))
    return xr.Dataset(
        {
            name: ("parameter", np.array(columns[name]), {"units": units, "definition": definition})
            for name, (units, definition) in VARIABLES.items()
        },
        coords={"parameter": shared},
    )


def rows_that_deviate(before: Tensor, after: Tensor, axis: str) -> tuple[tuple[int, ...], float]:
    """(indices of the rows or columns beyond half of the largest deviation, median of their ratios)."""
    one, two = (
        value if axis == "row" else value.T for value in (_matrix(before, after), _matrix(after, after))
    )
    logarithms = _logarithms(one, two)
    deviation = logarithms.abs()
    beyond = torch.nonzero(deviation > deviation.max() / 2).flatten()
    return tuple(beyond.tolist()), float(logarithms[beyond].median().exp())


def _fits(before: Tensor, after: Tensor) -> bool:
    return before.shape == after.shape or (before.numel() == 1 and after.ndim == 1)


def _matrix(value: Tensor, like: Tensor) -> Tensor:
    value = value.float()
    value = value.expand(like.shape) if value.shape != like.shape else value
    return value.reshape(value.shape[0], -1) if value.ndim else value.reshape(1, 1)


def _change(before: Tensor, after: Tensor, earlier: Tensor | None) -> dict[str, float]:
    one, two = _matrix(before, after), _matrix(after, after)
    rows, columns = _logarithms(one, two), _logarithms(one.T, two.T)
    row_deviations = _without_crossings(one, two, rows).abs()
    if earlier is not None and earlier.shape == before.shape:
        row_deviations[_first_moved(_matrix(earlier, after), one, two)] = 0.0
    narrow = torch.finfo(after.dtype).bits <= 16
    return {
        "norm_ratio": float(two.norm() / one.norm()),
        **_largest("row", row_deviations, rows, one, two),
        "rows_beyond": float((row_deviations > row_deviations.max() / 2).sum()),
        **_largest("column", columns.abs(), columns, one.T, two.T),
        "bfloat16_share": float("nan") if narrow else float((after == after.bfloat16()).float().mean()),
        "is_same": float(torch.equal(one, two)),
    }


def _without_crossings(one: Tensor, two: Tensor, logarithms: Tensor) -> Tensor:
    """Of a vector with both signs (a bias), ratios of entries each longer by the vector's root mean square:
    an entry that passes through zero has any ratio."""
    if one.shape[1] > 1 or not ((two < 0).any() and (two > 0).any()):
        return logarithms
    floor = torch.maximum(one.square().mean(), two.square().mean()).sqrt()
    return _logarithms(one.abs() + floor, two.abs() + floor)


def _first_moved(earlier: Tensor, one: Tensor, two: Tensor) -> Tensor:
    """Rows of a token that occurs now for the first time: until then they stood still, or decayed."""
    waited = torch.cosine_similarity(earlier, one, dim=1) > ALONG
    return waited & (torch.cosine_similarity(one, two, dim=1) < TURNED)


def _logarithms(one: Tensor, two: Tensor) -> Tensor:
    """ln of the ratios of the rows' norms, less their median; 0 of rows that were zero."""
    lengths, now = one.norm(dim=1), two.norm(dim=1)
    valid = lengths > 0
    logarithms = torch.where(valid, (now / lengths.clamp(min=1e-30)).clamp(min=LEAST).log(), 0.0)
    return torch.where(valid, logarithms - logarithms[valid].median() if valid.any() else 0.0, 0.0)


def _largest(axis: str, deviations: Tensor, logarithms: Tensor, one: Tensor, two: Tensor) -> dict[str, float]:
    """Where the deviation is largest: how large it is, which row or column that is, its ratio, its turn."""
    place = int(deviations.argmax())
    return {
        f"{axis}_deviation": float(deviations[place]),
        axis: float(place),
        f"{axis}_ratio": float(logarithms[place].exp()),
        f"{axis}_cosine": float(torch.cosine_similarity(one[place], two[place], dim=0)),
    }
