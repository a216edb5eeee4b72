"""How a head makes its sink: which channels of q·k_sink carry the logit, and norms against angle.

Queries are the valid ones after the sink key that can see it (all of them unless a window or a
packed document hides it). Everything is NaN where an observation has logits but no q and k.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, Namespace, namespace_of, quotient
from osp_diag.estimators.attention import AttentionObservation, channel_norm, per_head, wide
from osp_diag.estimators.attention_tiles import column_sums
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source

__all__ = ["QueryKeyChannelOverlap", "SinkGeometry", "SinkLogitContribution"]

GU = Source(
    "Gu et al. 2025, When Attention Sink Emerges in Language Models", "https://arxiv.org/abs/2410.10781"
)
OSP = Source(
    "Park et al. 2025, Outlier-Safe Pre-Training (Figs. 5 and 6)", "https://arxiv.org/abs/2506.19697"
)


def _zero_sums(measurement: Measurement, observation: AttentionObservation) -> Mapping[str, Array]:
    """Zeros in every field: what an observation without q and k adds."""
    xp, layout = namespace_of(observation.valid), observation.layout
    zero = wide(observation.valid[0, 0] * 0.0)
    return {
        name: xp.broadcast_to(zero, tuple(layout.size(dim) for dim in spec.dims)) + zero
        for name, spec in measurement.fields(layout).items()
    }


def _positive(norm: Array) -> Array:
    xp = namespace_of(norm)
    return xp.where(norm > 0, norm, xp.ones_like(norm))


def _scaled(xp: Namespace, x: Array) -> tuple[Array, Array]:
    """(x / s, s) with s the largest magnitude: its squares and products stay within float32."""
    scale = _positive(xp.max(xp.abs(x)))
    return x / scale, wide(scale)


@dataclass(frozen=True)
class SinkDecomposition(Measurement):
    """Sums over queries of scale · q_j · k_sink,j by channel j, and of the squares of q and of k_sink."""

    name = "sink_decomposition"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {
            "contribution": Field(("head", "head_channel")),
            "query_square": Field(("head", "head_channel")),
            "sink_key_square": Field(("key_value_head", "head_channel")),
            "count": Field(("head",)),
        }

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        if observation.query is None or observation.sink_key is None or observation.scale is None:
            return _zero_sums(self, observation)
        xp = namespace_of(observation.query)
        weight = observation.sink_query_weight
        query, query_scale = _scaled(xp, observation.query)
        sink, key_scale = _scaled(xp, observation.sink_key)
        # k_sink,j is the same for every query: Σ_i scale · q_ij · k_sink,j = scale · k_sink,j · Σ_i q_ij.
        total, square = column_sums(weight, query), column_sums(weight, query * query)
        contribution = wide(total) * wide(per_head(sink, observation.layout.heads, axis=1))
        present = wide(xp.astype(xp.any(observation.valid > 0, axis=-1), xp.float32))[:, None, None]
        return {
            "contribution": xp.sum(contribution, axis=0) * (query_scale * key_scale * observation.scale),
            "query_square": xp.sum(wide(square), axis=0) * query_scale**2,
            "sink_key_square": xp.sum(wide(sink * sink) * present, axis=0) * key_scale**2,
            "count": xp.sum(weight, axis=(0, 2)),
        }


@dataclass(frozen=True)
class SinkGeometrySums(Measurement):
    """Cosine of queries with the sink key, and norms of queries, the sink key and other keys."""

    name = "sink_geometry"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {
            "cosine": Field(("head",)),
            "query_norm": Field(("head",)),
            "count": Field(("head",)),
            "sink_key_norm": Field(("key_value_head",)),
            "sequences": Field(()),
            "other_key_norm": Field(("key_value_head",)),
            "other_keys": Field(()),
        }

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        if observation.query is None or observation.key is None or observation.sink_key is None:
            return _zero_sums(self, observation)
        xp = namespace_of(observation.query)
        heads, weight = observation.layout.heads, observation.sink_query_weight
        query_norm, key_norm = channel_norm(observation.query), channel_norm(observation.key)
        sink_norm = channel_norm(observation.sink_key)
        # Unit vectors first: no product can overflow.
        unit_sink = observation.sink_key / _positive(sink_norm)[..., None]
        unit_query = observation.query / _positive(query_norm)[..., None]
        cosine = xp.sum(unit_query * per_head(unit_sink, heads, axis=1)[:, :, None, :], axis=-1)
        sink = xp.astype(observation.is_sink, xp.float32) * observation.valid
        other = (observation.valid - sink)[:, None, :]
        return {
            "cosine": xp.sum(weight * cosine, axis=(0, 2)),
            "query_norm": xp.sum(wide(weight * query_norm), axis=(0, 2)),
            "count": xp.sum(weight, axis=(0, 2)),
            "sink_key_norm": xp.sum(wide(sink[:, None, :] * key_norm), axis=(0, 2)),
            "sequences": xp.sum(sink),
            "other_key_norm": xp.sum(wide(other * key_norm), axis=(0, 2)),
            "other_keys": xp.sum(other),
        }


@dataclass(frozen=True)
class SinkLogitContribution(Estimator):
    """The mean logit of the sink key, split over the channels of q·k_sink, and how many carry it.

    The channels of a head add up to its mean sink logit (before soft cap and bias). A sink held by
    few channels (Adam) or spread over many (OSP) can give the same logit.
    """

    name = "sink_logit_contribution"
    title = "Sink logit by channel"
    formula = (
        "c_j = mean over queries i after the sink of scale · q_ij · k_sink,j; channels_90 = smallest number "
        "of channels with Σ|c_j| ≥ 0.9 of the total"
    )
    unit = "logit"
    range = "contribution (−∞, ∞); channels_90 from 1 to the head's width (0 if all are 0)"
    floor = "channels_90: 1, one channel carries the sink"
    ceiling = "channels_90: about 0.9 of the head's width if every channel contributes alike"
    sources = (OSP, GU)
    observes = "attention"
    sites = ("attention",)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (SinkDecomposition(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        count = state["sink_decomposition.count"]
        mean = quotient(state["sink_decomposition.contribution"], count[..., None])
        xp = namespace_of(mean)
        descending = xp.sort(xp.abs(state["sink_decomposition.contribution"]), axis=-1, descending=True)
        running = xp.cumulative_sum(descending, axis=-1)
        total = running[..., -1:]
        # channels_90: those whose running sum is short of 0.9 of Σ|c_j|, and the one that reaches it.
        short = xp.sum(xp.astype(running < 0.9 * total, mean.dtype), axis=-1)
        channels = xp.where(total[..., 0] > 0, short + 1, xp.zeros_like(short))
        channels = xp.where(count > 0, channels, xp.full_like(channels, xp.nan))
        return {
            "sink_logit_contribution": Output(
                mean, ("head", "head_channel"), self.unit, "mean over queries of scale · q_j · k_sink,j"
            ),
            "sink_logit_channels_90": Output(
                channels,
                ("head",),
                "channels",
                "smallest number of channels whose |c_j| add up to 0.9 of Σ|c_j|",
                floor=1.0,
                ceiling=float(layout.head_channels),
            ),
        }


@dataclass(frozen=True)
class QueryKeyChannelOverlap(Estimator):
    """Whether the large channels of the queries are the large channels of the sink key.

    Jaccard index of the sets of the ``top`` largest channels (of a quarter of the head's width if
    that is smaller, at least 1), by the root mean square of q over queries after the sink and of
    k_sink over sequences. Ties go to the lower channel.
    """

    top: int = 8

    name = "query_key_channel_overlap"
    title = "Overlap of large query and sink-key channels"
    formula = "|Q ∩ K| / |Q ∪ K|, Q and K the top channels of RMS(q) and of RMS(k_sink)"
    range = "[0, 1]"
    floor = "about m/(2w − m) for independent sets of m of w channels: 0.067 for 8 of 64"
    ceiling = "1"
    sources = (Source("osp_diag; after Park et al. 2025, Fig. 5", OSP.url),)
    observes = "attention"
    sites = ("attention",)

    def __post_init__(self) -> None:
        if self.top < 1:
            raise EstimatorError(f"query_key_channel_overlap: top is {self.top}, give at least 1 channel")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (SinkDecomposition(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        query = state["sink_decomposition.query_square"]
        key = per_head(state["sink_decomposition.sink_key_square"], query.shape[-2], axis=-2)
        count = state["sink_decomposition.count"]
        xp = namespace_of(query)
        top = min(self.top, max(1, query.shape[-1] // 4))

        def largest(values: Array) -> Array:
            # argsort of argsort is each channel's rank.
            order = xp.argsort(values, axis=-1, descending=True, stable=True)
            return xp.argsort(order, axis=-1) < top

        both = xp.sum(xp.astype(largest(query) & largest(key), query.dtype), axis=-1)
        # |Q ∪ K| = 2 m − |Q ∩ K| for two sets of m channels.
        jaccard = both / (2 * top - both)
        jaccard = xp.where(count > 0, jaccard, xp.full_like(jaccard, xp.nan))
        return {
            "query_key_channel_overlap": Output(
                jaccard, ("head",), "1", self.formula, floor=top / (2 * query.shape[-1] - top), ceiling=1.0
            )
        }


@dataclass(frozen=True)
class SinkGeometry(Estimator):
    """Angle against norms: the sink logit is scale · ‖q‖ · ‖k_sink‖ · cosine.

    Gu et al. find a small norm of the first key and a large cosine. Norms of key-value heads are
    repeated for the query heads that share them.
    """

    name = "sink_geometry"
    title = "Cosine of queries with the sink key, and norms"
    formula = (
        "mean over queries i after the sink of q_i·k_sink / (‖q_i‖‖k_sink‖); "
        "means of ‖q_i‖, ‖k_sink‖, ‖k_other‖"
    )
    range = "cosine [−1, 1]; norms [0, ∞)"
    floor = "cosine 0 ± 1/√width for unrelated directions"
    ceiling = "cosine 1"
    sources = (GU,)
    observes = "attention"
    sites = ("attention",)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (SinkGeometrySums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        count = state["sink_geometry.count"]
        heads = count.shape[-1]

        def norm(name: str, count_name: str) -> Array:
            mean = quotient(state[f"sink_geometry.{name}"], state[f"sink_geometry.{count_name}"][..., None])
            return per_head(mean, heads, axis=-1)

        return {
            "sink_cosine": Output(
                quotient(state["sink_geometry.cosine"], count),
                ("head",),
                "1",
                "mean over queries i after the sink of cos(q_i, k_sink)",
                floor=0.0,
                ceiling=1.0,
            ),
            "query_norm": Output(
                quotient(state["sink_geometry.query_norm"], count),
                ("head",),
                "activation",
                "mean over queries i after the sink of ‖q_i‖₂",
            ),
            "sink_key_norm": Output(
                norm("sink_key_norm", "sequences"),
                ("head",),
                "activation",
                "mean over sequences of ‖k_sink‖₂",
            ),
            "other_key_norm": Output(
                norm("other_key_norm", "other_keys"),
                ("head",),
                "activation",
                "mean over valid tokens other than the sink of ‖k‖₂",
            ),
        }
