"""Do few channels, rows or gains hold most of the energy? Pure functions of tensors."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from osp_diag.estimators.neuron_kurtosis import relative_energy

__all__ = ["CONCENTRATION", "concentration", "orthogonality", "row_norms"]

CONCENTRATION = {
    "participation_ratio": ("channels", "(Σ_j e_j)² / Σ_j e_j²: d for equal channels, 1 for a single one"),
    "top_share": ("1", "max_j e_j / Σ_j e_j"),
    "max_median_ratio": ("1", "max_j √e_j / median_j √e_j, the lower median; NaN where it is 0"),
}
"""Variable → units, definition, of energies e_j."""

ORTHOGONALITY = {
    "orthogonality_error": ("1", "‖PᵀP / s − I‖_F / √d, s = tr(PᵀP) / d: 0 for a scaled orthogonal matrix"),
    "scale": ("1", "√s, the root mean square of the singular values"),
    "condition_number": ("1", "largest over smallest singular value"),
}

ROW_NORMS = {
    "row_norm_mean": ("1", "mean over rows of ‖w_i‖"),
    "row_norm_max": ("1", "max over rows of ‖w_i‖"),
    "row_norm_max_median_ratio": ("1", "max over rows of ‖w_i‖ / their lower median"),
    "top_row": ("row", "numbers of the rows with the largest norms, largest first"),
    "top_row_norm": ("1", "their norms"),
}

TOP_ROWS = 8


def concentration(energy: Float[Tensor, "*batch channel"]) -> dict[str, Float[Tensor, "*batch"]]:
    """How unevenly energies are spread over channels; the definitions of ``channel_concentration``.

    Parameters
    ----------
    energy : sums or means of squares of each channel. If all are 0 they count as even

    Returns
    -------
    dict : the variables of :data:`CONCENTRATION`
    """
    relative = relative_energy(energy.to(torch.float32))
    # Relative energies r_j = d e_j / Σ e have the mean 1, so (Σ e)² / Σ e² = d / mean r², and the largest
    # share max e / Σ e is max r / d.
    amplitude = relative.sqrt()
    median = amplitude.median(dim=-1).values
    channels = relative.shape[-1]
    return {
        "participation_ratio": channels / relative.square().mean(-1),
        "top_share": relative.amax(-1) / channels,
        "max_median_ratio": torch.where(median > 0, amplitude.amax(-1) / median, torch.nan),
    }


def orthogonality(projection: Float[Tensor, "channel channel"]) -> dict[str, Float[Tensor, ""]]:
    """How far a square matrix is from a multiple of an orthogonal one; in float64.

    The singular values are the roots of the eigenvalues of PᵀP, so condition numbers above 10⁷ are not seen.
    All are NaN of a matrix with NaN or Inf, but the scale, which may be Inf.
    """
    wide = projection.to(torch.float64)
    channels = wide.shape[0]
    # PᵀP = s·I for √s times an orthogonal matrix; s is then the mean of its diagonal.
    gram = wide.mT @ wide
    scale = gram.diagonal().sum() / channels
    identity = torch.eye(channels, dtype=gram.dtype, device=gram.device)
    # Of NaN or Inf there are no eigenvalues, for which LAPACK raises: those of the identity become NaN.
    finite = gram.isfinite().all()
    eigenvalues = torch.where(finite, torch.linalg.eigvalsh(torch.where(finite, gram, identity)), torch.nan)
    # Rounding may leave the smallest at 0 or below.
    smallest = eigenvalues[0].clamp(min=torch.finfo(gram.dtype).eps * eigenvalues[-1])
    return {
        "orthogonality_error": torch.linalg.matrix_norm(gram / scale - identity) / channels**0.5,
        "scale": scale.sqrt(),
        "condition_number": (eigenvalues[-1] / smallest).sqrt(),
    }


def row_norms(squares: Float[Tensor, " row"], top: int = TOP_ROWS) -> dict[str, Tensor]:
    """Statistics of the norms of rows, such as a token's entry of the embedding.

    Parameters
    ----------
    squares : ‖w_i‖² of every row
    top : so many of the largest; NaN beyond the number of rows

    Returns
    -------
    dict : the variables of :data:`ROW_NORMS`, the last two of ``top`` numbers
    """
    norms = squares.to(torch.float32).sqrt()
    largest, rows = norms.topk(min(top, norms.shape[0]))
    padding = (0, top - largest.shape[0])
    return {
        "row_norm_mean": norms.mean(),
        "row_norm_max": norms.amax(),
        "row_norm_max_median_ratio": norms.amax() / norms.median(),
        "top_row": torch.nn.functional.pad(rows.to(norms.dtype), padding, value=torch.nan),
        "top_row_norm": torch.nn.functional.pad(largest, padding, value=torch.nan),
    }
