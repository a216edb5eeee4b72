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

__all__ = ["distinct_heads", "pre_rope_tap", "split_fused"]


def _proportional(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Equal up to one positive factor (some models scale queries before the product)."""
    left, right = left.double().flatten(), right.double().flatten()
    if left.numel() != right.numel():
        return False
    # Least squares: the factor c that minimises ‖left − c · right‖ is ⟨left, right⟩ / ⟨right, right⟩.
    energy = (right * right).sum()
    if energy == 0:
        return False
    factor = (left * right).sum() / energy
    return bool(
        factor > 0 and torch.allclose(left, factor * right, rtol=1e-2, atol=1e-3 * float(left.abs().max()))
    )


def distinct_heads(key: torch.Tensor) -> torch.Tensor:
    """Keys (batch, head, token, width) without the copies that a model makes for heads that share one."""
    heads = key.shape[1]
    for groups in range(1, heads):
        if heads % groups == 0:
            grouped = key.unflatten(1, (groups, heads // groups))
            if torch.equal(grouped, grouped[:, :, :1].expand_as(grouped)):
                return grouped[:, :, 0]
    return key


def _fused_layouts(query_heads: int, key_heads: int, role: str) -> list[tuple[int, int, int, int]]:
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
    start, number = contiguous[role]
    first, count = grouped[role]
    return [(1, total, start, number), (key_heads, per_group + 2, first, count)]


def pre_rope_tap(
    site: str, layer: int, operand: torch.Tensor, earlier: list[Event], *, query_heads: int, key_heads: int
) -> Tap | None:
    """The last module output before the attention call that equals ``operand`` at position 0.

    An output that equals it at every position comes after a rotary embedding that is a module, or belongs
    to a model without any; it is taken only if no other fits.

    Parameters
    ----------
    operand : (batch, heads, token, width) as it entered the product
    earlier : the module calls inside the attention module that ended before the attention call
    query_heads, key_heads : numbers of distinct heads, which tell fused layouts apart
    """
    rotated_tap: Tap | None = None
    base = Tap(site=site, layer=layer, module="", side="output", heads=operand.shape[1])
    for event in reversed(earlier):
        for index, output in event.outputs.items():
            layouts = _layouts(site, output, operand.shape, query_heads, key_heads)
            for layout, tensor in layouts:
                if not _proportional(operand[0, :, 0], tensor[0, :, 0]):
                    continue
                tap = replace(base, module=event.name, argument=index, call=event.call, **layout)
                # Equal at position 0 and not elsewhere: a rotation lies between the two.
                if not _proportional(operand, tensor):
                    return tap
                rotated_tap = rotated_tap or tap
    return rotated_tap


def _layouts(
    site: str, output: torch.Tensor, shape: tuple[int, ...], query_heads: int, key_heads: int
) -> list[tuple[dict[str, Any], torch.Tensor]]:
    """``output`` as (batch, heads, token, width), under each layout that its size allows."""
    batch, heads, tokens, width = shape
    if batch != tokens and tuple(output.shape[:2]) == (tokens, batch) and output.ndim > 2:
        output = output.transpose(0, 1)
    candidates: list[tuple[dict[str, Any], torch.Tensor]] = []
    if output.numel() == batch * heads * tokens * width:
        if tuple(output.shape) == (batch, heads, tokens, width):
            candidates.append(({"head_axis": "first"}, output))
        if tuple(output.shape) == (batch, tokens, heads, width):
            candidates.append(({"head_axis": "last"}, output.transpose(1, 2)))
        if tuple(output.shape) in ((batch, tokens, heads * width), (batch * tokens, heads * width)):
            flat = output.reshape(batch, tokens, heads, width)
            candidates.append(({"head_axis": "flat"}, flat.transpose(1, 2)))
    slots = query_heads + 2 * key_heads
    if output.shape[-1] == slots * width and output.numel() == batch * tokens * slots * width:
        for fused in _fused_layouts(query_heads, key_heads, site.partition("_")[0]):
            part = split_fused(output.reshape(batch, tokens, -1), fused, width)
            candidates.append(({"fused": fused}, part.transpose(1, 2)))
    return candidates


def split_fused(output: Any, fused: tuple[int, int, int, int], width: int) -> torch.Tensor:
    """(batch, token, fused channels) → (batch, token, heads, width) of the part that ``fused`` names."""
    groups, slots, first, count = fused
    batch, tokens = output.shape[:2]
    return output.reshape(batch, tokens, groups, slots, width)[:, :, :, first : first + count].flatten(2, 3)
