"""Attention calls seen as torch functions, in models of any make.

``scaled_dot_product_attention`` hands over query, key and mask. Models that multiply, mask and normalise by
hand have made the T×T logits themselves; those are taken where the softmax receives them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import (
    TorchFunctionMode,
    _get_current_function_mode_stack,
    _pop_mode,
    _push_mode,
)

from osp_diag.seams.call import AttentionCall, SkipReason
from osp_diag.seams.declared import is_declared

__all__ = [
    "Arguments",
    "AttentionFunctionMode",
    "Frame",
    "describe_scaled_dot_product",
    "describe_softmax",
    "remove_mode",
    "scaled_dot_product_arguments",
    "suspended",
]

Frame = tuple[nn.Module, tuple[Any, ...], Mapping[str, Any]]
"""A module being run, with the arguments of its forward."""

_SCALED_DOT_PRODUCT: frozenset[Any] = frozenset(
    {
        functional.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention,
        torch.ops.aten.scaled_dot_product_attention.default,
    }
)
_SOFTMAX: frozenset[Any] = frozenset(
    {
        torch.softmax,
        functional.softmax,
        Tensor.softmax,
        torch.special.softmax,
        torch._safe_softmax,
        torch.ops.aten.softmax,
        torch.ops.aten.softmax.int,
        torch.ops.aten._softmax,
        torch.ops.aten._softmax.default,
        torch.ops.aten._safe_softmax,
        torch.ops.aten._safe_softmax.default,
    }
)


Arguments = tuple[tuple[Any, ...], Mapping[str, Any]]
"""Of a function: those by place, and those by name."""


class AttentionFunctionMode(TorchFunctionMode):
    """Runs attention-like torch functions with what ``prepare(func, kind, args, kwargs)`` gives.

    torch takes the mode off its stack while the handler runs, so what a function calls inside (``F.softmax``
    calls ``Tensor.softmax``) is not seen a second time.
    """

    def __init__(self, prepare: Callable[[Any, str, tuple[Any, ...], Mapping[str, Any]], Arguments]) -> None:
        super().__init__()
        self._prepare = prepare

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_compiling():
            return func(*args, **kwargs)
        kind = _kind_of(func)
        if kind is None:
            return func(*args, **kwargs)
        arguments, named = self._prepare(func, kind, args, kwargs)
        return func(*arguments, **named)


def _kind_of(func: Any) -> str | None:
    if func in _SCALED_DOT_PRODUCT:
        return "scaled_dot_product_attention"
    if func in _SOFTMAX:
        return "softmax"
    return "declared function" if is_declared(func) else None


def remove_mode(mode: TorchFunctionMode) -> int | None:
    """Take a mode off this thread's stack wherever it is. Its depth, or None where it is not there."""
    depth = next((i for i, entry in enumerate(_get_current_function_mode_stack()) if entry is mode), None)
    if depth is not None:
        above = [_pop_mode() for _ in range(len(_get_current_function_mode_stack()) - depth)][:-1]
        for entry in reversed(above):
            _push_mode(entry)
    return depth


@contextmanager
def suspended(mode: TorchFunctionMode) -> Iterator[None]:
    """Keep a mode off the stack for a while; nothing happens where it is not on it."""
    depth = remove_mode(mode)
    try:
        yield
    finally:
        if depth is not None:
            above = [_pop_mode() for _ in range(len(_get_current_function_mode_stack()) - depth)]
            _push_mode(mode)
            for entry in reversed(above):
                _push_mode(entry)


def _token_shapes(frames: list[Frame], streams: int = 1) -> Iterator[tuple[int, int]]:
    """(B, T), as both readings of the hidden states that the innermost module was given.

    Where a convolution in it reads them as (B, channel, T), so they are read too.
    """
    for module, args, kwargs in reversed(frames):
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
                yield value.shape[0], value.shape[1] // streams
                if streams > 1:
                    yield value.shape[0], value.shape[1]
                yield value.shape[1], value.shape[0]
                convolutions = (m for m in module.children() if isinstance(m, nn.Conv1d))
                if any(c.kernel_size == (1,) and c.in_channels == value.shape[1] for c in convolutions):
                    yield value.shape[0], value.shape[2]
                return


def _four_dimensional(tensor: Tensor, batch: int) -> Tensor:
    """(B·H, T, hd) → (B, H, T, hd)."""
    return tensor if tensor.ndim == 4 else tensor.unflatten(0, (batch, tensor.shape[0] // batch))


def scaled_dot_product_arguments(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of ``scaled_dot_product_attention`` by name."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    return dict(zip(names, args, strict=False)) | dict(kwargs)


def describe_scaled_dot_product(
    args: tuple[Any, ...], kwargs: Mapping[str, Any], frames: list[Frame]
) -> AttentionCall | str:
    """The call, or the reason why it is skipped."""
    arguments = scaled_dot_product_arguments(args, kwargs)
    query, key, value = arguments["query"], arguments["key"], arguments["value"]
    if query.is_nested or key.is_nested:
        return SkipReason.NESTED
    if query.ndim not in (3, 4) or key.ndim != query.ndim:
        return SkipReason.LAYOUT
    mask = arguments.get("attn_mask")
    if query.ndim == 3:
        rows = query.shape[0]
        if key.shape[0] != rows:
            return SkipReason.LAYOUT
        # Unknown batch size: one sequence, its heads leading.
        batch = next((b for b, t in _token_shapes(frames) if t == query.shape[1] and rows % b == 0), 1)
        if mask is not None and mask.ndim == 3:
            mask = _four_dimensional(mask, batch) if mask.shape[0] == rows else mask[None]
        query, key, value = (_four_dimensional(tensor, batch) for tensor in (query, key, value))
    if key.shape[0] != query.shape[0]:
        key, value = (tensor.expand(query.shape[0], -1, -1, -1) for tensor in (key, value))
    scale = arguments.get("scale")
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        seam="scaled_dot_product_attention",
        module=frames[-1][0] if frames else None,
        causal=bool(arguments.get("is_causal", False)),
        mask=mask,
    )


def describe_softmax(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    frames: list[Frame],
    heads: int | None,
    *,
    streams: int = 1,
) -> AttentionCall | str | None:
    """The call, the reason why it is skipped, or None where the softmax is no attention.

    Attention is a softmax over the last axis of (B, H, T, T) or (B·H, T, T), where B and T are those of the
    hidden states at hand. ``heads`` is the model's number of heads where known: it tells a router's
    (B, T, experts) with as many experts as tokens from a one-headed (B, T, T). Of ``streams`` that stand one
    behind the other in the rows each has its own softmax.
    """
    logits = args[0] if args else kwargs.get("input", kwargs.get("self"))
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(logits, Tensor) or logits.ndim not in (3, 4) or dim not in (-1, logits.ndim - 1):
        return None
    for batch, tokens in _token_shapes(frames, streams):
        if logits.shape[-2] != tokens or logits.shape[0] % batch:
            continue
        if logits.ndim == 4 and logits.shape[0] != batch:
            continue
        number = logits.shape[1] if logits.ndim == 4 else logits.shape[0] // batch
        # A (B·H, T, T) of one head looks like a router's (B, T, experts): not in a model of several heads.
        if logits.ndim == 3 and number == 1 and (heads not in (None, 1) or logits.shape[-1] != tokens):
            continue
        return AttentionCall(
            query=None,
            key=None,
            value=None,
            scale=1.0,
            seam="softmax",
            module=frames[-1][0],
            logits=_four_dimensional(logits, batch),
        )
    return None
