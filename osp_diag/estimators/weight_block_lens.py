"""Block formats of weights: what NVFP4, MXFP4, MXFP8, FP8 and INT4 would lose of a projection's matrix.

Blocks lie along the input channels, as those of the activations that they are multiplied by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from osp_diag.estimators._arrays import Array, accumulator_dtype, namespace_of, quotient
from osp_diag.estimators._block_losses import (
    MOST_BITS,
    SERIOUS_LOSS,
    block_losses,
    blocks_of,
    extremes_of_rows,
    sums_of_rows,
)
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Observes, Output, Source
from osp_diag.estimators.block_crest import crests
from osp_diag.estimators.block_formats import (
    BLOCK_FORMATS,
    BLOCK_WIDTHS,
    BlockFormat,
    block_dim,
    block_format,
    check_formats,
    in_blocks,
    tensor_peak_by_block,
)
from osp_diag.estimators.block_lens import FAMILY, FORMAT_SOURCES
from osp_diag.estimators.counts import maximum_or_nan
from osp_diag.estimators.weight_outliers import WeightObservation
from osp_diag.schema import DOWN_WEIGHT, PROJECTION_WEIGHT

__all__ = ["WeightBlockLens", "WeightBlockRounding"]

_AT_ONCE = 2**18
_OF_MATRIX = (
    "collateral",
    "worst",
    "above",
    "bits",
    "least_bits",
    "zeroed",
    "headroom",
    "least_headroom",
    "small_scale",
)


@dataclass(frozen=True)
class WeightBlockRounding(Measurement):
    """What each format loses of the matrix of each expert, and the crests of its blocks.

    All fields are maxima, as those of :class:`~osp_diag.estimators.weight_outliers.ColumnRatios`: each is a
    number of a whole matrix. −Inf where one is not defined.
    """

    formats: tuple[str, ...] = tuple(BLOCK_FORMATS)
    name = "weight_block_rounding"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        fields = {key: Field(("expert", "block_format"), "maximum") for key in _OF_MATRIX}
        fields |= {key: Field(("expert", "block_width"), "maximum") for key in ("crest", "largest_crest")}
        fields |= {f"crest_{width}": Field((block_dim(width),), "maximum") for width in BLOCK_WIDTHS}
        for name in self.formats:
            width = block_format(name).width
            if width is not None:
                fields[f"{name}_collateral"] = Field((block_dim(width),), "maximum")
        return fields

    def coords(self) -> Mapping[str, Sequence[Any]]:
        return {"block_format": self.formats, "block_width": BLOCK_WIDTHS}

    def measure(self, observation: WeightObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.weight)
        experts = [
            self._of_matrix(xp.astype(observation.weight[index, ...], xp.float32, copy=False))
            for index in range(observation.weight.shape[0])
        ]
        by_expert = {"crest", "largest_crest", *_OF_MATRIX}
        stacked = {key: xp.stack([expert[key] for expert in experts]) for key in experts[0]}
        return {key: v if key in by_expert else xp.max(v, axis=0) for key, v in stacked.items()}

    def _of_matrix(self, matrix: Array) -> dict[str, Array]:
        xp = namespace_of(matrix)
        extent = xp.max(xp.abs(matrix))
        is_finite = xp.isfinite(extent) & xp.all(xp.isfinite(matrix))
        matrix = xp.where(is_finite, matrix, xp.zeros_like(matrix))
        peak = xp.where(is_finite, extent, xp.zeros_like(extent))
        fields: dict[str, Array] = {}
        numbers = []
        for name in self.formats:
            number, by_block = _rounding_of(block_format(name), matrix, peak)
            numbers.append(number)
            if block_format(name).width is not None:
                fields[f"{name}_collateral"] = by_block
        fields |= {key: xp.stack([number[key] for number in numbers]) for key in _OF_MATRIX}
        crest = [_crest_of(matrix, width) for width in BLOCK_WIDTHS]
        fields |= {f"crest_{width}": part[2] for width, part in zip(BLOCK_WIDTHS, crest, strict=True)}
        fields["crest"] = xp.stack([part[0] for part in crest])
        fields["largest_crest"] = xp.stack([part[1] for part in crest])
        # A matrix of zeros has none of these numbers, nor has one with NaN or Inf.
        return {key: xp.where(xp.isnan(v), xp.full_like(v, -xp.inf), v) for key, v in fields.items()}


def _parts(matrix: Array, height: int) -> list[Array]:
    """Bands of rows to work on one after the other, whole blocks of ``height`` rows each."""
    rows, channels = matrix.shape
    step = max(1, _AT_ONCE // (channels * height)) * height
    return [matrix[start : start + step, :] for start in range(0, rows, step)]


def _rounding_of(entry: BlockFormat, matrix: Array, peak: Array) -> tuple[dict[str, Array], Array]:
    """The numbers of a matrix in one format, and the mean loss of each block; NaN where none is."""
    xp = namespace_of(matrix)
    wide = accumulator_dtype(xp, matrix)
    by_block, neighbours = 0.0, 0.0
    sums: dict[str, Array] = {}
    extremes: dict[str, list[Array]] = {}
    for rows in _parts(matrix, entry.rows):
        blocks = blocks_of(in_blocks(rows, entry.width, entry.rows))
        bands = blocks.unit.shape[0]
        losses = block_losses(
            entry, blocks, tensor_peak_by_block(xp.broadcast_to(peak, (bands,)), blocks.unit)
        )
        by_block = by_block + xp.sum(losses.collateral, axis=0, dtype=wide)
        neighbours = neighbours + xp.sum(xp.astype(losses.has_neighbours, wide), axis=0)
        for key, values in sums_of_rows(losses).items():
            sums[key] = sums.get(key, 0.0) + xp.sum(values, axis=0, dtype=wide)
        is_zero = xp.max(losses.signal, axis=-1) == 0
        for key, values in extremes_of_rows(losses, blocks.unit).items():
            # Rows of zeros sort last among the ratios, and are not counted.
            values = xp.where(is_zero, xp.full_like(values, xp.inf), values) if key == "ratio" else values
            extremes.setdefault(key, []).append(xp.astype(values, wide))
    joined = {key: xp.concat(values) for key, values in extremes.items()}
    nonzero = xp.sum(xp.astype(matrix != 0, wide))
    count = xp.sum(neighbours)
    least, median = _least_and_median(joined["ratio"])
    numbers = {
        "collateral": quotient(xp.sum(by_block), count),
        "worst": maximum_or_nan(xp.max(joined["worst"])),
        "above": quotient(sums["above"], count),
        "bits": median,
        "least_bits": least,
        "zeroed": quotient(sums["zeroed"], nonzero),
        "headroom": quotient(sums["headroom"], sums["scaled"]),
        "least_headroom": -maximum_or_nan(-xp.min(joined["least_headroom"])),
        "small_scale": quotient(sums["small_scale"], sums["filled"]),
    }
    return numbers, quotient(by_block, neighbours)


def _least_and_median(ratio: Array) -> tuple[Array, Array]:
    """Of rows that are not 0, in bits: the least and the lower median; NaN if there is none."""
    xp = namespace_of(ratio)
    ordered = xp.sort(ratio)
    count = xp.sum(xp.astype(ratio < xp.inf, xp.int32))
    rank = xp.clip((count - 1) // 2, 0, None)
    # The one at the rank, without looking at values.
    places = xp.cumulative_sum(xp.ones_like(ordered)) - 1.0
    median = xp.max(xp.where(places <= xp.astype(rank, places.dtype), ordered, xp.zeros_like(ordered)))
    is_defined = count > 0

    def bits(value: Array) -> Array:
        nothing = xp.nan * xp.ones_like(value)
        return xp.where(is_defined, 0.5 * xp.log2(xp.where(is_defined, value, xp.ones_like(value))), nothing)

    return bits(ordered[0]), bits(median)


def _crest_of(matrix: Array, width: int) -> tuple[Array, Array, Array]:
    """Mean and largest crest over rows and blocks, and the mean of each block; NaN where all are 0."""
    xp = namespace_of(matrix)
    wide = accumulator_dtype(xp, matrix)
    total, count, largest = 0.0, 0.0, []
    for rows in _parts(matrix, 1):
        crest = crests(rows, width)
        total = total + xp.sum(crest, axis=0, dtype=wide)
        count = count + xp.sum(xp.astype(crest > 0, wide), axis=0)
        largest.append(xp.max(crest))
    top = xp.astype(xp.max(xp.stack(largest)), wide)
    mean = quotient(xp.sum(total), xp.sum(count))
    return mean, xp.where(top > 0, top, xp.nan * xp.ones_like(top)), quotient(total, count)


@dataclass(frozen=True)
class WeightBlockLens(Estimator):
    """What block formats lose of a projection's weights: the numbers of ``block_lens``, of a matrix.

    Blocks lie along the input channels. NVFP4's tensor is the matrix; FP8 by block has one scale for 128 rows
    and 128 channels, and its *row* is such a band of 128 rows; ``int4_token`` has one scale a row. Median and
    worst of ``weight_effective_bits`` are over rows, the median being the lower one. Of experts stacked in
    one parameter each is a matrix of its own, and the number is that of the expert that loses most; of a part
    of a fused projection (query, key, value) the part is the matrix. NaN for a matrix with NaN or Inf, and of
    zeros.

    ``weight_<format>_block_collateral_loss`` is the mean over rows of each block of channels.
    """

    formats: tuple[str, ...] = tuple(BLOCK_FORMATS)

    name: ClassVar[str] = "weight_block_lens"
    title: ClassVar[str] = "Losses of a projection's weights in block formats"
    formula: ClassVar[str] = (
        "as block_crest, collateral_loss, effective_bits, zeroed_fraction, scale_headroom, of rows W_i"
    )
    range: ClassVar[str] = "as theirs"
    floor: ClassVar[str] = "Gaussian weights give what those give on Gaussian noise"
    ceiling: ClassVar[str] = "as theirs"
    sources: ClassVar[tuple[Source, ...]] = FORMAT_SOURCES
    observes: ClassVar[Observes] = "weight"
    sites: ClassVar[tuple[str, ...]] = (DOWN_WEIGHT, f"{PROJECTION_WEIGHT}*")
    optional: ClassVar[bool] = True
    family: ClassVar[str] = FAMILY

    def __post_init__(self) -> None:
        check_formats(self.formats)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (WeightBlockRounding(self.formats),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        fields = {key.partition(".")[2]: values for key, values in state.items()}
        xp = namespace_of(fields["crest"])
        formats, widths = {"block_format": self.formats}, {"block_width": BLOCK_WIDTHS}

        def largest(key: str) -> Array:
            return maximum_or_nan(xp.max(fields[key], axis=-2))

        def least(key: str) -> Array:
            values = xp.where(fields[key] > -xp.inf, fields[key], xp.full_like(fields[key], xp.inf))
            return -maximum_or_nan(-xp.min(values, axis=-2))

        def output(
            values: Array, definition: str, coords: Mapping[str, Sequence[Any]] = formats, **options: Any
        ) -> Output:
            return Output(values, tuple(coords), definition=definition, coords=coords, **options)

        share: dict[str, Any] = {"floor": 0.0, "ceiling": 1.0}
        bits: dict[str, Any] = {"unit": "bits", "floor": 0.0, "ceiling": MOST_BITS}
        outputs = {
            "weight_block_crest": output(
                largest("crest"), "mean over rows and blocks of max |W| / RMS of a block", widths, floor=1.0
            ),
            "weight_block_crest_max": output(
                largest("largest_crest"), "the largest over rows and blocks", widths, floor=1.0
            ),
            "weight_collateral_loss": output(
                largest("collateral"),
                "mean over rows and blocks of Σ (W − q)² / Σ W² over a block's elements but the largest",
                **share,
            ),
            "weight_collateral_loss_max": output(
                largest("worst"), "the largest over rows and blocks", **share
            ),
            "weight_collateral_loss_above_tenth": output(
                largest("above"), f"share of blocks of which more than {SERIOUS_LOSS:g} is lost", **share
            ),
            "weight_effective_bits": output(
                least("bits"), "lower median over rows of ½ log₂(Σ W² / Σ (W − q)²)", **bits
            ),
            "weight_effective_bits_min": output(least("least_bits"), "those of the worst row", **bits),
            "weight_zeroed_fraction": output(largest("zeroed"), "#{W ≠ 0, q = 0} / #{W ≠ 0}", **share),
            "weight_scale_headroom": output(
                largest("headroom"), "mean over rows and blocks of log₂(s · max grid / max |W|)", unit="bits"
            ),
            "weight_scale_headroom_min": output(
                least("least_headroom"), "the least over rows and blocks", unit="bits"
            ),
            "weight_scale_underflow_fraction": output(
                largest("small_scale"),
                "share of the blocks that are not all 0 whose scale is below the normal numbers of its type",
                **share,
            ),
        }
        for width in BLOCK_WIDTHS:
            outputs[f"weight_block_crest_{width}"] = Output(
                maximum_or_nan(fields[f"crest_{width}"]),
                (block_dim(width),),
                definition=f"mean over rows of max |W| / RMS of each block of {width} input channels",
                floor=1.0,
                ceiling=width**0.5,
            )
        for name in self.formats:
            columns = block_format(name).width
            if columns is not None:
                outputs[f"weight_{name}_block_collateral_loss"] = Output(
                    maximum_or_nan(fields[f"{name}_collateral"]),
                    (block_dim(columns),),
                    definition=f"mean over rows of the loss of each block of {columns} input channels",
                    **share,
                )
        return outputs
