"""What one attention call of a running model looks like, whichever way it was seen."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from osp_diag.errors import CaptureError

__all__ = ["DOCUMENT_OFFSETS", "AttentionCall", "MaskFunction", "Seam", "SkipReason", "add_bias"]

Seam = Literal[
    "attention interface",
    "scaled_dot_product_attention",
    "multi-head attention",
    "declared function",
    "softmax",
]

DOCUMENT_OFFSETS = re.compile(r"^cu(mulative)?_?seq(uence)?_?len(gth)?s?(_q|_k)?$")
"""What arguments are called that hold the offsets of documents in rows read one after the other, as the
kernels of flash-attn take them."""

MaskFunction = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
"""(batch, head, query position, key position) → allowed, as FlexAttention's ``mask_mod``."""


class SkipReason:
    """Why a call was counted in ``AttentionCapture.skipped`` and not delivered."""

    CROSS = "cross-attention"
    CACHED = "cached keys (more keys than queries)"
    LAYOUT = "query is neither (batch, head, token, channel) nor (batch·head, token, channel)"
    NESTED = "nested tensors"
    EXTRA_KEYS = "extra key appended by nn.MultiheadAttention (bias_k or add_zero_attn)"
    FUSED_ENCODER = (
        "nn.TransformerEncoderLayer's fused inference path; "
        "torch.backends.mha.set_fastpath_enabled(False) makes it visible"
    )


@dataclass(frozen=True, kw_only=True)
class AttentionCall:
    """One attention call, of self-attention or (``crosses``) over another sequence.

    Tensors are the model's own, detached: read them, never write.

    The attention weights are the softmax over allowed keys of softcap·tanh(scale·q·kᵀ / softcap) plus the
    additive mask and, where there are ``sink_logits``, one more logit per head that takes mass and gives
    nothing. A key is allowed where ``causal``, ``window``, ``mask`` and ``mask_function`` all allow it.
    Head h of the query reads head ⌊h·G/H⌋ of key and value.

    Attributes:
        query: (B, H, T, hd), as multiplied with the keys (after RoPE and QK-norm, before scaling).
        key: (B, G, T, hd) with G dividing H; not repeated where the model hands it over so.
        value: (B, G, T, hdv).
        scale: the factor of q·k.
        seam: how the call was seen.
        module: the innermost module around the call.
        causal: key position ≤ query position.
        window: query position − key position < ``window``; without ``causal`` also the other way round.
        mask: broadcastable to (B, H, T, T). Boolean: True where attention is allowed. Floating: added to the
            scaled and soft-capped logits (ALiBi and relative position biases are here too).
        mask_function: FlexAttention's ``mask_mod``.
        softcap: bound of the logits, or None.
        sink_logits: (H,) learned logits of an imaginary key (gpt-oss), or None.
        logits: (B, H, T, T) where the model itself made them (``seam == "softmax"``): scaled, biased and
            masked, exactly what its softmax received. Query, key and value are then None, and nothing is
            known of the mask but what the logits show.
        crosses: keys and values are of another sequence, of another length S: (B, G, S, hd).
    """

    query: Tensor | None
    key: Tensor | None
    value: Tensor | None
    scale: float
    seam: Seam
    module: nn.Module | None = None
    causal: bool = False
    window: int | None = None
    mask: Tensor | None = None
    mask_function: MaskFunction | None = None
    softcap: float | None = None
    sink_logits: Tensor | None = None
    logits: Tensor | None = None
    crosses: bool = False

    @property
    def tensor(self) -> Tensor:
        """Query or logits, whichever there is: (B, H, T, …)."""
        tensor = self.logits if self.query is None else self.query
        if tensor is None:
            raise CaptureError("an AttentionCall holds neither query and key nor logits; give it one of them")
        return tensor

    @property
    def lengths(self) -> tuple[int, int]:
        """(number of queries, number of keys)."""
        return self.tensor.shape[-2], self.tensor.shape[-1] if self.key is None else self.key.shape[-2]

    def detached(self) -> AttentionCall:
        """The same call without autograd history."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        tensors: dict[str, Any] = {k: v.detach() for k, v in values.items() if isinstance(v, Tensor)}
        return replace(self, **tensors)

    def of_first_stream(self, streams: int) -> AttentionCall:
        """The call of the first of ``streams`` whose queries stand one behind the other."""
        if streams == 1:
            return self
        queries = self.lengths[0]
        changes: dict[str, Any] = {}
        for name in ("query", "logits", "mask"):
            tensor = getattr(self, name)
            if tensor is not None and tensor.ndim > 2 and tensor.shape[-2] == queries:
                changes[name] = tensor[..., : queries // streams, :]
        return replace(self, **changes)

    def with_distinct_keys(self, copies: int) -> AttentionCall:
        """The same call with each key and value head once, where the model repeated it ``copies`` times."""
        if copies == 1 or self.key is None or self.value is None:
            return self
        return replace(self, key=self.key[:, ::copies], value=self.value[:, ::copies])


def add_bias(bias: Tensor | None, mask: Tensor | None) -> Tensor | None:
    """One additive tensor from a bias of the logits and a mask, as transformers combines them."""
    if bias is None or mask is None:
        return mask if bias is None else bias
    if mask.dtype == torch.bool:
        return torch.where(mask, bias, torch.finfo(bias.dtype).min)
    return bias + mask
