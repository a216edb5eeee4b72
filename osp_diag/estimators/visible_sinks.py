"""Sinks where not every later query sees the key: sliding windows, chunks, packed documents.

α of the sink rate divides what a key receives by all queries at or after it. Behind a window of w keys only
w queries see it, so α is at most w / (n − k), however strong the head's preference. Here the denominator is
the number of queries that the mask lets see the key.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, namespace_of, quotient
from osp_diag.estimators.attention import AttentionObservation
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source

__all__ = ["VisibleSinkRate"]

GU = Source(
    "Gu et al. 2025, When Attention Sink Emerges in Language Models (α over all later queries)",
    "https://arxiv.org/abs/2410.10781",
)


@dataclass(frozen=True)
class VisibleSinkIndicators(Measurement):
    """Per sequence, whether the queries that see the sink key give it more than ε on average."""

    epsilons: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.8)
    name = "visible_sink"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {
            "above": Field(("head", "epsilon")),
            "alpha": Field(("head",)),
            "share": Field(("head",)),
            "count": Field(("head",)),
        }

    def coords(self) -> Mapping[str, tuple]:
        return {"epsilon": self.epsilons}

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        xp, softmax = namespace_of(observation.valid), observation.softmax
        weight = observation.query_weight
        sees = weight * xp.astype(softmax.sink_logit > -xp.inf, weight.dtype)
        seeing, total = xp.sum(sees, axis=-1), xp.sum(weight, axis=-1)
        is_defined = xp.astype(seeing > 0, weight.dtype)
        received = xp.sum(weight * softmax.sink_probability, axis=-1)
        alpha = received / xp.where(seeing > 0, seeing, xp.ones_like(seeing))
        above = [xp.sum(xp.astype(alpha > e, weight.dtype) * is_defined, axis=0) for e in self.epsilons]
        share = seeing / xp.where(total > 0, total, xp.ones_like(total))
        return {
            "above": xp.stack(above, axis=1),
            "alpha": xp.sum(alpha * is_defined, axis=0),
            "share": xp.sum(share * is_defined, axis=0),
            "count": xp.sum(is_defined, axis=0),
        }


@dataclass(frozen=True)
class VisibleSinkRate(Estimator):
    """The sink rate of the first token over the queries that see it, and what share of queries that is.

    As ``sink_rate`` at k = 0, but α divides by the number of queries whose mask lets the sink key through,
    the sink's own included. Both agree where every query sees it. A head behind a window of w keys that gives
    all its attention to the first token while it can has ``sink_rate`` 0 once ε exceeds w / n, and 1 here;
    ``sink_key_visibility``, about w / n there, says how far a ``sink_rate`` is capped by its mask.
    """

    epsilons: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.8)

    name = "visible_sink_rate"
    title = "Sink rate over the queries that see the first token"
    formula = "mean over sequences of 1(α > ε), α = Σ_i A[i, sink] / #{i: query i sees the sink key}"
    range = "[0, 1]"
    floor = "0"
    ceiling = "1"
    sources = (GU, Source("osp_diag"))
    also_used_by = ("`sink_rate` divides by all queries, as Gu et al. do.",)
    observes = "attention"
    sites = ("attention",)

    def __post_init__(self) -> None:
        if not self.epsilons or any(not 0 < e < 1 for e in self.epsilons):
            raise EstimatorError(
                f"visible_sink_rate: epsilons {self.epsilons} must be shares between 0 and 1"
            )

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (VisibleSinkIndicators(self.epsilons),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        count = state["visible_sink.count"]
        coords = {"epsilon": self.epsilons}
        return {
            "visible_sink_rate": Output(
                quotient(state["visible_sink.above"], count[..., None]),
                ("head", "epsilon"),
                "1",
                self.formula,
                coords,
                floor=0.0,
                ceiling=1.0,
            ),
            "visible_first_token_attention": Output(
                quotient(state["visible_sink.alpha"], count),
                ("head",),
                "1",
                "mean over sequences of Σ_i A[i, sink] / #{i: query i sees the sink key}",
                floor=0.0,
                ceiling=1.0,
            ),
            "sink_key_visibility": Output(
                quotient(state["visible_sink.share"], count),
                ("head",),
                "1",
                "mean over sequences of the share of queries that see the sink key",
                floor=0.0,
                ceiling=1.0,
            ),
        }
