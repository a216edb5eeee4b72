"""Gains of norms, moved into the Linears that read them, so that the norms commute with rotations."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

from osp_diag.errors import CheckpointError
from osp_diag.quantizing.stream_structure import ADVICE

__all__ = ["NormGains", "norm_gains"]

_ROWS = 5
_SIZE = 1024.0
"""Magnitude of the vectors that a norm is tried on: ε is lost beside their squares."""
_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-4}
_HALF_TOLERANCE = 2e-2


@dataclass(frozen=True, kw_only=True)
class NormGains:
    """The gains g of a norm g ⊙ x / √(mean x²)."""

    gains: Float[Tensor, " channel"]
    """float64"""
    parameter: str | None
    """what holds them, a channel each; None where all channels have the same gain, which may stay"""
    neutral: float
    """what the parameter holds where the gain is 1: 1, or 0 for norms that multiply by 1 + w"""


@torch.no_grad()
def norm_gains(path: str, norm: nn.Module, width: int) -> NormGains:
    """The gains of a norm, by what it makes of random vectors.

    Parameters
    ----------
    path : of the norm, for messages
    width : of the stream

    Raises
    ------
    CheckpointError : it does not compute g ⊙ x / √(mean x²): it subtracts the mean or adds a bias
        (LayerNorm), or is no norm at all
    """
    held = [(name, p) for name, p in norm.named_parameters(recurse=False) if p.numel() == width]
    example = next(norm.parameters(), torch.zeros(1))
    generator = torch.Generator().manual_seed(0)
    # A mean far from 0 tells a norm that subtracts it.
    drawn = torch.randn(_ROWS, width, generator=generator, dtype=torch.float64) + 0.5
    values = (_SIZE * drawn).to(example.device, example.dtype)
    normalised = values.double() / values.double().square().mean(-1, keepdim=True).sqrt()
    try:
        outputs = norm(values[None])[0].double()
    except Exception as error:  # whatever a foreign module makes of a tensor that it does not know
        raise _refusal(path, norm, f"cannot be run alone ({type(error).__name__}: {error})") from error
    # Least squares over the rows, channel by channel.
    gains = (outputs * normalised).sum(0) / normalised.square().sum(0)
    tolerance = _TOLERANCE.get(example.dtype, _HALF_TOLERANCE)
    if outputs.shape != normalised.shape or not torch.allclose(
        gains * normalised, outputs, rtol=tolerance, atol=tolerance * float(outputs.abs().max())
    ):
        raise _refusal(
            path,
            norm,
            "is no gain a channel times x / √(mean x²): it subtracts the mean or adds a bias, as LayerNorm "
            "does, which a rotation of the channels does not leave alone",
        )
    if not held:
        return NormGains(gains=gains, parameter=None, neutral=1.0)
    name, parameter = held[0]
    weights = parameter.detach().double()
    neutral = 1.0 - round(float((gains - weights).median()))
    exact = weights + (1.0 - neutral)
    limit = tolerance * max(1.0, float(exact.abs().max()))
    if len(held) > 1 or not torch.allclose(exact, gains, rtol=tolerance, atol=limit):
        raise _refusal(path, norm, f"does not multiply by its {name}, channel by channel")
    return NormGains(gains=exact, parameter=name, neutral=neutral)


def _refusal(path: str, norm: nn.Module, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the gains of {path}, a {type(norm).__name__}, cannot be folded into the Linears behind it, since "
        f"it {reason}; {ADVICE}"
    )
