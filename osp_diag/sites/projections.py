"""Queries, keys and values before rotary embedding: found by their values.

Rotary embedding leaves position 0 unchanged, so the queries that enter the product equal, at that position,
what was projected. Whichever module output holds those numbers is the pre-RoPE site, whatever its name:
a plain projection, a QK-norm, or a slice of a fused projection.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from osp_diag.sites.names import Tap
from osp_diag.sites.trace import Event

__all__ = ["pre_rope_tap"]


def _proportional(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal up to one positive factor (some models scale queries before the product)."""
    left, right = left.double().flatten(), right.double().flatten()
    if left.numel() != right.numel():
        return False
    energy = (right * right).sum()
    if energy == 0:
        return False
    factor = (left * right).sum() / energy
    return bool(
        factor > 0 and torch.allclose(left, factor * right, rtol=1e-2, atol=1e-3 * float(left.abs().max()))
    )


def _views(
    output: torch.Tensor, batch_tokens: tuple[int, int], heads: int, width: int
) -> dict[str, torch.Tensor]:
    """Position 0 of ``output`` as (heads, width), under each layout that its shape allows."""
    batch, tokens = batch_tokens
    views: dict[str, torch.Tensor] = {}
    if output.numel() != batch * tokens * heads * width:
        return views
    shape = tuple(output.shape)
    if shape == (batch, heads, tokens, width):
        views["first"] = output[0, :, 0]
    if shape == (batch, tokens, heads, width):
        views["last"] = output[0, 0]
    if shape in ((batch, tokens, heads * width), (batch * tokens, heads * width)):
        views["flat"] = output.reshape(batch, tokens, heads, width)[0, 0]
    return views


def _fused_layouts(
    query_heads: int, key_heads: int, own_heads: int, role: str
) -> list[tuple[int, int, int, int]]:
    """(groups, slots per group, first slot, slots taken) of the known ways to fuse q, k and v.

    A slot is one head's width. Contiguous [q | k | v], and grouped by key head [q … q, k, v].
    """
    per_group = query_heads // key_heads
    total = query_heads + 2 * key_heads
    contiguous = {
        "query": (0, query_heads),
        "key": (query_heads, key_heads),
        "value": (query_heads + key_heads, key_heads),
    }
    grouped = {"query": (0, per_group), "key": (per_group, 1), "value": (per_group + 1, 1)}
    start, taken = contiguous[role]
    first, count = grouped[role]
    return [(1, total, start, taken), (key_heads, per_group + 2, first, count)]


def pre_rope_tap(
    site: str, layer: int, wanted: torch.Tensor, before: list[Event], *, query_heads: int, key_heads: int
) -> Tap | None:
    """The last module output before the attention call that equals ``wanted`` at position 0.

    Parameters
    ----------
    wanted : (batch, heads, token, width) as it entered the product
    before : the module calls inside the attention module that ended before the attention call
    """
    batch, heads, tokens, width = wanted.shape
    target = wanted[0, :, 0]
    role = site.partition("_")[0]
    base = Tap(site=site, layer=layer, module="", side="output", heads=heads)
    for event in reversed(before):
        for index, output in event.outputs.items():
            for axis, view in _views(output, (batch, tokens), heads, width).items():
                if _proportional(target, view):
                    return replace(base, module=event.name, argument=index, head_axis=axis)
            if output.ndim == 3 and output.shape[-1] == (query_heads + 2 * key_heads) * width:
                for fused in _fused_layouts(query_heads, key_heads, heads, role):
                    if _proportional(target, split_fused(output, fused, width)[0, 0]):
                        return replace(base, module=event.name, argument=index, fused=fused)
    return None


def split_fused(output: Any, fused: tuple[int, int, int, int], width: int) -> torch.Tensor:
    """(batch, token, fused channels) → (batch, token, heads, width) of the part that ``fused`` names."""
    groups, slots, first, taken = fused
    batch, tokens = output.shape[:2]
    return output.reshape(batch, tokens, groups, slots, width)[:, :, :, first : first + taken].flatten(2, 3)
