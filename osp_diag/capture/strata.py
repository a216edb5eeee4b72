"""Which tokens a statistic speaks of: the strata of every forward pass, as weights on the device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor

from osp_diag.capture.token_kinds import TokenKinds
from osp_diag.errors import CaptureError

__all__ = ["strata_of"]


# Why every state holds all of them: docs/decisions.md, Estimators.
def strata_of(
    input_ids: Int[Tensor, "batch token"] | None,
    attention_mask: Shaped[Tensor, "batch token"] | None,
    delimiter_ids: Sequence[int] | Int[Tensor, " delimiter"],
    position_ids: Int[Tensor, "batch token"] | None = None,
    *,
    inputs_embeds: Float[Tensor, "batch token channel"] | None = None,
    kinds: TokenKinds | None = None,
    start: int = 0,
) -> Float[Tensor, "stratum batch token"]:
    """The weight, 0 or 1, of every token in every stratum.

    * ``all``: every token that is not padding;
    * ``first``: the first token of each row that is not padding and, where positions are given, every
      token at position 0, so that each document of a packed row has its own first token;
    * ``delimiter``: not first, and its id is one of ``delimiter_ids``;
    * ``rest``: neither. So all = first + delimiter + rest.

    A token of one of the model's ``kinds`` is of that stratum and of no other but ``all``.

    The host never waits for the device, except that delimiter ids given as Python numbers are copied
    there once and kept.

    Parameters
    ----------
    input_ids
        Token ids; None where the model is called with embeddings, and then no token is a delimiter.
    attention_mask
        Not 0 where there is a token, 0 on padding; None for no padding. A longer one than the tokens
        (it covers a key-value cache) is read from its end.
    delimiter_ids
        The ids of the ``delimiter`` stratum, in any order.
    position_ids
        Positions, of shape (batch, token), (token,) or (1, token).
    inputs_embeds
        Stands in for missing ``input_ids``: only its shape and device are read.
    kinds
        Kinds of tokens that the model has beside text.
    start
        Position of the first token of each row, from which the positions of kinds count.

    Returns
    -------
    float32 of shape (stratum, batch, token) in the order of :data:`STRATA`, or of ``kinds.strata``, on the
    device of the tokens.

    Raises
    ------
    CaptureError
        The shape of the tokens cannot be learnt, or the mask or the positions do not have it.
    """
    batch, tokens, device = _shape_of(input_ids, attention_mask, inputs_embeds)
    present = _present(attention_mask, batch, tokens, device)
    # Padding may stand on either side: the first token is where the count of tokens becomes 1.
    first = present & (present.cumsum(dim=1) == 1)
    if position_ids is not None:
        first = first | (present & (_positions(position_ids, batch, tokens, device) == 0))
    delimiter = present & ~first
    if input_ids is None or len(delimiter_ids) == 0:
        delimiter = torch.zeros_like(present)
    else:
        delimiter = delimiter & _is_member(input_ids, _sorted_on_device(delimiter_ids, device))
    rest = present & ~first & ~delimiter
    parts = [first, delimiter, rest]
    if kinds is not None:
        ids = torch.full((batch, tokens), -1, device=device) if input_ids is None else input_ids
        parts = _with_kinds(kinds, present, parts, kinds.members(ids, start))
    return torch.stack([present, *parts]).to(torch.float32)


def _with_kinds(
    kinds: TokenKinds, present: Tensor, of_text: list[Tensor], members: list[Tensor]
) -> list[Tensor]:
    """The strata but ``all``, of a model with kinds of tokens."""
    members = [mine & present for mine in members]
    others = present
    for mine in members:
        others = others & ~mine
    if kinds.has_remaining:
        return [*members, others]
    first, delimiter, rest = (part & others for part in of_text)
    return [first, delimiter, *members, rest]


def _shape_of(
    input_ids: Tensor | None, attention_mask: Tensor | None, inputs_embeds: Tensor | None
) -> tuple[int, int, torch.device]:
    for tensor in (input_ids, inputs_embeds, attention_mask):
        if tensor is not None and tensor.ndim >= 2:
            return tensor.shape[0], tensor.shape[1], tensor.device
    raise CaptureError(
        "the forward pass has no input_ids, inputs_embeds or attention_mask of shape (batch, token, …), so "
        "its tokens cannot be told apart; call the model with one of them"
    )


def _present(mask: Tensor | None, batch: int, tokens: int, device: torch.device) -> Tensor:
    if mask is None:
        return torch.ones(batch, tokens, dtype=torch.bool, device=device)
    if mask.ndim != 2 or mask.shape[0] != batch or mask.shape[1] < tokens:
        raise CaptureError(
            f"the attention mask has shape {tuple(mask.shape)}, but padding is read from one of shape "
            f"(batch, token) = ({batch}, {tokens}); pass the tokenizer's mask and let the model expand it"
        )
    values = mask[:, -tokens:].to(device)
    if not values.is_floating_point():
        return values != 0
    # Made for adding to logits (Longformer's, near its blocks), it is 0 for tokens and negative for padding.
    smallest, largest = values.amin(), values.amax()
    is_factor = (smallest >= 0) & (largest > 0) & (largest <= 1)
    return torch.where(is_factor, values > 0, values >= 0)


def _positions(position_ids: Tensor, batch: int, tokens: int, device: torch.device) -> Tensor:
    if position_ids.shape not in ((batch, tokens), (1, tokens), (tokens,)):
        raise CaptureError(
            f"position_ids have shape {tuple(position_ids.shape)}, which does not fit tokens of shape "
            f"(batch, token) = ({batch}, {tokens})"
        )
    return position_ids.to(device)


def _sorted_on_device(ids: Sequence[int] | Tensor, device: torch.device) -> Tensor:
    """``ids`` sorted, on ``device``."""
    if isinstance(ids, Tensor):
        return ids.to(device=device, dtype=torch.int64, non_blocking=True).sort().values
    return _cached_on_device(tuple(ids), device)


@lru_cache(maxsize=32)
def _cached_on_device(ids: tuple[int, ...], device: torch.device) -> Tensor:
    # A tensor born in inference mode could not be used outside it later.
    with torch.inference_mode(False):
        return torch.tensor(sorted(ids), dtype=torch.int64, device=device)


def _is_member(values: Tensor, ordered: Tensor) -> Tensor:
    """Elementwise membership by bisection; ``torch.isin`` may wait for the device to learn a size."""
    values = values.to(torch.int64)
    place = torch.searchsorted(ordered, values.contiguous()).clamp(max=ordered.shape[0] - 1)
    return ordered[place] == values
