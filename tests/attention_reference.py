"""What attention tests share: dense weights by definition, and proof that a capture leaves no trace."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from osp_diag.seams.attention import AttentionCall, AttentionCapture


def dense_weights(call: AttentionCall) -> Tensor:
    """Attention weights (B, H, T, T) in float64, by the definition in ``AttentionCall``."""
    if call.logits is not None:
        return call.logits.double().softmax(-1)
    assert call.query is not None
    assert call.key is not None
    query, key = call.query.double(), call.key.double()
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = call.scale * query @ key.transpose(-1, -2)
    if call.softcap is not None:
        logits = call.softcap * torch.tanh(logits / call.softcap)
    batch, heads, tokens, _ = logits.shape
    query_position, key_position = torch.arange(tokens)[:, None], torch.arange(tokens)[None, :]
    allowed = torch.ones(batch, heads, tokens, tokens, dtype=torch.bool)
    if call.causal:
        allowed &= key_position <= query_position
    if call.window is not None:
        allowed &= (query_position - key_position).abs() < call.window
    if call.mask_function is not None:
        for b in range(batch):
            for q in range(tokens):
                for k in range(tokens):
                    index = (torch.tensor(i) for i in (b, 0, q, k))
                    allowed[b, :, q, k] &= bool(call.mask_function(*index))
    if call.mask is not None and call.mask.dtype == torch.bool:
        allowed &= call.mask
    elif call.mask is not None:
        logits = logits + call.mask
    logits = logits.masked_fill(~allowed, torch.finfo(torch.float64).min)
    if call.sink_logits is not None:
        sinks = call.sink_logits.double().reshape(1, -1, 1, 1).expand(batch, -1, tokens, 1)
        return torch.cat([logits, sinks], dim=-1).softmax(-1)[..., :-1]
    return logits.softmax(-1)


def observed(model: nn.Module, batch: dict[str, Any]) -> tuple[Any, list[AttentionCall], AttentionCapture]:
    calls: list[AttentionCall] = []
    with torch.no_grad(), AttentionCapture(model, calls.append) as capture:
        output = model(**batch)
    return output, calls, capture


@contextmanager
def no_trace(model: nn.Module) -> Iterator[None]:
    """Asserts that hooks, tables, configs, modes and the random state are afterwards as before."""

    def state() -> tuple[Any, ...]:
        hooks = [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._forward_hooks_always_called))
            for m in model.modules()
        ]
        configs = [
            (type(c._attn_implementation), c._attn_implementation)
            for c in (getattr(m, "config", None) for m in model.modules())
            if hasattr(c, "_attn_implementation")
        ]
        tables = (
            list(type(ALL_ATTENTION_FUNCTIONS)._global_mapping.items()),
            list(type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping.items()),
        )
        flags = [m.training for m in model.modules()]
        return hooks, configs, tables, flags, _get_current_function_mode_stack()

    before, random = state(), torch.get_rng_state()
    yield
    assert state() == before
    assert torch.equal(torch.get_rng_state(), random)
