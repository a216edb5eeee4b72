"""How spread the attention of a query is: its entropy, which collapses where one key takes everything."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from osp_diag.estimators._arrays import Array, namespace_of, quotient
from osp_diag.estimators.attention import AttentionObservation, SampledTile, wide
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source

__all__ = ["AttentionEntropy"]

ZHAI = Source(
    "Zhai et al. 2023, Stabilizing Transformer Training by Preventing Attention Entropy Collapse",
    "https://arxiv.org/abs/2303.06296",
)


@dataclass(frozen=True)
class EntropySums(Measurement):
    """Entropy of the sampled queries' attention."""

    name = "attention_entropy"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"entropy": Field(("head",)), "count": Field(("head",))}

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.valid)
        entropies, counts = [], []
        for number in range(observation.sampled_tiles):
            tile = observation.sampled_tile(number)
            entropies.append(xp.sum(wide(tile.weight * _entropy(tile)), axis=(0, 2)))
            counts.append(xp.sum(tile.weight, axis=(0, 2)))
        return {"entropy": sum(entropies[1:], entropies[0]), "count": sum(counts[1:], counts[0])}


def _entropy(tile: SampledTile) -> Array:
    """−Σ p log p of each row over its keys and the learned sinks together; 0 where it sees nothing."""
    xp = namespace_of(tile.logits)
    nothing = xp.full_like(tile.logits[:1, :1, :1, :1], -xp.inf)
    logits = xp.where(tile.allowed, tile.logits, nothing)
    top = xp.max(logits, axis=-1)
    extra = xp.full_like(top, -xp.inf)
    if tile.extra is not None:
        extra = xp.broadcast_to(tile.extra, top.shape)
        top = xp.maximum(top, extra)
    top = xp.where(top > -xp.inf, top, xp.zeros_like(top))
    # With z = logit − top, e = exp(z), Z = Σ e: −Σ (e/Z) log(e/Z) = log Z − Σ e z / Z.
    z, z_extra = logits - top[..., None], extra - top
    e, e_extra = xp.exp(z), xp.exp(z_extra)
    total = xp.sum(e, axis=-1) + e_extra
    moment = xp.sum(e * xp.where(e > 0, z, xp.zeros_like(z)), axis=-1)
    moment = moment + e_extra * xp.where(e_extra > 0, z_extra, xp.zeros_like(z_extra))
    total = xp.where(total > 0, total, xp.ones_like(total))
    return xp.log(total) - moment / total


@dataclass(frozen=True)
class AttentionEntropy(Estimator):
    """Mean entropy of a query's attention over the keys that it sees, in nats.

    Learned sinks together are one outcome more. Taken at the sampled queries, as ``delta_logit``. It falls as
    one key (a sink, say) takes the mass, and its collapse goes with logits that grow without bound; it
    rises with the number of keys: never compare across lengths.
    """

    name = "attention_entropy"
    title = "Attention entropy"
    formula = "mean over sampled queries i of −Σ_k A[i, k] ln A[i, k]"
    unit = "nat"
    range = "[0, ln n]"
    floor = "0: every query looks at one key"
    ceiling = "mean of ln(number of keys seen): uniform attention"
    sources = (ZHAI,)
    observes = "attention"
    sites = ("attention",)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (EntropySums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        mean = quotient(state["attention_entropy.entropy"], state["attention_entropy.count"])
        return {self.name: Output(mean, ("head",), self.unit, self.formula, floor=0.0)}
