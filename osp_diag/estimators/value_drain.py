"""Values of the sink token against those of other tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from osp_diag.estimators._arrays import Array, namespace_of, quotient
from osp_diag.estimators.attention import AttentionObservation, wide
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source

__all__ = ["ValueDrain"]

GU = Source(
    "Gu et al. 2025, When Attention Sink Emerges in Language Models", "https://arxiv.org/abs/2410.10781"
)
GUO = Source("Guo et al. 2024, Active-Dormant Attention Heads", "https://arxiv.org/abs/2410.13835")


@dataclass(frozen=True)
class ValueNormSums(Measurement):
    """Norms of value vectors, by the token's stratum and of the sink token."""

    name = "value_norm"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        groups = ("key_value_head",)
        return {
            "norm": Field(("key_value_head", "stratum")),
            "count": Field(("stratum",)),
            "sink": Field(groups),
            "sink_count": Field(()),
        }

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.valid)
        norms = observation.finite_values
        if norms is None:
            zeros = xp.zeros_like(observation.key_strata[:, 0, 0])
            no_norm = xp.broadcast_to(zeros[:1], (observation.layout.key_value_heads,))
            norm = xp.zeros_like(no_norm[:, None] * zeros[None, :])
            return {"norm": norm, "count": zeros, "sink": no_norm, "sink_count": zeros[0]}
        norm, weight = norms
        strata = observation.key_strata * weight[None, ...]
        sink = weight * xp.astype(observation.is_sink, weight.dtype)
        sums = [xp.sum(wide(strata[s, :, None, :] * norm), axis=(0, 2)) for s in range(strata.shape[0])]
        return {
            "norm": xp.stack(sums, axis=-1),
            "count": xp.sum(strata, axis=(1, 2)),
            "sink": xp.sum(wide(sink[:, None, :] * norm), axis=(0, 2)),
            "sink_count": xp.sum(sink),
        }


@dataclass(frozen=True)
class ValueDrain(Estimator):
    """How small the sink token's value is: a head that attends to it then adds almost nothing.

    Also the mean norm of values by stratum. Means are taken before the ratio. Norms are of v itself, and the
    mean is over all tokens, the sink's included. Guo et al. take norms after the output projection (of
    W_O v, a head's part) and compare the sink's with those of the other tokens: ``guo_value_drain``.
    """

    name = "value_drain"
    title = "Value drain"
    formula = "mean over sequences of ‖v_sink‖₂ / mean over valid tokens of ‖v‖₂"
    range = "[0, ∞); 1 = the sink's value is like any other"
    floor = "0"
    sources = (GUO, GU)
    also_used_by = ("Sun et al. 2026",)
    observes = "attention"
    sites = ("attention", "cross_attention")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (ValueNormSums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        norm = quotient(state["value_norm.norm"], state["value_norm.count"][..., None, :])
        sink = quotient(state["value_norm.sink"], state["value_norm.sink_count"][..., None])
        drain = quotient(sink, norm[..., 0])
        return {
            "value_drain": Output(drain, ("key_value_head",), "1", self.formula, floor=0.0),
            "value_norm": Output(
                norm,
                ("key_value_head", "stratum"),
                "activation",
                "mean over the stratum's tokens of ‖v‖₂",
                {"stratum": layout.strata},
            ),
        }
