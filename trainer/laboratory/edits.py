"""Edits of a model's weights that ask what carries its outliers; each leaves the model otherwise as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import nn

from osp_diag.interventions.weights import clip_row_norms
from osp_diag.trainer.model import Llama

__all__ = ["EDITS"]


def _weights(model: Llama, *projections: str) -> Iterator[nn.Parameter]:
    for name, weight in model.named_parameters():
        if name.endswith(tuple(f".{projection}.weight" for projection in projections)):
            yield weight


@torch.no_grad()
def clip_rows(model: Llama) -> None:
    """Scale every row of o_proj and down_proj that is longer than the median row to its length."""
    for weight in _weights(model, "o_proj", "down_proj"):
        clip_row_norms(weight)


@torch.no_grad()
def average_gains(model: Llama) -> None:
    """Replace the gains of every norm by their root mean square, √(mean γ²)."""
    for name, gain in model.named_parameters():
        if name.endswith("norm.weight"):
            gain.copy_(gain.square().mean().sqrt().expand_as(gain))


@torch.no_grad()
def equal_heads(model: Llama) -> None:
    """Scale the rows of every head of q_proj and k_proj to the layer's median head norm."""
    width = model.config.head_size
    for weight in _weights(model, "q_proj", "k_proj"):
        heads = weight.view(-1, width, weight.shape[1])
        lengths = heads.norm(dim=(1, 2), keepdim=True)
        heads.mul_(lengths.median() / lengths.clamp(min=1e-30))


EDITS: Mapping[str, tuple[str, Callable[[Llama], None]]] = {
    "clip_rows": ("rows of o_proj and down_proj clipped to the median norm", clip_rows),
    "average_gains": ("gains replaced by their root mean square", average_gains),
    "equal_heads": ("heads of q_proj and k_proj scaled to the median norm", equal_heads),
}
"""Name → (in words, the edit)."""
