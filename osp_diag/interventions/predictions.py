"""How a model's predictions of the next token differ from those of the untouched model."""

from __future__ import annotations

from typing import Any

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from osp_diag.quantizing.divergence import divergence_of

__all__ = ["divergence", "logits_of", "surprise"]

_AT_ONCE = 2**24
"""Logits that are float64 at one time: 128 MiB."""


def logits_of(output: Any) -> Float[Tensor, "1 token vocabulary"]:
    """The logits in what a model gives."""
    if hasattr(output, "logits"):
        return output.logits
    return output[0] if isinstance(output, tuple) else output


def surprise(
    logits: Float[Tensor, "1 token vocabulary"], ids: Int[Tensor, "1 token"], present: Bool[Tensor, " token"]
) -> tuple[float, int]:
    """(Σ −log p(x_t | x_<t) in nats, how many tokens are predicted) of one sequence without its padding."""
    predictions = logits[0][present.to(logits.device)]
    targets = ids[0][present].to(logits.device)[1:]
    rows = max(1, _AT_ONCE // predictions.shape[-1])
    parts = zip(predictions[:-1].split(rows), targets.split(rows), strict=True)
    return sum(float(functional.cross_entropy(x.double(), y, reduction="sum")) for x, y in parts), len(
        targets
    )


def divergence(
    untouched: Float[Tensor, "1 token vocabulary"],
    logits: Float[Tensor, "1 token vocabulary"],
    present: Bool[Tensor, " token"],
) -> tuple[float, int]:
    """(Σ_t KL(p_t ‖ q_t) in nats, how many tokens), p of the untouched model and q of the other."""
    p, q = (x[0][present.to(x.device)] for x in (untouched, logits))
    return divergence_of(p, q.to(p.device)), len(p)
