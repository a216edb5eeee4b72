"""The shape of a weight matrix: kurtosis of its entries, and how far single rows and columns stand out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from osp_diag.estimators._arrays import Array, accumulator_dtype, namespace_of
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Observes, Output, Source
from osp_diag.estimators.counts import maximum_or_nan
from osp_diag.estimators.reductions import power_of_two_below
from osp_diag.estimators.weight_outliers import WeightObservation
from osp_diag.schema import DOWN_WEIGHT, PROJECTION_WEIGHT

__all__ = ["MatrixShape", "WeightShape"]


@dataclass(frozen=True)
class MatrixShape(Measurement):
    """Excess kurtosis, and the norm ratios of rows and of columns, of the matrix of each expert.

    All fields are maxima, as those of :class:`~osp_diag.estimators.weight_outliers.ColumnRatios`. −Inf where
    one is not defined.
    """

    name = "weight_shape"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {key: Field(("expert",), "maximum") for key in ("kurtosis", "row_ratio", "column_ratio")}

    def measure(self, observation: WeightObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.weight)
        parts = [_shape_of(observation.weight, experts, rows) for experts, rows in observation.blocks()]
        return {key: xp.concat([part[key] for part in parts]) for key in parts[0]}


def _shape_of(weight: Array, experts: slice, parts: list[slice]) -> dict[str, Array]:
    """The fields of some experts; their rows are read three times: extent, mean, then powers."""
    xp = namespace_of(weight)
    wide = accumulator_dtype(xp, weight)
    elements = weight.shape[1] * weight.shape[2]

    def entries(rows: slice) -> Array:
        return xp.astype(weight[experts, rows, :], xp.float32, copy=False)

    extents = [xp.max(xp.abs(entries(rows)), axis=(1, 2)) for rows in parts]
    peak = extents[0]
    for extent in extents[1:]:
        peak = xp.maximum(peak, extent)
    # Powers of what is divided by the largest entry neither overflow nor all vanish.
    unit = power_of_two_below(xp, xp.where(xp.isfinite(peak), peak, xp.ones_like(peak)))[:, None, None]
    total = sum(xp.sum(entries(rows) / unit, axis=(1, 2), dtype=wide) for rows in parts)
    mean = total / elements
    second, fourth, by_row, by_column = 0.0, 0.0, [], 0.0
    for rows in parts:
        z = entries(rows) / unit
        squares = z * z
        by_row.append(xp.sum(squares, axis=2, dtype=wide))
        by_column = by_column + xp.sum(squares, axis=1, dtype=wide)
        centred = z - xp.astype(mean, xp.float32)[:, None, None]
        squares = centred * centred
        second = second + xp.sum(squares, axis=(1, 2), dtype=wide)
        fourth = fourth + xp.sum(squares * squares, axis=(1, 2), dtype=wide)
    # A matrix with NaN or Inf has no finite sum; one of equal entries no spread but their rounding.
    is_defined = xp.isfinite(total) & (second / elements > 2.0**-44 * mean**2)
    spread = xp.where(is_defined, second / elements, xp.ones_like(total))
    kurtosis = fourth / elements / spread**2 - 3.0
    return {
        "kurtosis": xp.where(is_defined, kurtosis, xp.full_like(kurtosis, -xp.inf)),
        "row_ratio": _norm_ratio(xp.concat(by_row, axis=1), xp.isfinite(total)),
        "column_ratio": _norm_ratio(by_column, xp.isfinite(total)),
    }


def _norm_ratio(squares: Array, is_finite: Array) -> Array:
    """Largest norm over the lower median one, from squared norms (expert, row or column)."""
    xp = namespace_of(squares)
    squares = xp.where(is_finite[:, None], squares, xp.zeros_like(squares))
    ordered = xp.sort(squares, axis=-1)
    largest, median = ordered[:, -1], ordered[:, (ordered.shape[-1] - 1) // 2]
    is_defined = median > 0
    ratio = xp.sqrt(largest / xp.where(is_defined, median, xp.ones_like(median)))
    return xp.where(is_defined, ratio, xp.full_like(ratio, -xp.inf))


@dataclass(frozen=True)
class WeightShape(Estimator):
    """Excess kurtosis of a projection's weights, and the largest over the median norm of rows and columns.

    Kurtosis is of all entries of the matrix together, centred; heavy tails of single weights show in it, as
    do rows or columns that stand out as a whole, which the two ratios tell apart: of rows (output channels)
    and of columns (input channels), ‖·‖₂, over the lower median. Of experts stacked in one parameter the
    largest of each, every expert being a matrix of its own. NaN for a matrix with NaN or Inf; the kurtosis
    also where all entries are equal, a ratio also where half of the norms are 0.

    At ``mlp_down_weight``, and on request at ``projection_weight:…``: the query, key and value (slices of a
    fused projection, where its layout is known), attention_output, gate and up; other projections by their
    path within the block, so one that is fused in an unknown layout too.
    """

    name: ClassVar[str] = "weight_shape"
    title: ClassVar[str] = "Kurtosis and norm ratios of a projection's weights"
    formula: ClassVar[str] = "mean (W_ij − W̄)⁴ / (mean (W_ij − W̄)²)² − 3; max_i ‖W_i‖₂ / median_i ‖W_i‖₂"
    range: ClassVar[str] = "kurtosis [−2, number of entries − 3); ratios [1, ∞)"
    floor: ClassVar[str] = "0 of Gaussian weights; 1 where all rows (columns) are equally long"
    sources: ClassVar[tuple[Source, ...]] = (Source("The sample's moments and norms, over a matrix"),)
    also_used_by: ClassVar[tuple[str, ...]] = (
        "Confusable with `weight_outliers`, of single entries over the mean magnitude of their column.",
    )
    observes: ClassVar[Observes] = "weight"
    sites: ClassVar[tuple[str, ...]] = (DOWN_WEIGHT, f"{PROJECTION_WEIGHT}*")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (MatrixShape(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        xp = namespace_of(state["weight_shape.kurtosis"])

        def largest(key: str) -> Array:
            return maximum_or_nan(xp.max(state[f"weight_shape.{key}"], axis=-1))

        return {
            "weight_excess_kurtosis": Output(
                largest("kurtosis"),
                definition="mean (W_ij − W̄)⁴ / (mean (W_ij − W̄)²)² − 3, the largest over experts",
                floor=-2.0,
            ),
            "weight_row_norm_ratio": Output(
                largest("row_ratio"),
                definition="max_i ‖W_i‖₂ / lower median_i ‖W_i‖₂ over rows i, the largest over experts",
                floor=1.0,
            ),
            "weight_column_norm_ratio": Output(
                largest("column_ratio"),
                definition="max_j ‖W_j‖₂ / lower median_j ‖W_j‖₂ over columns j, the largest over experts",
                floor=1.0,
            ),
        }
