"""Newton-Schulz: many matrices made nearly orthogonal at once, by matrix products alone."""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["COEFFICIENTS", "multiplies_bfloat16", "newton_schulz", "newton_schulz_dtype"]

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""a, b, c of Jordan's quintic (https://kellerjordan.github.io/posts/muon/): steep at 0, not convergent."""


def newton_schulz(
    stack: Float[Tensor, "matrix row column"],
    *,
    steps: int = 5,
    dtype: torch.dtype = torch.float32,
    epsilon: float = 1e-7,
) -> Float[Tensor, "matrix row column"]:
    """U S' Vᵀ for every matrix G = U S Vᵀ of a stack, the singular values S' between about 0.7 and 1.2.

    X₀ = G / ‖G‖_F; then ``steps`` times, with the Gram matrix A = X Xᵀ,

        X ← a X + (b A + c A²) X.

    Jordan transposes a tall matrix, so that A has its smaller size. The same comes of A = Xᵀ X on the right,
    X ← a X + X (b A + c A²), which needs no transposed copies.

    Parameters
    ----------
    stack : matrices of one shape; not changed
    steps : iterations
    dtype : of the products, and of what is returned; ``stack`` is rounded to it first
    epsilon : least norm divided by, so that zeros stay zeros
    """
    a, b, c = COEFFICIENTS
    x = stack.to(dtype)
    # Divided by ‖G‖_F no singular value is above 1, where the quintic holds.
    x = x / torch.linalg.vector_norm(x, dim=(-2, -1), keepdim=True).clamp(min=epsilon)
    tall = x.shape[-2] > x.shape[-1]
    for _ in range(steps):
        # A
        gram = x.mT @ x if tall else x @ x.mT
        # b A + c A²
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        # a X + (b A + c A²) X, or with the polynomial on the right
        left, right = (x, polynomial) if tall else (polynomial, x)
        x = torch.baddbmm(x, left, right, beta=a)
    return x


def newton_schulz_dtype(
    device: torch.device, choice: Literal["auto", "bfloat16", "float32"] = "auto"
) -> torch.dtype:
    """The type to iterate in; ``auto``: bfloat16 where ``device`` multiplies it in hardware, else float32."""
    if choice == "auto":
        return torch.bfloat16 if multiplies_bfloat16(device) else torch.float32
    return torch.bfloat16 if choice == "bfloat16" else torch.float32


def multiplies_bfloat16(device: torch.device) -> bool:
    """Whether matrices of bfloat16 are multiplied by units made for it, and not emulated.

    CUDA from compute capability 8.0; CPUs with AMX or AVX512_BF16 whose torch is built with oneDNN, which
    uses them. Others (Metal, older CPUs) take float32.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu" and torch.backends.mkldnn.is_available():
        # No public function says so in every torch that is supported.
        names = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
        return any(getattr(torch.cpu, name, bool)() for name in names)
    return False
