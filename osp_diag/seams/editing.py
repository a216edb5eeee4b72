"""Changing attention calls of a running model before it computes them.

What is observed by :class:`~osp_diag.seams.attention.AttentionCapture` is what the changed call is, if the
editing begins later in the forward pass, as it does where the stream enters the first block.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from osp_diag.errors import CaptureError
from osp_diag.estimators.attention_mask import in_four_axes, is_fill
from osp_diag.seams.call import AttentionCall
from osp_diag.seams.declared import describe_declared
from osp_diag.seams.functions import (
    Arguments,
    AttentionFunctionMode,
    describe_scaled_dot_product,
    remove_mode,
    scaled_dot_product_arguments,
    suspended,
)
from osp_diag.seams.interface import InterfaceSwitch, arguments_after_value, describe_call

__all__ = ["AttentionEditing", "Edit", "EditingSwitch", "refuse_own_masks", "without_keys"]

Edit = Callable[[AttentionCall], AttentionCall]
"""The call to compute in place of one: itself where nothing is to change."""
_OWN_MASKS = ("flex", "flash", "paged")
"""Parts of the names of implementations whose masks are no tensors."""


def without_keys(call: AttentionCall, masked: Bool[Tensor, "#batch #head #query key"]) -> AttentionCall:
    """The call with keys that no query sees, but one that would see no other key.

    Everything that hides keys in the call is written out in its ``mask``: boolean, or additive where the
    call has a bias.
    """
    if call.logits is not None:
        hidden = is_fill(call.logits) | masked
        left = torch.where(hidden, -torch.inf, call.logits)
        return replace(call, logits=torch.where(hidden.all(-1, keepdim=True), call.logits, left))
    allowed, bias = _written_out(call)
    left = allowed & ~masked
    left = torch.where(left.any(-1, keepdim=True), left, allowed)
    mask = left if bias is None else torch.where(left, bias, torch.finfo(bias.dtype).min)
    return replace(call, mask=mask, causal=False, window=None, mask_function=None)


def _written_out(
    call: AttentionCall,
) -> tuple[Bool[Tensor, "#batch #head query key"], Float[Tensor, "#batch #head #query #key"] | None]:
    """(which keys a query may see, what is added to its logits)."""
    queries, keys = call.lengths
    device = call.tensor.device
    query, key = torch.arange(queries, device=device)[:, None], torch.arange(keys, device=device)[None]
    allowed = torch.ones(1, 1, queries, keys, dtype=torch.bool, device=device)
    if call.causal:
        allowed = allowed & (key <= query)
    if call.window is not None:
        allowed = allowed & (query - key < call.window)
        allowed = allowed if call.causal else allowed & (key - query < call.window)
    if call.mask_function is not None:
        batch, heads = call.tensor.shape[:2]
        of_batch = torch.arange(batch, device=device)[:, None, None, None]
        of_head = torch.arange(heads, device=device)[None, :, None, None]
        allowed = allowed & call.mask_function(of_batch, of_head, query[None, None], key[None, None])
    if call.mask is None:
        return allowed, None
    mask = in_four_axes(call.mask)
    if mask.dtype == torch.bool:
        return allowed & mask, None
    return allowed & ~is_fill(mask, allowed), mask


def refuse_own_masks(switch: InterfaceSwitch) -> None:
    """Refuse to mask keys in an attention whose masks are no tensors.

    Raises
    ------
    CaptureError : there is such
    """
    for config in switch.configs:
        name = str(config._attn_implementation_internal)
        if any(part in name for part in _OWN_MASKS):
            raise CaptureError(
                f"keys cannot be masked under the attention implementation {name!r}, whose masks are no "
                'tensors; open the model with attention="sdpa" or "eager" (--attention sdpa)'
            )


class AttentionEditing:
    """Between :meth:`start` and :meth:`stop`, attention of ``model`` is computed of edited calls.

    It acts in the thread that made it. ``edit`` is asked for every attention call that a seam can change,
    self-attention or not, in the order of the calls.

    Raises
    ------
    CaptureError : an attention implementation whose masks are no tensors, while ``masks`` are to be changed
    """

    def __init__(self, model: nn.Module, edit: Edit, *, masks: bool) -> None:
        self._edit, self._owner = edit, threading.get_ident()
        self._mode = AttentionFunctionMode(self._edited_arguments)
        self._switch = EditingSwitch(model, self._edited, lambda: suspended(self._mode))
        self._running: ExitStack | None = None
        if masks:
            refuse_own_masks(self._switch)

    def start(self) -> None:
        """Begin; what is left of a pass that was interrupted ends first."""
        self.stop()
        running = self._running = ExitStack()
        running.callback(self._switch.exit)
        self._switch.enter()
        running.callback(remove_mode, self._mode)
        self._mode.__enter__()

    def stop(self) -> None:
        """End, and leave no trace."""
        if self._running is not None:
            self._running.close()
            self._running = None

    def _edited(self, call: AttentionCall) -> AttentionCall:
        if self._running is None or threading.get_ident() != self._owner:
            return call
        with torch._C.DisableTorchFunction():
            return self._edit(call)

    def _edited_arguments(
        self, function: Any, kind: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Arguments:
        """Of a call of one of torch's functions, or of a function that its author declares."""
        if kind == "declared function":
            return _edited_declared(self._edited, function, args, kwargs)
        if kind == "scaled_dot_product_attention":
            return _edited_scaled_dot_product(self._edited, args, kwargs)
        return _edited_softmax(self._edited, args), kwargs


class EditingSwitch(InterfaceSwitch):
    """Calls through transformers' attention interface."""

    def __init__(self, model: nn.Module, edited: Edit, suspension: Any = nullcontext) -> None:
        super().__init__(model, lambda describe, compute: compute(), suspension)
        self._edited = edited

    def arguments(
        self,
        original: str,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What to call the attention function ``original`` with, in place of these arguments.

        Parameters
        ----------
        original : its name in transformers' table
        module, query, key, value, args, kwargs : what it would be called with
        """
        inner = self._innermost(module, original)
        call = describe_call(original, inner, module, query, key, value, args, kwargs)
        new = self._edited(call)
        if new is call:
            return (module, query, key, value, *args), kwargs
        named = arguments_after_value(inspect.signature(inner), args, kwargs)
        if new.mask is not call.mask and new.mask is not None:
            # Eager functions add their mask; the others take an additive one as well.
            named["attention_mask"] = _additive(new.mask, query.dtype)
            if named.get("position_bias") is not None:
                named["position_bias"] = None  # the mask holds it now
        mask = named.pop("attention_mask", None)
        return (module, new.query, new.key, new.value, mask), named

    def _function(self, original: str) -> Callable[..., Any]:
        def edited_attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            with self._suspension():
                changed, named = self.arguments(original, module, query, key, value, *args, **kwargs)
                return self._delegate(module, original)(*changed, **named)

        return self._marked(edited_attention, original)


def _edited_scaled_dot_product(edited: Edit, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Arguments:
    arguments = scaled_dot_product_arguments(args, kwargs)
    call = describe_scaled_dot_product(args, kwargs, [])
    if isinstance(call, str) or call.query is None or arguments["query"].ndim != 4:
        return args, kwargs
    new = edited(call)
    if new is call:
        return args, kwargs
    arguments |= {"query": new.query, "key": new.key, "value": new.value}
    if new.mask is not call.mask:
        arguments |= {"attn_mask": new.mask, "is_causal": False}
    return (arguments.pop("query"), arguments.pop("key"), arguments.pop("value")), arguments


def _edited_softmax(edited: Edit, args: tuple[Any, ...]) -> tuple[Any, ...]:
    logits = args[0] if args else None
    # With fewer axes a router's softmax over experts could be meant.
    if not isinstance(logits, Tensor) or logits.ndim != 4 or logits.shape[-1] != logits.shape[-2]:
        return args
    call = AttentionCall(query=None, key=None, value=None, scale=1.0, seam="softmax", logits=logits)
    return (edited(call).logits, *args[1:])


def _edited_declared(
    edited: Edit, function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Arguments:
    call = describe_declared(function, args, kwargs, None)
    new = edited(call)
    if new is call:
        return args, kwargs
    bound = function.__attention__[0].bind(*args, **kwargs)
    changes = {"query": new.query, "key": new.key, "value": new.value}
    if new.mask is not call.mask:
        if "mask" not in bound.signature.parameters:
            raise CaptureError(
                f"keys cannot be masked in {function.__qualname__}, which takes no mask; give it a parameter "
                "`mask`, True where attention is allowed"
            )
        changes["mask"] = new.mask
    bound.arguments.update(changes)
    return bound.args, bound.kwargs


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, torch.finfo(dtype).min)
