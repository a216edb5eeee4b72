"""Massive values in queries and keys: channels of a head whose norm over a sequence stands out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, namespace_of, once, quotient
from osp_diag.estimators.attention import finite_tokens, wide
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source
from osp_diag.schema import HEAD_SITES, STRATA

__all__ = ["HeadChannelNorm", "HeadsObservation", "MassiveValues"]

JIN = Source(
    "Jin et al. 2025, Massive Values in Self-Attention Modules are the Key to Contextual Knowledge "
    "Understanding",
    "https://arxiv.org/abs/2502.01563",
)


class HeadsObservation:
    """Queries, keys or values of one layer, split into heads.

    Parameters
    ----------
    x : (batch, head, token, channel), any floating dtype; computed on in float32. For keys and
        values, ``head`` is the key-value head, not repeated.
    strata : (stratum, batch, token) of 0 and 1, in the order of ``stratum_names``; padding is 0 in all
    stratum_names : ``all``, then the others

    Tokens with a NaN or Inf in any head are left out; ``nonfinite_token_count`` of the same site
    counts them.
    """

    def __init__(
        self,
        x: Float[Any, "batch head token channel"],
        strata: Float[Any, "stratum batch token"],
        *,
        stratum_names: tuple[str, ...] = STRATA,
    ) -> None:
        xp = namespace_of(x)
        batch, heads, tokens, channels = x.shape
        if tuple(strata.shape) != (len(stratum_names), batch, tokens):
            raise EstimatorError(
                f"strata has shape {tuple(strata.shape)}, expected (stratum, batch, token) = "
                f"{(len(stratum_names), batch, tokens)} for x of shape {tuple(x.shape)} (batch, head, token, "
                "channel)"
            )
        x = x if x.dtype == xp.float32 else xp.astype(x, xp.float32)
        finite = finite_tokens(x)
        strata = xp.astype(strata, xp.float32) * xp.astype(finite, xp.float32)[None, ...]
        valid = strata[0, ...] > 0
        self.x = xp.where(valid[:, None, :, None], x, xp.zeros_like(x[:1, :1, :1, :1]))
        self.strata = strata
        self.layout = Layout(
            channels=heads * channels,
            heads=heads,
            key_value_heads=heads,
            head_channels=channels,
            tokens=tokens,
            strata=stratum_names,
        )
        self._cache: dict[str, Any] = {}

    @once
    def channel_norms(self) -> Float[Any, "batch head channel"]:
        """M[h, c] = ‖x[:, h, c]‖₂ over the valid tokens of each sequence."""
        xp = namespace_of(self.x)
        peak = xp.max(xp.abs(self.x), axis=2)
        z = self.x / xp.where(peak > 0, peak, xp.ones_like(peak))[:, :, None, :]
        return peak * xp.sqrt(xp.sum(z * z, axis=2))

    @once
    def sequence_weight(self) -> Float[Any, " batch"]:
        """1 for a sequence with a valid token, else 0."""
        xp = namespace_of(self.x)
        return xp.astype(xp.any(self.strata[0, ...] > 0, axis=-1), xp.float32)


@dataclass(frozen=True)
class HeadChannelNormSums(Measurement):
    """Sum over sequences of M[h, c]."""

    name = "head_channel_norm"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"norm": Field(("head", "head_channel")), "sequences": Field(())}

    def measure(self, observation: HeadsObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.x)
        return {
            "norm": xp.sum(wide(observation.channel_norms), axis=0),
            "sequences": xp.sum(observation.sequence_weight),
        }


@dataclass(frozen=True)
class MassiveValueCounts(Measurement):
    """Number of sequences in which M[h, c] exceeds ``threshold`` times its mean over heads and channels."""

    threshold: float = 5.0
    name = "massive_values"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"massive": Field(("head", "head_channel")), "sequences": Field(())}

    def measure(self, observation: HeadsObservation) -> Mapping[str, Array]:
        norms = observation.channel_norms
        xp = namespace_of(norms)
        peak = xp.max(norms, axis=(1, 2), keepdims=True)
        # In units of the sequence's largest norm, so that the mean over all heads stays within float32.
        share = norms / xp.where(peak > 0, peak, xp.ones_like(peak))
        massive = share > self.threshold * xp.mean(share, axis=(1, 2), keepdims=True)
        return {
            "massive": xp.sum(xp.astype(massive, xp.float32), axis=0),
            "sequences": xp.sum(observation.sequence_weight),
        }


@dataclass(frozen=True)
class HeadChannelNorm(Estimator):
    """Norm of each channel of each head over a sequence's valid tokens, averaged over sequences.

    The map of OSP's Fig. 5. It grows as √tokens: compare at equal sequence lengths.
    """

    name = "head_channel_norm"
    title = "Norm of each head channel over a sequence"
    formula = "mean over sequences of M[h, c] = ‖x[:, h, c]‖₂"
    unit = "activation"
    range = "[0, ∞)"
    floor = "0"
    sources = (JIN,)
    also_used_by = ("Park et al. 2025 (OSP), Fig. 5",)
    observes = "heads"
    sites = HEAD_SITES

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (HeadChannelNormSums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        mean = quotient(
            state["head_channel_norm.norm"], state["head_channel_norm.sequences"][..., None, None]
        )
        return {
            "head_channel_norm": Output(mean, ("head", "head_channel"), self.unit, self.formula, floor=0.0)
        }


@dataclass(frozen=True)
class MassiveValues(Estimator):
    """Massive values: channels of a head whose norm exceeds λ times the mean over all heads and channels.

    λ = 5 is the threshold commonly used to replicate Jin et al.; check theirs before comparing. Expected
    in Q and K of models with RoPE, in low-frequency channels, and not in V.
    """

    threshold: float = 5.0

    name = "massive_values"
    title = "Massive values in queries and keys"
    formula = (
        "number of channels c of head h with M[h, c] > λ · mean(M), M[h, c] = ‖x[:, h, c]‖₂, "
        "averaged over sequences"
    )
    unit = "channels"
    range = "count from 0 to the head's width; fraction [0, 1/λ)"
    floor = "0"
    ceiling = "fraction 1/λ: a mean cannot be exceeded λ-fold by more"
    sources = (JIN,)
    observes = "heads"
    sites = HEAD_SITES

    def __post_init__(self) -> None:
        if not self.threshold > 0:
            raise EstimatorError(f"massive_values: λ is {self.threshold}, give a positive number")

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (MassiveValueCounts(self.threshold),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        massive, sequences = state["massive_values.massive"], state["massive_values.sequences"]
        xp = namespace_of(massive)
        count = quotient(xp.sum(massive, axis=-1), sequences[..., None])
        fraction = quotient(xp.mean(massive, axis=(-2, -1)), sequences)
        return {
            "massive_value_count": Output(count, ("head",), self.unit, self.formula, floor=0.0),
            "massive_value_fraction": Output(
                fraction,
                (),
                "1",
                "share of all heads and channels with M[h, c] > λ · mean(M); mean over sequences",
                floor=0.0,
                ceiling=1.0 / self.threshold,
            ),
        }
