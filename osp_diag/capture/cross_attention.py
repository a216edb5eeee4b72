"""Attention to another sequence: whose tokens its keys are, and the increments of its statistics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from osp_diag.capture.hooks import ForwardPass
from osp_diag.capture.strata import strata_of
from osp_diag.estimators.attention import AttentionMask, TokenIds
from osp_diag.estimators.attention_mask import QueryRows, in_four_axes
from osp_diag.estimators.base import Layout, State, Suite
from osp_diag.estimators.cross_attention import CrossAttentionObservation
from osp_diag.schema import STRATA

if TYPE_CHECKING:
    from osp_diag.seams.attention import AttentionCall

__all__ = ["Crossing", "joined_crossings", "key_tokens", "measure_cross_attention"]


@dataclass(frozen=True)
class Crossing:
    """A call of cross-attention, and the tokens of its keys."""

    call: AttentionCall
    key_strata: Float[Tensor, "stratum batch key"]
    key_ids: Int[Tensor, "batch key"]
    """−1 where they are no tokens of a vocabulary, or not known"""


def key_tokens(
    forward_pass: ForwardPass,
    call: AttentionCall,
    delimiter_ids: Sequence[int],
    stratum_names: Sequence[str] = STRATA,
) -> Crossing:
    """The call with the strata and ids of the tokens behind its keys.

    They are an encoder's: the model's ``input_ids`` and ``attention_mask`` where these have that shape and
    the blocks' own arguments bear a prefix, or what it is handed as ``encoder_attention_mask``. Without a
    mask of them, a key that no query may see is padding. Of ``stratum_names``, the run's, keys
    are in the strata of text alone: kinds of token are told among the queries.
    """
    batch, keys = call.tensor.shape[0], call.lengths[1]
    ids, mask = forward_pass.of_other_sequence(batch, keys)
    device = call.tensor.device
    ids = torch.full((batch, keys), -1, device=device) if ids is None else ids.to(device)
    present = torch.ones((batch, keys), dtype=torch.bool, device=device)
    if mask is not None:
        present = mask.to(device) != 0
    elif call.mask is not None and call.mask.shape[-1] == keys:
        queries = call.lengths[0]
        rows = QueryRows(torch.arange(queries, device=device), (0, queries), (0, keys))
        mask_alone = AttentionMask(causal=False, tensor=call.mask)
        _, allowed = mask_alone.rows(rows, batch=batch, heads=1, like=call.tensor)
        present = allowed.flatten(1, 2).any(1).expand(batch, keys)
    of_text = dict(zip(STRATA, strata_of(ids, present, delimiter_ids), strict=True))
    nowhere = torch.zeros_like(of_text["all"])
    strata = torch.stack([of_text.get(name, nowhere) for name in stratum_names])
    return Crossing(call, strata, torch.where(present, ids, -1))


def measure_cross_attention(
    suite: Suite,
    crossing: Crossing,
    strata: Float[Tensor, "stratum batch token"],
    vocabulary: int | None,
    stratum_names: tuple[str, ...] = STRATA,
) -> tuple[Layout, State]:
    """Measure one call; ``strata`` are of the queries' tokens."""
    call = crossing.call
    mask = AttentionMask(causal=call.causal, tensor=call.mask, function=call.mask_function)
    observation = CrossAttentionObservation(
        call.query,
        call.key,
        call.value,
        strata,
        crossing.key_strata,
        stratum_names=stratum_names,
        scale=call.scale,
        logits=call.logits,
        mask=mask,
        softcap=call.softcap,
        sink_logits=call.sink_logits,
        token_ids=None if vocabulary is None else TokenIds(crossing.key_ids, vocabulary),
    )
    return observation.layout, suite.measure(observation)


def joined_crossings(parts: Sequence[Crossing | None]) -> Crossing | str:
    """The calls that a model made token by token over the same keys as one; text that says why not."""
    crossings = [part for part in parts if part is not None]
    if len(crossings) < len(parts):
        return "some of the passes that make its tokens did not call it"
    first = crossings[0]
    if len(crossings) == 1:
        return first
    for other in crossings[1:]:
        one, two = first.call.key, other.call.key
        if one is not None and (two is None or one.shape != two.shape or not torch.equal(one, two)):
            return "its keys changed while tokens were made (beam search)"
    if any(part.call.mask_function is not None for part in crossings):
        return "its mask is a function of each pass's own positions"
    changes: dict[str, Any] = {}
    for name in ("query", "logits"):
        tensors = [getattr(part.call, name) for part in crossings]
        if all(isinstance(tensor, Tensor) for tensor in tensors):
            changes[name] = torch.cat(tensors, dim=2)
    masks = [_rows(part.call) for part in crossings]
    if any(mask is not None for mask in masks):
        if any(mask is None for mask in masks):
            return "some of the passes that make its tokens mask its keys and others do not"
        changes["mask"] = torch.cat([mask for mask in masks if mask is not None], dim=2)
    return replace(first, call=replace(first.call, **changes))


def _rows(call: AttentionCall) -> Tensor | None:
    """The mask with a row a query."""
    return None if call.mask is None else in_four_axes(call.mask).expand(-1, -1, call.lengths[0], -1)
