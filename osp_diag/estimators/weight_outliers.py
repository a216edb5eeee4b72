"""Outliers of weights: how far single entries of a down projection stand above the rest of their column.

What is observed is a matrix and no activation, so tokens, strata and padding do not come in. A *column*
holds the weights of one input channel (of the MLP's hidden state), a *row* those of one output channel
(of the residual stream), whatever way the module stores them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, accumulator_dtype, namespace_of, take_along_last
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Observes, Output, Source
from osp_diag.estimators.counts import maximum_or_nan

__all__ = ["ColumnRatios", "WeightObservation", "WeightOutliers"]

AN = Source(
    "An et al. 2025, Systematic Outliers in Large Language Models", "https://arxiv.org/abs/2502.06415"
)

_BLOCK_ELEMENTS = 2**22
"""Weights looked at together: a float32 copy of them takes 16 MiB, whatever the size of the matrix."""


class WeightObservation:
    """A projection of one layer.

    Parameters
    ----------
    weight : (expert, row, channel), any floating dtype; computed on in float32. A row is an output
        channel, a channel an input channel. A layer without experts has one.

    Raises :class:`~osp_diag.errors.EstimatorError` for another shape.
    """

    def __init__(self, weight: Float[Any, "expert row channel"]) -> None:
        if len(weight.shape) != 3 or 0 in weight.shape:
            raise EstimatorError(
                "a projection is observed as (expert, row, channel), none of them 0; got "
                f"{tuple(weight.shape)}: a single matrix is weight[None]"
            )
        experts, rows, channels = weight.shape
        self.weight = weight
        self.layout = Layout(channels=channels, output_channels=rows, experts=experts)

    def blocks(self) -> list[tuple[slice, list[slice]]]:
        """(experts, slices of their rows) to look at one after the other."""
        experts, rows, channels = self.weight.shape
        together = max(1, min(experts, _BLOCK_ELEMENTS // (rows * channels)))
        height = max(1, _BLOCK_ELEMENTS // (together * channels))
        parts = [slice(start, min(start + height, rows)) for start in range(0, rows, height)]
        return [
            (slice(start, min(start + together, experts)), parts) for start in range(0, experts, together)
        ]


# Why maxima and no sums: docs/decisions.md, Estimators.
@dataclass(frozen=True)
class ColumnRatios(Measurement):
    """The largest |W| / mean of its column's |W|: of each column, of each row, of each expert.

    All fields are maxima: the same weights, seen again or by every rank, change nothing, and matrices
    that ranks hold between them (whole experts) merge to what one rank with all of them would find.
    """

    name = "weight_column_ratio"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {
            "channel": Field(("channel",), "maximum"),
            "row": Field(("output_channel",), "maximum"),
            "expert": Field(("expert",), "maximum"),
            "nonfinite": Field(("channel",), "maximum"),
        }

    def measure(self, observation: WeightObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.weight)
        by_field: dict[str, list[Array]] = {"channel": [], "row": [], "expert": [], "nonfinite": []}
        for experts, parts in observation.blocks():
            part = _ratios_of(observation.weight, experts, parts)
            for key, value in part.items():
                by_field[key].append(value)
        largest = {key: _largest(by_field[key]) for key in ("channel", "row", "nonfinite")}
        return {**largest, "expert": xp.concat(by_field["expert"])}


def _largest(values: list[Array]) -> Array:
    xp, top = namespace_of(values[0]), values[0]
    for value in values[1:]:
        top = xp.maximum(top, value)
    return top


def _ratios_of(weight: Array, experts: slice, parts: list[slice]) -> dict[str, Array]:
    """The fields of some experts, their rows read in two rounds: sums first, then ratios to the mean."""
    xp = namespace_of(weight)
    wide = accumulator_dtype(xp, weight)

    def magnitude(rows: slice) -> Array:
        return xp.abs(xp.astype(weight[experts, rows, :], xp.float32))

    # mean_i |W_ij| of each column; a column with NaN or Inf has no finite sum.
    total = sum(xp.sum(magnitude(rows), axis=1, dtype=wide) for rows in parts)
    finite = xp.isfinite(total)
    mean = xp.astype(xp.where(finite, total, xp.zeros_like(total)) / weight.shape[1], xp.float32)
    # A column of zeros counts as 1, one that is not finite as −Inf: left out of every maximum.
    empty = mean == 0
    divisor, nothing = xp.where(empty, xp.ones_like(mean), mean), xp.full_like(mean, -xp.inf)
    per_row, per_column = [], []
    for rows in parts:
        ratio = magnitude(rows) / divisor[:, None, :]
        ratio = xp.where(empty[:, None, :], xp.ones_like(ratio), ratio)
        ratio = xp.where(finite[:, None, :], ratio, nothing[:, None, :])
        per_row.append(xp.max(ratio, axis=(0, 2)))
        per_column.append(xp.max(ratio, axis=1))
    of_columns = _largest(per_column)
    return {
        "channel": xp.max(of_columns, axis=0),
        "row": xp.concat(per_row),
        "expert": xp.max(of_columns, axis=1),
        "nonfinite": xp.astype(xp.any(~finite, axis=0), xp.float32),
    }


@dataclass(frozen=True)
class WeightOutliers(Estimator):
    """Largest magnitude of each column of a down projection over the mean magnitude of the column.

    A large ratio is one weight that turns one hidden channel into one channel of the residual stream;
    An et al. find such weights in the layers where massive activations appear and vanish, in the rows of
    the massive channels. Of each layer also the largest ratio with its column (a channel of
    ``mlp_hidden``), its row (a channel of the residual stream) and its expert, the median over columns,
    and the largest of each row. Where two entries tie for the largest, the lowest column, row and expert
    are given, each by itself.

    Experts stacked in one parameter are one matrix each: a ratio is to the mean of the column of that
    expert, and a channel shows the largest over experts. A shared expert beside them is not looked at,
    as at ``mlp_hidden``. A column of zeros counts as 1 (An et al.'s code adds 1e-8 to the mean and gives
    0); a column with NaN or Inf is left out and counted. Scaling a column changes nothing.

    The weights are those that the first forward pass of a step multiplied by, in the dtype in which it
    held them.
    """

    name: ClassVar[str] = "weight_outliers"
    title: ClassVar[str] = "Weight outliers of down projections"
    formula: ClassVar[str] = "max_i |W_ij| / mean_i |W_ij| of column j"
    range: ClassVar[str] = "[1, number of rows]"
    floor: ClassVar[str] = (
        "1, all entries alike; Gaussian weights give 4.1 for a column of 576 rows, 4.6 for 2,048, 4.8 for "
        "4,096, and 6 to 7.5 for the largest of a layer's columns"
    )
    ceiling: ClassVar[str] = "the number of rows, a column with a single non-zero entry"
    sources: ClassVar[tuple[Source, ...]] = (AN,)
    also_used_by: ClassVar[tuple[str, ...]] = (
        "An et al. draw the largest and the median ratio of each layer's `down_proj` "
        "(their pos_weight_outliers.py).",
        "Yu et al. 2024 (The Super Weight) find single weights of the same matrix by the activations that "
        "they make, not by a ratio.",
    )
    observes: ClassVar[Observes] = "weight"
    sites: ClassVar[tuple[str, ...]] = ("mlp_down_weight",)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (ColumnRatios(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        column, row, expert = (state[f"weight_column_ratio.{key}"] for key in ("channel", "row", "expert"))
        xp = namespace_of(column)
        largest = xp.max(column, axis=-1)
        is_defined = largest > -xp.inf
        missing = xp.nan * xp.ones_like(largest)

        def index_of_largest(values: Array) -> Array:
            index = xp.astype(xp.argmax(values, axis=-1), column.dtype)
            return xp.where(is_defined, index, missing)

        flags = state["weight_column_ratio.nonfinite"]
        rows = float(layout.output_channels)
        return {
            "weight_outlier_ratio": Output(
                maximum_or_nan(column),
                ("channel",),
                definition=f"{self.formula}, the largest over experts",
                floor=1.0,
                ceiling=rows,
            ),
            "weight_outlier_row_ratio": Output(
                maximum_or_nan(row),
                ("output_channel",),
                definition="max_j |W_ij| / mean_i |W_ij| of row i, the largest over experts",
                ceiling=rows,
            ),
            "weight_outlier_ratio_max": Output(
                maximum_or_nan(largest),
                (),
                definition="the largest ratio of a column",
                floor=1.0,
                ceiling=rows,
            ),
            "weight_outlier_ratio_median": Output(
                _lower_median(column),
                (),
                definition="lower median over columns of their ratio",
                floor=1.0,
                ceiling=rows,
            ),
            "weight_outlier_channel": Output(
                index_of_largest(column),
                (),
                "channel",
                "the column of the largest ratio, a channel of mlp_hidden",
            ),
            "weight_outlier_row": Output(
                index_of_largest(row),
                (),
                "channel",
                "the row of the largest ratio, a channel of the residual stream",
            ),
            "weight_outlier_expert": Output(
                index_of_largest(expert),
                (),
                "expert",
                "the expert of the largest ratio; 0 in a layer without experts",
            ),
            "weight_outlier_nonfinite_columns": Output(
                xp.sum(xp.where(flags > 0, xp.ones_like(flags), xp.zeros_like(flags)), axis=-1),
                (),
                "columns",
                "columns with NaN or Inf (in any expert), which are left out",
                floor=0.0,
            ),
        }


def _lower_median(ratio: Array) -> Array:
    """Over the columns that are not left out (−Inf); NaN without any."""
    xp = namespace_of(ratio)
    is_finite = ratio > -xp.inf
    count = xp.sum(xp.astype(is_finite, xp.int32), axis=-1)
    missing = ratio.shape[-1] - count
    # Columns that are left out (−Inf) sort first: the rank is moved past them.
    rank = missing + xp.maximum(count - 1, xp.zeros_like(count)) // 2
    rank = xp.minimum(rank, xp.full_like(rank, ratio.shape[-1] - 1))
    value = take_along_last(xp.sort(ratio, axis=-1), rank)
    return xp.where(count > 0, value, xp.nan * xp.ones_like(value))
