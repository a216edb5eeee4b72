"""Pre-softmax logits of each head: their maximum, and their distribution for the sink key and for others.

A logit is what enters the softmax: scaled, soft-capped, with additive biases (ALiBi). Learned sink
logits are not among them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, namespace_of, quotient
from osp_diag.estimators._histogram import quantile_places
from osp_diag.estimators.attention import AttentionObservation, wide
from osp_diag.estimators.attention_tiles import LogitGrid
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source

__all__ = ["DeltaLogit", "LogitDistribution", "MaxLogit"]

KEY_CLASSES = ("sink", "other")
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95, 0.99)

OSP = Source("Park et al. 2025, Outlier-Safe Pre-Training (Fig. 6)", "https://arxiv.org/abs/2506.19697")
KIMI = Source("Kimi Team 2025, Kimi K2 (QK-Clip)", "https://arxiv.org/abs/2507.20534")
GUO = Source("Guo et al. 2024, Active-Dormant Attention Heads", "https://arxiv.org/abs/2410.13835")


@dataclass(frozen=True)
class LogitMaximum(Measurement):
    """Largest logit of each head over valid queries and the keys they see."""

    name = "max_logit"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"maximum": Field(("head",), "maximum")}

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        softmax = observation.softmax
        xp = namespace_of(softmax.sink_logit)
        top = xp.maximum(softmax.sink_logit, softmax.other_maximum)
        top = xp.where(observation.query_weight > 0, top, xp.full_like(top, -xp.inf))
        return {"maximum": xp.max(top, axis=(0, 2))}


@dataclass(frozen=True)
class LogitHistogram(Measurement):
    """Counts of logits in fixed bins at the sampled queries, for the sink key and for all other keys."""

    bins: int = 256
    limit: float = 1e4
    name = "logit_histogram"

    @property
    def grid(self) -> LogitGrid:
        """The bins."""
        return LogitGrid(self.bins, self.limit)

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"count": Field(("head", "key_class", "logit_bin"))}

    def coords(self) -> Mapping[str, Sequence]:
        return {"key_class": KEY_CLASSES, "logit_bin": self.grid.centres.tolist()}

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        xp, count = namespace_of(observation.valid), observation.reductions.logit_counts
        batch, heads = observation.valid.shape[0], observation.layout.heads
        grid = self.grid
        total = None
        for number in range(observation.sampled_tiles):
            tile = observation.sampled_tile(number)
            weight = xp.where(tile.other, tile.weight[..., None], xp.zeros_like(tile.logits[:1, :1, :1, :1]))
            rows = (batch, heads, -1)
            other = count(xp.reshape(tile.logits, rows), xp.reshape(weight, rows), grid)
            both = xp.stack([count(tile.sink_logit, tile.sink_weight, grid), other], axis=1)
            total = both if total is None else total + both
        return {"count": total}


@dataclass(frozen=True)
class DeltaLogitSums(Measurement):
    """Sink logit less the mean logit of the keys that a sampled query sees."""

    name = "delta_logit"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"difference": Field(("head",)), "count": Field(("head",))}

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.valid)
        differences, counts = [], []
        for number in range(observation.sampled_tiles):
            tile = observation.sampled_tile(number)
            allowed = xp.astype(xp.broadcast_to(tile.allowed, tile.logits.shape), xp.float32)
            keys = xp.sum(allowed, axis=-1)
            keys = xp.where(keys > 0, keys, xp.ones_like(keys))
            # Less the sink logit first: the sum of differences keeps the digits that matter.
            gap = tile.sink_logit[..., None] - tile.logits
            gap = xp.where(tile.allowed, gap, xp.zeros_like(gap))
            mean = xp.sum(gap, axis=-1) / keys
            differences.append(xp.sum(wide(tile.sink_weight * mean), axis=(0, 2)))
            counts.append(xp.sum(tile.sink_weight, axis=(0, 2)))
        return {"difference": sum(differences[1:], differences[0]), "count": sum(counts[1:], counts[0])}


@dataclass(frozen=True)
class MaxLogit(Estimator):
    """Largest pre-softmax logit of each head, over every valid query and every key that it sees.

    QK-Clip acts above τ = 100; plain Muon runs were seen to exceed 1000. −Inf where nothing was seen.
    """

    name = "max_logit"
    title = "Maximum attention logit"
    formula = "max over queries i and allowed keys k of scale · q_i·k_k (soft-capped, with bias)"
    unit = "logit"
    range = "(−∞, ∞)"
    ceiling = "the soft cap, where there is one"
    sources = (KIMI,)
    also_used_by = (
        "TransformerEngine (`return_max_logit` of its attention, per head)",
        "flash-attention (per-head maximum, issue 1876)",
    )
    observes = "attention"
    sites = ("attention", "cross_attention")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (LogitMaximum(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        return {"max_logit": Output(state["max_logit.maximum"], ("head",), self.unit, self.formula)}


@dataclass(frozen=True)
class LogitDistribution(Estimator):
    """Distribution of logits, of the sink key and of all other keys, over sampled queries.

    Queries are evenly spaced among the valid ones of each sequence.

    Counted in ``bins`` fixed bins that are equally wide in asinh(logit), over ±``limit``; logits
    beyond fall into the outer bins. The density of each class integrates to 1 over the logit (each
    bin's share divided by its width). Quantiles are interpolated within a bin, linearly in asinh.
    Sink and other keys are this library's reading of the paper's "Pos." and "Neg.", which it does
    not spell out.
    """

    bins: int = 256
    limit: float = 1e4
    quantiles: tuple[float, ...] = QUANTILES

    name = "logit_distribution"
    title = "Distribution of attention logits, sink key against other keys"
    formula = "share of logits in a bin / width of the bin, by class of key; quantiles of the same counts"
    unit = "1 / logit"
    range = "density [0, ∞); quantiles within ±limit"
    floor = "0"
    sources = (OSP,)
    observes = "attention"
    sites = ("attention", "cross_attention")

    def __post_init__(self) -> None:
        if self.bins < 2 or not self.limit > 0 or any(not 0 <= q <= 1 for q in self.quantiles):
            raise EstimatorError(
                f"logit_distribution: bins {self.bins} must be at least 2, limit {self.limit} positive and "
                f"quantiles {self.quantiles} between 0 and 1"
            )

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (LogitHistogram(self.bins, self.limit),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        counts = state["logit_histogram.count"]
        xp = namespace_of(counts)
        grid = LogitGrid(self.bins, self.limit)
        edges = grid.edges.tolist()
        widths = [high - low for low, high in itertools.pairwise(edges)]
        like = {"dtype": counts.dtype}
        if hasattr(counts, "device") and not isinstance(counts.device, str):
            like["device"] = counts.device
        total = xp.sum(counts, axis=-1, keepdims=True)
        # Shares over widths integrate to 1 over the logit.
        density = quotient(counts, total) / xp.asarray(widths, **like)
        coords = {"key_class": KEY_CLASSES, "logit_bin": grid.centres.tolist()}
        return {
            "logit_density": Output(
                density,
                ("head", "key_class", "logit_bin"),
                self.unit,
                "share of logits in a bin / width of the bin",
                coords,
                floor=0.0,
            ),
            "logit_quantile": Output(
                self._quantiles(counts),
                ("head", "key_class", "quantile"),
                "logit",
                "quantiles of the logits of sampled queries, from the histogram",
                {"key_class": KEY_CLASSES, "quantile": self.quantiles},
            ),
        }

    def _quantiles(self, counts: Array) -> Array:
        """(..., bin) → (..., quantile)."""
        top = math.asinh(self.limit)
        places = quantile_places(counts, self.quantiles) * (2 * top / self.bins) - top
        return namespace_of(counts).sinh(places)


@dataclass(frozen=True)
class DeltaLogit(Estimator):
    """How far the sink key's logit lies above the mean logit of all keys that a query sees, its own included.

    Over sampled queries, evenly spaced among the valid ones, that see the sink key. It is not the number of
    Guo et al., whose logits are taken before the causal mask, over all keys: that is ``guo_delta_logit``.
    """

    name = "delta_logit"
    title = "Δlogit: sink logit less mean logit"
    formula = "mean over sampled queries i of (logit[i, sink] − mean over allowed keys k of logit[i, k])"
    unit = "logit"
    range = "(−∞, ∞); 0 = the sink key is like any other"
    floor = "0"
    sources = (GUO,)
    observes = "attention"
    sites = ("attention", "cross_attention")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (DeltaLogitSums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        mean = quotient(state["delta_logit.difference"], state["delta_logit.count"])
        return {"delta_logit": Output(mean, ("head",), self.unit, self.formula, floor=0.0)}
