"""Which keys a query may see: none later than it, and none of another document."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from osp_diag.trainer.config import ModelConfig

__all__ = ["Mask", "attention_mask", "block_mask", "document_starts"]

Mask = Bool[Tensor, "sequence 1 query key"] | BlockMask | None
"""What is visible; None: every key that is not later than the query."""

BLOCK = 128
"""Queries and keys of a block, FlexAttention's own size."""
_NARROWEST_FLEX_HEAD = 16
_SINKS = ("softmax_off_by_one", "learned_sink")


def document_starts(document_ids: Int[Tensor, "sequence position"]) -> Int[Tensor, "sequence position"]:
    """Where the document of each position begins: documents are runs of equal ids."""
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    begins = torch.ones_like(document_ids, dtype=torch.bool)
    begins[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return torch.where(begins, index, 0).cummax(dim=1).values


def attention_mask(
    config: ModelConfig, tokens: int, device: torch.device, starts: Int[Tensor, "sequence position"] | None
) -> Mask:
    """The mask of one forward pass, the same in every layer.

    Parameters
    ----------
    config : of the model; its kind of attention says which kernel will read the mask
    tokens : positions of a sequence
    device : of the model
    starts : from :func:`document_starts`; None where a sequence is one document
    """
    flex = device.type == "cuda" and config.head_size >= _NARROWEST_FLEX_HEAD
    if flex and starts is not None:
        return block_mask(starts)
    if flex and config.attention in _SINKS:
        return _causal_block_mask(tokens, device)
    if starts is None:
        return None
    position = torch.arange(tokens, device=device)
    return ((position <= position[:, None]) & (position >= starts[:, :, None]))[:, None]


def block_mask(starts: Int[Tensor, "sequence position"]) -> BlockMask:
    """FlexAttention's mask of causal documents.

    Torch's own ``create_block_mask`` asks about every pair of positions. Since starts never fall, a few
    numbers a block answer: block j of keys holds something for block i of queries if it reaches up to the
    earliest start there, and hides nothing if it begins at or after the latest one and is not the diagonal.
    """

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (key >= starts[batch, query])

    return _from_starts(starts, visible)


@lru_cache(maxsize=16)
def _causal_block_mask(tokens: int, device: torch.device) -> BlockMask:
    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    # A tensor born in inference mode could not be used outside it later.
    with torch.inference_mode(False):
        return _from_starts(torch.zeros(1, tokens, dtype=torch.int64, device=device), visible)


def _from_starts(
    starts: Int[Tensor, "sequence position"], visible: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
) -> BlockMask:
    tokens = starts.shape[1]
    begins = torch.arange(0, tokens, BLOCK, device=starts.device)
    ends = (begins + BLOCK - 1).clamp(max=tokens - 1)
    earliest, latest = starts[:, begins, None], starts[:, ends, None]
    below = begins[None, :] < begins[:, None]
    diagonal = begins[None, :] == begins[:, None]
    # A block that the sequence does not fill counts as partly hidden, as torch has it.
    is_filled = (begins + BLOCK <= tokens)[:, None]
    # Nothing hidden: every start is at or before the keys' first position. Something visible: the diagonal,
    # or keys that reach up to the earliest start.
    full = below & (begins >= latest) & is_filled
    partial = (diagonal | (below & (ends >= earliest))) & ~full
    return BlockMask.from_kv_blocks(
        *_block_lists(partial),
        *_block_lists(full),
        BLOCK_SIZE=BLOCK,
        mask_mod=visible,
        seq_lengths=(tokens, tokens),
    )


def _block_lists(
    mask: Bool[Tensor, "sequence query_block key_block"],
) -> tuple[Int[Tensor, "sequence 1 query_block"], Int[Tensor, "sequence 1 query_block key_block"]]:
    """How many blocks of keys each block of queries has in ``mask``, and which, those first."""
    order = mask.to(torch.int8).argsort(dim=-1, descending=True, stable=True)
    return mask.sum(dim=-1, dtype=torch.int32)[:, None], order.to(torch.int32)[:, None]
