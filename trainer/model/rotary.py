"""Rotary position embedding, in the layout of Hugging Face's Llama."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Rotation", "rotate", "rotation"]


class Rotation(NamedTuple):
    """Cosine and sine of every position's angles, float32."""

    cosine: Float[Tensor, "sequence position channel"]
    sine: Float[Tensor, "sequence position channel"]


def rotation(positions: Int[Tensor, "sequence position"], head_size: int, theta: float) -> Rotation:
    """The rotation by the angles position · θ^(−2i/d), i = 0 … d/2 − 1 (Su et al., 2021).

    Channels i and i + d/2 are rotated together, as in Hugging Face's Llama ("rotate half"); the paper's own
    layout pairs neighbours, which a fixed permutation of the heads' channels turns into this one.

    Parameters
    ----------
    positions : one row for all sequences, or a row for each
    head_size : d, even
    theta : θ
    """
    # θ^(−2i/d), and the angle of each position; channels i and i + d/2 share it.
    exponent = torch.arange(0, head_size, 2, device=positions.device).float() / head_size
    frequency = 1.0 / theta**exponent
    angle = positions.float()[..., None] * frequency
    angles = torch.cat([angle, angle], dim=-1)
    return Rotation(angles.cos(), angles.sin())


def rotate(
    x: Float[Tensor, "sequence head position channel"], by: Rotation
) -> Float[Tensor, "sequence head position channel"]:
    """``x`` with every head rotated by its position's angles; float32."""
    # (a, b) → (a cos − b sin, b cos + a sin) for the halves a and b of a head.
    first, second = x.chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return x * by.cosine[:, None] + turned * by.sine[:, None]
