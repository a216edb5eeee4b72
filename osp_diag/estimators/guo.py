"""Guo's Δlogit, whose logits are taken before the causal mask: of every query against every key."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from osp_diag.estimators._arrays import Array, float32_matmul, namespace_of, quotient
from osp_diag.estimators.attention import AttentionObservation, per_head, wide
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source

__all__ = ["GuoDeltaLogit"]

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
