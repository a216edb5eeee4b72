"""Block formats at a site: what NVFP4, MXFP4, MXFP8, FP8 and INT4 would lose of each block of channels.

One channel that is large on every token raises the signal to noise of the whole tensor, since it is most of
the signal and is rounded well, while its neighbours, which share its scale, vanish. So losses are taken by
block, and of a block's elements without its largest. The formats are simulated
(``osp_diag/estimators/block_formats.py`` says how), and measured on request: the name ``block_lens`` asks
for the whole family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from osp_diag.estimators._arrays import (
    Array,
    accumulator_dtype,
    namespace_of,
    quotient,
    row_blocks,
    weighted_row_sum,
)
from osp_diag.estimators._block_losses import (
    LARGEST_RATIO,
    MOST_BITS,
    ROW_SUMS,
    SERIOUS_LOSS,
    block_losses,
    blocks_of,
    extremes_of_rows,
    sums_of_rows,
)
from osp_diag.estimators._histogram import LogHistogram
from osp_diag.estimators.activation import ActivationObservation, max_over_strata
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source
from osp_diag.estimators.block_formats import (
    BLOCK_FORMATS,
    block_dim,
    block_format,
    by_width,
    check_formats,
    in_blocks,
    tensor_peak_by_block,
)
from osp_diag.estimators.block_gaussian import on_gaussian_noise
from osp_diag.estimators.counts import maximum_or_nan
from osp_diag.estimators.reductions import with_union
from osp_diag.schema import GRADIENT

__all__ = [
    "FAMILY",
    "FORMAT_SOURCES",
    "BlockRounding",
    "CollateralLoss",
    "EffectiveBits",
    "ScaleHeadroom",
    "ZeroedFraction",
]

FAMILY = "block_lens"
FORMAT_SOURCES = (
    Source(
        "OCP Microscaling Formats (MX) Specification 1.0, 2023",
        "https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf",
    ),
    Source("NVIDIA 2025, Pretraining Large Language Models with NVFP4", "https://arxiv.org/abs/2509.25149"),
)
_BITS = LogHistogram(low=1.0, high=LARGEST_RATIO, bins=64 * int(MOST_BITS))
"""Of signal over noise: a bin is 1/64 of a bit wide."""
_BIN = "effective_bits_bin"
_AT_ONCE = 2**18
"""Elements worked on together: each part makes many small arrays, which cost more than leaving the cache."""
_BY_FORMAT = ("stratum", "block_format")


def _width_label(width: int | None) -> str:
    return "token" if width is None else str(width)


@dataclass(frozen=True)
class BlockRounding(Measurement):
    """What each format loses, by block of channels and by token.

    ``<format>_collateral`` is the sum over tokens of each block's loss, ``neighbours_<width>`` over how many;
    ``histogram`` counts tokens by signal over noise.
    """

    formats: tuple[str, ...] = tuple(BLOCK_FORMATS)
    name = "block_rounding"
    reads_elements = True

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        fields = {key: Field(_BY_FORMAT) for key in ROW_SUMS}
        fields |= {
            "nonzero": Field(("stratum",)),
            "worst": Field(_BY_FORMAT, "maximum"),
            "least_headroom": Field(_BY_FORMAT, "minimum"),
            "least_ratio": Field(_BY_FORMAT, "minimum"),
            "histogram": Field((*_BY_FORMAT, _BIN)),
        }
        for width, names in by_width(self.formats).items():
            dims = ("stratum",) if width is None else ("stratum", block_dim(width))
            fields |= {f"{name}_collateral": Field(dims) for name in names}
            fields[f"neighbours_{_width_label(width)}"] = Field(dims)
        return fields

    def coords(self) -> Mapping[str, Sequence[Any]]:
        return {
            "block_format": self.formats,
            _BIN: tuple(0.5 * math.log2(edge) for edge in _BITS.lower_edges),
        }

    def measure(self, observation: ActivationObservation) -> Mapping[str, Array]:
        x, strata = observation.x, observation.strata
        xp = namespace_of(x)
        wide = accumulator_dtype(xp, x)
        rows, parts = xp.reshape(x, (-1, x.shape[-1])), xp.reshape(strata[1:, ...], (strata.shape[0] - 1, -1))
        # Of each token the largest |x| of its sequence.
        peak = xp.max(observation.peak, axis=-1, keepdims=True)
        peak = xp.reshape(xp.broadcast_to(peak, x.shape[:2]), (-1,))
        sums: dict[str, Array] = {}
        extremes: dict[str, list[Array]] = {}
        for block in row_blocks(rows, _AT_ONCE):
            columns, numbers = self._of_tokens(rows[block, :], peak[block])
            for key, values in columns.items():
                total = xp.astype(weighted_row_sum(parts[:, block], values), wide)
                sums[key] = total if key not in sums else sums[key] + total
            for key, values in numbers.items():
                extremes.setdefault(key, []).append(values)
        increments = {key: with_union(xp, total, xp.sum) for key, total in sums.items()}
        by_token = {key: xp.concat(values, axis=0) for key, values in extremes.items()}
        # A token of zeros has neither signal nor noise.
        has_signal = xp.astype(observation.peak > 0, strata.dtype)
        increments |= _over_strata(by_token, strata * has_signal[None, ...])
        dims = {key: len(spec.dims) for key, spec in self.fields(observation.layout).items()}
        # What is one number a token has had a column of its own so far.
        return {key: v if len(v.shape) == dims[key] else v[:, 0] for key, v in increments.items()}

    def _of_tokens(self, rows: Array, peak: Array) -> tuple[dict[str, Array], dict[str, Array]]:
        """Columns to add up over tokens, (token, column), and numbers of each token, (token, format)."""
        xp = namespace_of(rows)
        columns = {"nonzero": xp.sum(xp.astype(rows != 0, rows.dtype), axis=1, keepdims=True)}
        sums: dict[str, dict[str, Array]] = {}
        extremes: dict[str, dict[str, Array]] = {}
        for width, names in by_width(self.formats).items():
            blocks = blocks_of(in_blocks(rows, width))
            tensor_peak = tensor_peak_by_block(peak, blocks.unit)
            for name in names:
                losses = block_losses(block_format(name), blocks, tensor_peak)
                columns[f"{name}_collateral"] = losses.collateral
                sums[name], extremes[name] = sums_of_rows(losses), extremes_of_rows(losses, blocks.unit)
            columns[f"neighbours_{_width_label(width)}"] = xp.astype(losses.has_neighbours, rows.dtype)

        def side_by_side(parts: Mapping[str, Mapping[str, Array]]) -> dict[str, Array]:
            keys = next(iter(parts.values()))
            return {key: xp.stack([parts[name][key] for name in self.formats], axis=1) for key in keys}

        return columns | side_by_side(sums), side_by_side(extremes)


def _over_strata(by_token: Mapping[str, Array], strata: Array) -> dict[str, Array]:
    """Extremes and histograms of the strata from numbers of each token, (token, format)."""
    xp = namespace_of(strata)

    def largest(values: Array) -> Array:
        columns = [xp.reshape(values[:, index], strata.shape[1:]) for index in range(values.shape[1])]
        return xp.stack([max_over_strata(column, strata) for column in columns], axis=1)

    ratio = by_token["ratio"]
    weights = xp.reshape(xp.astype(strata, accumulator_dtype(xp, strata)), (strata.shape[0], -1))
    counts = [_BITS.counts(ratio[:, index], weights) for index in range(ratio.shape[1])]
    return {
        "worst": largest(by_token["worst"]),
        "least_headroom": -largest(-by_token["least_headroom"]),
        "least_ratio": -largest(-ratio),
        "histogram": xp.stack(counts, axis=1),
    }


def constants(values: Mapping[Any, float], like: Array) -> Array:
    """Numbers that no data change, after the leading axes of a state, in the shape of ``like``."""
    xp = namespace_of(like)
    return xp.zeros_like(like) + xp.asarray(list(values.values()), dtype=like.dtype)


@dataclass(frozen=True)
class _OfBlockFormats(Estimator):
    """What the family has in common: one measurement, of the formats asked for."""

    formats: tuple[str, ...] = tuple(BLOCK_FORMATS)

    sources: ClassVar[tuple[Source, ...]] = FORMAT_SOURCES
    sites: ClassVar[tuple[str, ...]] = ("*", f"{GRADIENT}*")
    optional: ClassVar[bool] = True
    family: ClassVar[str] = FAMILY

    def __post_init__(self) -> None:
        check_formats(self.formats)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (BlockRounding(self.formats),)

    def _output(self, values: Array, definition: str, unit: str = "1", **bounds: float) -> Output:
        return Output(values, _BY_FORMAT, unit, definition, {"block_format": self.formats}, **bounds)

    def _on_noise(self, statistic: str, layout: Layout, like: Array, unit: str = "1") -> Output:
        """The Gaussian floor of a statistic by format, beside which its numbers are to be read."""
        values = {name: on_gaussian_noise(statistic, name, layout.channels) for name in self.formats}
        return Output(
            constants(values, like[..., 0, :]),
            ("block_format",),
            unit,
            f"{statistic} of Gaussian noise of this width, simulated: the floor that a site is read against",
            {"block_format": self.formats},
        )


@dataclass(frozen=True)
class CollateralLoss(_OfBlockFormats):
    """Energy that the neighbours of a block's largest element lose to rounding: mean, worst, share above 0.1.

    Of each block of each token Σ(x − q)² / Σ x² over its elements but the largest one (the first of equal
    ones): what a hot channel costs the others that share its scale, which neither the whole tensor's signal
    to noise nor its mean squared error shows. A block of which at most one element is not 0 has no neighbours
    and is left out. ``<format>_block_collateral_loss`` is the mean over tokens of each block: block b holds
    the channels from b · width on, so a hot channel's block has a name.
    """

    name: ClassVar[str] = "collateral_loss"
    title: ClassVar[str] = "Collateral loss of a block format"
    formula: ClassVar[str] = (
        "mean over tokens and blocks of Σ_j (x_j − q_j)² / Σ_j x_j², j in the block without argmax |x_j|"
    )
    range: ClassVar[str] = "[0, 1]"
    floor: ClassVar[str] = (
        "Gaussian noise: NVFP4 0.012, MXFP4 0.012, MXFP8 and FP8 by block 0.0007, INT4 g128 0.015, per token "
        "0.023 at d = 2,048 (`collateral_loss_on_noise`)"
    )
    ceiling: ClassVar[str] = "1, all neighbours of the largest element become 0"
    also_used_by: ClassVar[tuple[str, ...]] = (
        "Confusable with the underflow share (`zeroed_fraction`), which counts elements whatever they held, "
        "and with the whole tensor's mean squared error, of which a hot channel's own rounding is most.",
    )

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        xp = namespace_of(state["block_rounding.above"])
        total, count, by_block = [], [], {}
        for width, names in by_width(self.formats).items():
            neighbours = state[f"block_rounding.neighbours_{_width_label(width)}"]
            for name in names:
                loss = state[f"block_rounding.{name}_collateral"]
                if width is not None:
                    by_block[f"{name}_block_collateral_loss"] = Output(
                        quotient(loss, neighbours),
                        ("stratum", block_dim(width)),
                        definition=f"mean over tokens of the loss of each block of {width} channels",
                        floor=0.0,
                        ceiling=1.0,
                    )
        for name in self.formats:
            width = block_format(name).width
            pair = (
                state[f"block_rounding.{name}_collateral"],
                state[f"block_rounding.neighbours_{_width_label(width)}"],
            )
            whole = pair if width is None else tuple(xp.sum(values, axis=-1) for values in pair)
            total.append(whole[0])
            count.append(whole[1])
        blocks = xp.stack(count, axis=-1)
        bounds: dict[str, Any] = {"floor": 0.0, "ceiling": 1.0}
        return {
            self.name: self._output(quotient(xp.stack(total, axis=-1), blocks), self.formula, **bounds),
            "collateral_loss_max": self._output(
                maximum_or_nan(state["block_rounding.worst"]), "the largest over tokens and blocks", **bounds
            ),
            "collateral_loss_above_tenth": self._output(
                quotient(state["block_rounding.above"], blocks),
                f"share of blocks of which more than {SERIOUS_LOSS:g} is lost",
                **bounds,
            ),
            "collateral_loss_on_noise": self._on_noise(self.name, layout, blocks),
            **by_block,
        }


@dataclass(frozen=True)
class EffectiveBits(_OfBlockFormats):
    """Signal over quantization noise of a token, in bits: median and worst token.

    ½ log₂(Σ x² / Σ(x − q)²) over a token's channels, which is its SQNR in dB over 6.02. The median is of a
    histogram whose bins are 1/64 of a bit wide, interpolated within its bin, and merges exactly; the worst is
    exact. Both end at 12 bits, where a token that a format holds exactly is counted. A token of zeros is left
    out. Of the whole token, so it is blind to a hot channel as the tensor's SQNR is: read ``collateral_loss``
    beside it.
    """

    name: ClassVar[str] = "effective_bits"
    title: ClassVar[str] = "Effective bits of a block format"
    formula: ClassVar[str] = "median over tokens of ½ log₂(Σ_j x_j² / Σ_j (x_j − q_j)²)"
    unit: ClassVar[str] = "bits"
    range: ClassVar[str] = "[0, 12]"
    floor: ClassVar[str] = "0, everything becomes 0"
    ceiling: ClassVar[str] = (
        "12 or more, all values on the grid; Gaussian noise gives NVFP4 3.39, MXFP4 3.12, MXFP8 5.09, FP8 by "
        "block 5.28, INT4 g128 3.09, per token 2.76 at d = 2,048 (`effective_bits_on_noise`)"
    )

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        counts, least = state["block_rounding.histogram"], state["block_rounding.least_ratio"]
        xp = namespace_of(counts)
        median = _BITS.quantiles(counts, (0.5,))[..., 0]
        lowest = xp.where(least < xp.inf, least, xp.nan * xp.ones_like(least))
        bounds: dict[str, Any] = {"floor": 0.0, "ceiling": MOST_BITS}
        return {
            self.name: self._output(0.5 * xp.log2(median), self.formula, self.unit, **bounds),
            "effective_bits_min": self._output(
                0.5 * xp.log2(lowest), "those of the worst token", self.unit, **bounds
            ),
            "effective_bits_on_noise": self._on_noise(self.name, layout, least, self.unit),
        }


@dataclass(frozen=True)
class ZeroedFraction(_OfBlockFormats):
    """Share of the elements that were not 0 and become 0: underflow.

    What was 0 before is not counted. Of Gaussian noise 7% underflow in NVFP4, though only 1.2% of the
    neighbours' energy is lost: small elements are many and hold little.
    """

    name: ClassVar[str] = "zeroed_fraction"
    title: ClassVar[str] = "Underflow of a block format"
    formula: ClassVar[str] = "#{x_tj ≠ 0, q_tj = 0} / #{x_tj ≠ 0}"
    range: ClassVar[str] = "[0, 1]"
    floor: ClassVar[str] = (
        "0; Gaussian noise: NVFP4 0.068, MXFP4 0.088, MXFP8 and FP8 by block 5e-6, INT4 g128 0.160, per "
        "token 0.204 at d = 2,048 (`zeroed_fraction_on_noise`)"
    )
    ceiling: ClassVar[str] = "1; below 1 − 1/width while a block's scale does not vanish itself"

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        zeroed = state["block_rounding.zeroed"]
        share = quotient(zeroed, state["block_rounding.nonzero"][..., None])
        return {
            self.name: self._output(share, self.formula, floor=0.0, ceiling=1.0),
            "zeroed_fraction_on_noise": self._on_noise(self.name, layout, zeroed),
        }


@dataclass(frozen=True)
class ScaleHeadroom(_OfBlockFormats):
    """Bits between a block's largest magnitude and the largest that its scale reaches: mean and least.

    0 where the block uses its grid to the end, 1 where the upper half of the grid lies idle, below 0 where
    the largest element is cut off. A scale that is a power of two leaves up to 0.58 bits of E2M1 idle and
    cuts off up to 0.42; of E4M3 0.81 and 0.19. Float32 scales leave nothing. ``scale_underflow_fraction`` is
    the share of blocks (of zeros none) whose scale of E4M3 is below 2⁻⁶, where it loses its own mantissa and
    at last becomes 0: blocks 28,672 times and more below the largest value of the sequence, which massive
    activations do. Blocks without a scale are in that share and in no mean.
    """

    name: ClassVar[str] = "scale_headroom"
    title: ClassVar[str] = "Headroom of a block format's scales"
    formula: ClassVar[str] = "mean over tokens and blocks of log₂(s · max grid / max_j |x_j|)"
    unit: ClassVar[str] = "bits"
    range: ClassVar[str] = (
        "MXFP4 (−0.42, 0.58], MXFP8 (−0.19, 0.81], NVFP4 ±0.09 above 2⁻⁶, others 0; share [0, 1]"
    )
    floor: ClassVar[str] = (
        "Gaussian noise: NVFP4 0, MXFP4 0.16, MXFP8 0.38, others 0 (`scale_headroom_on_noise`); shares 0"
    )
    ceiling: ClassVar[str] = "as the range; shares 1"

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        scaled, small = state["block_rounding.scaled"], state["block_rounding.small_scale"]
        least = state["block_rounding.least_headroom"]
        xp = namespace_of(scaled)
        return {
            self.name: self._output(
                quotient(state["block_rounding.headroom"], scaled), self.formula, self.unit
            ),
            "scale_headroom_min": self._output(
                xp.where(least < xp.inf, least, xp.nan * xp.ones_like(least)),
                "the least over tokens and blocks",
                self.unit,
            ),
            "scale_headroom_on_noise": self._on_noise(self.name, layout, scaled, self.unit),
            "scale_underflow_fraction": self._output(
                quotient(small, state["block_rounding.filled"]),
                "share of the blocks that are not all 0 whose scale is below the normal numbers of its type",
                floor=0.0,
                ceiling=1.0,
            ),
        }
