"""The normalisations: x divided by its root mean square, times a gain of one kind or another."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from osp_diag.trainer.config import Norm

__all__ = ["RMSNorm", "SRMSNorm", "SSNorm", "make_norm"]


def _normalised(x: Float[Tensor, "*shape channel"], epsilon: float) -> Float[Tensor, "*shape channel"]:
    """x / √(mean x² + ε) in float32, whatever autocast or sharding made of x."""
    return functional.rms_norm(x.float(), x.shape[-1:], None, epsilon)


class RMSNorm(nn.Module):
    """g ⊙ x / √(mean x² + ε), with a gain g per channel (Zhang & Sennrich, 2019).

    Parameters
    ----------
    channels : width
    scale : initial gain of every channel
    epsilon : ε
    """

    def __init__(self, channels: int, scale: float = 1.0, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.scale, self.epsilon = scale, epsilon
        self.weight = nn.Parameter(torch.full((channels,), scale))

    def forward(self, x: Float[Tensor, "*shape channel"]) -> Float[Tensor, "*shape channel"]:
        return (self.weight * _normalised(x, self.epsilon)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"gains={len(self.weight)}, initially {self.scale}"


class SSNorm(RMSNorm):
    """γ · x / ‖x‖ with one scalar (Park et al., 2025): no channel can be scaled apart from the others.

    The parameter is γ/√d, the gain of x / √(mean x² + ε), so that 1 is what RMSNorm starts with. It has the
    shape (1,): FSDP shards no parameter without axes.

    Parameters
    ----------
    scale : initial γ/√d
    epsilon : ε
    """

    def __init__(self, scale: float = 1.0, epsilon: float = 1e-5) -> None:
        super().__init__(1, scale, epsilon)


class SRMSNorm(nn.Module):
    """c · x / √(mean x² + ε) with a constant c: nothing is learned (Qin et al., 2023).

    Parameters
    ----------
    scale : c
    epsilon : ε
    """

    def __init__(self, scale: float = 1.0, epsilon: float = 1e-5) -> None:
        super().__init__()
        self.scale, self.epsilon = scale, epsilon

    def forward(self, x: Float[Tensor, "*shape channel"]) -> Float[Tensor, "*shape channel"]:
        return (self.scale * _normalised(x, self.epsilon)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"scale={self.scale}"


def make_norm(kind: Norm, channels: int, scale: float | None, epsilon: float) -> nn.Module:
    """A norm of the kind that ``model.norm`` names; ``scale`` None is 1."""
    scale = 1.0 if scale is None else scale
    if kind == "rmsnorm":
        return RMSNorm(channels, scale, epsilon)
    return SSNorm(scale, epsilon) if kind == "ssnorm" else SRMSNorm(scale, epsilon)
