"""Attention of four kinds: softmax, softmax with a sink column (two kinds), and softmax with a gate.

A sink column is one more logit s in the softmax's denominator, which takes mass and gives nothing:

    Σ_j exp(l_ij) v_j / (Σ_j exp(l_ij) + exp(s)) = σ(L_i − s) · softmax(l_i) v,  L_i = log Σ_j exp(l_ij)

So ordinary fused attention and its log-sum-exp are enough, and no logit outlives its tile. FlexAttention
hands out L with its gradient. Rejected: an extra key and value in ``scaled_dot_product_attention``, since a
learned s needs either a mask (T × T numbers, and no flash kernel) or eight more channels a head (which makes
128 channels 136, beyond the fast kernels); and torch's private flash operators, which change with releases.
On a CPU, and for heads narrower than FlexAttention takes, the T × T array is simply made.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, flex_attention

from osp_diag.seams.declared import attention_function
from osp_diag.trainer.config import ModelConfig
from osp_diag.trainer.model.masks import Mask
from osp_diag.trainer.model.norms import make_norm
from osp_diag.trainer.model.rotary import Rotation, rotate

__all__ = ["Attention", "attend"]


class Attention(nn.Module):
    """Multi-head attention with grouped keys and values (GQA) and rotary positions.

    Parameters
    ----------
    config : of the model. Under ``query_key_norm`` queries and keys get the model's own kind of norm with an
        initial gain of 1, per head and before the rotation, one gain (vector) for all heads of a layer: as
        Qwen3 under ``rmsnorm``, and without per-channel gains where the model has none.

    ``learned_sink`` has one logit a head, ``sinks``, as gpt-oss. They begin at 0, which is off by one.
    ``gated`` multiplies every channel of every head's output by σ(gate_proj(x)) before the output
    projection, x being what the attention reads (Qiu et al., 2025, their G1).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.kind, self.head_size = config.attention, config.head_size
        width, groups = config.hidden_size, config.number_of_key_value_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, groups * self.head_size, bias=False)
        self.v_proj = nn.Linear(width, groups * self.head_size, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)
        self.q_norm: nn.Module | None = None
        self.k_norm: nn.Module | None = None
        if config.query_key_norm:
            self.q_norm = make_norm(config.norm, self.head_size, None, config.norm_epsilon)
            self.k_norm = make_norm(config.norm, self.head_size, None, config.norm_epsilon)
        if self.kind == "learned_sink":
            self.sinks = nn.Parameter(torch.zeros(config.heads))
        if self.kind == "gated":
            self.gate_proj = nn.Linear(width, width, bias=False)

    def forward(
        self, x: Float[Tensor, "sequence position channel"], by: Rotation, mask: Mask
    ) -> Float[Tensor, "sequence position channel"]:
        # The gate comes first, so that one projection follows the attention, as a probe expects.
        gate = self.gate_proj(x) if self.kind == "gated" else None
        query, key, value = (self._heads(project(x)) for project in (self.q_proj, self.k_proj, self.v_proj))
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        value = value.transpose(1, 2)
        query, key = (rotate(heads.transpose(1, 2), by).to(value.dtype) for heads in (query, key))
        out = attend(query, key, value, sink_logits=self._sink_logits(x), mask=mask)
        out = out.transpose(1, 2).flatten(2)
        return self.o_proj(out if gate is None else out * gate.sigmoid())

    def _heads(
        self, x: Float[Tensor, "sequence position channel"]
    ) -> Float[Tensor, "sequence position head head_channel"]:
        return x.unflatten(-1, (-1, self.head_size))

    def _sink_logits(self, x: Tensor) -> Float[Tensor, " head"] | None:
        if self.kind == "learned_sink":
            return self.sinks
        if self.kind == "softmax_off_by_one":
            return x.new_zeros(self.q_proj.out_features // self.head_size, dtype=torch.float32)
        return None


@attention_function(causal=True)
def attend(
    query: Float[Tensor, "sequence head position channel"],
    key: Float[Tensor, "sequence key_value_head position channel"],
    value: Float[Tensor, "sequence key_value_head position channel"],
    *,
    sink_logits: Float[Tensor, " head"] | None = None,
    mask: Mask = None,
) -> Float[Tensor, "sequence head position channel"]:
    """Causal attention by the fastest exact way that there is for the arguments.

    Parameters
    ----------
    query, key, value : of one dtype; head h reads key-value head h // (heads / key_value_heads)
    sink_logits : of the sink column, or None for none
    mask : from :func:`osp_diag.trainer.model.masks.attention_mask`
    """
    if isinstance(mask, BlockMask):
        return _with_flex(query, key, value, sink_logits, mask)
    if sink_logits is None:
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, enable_gqa=True
        )
    return _dense(query, key, value, sink_logits, mask)


def _with_flex(
    query: Tensor, key: Tensor, value: Tensor, sink_logits: Tensor | None, mask: BlockMask
) -> Tensor:
    options: dict[str, Any] = {"block_mask": mask, "enable_gqa": True}
    if sink_logits is None:
        return _flex(query, key, value, **options)
    return _with_sink_column(query, key, value, sink_logits, options)


# Compiled as part of a block, the gradient through the log-sum-exp comes out wrong on a GPU (torch 2.11, seen
# by tests/test_trainer_model_cuda.py); compiled alone it is right. So the block's graph ends here.
@torch.compiler.disable
def _with_sink_column(
    query: Tensor, key: Tensor, value: Tensor, sink_logits: Tensor, options: dict[str, Any]
) -> Tensor:
    out, auxiliary = _flex(query, key, value, return_aux=AuxRequest(lse=True), **options)
    # The factor σ(L − s) of the module's formula, on what softmax without the column gives.
    share = torch.sigmoid(auxiliary.lse - sink_logits.float()[:, None])
    return (out * share[..., None]).to(out.dtype)


def _flex(*args: Any, **options: Any) -> Any:
    """FlexAttention's kernel, which exists compiled alone: outside of compiled code it is compiled here.

    Also where a probe has the rest of a compiled model run eagerly.
    """
    if torch.compiler.is_compiling():
        return flex_attention(*args, **options)
    with torch.compiler.set_stance("default"):
        return _compiled_flex()(*args, **options)


@lru_cache(maxsize=1)
def _compiled_flex() -> Any:
    return torch.compile(flex_attention)


def _dense(
    query: Tensor, key: Tensor, value: Tensor, sink_logits: Tensor, mask: Tensor | None
) -> Float[Tensor, "sequence head position channel"]:
    """By definition, with the T × T array; the softmax in float32."""
    batch, heads, tokens, channels = query.shape
    key, value = (part.repeat_interleave(heads // part.shape[1], dim=1) for part in (key, value))
    logits = (query @ key.transpose(-1, -2)).float() * channels**-0.5
    if mask is None:
        mask = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).tril()
    sinks = sink_logits.float()[None, :, None, None].expand(batch, heads, tokens, 1)
    # The sink column takes part in the softmax, and is cut off before the values are averaged.
    weights = torch.cat([logits.masked_fill(~mask, -torch.inf), sinks], dim=-1).softmax(-1)[..., :-1]
    return weights.to(value.dtype) @ value
