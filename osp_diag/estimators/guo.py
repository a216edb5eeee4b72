"""Guo et al.'s own definitions, which others use under the same words and define otherwise.

Their Δlogit takes logits before the causal mask, of every query against every key; their value-state drain
takes values after the output projection.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from osp_diag.estimators._arrays import Array, float32_matmul, namespace_of, quotient
from osp_diag.estimators.attention import AttentionObservation, channel_norm, per_head, wide
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source

__all__ = ["GuoDeltaLogit", "GuoValueDrain"]

GUO = Source("Guo et al. 2024, Active-Dormant Attention Heads", "https://arxiv.org/abs/2410.13835")


@dataclass(frozen=True)
class UnmaskedDeltaSums(Measurement):
    """scale · q_i · (k_sink − mean of all keys), summed over the valid queries of each sequence."""

    name = "unmasked_delta_logit"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"difference": Field(("head",)), "count": Field(("head",))}

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.valid)
        valid, heads = observation.valid, observation.layout.heads
        sink = observation.sink_key
        if observation.query is None or observation.key is None or sink is None:
            nothing = xp.zeros_like(observation.query_weight[0, :, 0])
            return {"difference": nothing, "count": nothing}
        tokens = xp.sum(valid, axis=-1)
        safe = xp.where(tokens > 0, tokens, xp.ones_like(tokens))[:, None, None]
        # The mean of q·k over keys is q · the mean key: no product of every pair is needed.
        mean_key = float32_matmul(valid[:, None, None, :], observation.key)[:, :, 0, :] / safe
        gap = per_head(sink - mean_key, heads, axis=1) * observation.scale
        difference = float32_matmul(observation.query, gap[..., None])[..., 0]
        weight = xp.broadcast_to(valid[:, None, :], difference.shape)
        return {
            "difference": xp.sum(wide(difference * weight), axis=(0, 2)),
            "count": xp.sum(weight, axis=(0, 2)),
        }


@dataclass(frozen=True)
class GuoDeltaLogit(Estimator):
    """How far the sink key's logit lies above the mean logit of *all* keys, also those that are masked.

    Logits are scale · q·k before mask, bias and soft cap, of every valid query, the sink's included, against
    every valid key, later ones included. ``delta_logit`` looks at the keys that a query sees. NaN where a
    model's queries and keys are not seen, only its logits.
    """

    name = "guo_delta_logit"
    title = "Δlogit before the causal mask (Guo)"
    formula = "mean over queries i of scale · (q_i·k_sink − mean over all keys k of q_i·k_k)"
    unit = "logit"
    range = "(−∞, ∞); 0 = the sink key is like any other"
    floor = "0"
    sources = (GUO,)
    also_used_by = ("Confusable with `delta_logit`, over the keys that the mask allows.",)
    observes = "attention"
    sites = ("attention",)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (UnmaskedDeltaSums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        mean = quotient(state["unmasked_delta_logit.difference"], state["unmasked_delta_logit.count"])
        return {self.name: Output(mean, ("head",), self.unit, self.formula, floor=0.0)}


@dataclass(frozen=True)
class ProjectedValueNormSums(Measurement):
    """‖W_O v‖₂ of each head, summed over the sink tokens and over all others."""

    name = "projected_value_norm"
    reads_output_weight = True

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {
            "sink": Field(("head",)),
            "sink_count": Field(()),
            "other": Field(("head",)),
            "other_count": Field(()),
        }

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.valid)
        heads, weight, finite_value = (
            observation.layout.heads,
            observation.output_weight,
            observation.finite_value,
        )
        if finite_value is None or weight is None:
            nothing = xp.sum(xp.zeros_like(observation.valid))
            no_norm = xp.broadcast_to(nothing, (heads,))
            return {"sink": no_norm, "sink_count": nothing, "other": no_norm, "other_count": nothing}
        value, counted = finite_value
        sink = counted * xp.astype(observation.is_sink, counted.dtype)
        other = counted - sink
        shared_by = heads // value.shape[1]
        of_sink, of_other = [], []
        # Head by head: what all heads give together is as large as the stream times their number.
        for head in range(heads):
            projection = xp.matrix_transpose(xp.astype(weight[head, :, :], xp.float32))
            norm = channel_norm(float32_matmul(value[:, head // shared_by, :, :], projection))
            of_sink.append(xp.sum(wide(sink * norm)))
            of_other.append(xp.sum(wide(other * norm)))
        return {
            "sink": xp.stack(of_sink),
            "sink_count": xp.sum(sink),
            "other": xp.stack(of_other),
            "other_count": xp.sum(other),
        }


@dataclass(frozen=True)
class GuoValueDrain(Estimator):
    """How little the sink token's value adds to the stream: its norm after a head's part of W_O.

    With W_O^h the columns of the output projection that read head h, ‖W_O^h v‖₂ of the sink token over its
    mean over all *other* valid tokens; the two means too. ``value_drain`` takes v itself and the mean over
    all tokens, the sink's included. Without the projection's bias. NaN where values or the one matrix of the
    projection are not seen (a note says which); where a model scales or norms the heads' outputs before it
    projects them, that is not in it. Multiplies every value by W_O, hence optional.
    """

    name = "guo_value_drain"
    title = "Value drain after the output projection (Guo)"
    formula = "mean over sequences of ‖W_O^h v_sink‖₂ / mean over other valid tokens of ‖W_O^h v‖₂"
    range = "[0, ∞); 1 = the sink's value adds as much as any other"
    floor = "0"
    sources = (GUO,)
    also_used_by = ("Confusable with `value_drain`, of values before the projection.",)
    observes = "attention"
    sites = ("attention",)
    optional = True

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (ProjectedValueNormSums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        sink, other = (
            quotient(
                state[f"projected_value_norm.{of}"], state[f"projected_value_norm.{of}_count"][..., None]
            )
            for of in ("sink", "other")
        )
        return {
            self.name: Output(quotient(sink, other), ("head",), self.unit, self.formula, floor=0.0),
            "guo_sink_value_norm": Output(
                sink, ("head",), "activation", "mean over sequences of ‖W_O^h v_sink‖₂", floor=0.0
            ),
            "guo_other_value_norm": Output(
                other, ("head",), "activation", "mean over other valid tokens of ‖W_O^h v‖₂", floor=0.0
            ),
        }
