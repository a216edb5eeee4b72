"""Documents that stand one after the other in a sequence and do not see one another.

Each becomes a sequence of its own before anything is measured, so that first tokens, sinks, positions and all
statistics by sequence are those of the documents fed one by one.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from osp_diag.capture.hooks import ForwardPass
from osp_diag.estimators.attention_mask import AttentionMask, QueryRows, in_four_axes
from osp_diag.seams.call import DOCUMENT_OFFSETS

if TYPE_CHECKING:
    from osp_diag.seams.attention import AttentionCall

__all__ = ["Documents", "cuts_of_call", "documents_of"]

_DOCUMENT_IDS = re.compile(r"^(documents?|docs?|segments?|seq(uence)?)_(ids?|idx|index|indices)$")
_MASK = re.compile(r"mask|bias", re.IGNORECASE)
_HIDDEN = -1e3
_TILE = 128


@dataclass(frozen=True)
class Documents:
    """Documents of similar length, each a row.

    Attributes
    ----------
    sequence : of the batch, in which each stands
    position : column there of each of its tokens; of the shorter ones' padding, any
    valid : False on that padding
    """

    sequence: Int[Tensor, " document"]
    position: Int[Tensor, "document token"]
    valid: Bool[Tensor, "document token"]

    def on(self, device: torch.device) -> Documents:
        """The same on a device."""
        parts = (self.sequence, self.position, self.valid)
        return self if self.valid.device == device else Documents(*(part.to(device) for part in parts))

    def rows(self, values: Tensor) -> Tensor:
        """(sequence, position, …) → (document, token, …)."""
        return values[self.sequence[:, None], self.position]

    def call(self, call: AttentionCall) -> AttentionCall:
        """The attention call with a document a row; what it says of its mask is then not to be read."""
        changes: dict[str, Any] = {"mask": None, "mask_function": None}
        for name in ("query", "key", "value"):
            tensor = getattr(call, name)
            if tensor is not None:
                changes[name] = self.rows(tensor.transpose(1, 2)).transpose(1, 2)
        if call.logits is not None:
            tokens = call.logits.shape[-2]
            pairs = self._pairs(call.logits[..., :tokens])
            extra = self.rows(call.logits[..., tokens:].transpose(1, 2)).transpose(1, 2)
            changes["logits"] = torch.cat([pairs, extra], dim=-1)
        return replace(call, **changes)

    def mask(self, mask: AttentionMask) -> AttentionMask:
        """What the queries of each document see of its own keys."""
        tensor, function = mask.tensor, mask.function
        if tensor is not None:
            tensor = in_four_axes(tensor)
            width = int(self.position.max()) + 1
            tensor = self._pairs(
                tensor.expand(-1, -1, max(width, tensor.shape[2]), max(width, tensor.shape[3]))
            )
        moved = function

        def within_documents(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            assert function is not None, "asked only where there is one"
            document = self.sequence[batch]
            return function(document, head, self.position[batch, query], self.position[batch, key])

        if function is not None:
            moved = within_documents
        partly = mask.partly_causal
        if partly is not None:
            partly = partly[self.sequence]
        return replace(mask, tensor=tensor, function=moved, keys=self.valid, partly_causal=partly)

    def _pairs(self, values: Tensor) -> Tensor:
        """(sequence or 1, head, query, key) → (document, head, token, token)."""
        sequence = self.sequence if values.shape[0] > 1 else torch.zeros_like(self.sequence)
        pairs = values[sequence[:, None, None], :, self.position[:, :, None], self.position[:, None, :]]
        return pairs.permute(0, 3, 1, 2)


# Why documents are taken apart, and when: docs/decisions.md, Capture.
def documents_of(forward_pass: ForwardPass, valid: Bool[Tensor, "batch token"]) -> list[Documents]:
    """The documents of a pass, or nothing where each sequence is one.

    Positions that begin again, ids of documents, or a mask of the caller's own make one ask; whether they
    are documents is told by the mask that the first block is handed: none of them sees another. Attention
    kernels of transformers that are given no mask ("flash") follow the positions, or the documents' offsets
    (``cu_seq_lens_q``); so does a model of somebody's own that takes such (``cu_seqlens``).
    """
    batch, tokens = valid.shape
    cumulative = _cumulative_starts(forward_pass, valid)
    declared = _declared_starts(forward_pass, batch, tokens)
    if cumulative is not None:
        declared = cumulative if declared is None else declared | cumulative
    masks = list(_masks(forward_pass.block_arguments, batch, tokens))
    if declared is None and not _may_be_the_callers(forward_pass, batch, tokens):
        return []
    if masks:
        starts = _cuts(masks[0], valid)
        # A layer that attends within chunks cuts its sequences too, and they are no documents.
        if forward_pass.attends_in_chunks:
            starts = starts & declared if declared is not None else torch.zeros_like(starts)
    elif cumulative is not None and (forward_pass.follows_positions or not forward_pass.makes_its_masks):
        # Masks that attention makes of them itself are looked at when it is called.
        starts, forward_pass.cut_by_attention = cumulative, not forward_pass.follows_positions
    elif declared is not None and forward_pass.follows_positions and batch == 1:
        starts = declared
    else:
        return []
    starts = (starts & valid) | (valid & (valid.cumsum(1) == 1))
    if not bool((starts.sum(1) > 1).any()):
        return []
    return list(_by_length(starts.cpu(), valid.cpu(), valid.device))


def _declared_starts(forward_pass: ForwardPass, batch: int, tokens: int) -> Tensor | None:
    """Where positions or document ids say that something begins; None where neither was given."""
    starts: Tensor | None = None
    positions = forward_pass.position_ids(batch, tokens)
    if positions is not None:
        positions = positions.expand(batch, tokens)
        starts = torch.zeros((batch, tokens), dtype=torch.bool, device=positions.device)
        starts[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    for arguments in forward_pass.levels:
        for name, value in arguments.items():
            is_ids = isinstance(value, Tensor) and tuple(value.shape) == (batch, tokens)
            if is_ids and _DOCUMENT_IDS.search(name) and not value.is_floating_point():
                changes = torch.zeros(value.shape, dtype=torch.bool, device=value.device)
                changes[:, 1:] = value[:, 1:] != value[:, :-1]
                starts = changes if starts is None else starts | changes.to(starts.device)
    return starts


def _cumulative_starts(forward_pass: ForwardPass, valid: Tensor) -> Tensor | None:
    """Where the offsets of documents say that one begins; None where there are none that fit."""
    for arguments in forward_pass.levels:
        for name, value in arguments.items():
            if not isinstance(value, Tensor) or not DOCUMENT_OFFSETS.search(name) or value.ndim != 1:
                continue
            offsets = [] if value.is_floating_point() else value.tolist()
            rises = all(one <= other for one, other in pairwise(offsets))
            if len(offsets) > 1 and offsets[0] == 0 and rises and offsets[-1] <= valid.numel():
                starts = torch.zeros(valid.numel(), dtype=torch.bool, device=valid.device)
                starts[[offset for offset in offsets if offset < valid.numel()]] = True
                return starts.reshape(valid.shape)
    return None


def cuts_of_call(call: AttentionCall, mask: AttentionMask, valid: Tensor) -> Bool[Tensor, "batch token"]:
    """Where no query from a token on sees an earlier key, by what an attention call was given.

    The host waits for nothing, but the answer is on the call's device.
    """
    if call.logits is not None:
        tokens = call.logits.shape[-2]
        seen = (call.logits[..., :tokens] > _HIDDEN).any(1, keepdim=True)
        mask = AttentionMask(causal=False, tensor=seen)
    return _cuts(mask, valid > 0)


def _may_be_the_callers(forward_pass: ForwardPass, batch: int, tokens: int) -> bool:
    """Whether a mask may come from the caller: transformers make theirs of the padding mask alone."""
    if not forward_pass.makes_its_masks:
        return True
    # The model and what it wraps: further inside (BERT's encoder) masks are the model's own, and asking costs
    # a wait for the device.
    return any(True for level in forward_pass.levels[:2] for _ in _masks(level, batch, tokens))


def _masks(arguments: Mapping[str, Any], batch: int, tokens: int) -> Iterator[AttentionMask]:
    for name, value in arguments.items():
        if hasattr(value, "mask_mod"):
            yield AttentionMask(causal=False, function=value.mask_mod)
        if not isinstance(value, Tensor) or not _MASK.search(name) or value.dtype not in _MASK_DTYPES:
            continue
        if value.ndim == 4 and tuple(value.shape[-2:]) == (tokens, tokens) and value.shape[0] in (1, batch):
            yield AttentionMask(causal=False, tensor=value)


_MASK_DTYPES = (torch.bool, torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _cuts(mask: AttentionMask, valid: Tensor) -> Tensor:
    """(batch, token): no query from here on sees an earlier key, and no earlier one a key from here on."""
    batch, tokens = valid.shape
    place = torch.arange(tokens, device=valid.device)
    nearest, furthest = [], []
    for start in range(0, tokens, _TILE):
        span = (start, min(start + _TILE, tokens))
        rows = QueryRows(place[slice(*span)], span, (0, tokens))
        bias, allowed = mask.rows(rows, batch=batch, heads=1, like=valid)
        if bias is not None:
            allowed = allowed & (bias > _HIDDEN)
        sees = allowed.any(1).expand(batch, -1, -1) & valid[:, None, :] & valid[:, slice(*span), None]
        nearest.append(torch.where(sees, place, tokens).amin(-1))
        furthest.append(torch.where(sees, place, -1).amax(-1))
    earliest = torch.cat(nearest, 1).flip(1).cummin(1).values.flip(1)
    latest = torch.cat(furthest, 1).cummax(1).values
    before = torch.cat([torch.full_like(latest[:, :1], -1), latest[:, :-1]], 1)
    return (earliest >= place) & (before < place)


def _by_length(starts: Tensor, valid: Tensor, device: torch.device) -> Iterator[Documents]:
    """Documents whose lengths lie between the same powers of two together: little of them is padding."""
    groups: dict[int, list[tuple[int, list[int]]]] = {}
    for row in range(len(starts)):
        columns = valid[row].nonzero()[:, 0].tolist()
        is_start = starts[row].tolist()
        document: list[int] = []
        for index, column in enumerate(columns):
            document.append(column)
            if index + 1 == len(columns) or is_start[columns[index + 1]]:
                groups.setdefault(len(document).bit_length(), []).append((row, document))
                document = []
    for documents in groups.values():
        length = max(len(columns) for _, columns in documents)
        position = torch.tensor([columns + columns[:1] * (length - len(columns)) for _, columns in documents])
        present = torch.tensor([len(columns) for _, columns in documents])[:, None] > torch.arange(length)
        sequence = torch.tensor([row for row, _ in documents])
        yield Documents(sequence, position, present).on(device)
