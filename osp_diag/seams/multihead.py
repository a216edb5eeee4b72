"""``torch.nn.MultiheadAttention``, whose fast path calls neither SDPA nor softmax where Python can see it.

Its query and key are computed a second time from the module's input and weights: one projection more, only
where such a module is observed.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from osp_diag.seams.call import AttentionCall, SkipReason, add_bias

__all__ = ["describe_multihead", "takes_fused_path"]

_SIGNATURE = inspect.signature(nn.MultiheadAttention.forward)


def takes_fused_path(layer: nn.TransformerEncoderLayer) -> bool:
    """Whether the layer may run as one fused kernel, which any hook on it would switch off.

    Outputs with a probe attached must be those without, so such layers are left alone.
    """
    if layer.training or torch.is_grad_enabled() or torch.is_autocast_enabled():
        return False
    return torch.backends.mha.get_fastpath_enabled()


def describe_multihead(
    module: nn.MultiheadAttention, args: tuple[Any, ...], kwargs: dict[str, Any], *, crossing: bool = False
) -> AttentionCall | str:
    """The call, or the reason why it is skipped; of cross-attention only where it is asked for."""
    arguments = _SIGNATURE.bind(module, *args, **kwargs).arguments
    inputs = [arguments[name] for name in ("query", "key", "value")]
    if any(tensor.is_nested for tensor in inputs):
        return SkipReason.NESTED
    crosses = inputs[1] is not inputs[0]
    if crosses and not crossing:
        return SkipReason.CROSS
    if module.bias_k is not None or module.add_zero_attn:
        return SkipReason.EXTRA_KEYS
    if inputs[0].ndim == 2:
        inputs = [tensor.unsqueeze(0) for tensor in inputs]
    elif not module.batch_first:
        inputs = [tensor.transpose(0, 1) for tensor in inputs]
    query, key, value = (_project(module, index, tensor) for index, tensor in enumerate(inputs))
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        scale=query.shape[-1] ** -0.5,
        seam="multi-head attention",
        module=module,
        mask=_mask(
            arguments.get("attn_mask"), arguments.get("key_padding_mask"), query.shape[0], query.dtype
        ),
        crosses=crosses,
    )


def _project(module: nn.MultiheadAttention, index: int, tensor: Tensor) -> Tensor:
    width = module.embed_dim
    if module._qkv_same_embed_dim:
        weight = module.in_proj_weight[index * width : (index + 1) * width]
    else:
        weight = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)[index]
    bias = None if module.in_proj_bias is None else module.in_proj_bias[index * width : (index + 1) * width]
    # Autocast is off here, so that its cache of cast weights is not filled without gradients; cast by hand.
    kind = tensor.device.type
    if torch.is_autocast_enabled(kind):
        dtype = torch.get_autocast_dtype(kind)
        tensor, weight = tensor.to(dtype), weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    with torch.no_grad(), torch.autocast(kind, enabled=False):
        projected = functional.linear(tensor, weight, bias)
    return projected.unflatten(-1, (module.num_heads, -1)).transpose(1, 2)


def _mask(attention: Tensor | None, padding: Tensor | None, batch: int, dtype: torch.dtype) -> Tensor | None:
    """Both masks as one; boolean ones say True where attention is *not* allowed, the reverse of SDPA."""
    if attention is not None:
        attention = attention.unflatten(0, (batch, -1)) if attention.ndim == 3 else attention[None, None]
    if padding is not None:
        padding = padding[None, None, None] if padding.ndim == 1 else padding[:, None, None, :]
    masks = [m.logical_not() if m.dtype == torch.bool else m for m in (attention, padding) if m is not None]
    if len(masks) < 2:
        return masks[0] if masks else None
    first, second = masks
    if first.dtype == torch.bool and second.dtype == torch.bool:
        return first & second
    return add_bias(second, first) if first.dtype == torch.bool else add_bias(first, second)
