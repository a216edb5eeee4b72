"""Attention functions whose authors declare them.

Attention that no library function computes as a whole (a rescaled softmax, a kernel of one's own) shows
nothing that a probe could recognise. Its author says in one line what its arguments mean.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any, TypeVar

import torch
from torch.overrides import handle_torch_function, has_torch_function

from osp_diag.errors import CaptureError
from osp_diag.seams.call import DOCUMENT_OFFSETS, AttentionCall, MaskFunction

__all__ = ["attention_function", "describe_declared", "is_declared"]

Function = TypeVar("Function", bound=Callable[..., Any])

_FIELDS = {field.name for field in fields(AttentionCall)} - {"seam", "module", "logits"}


# Why a declaration and not more recognising: docs/decisions.md, Training.
def attention_function(**constant: Any) -> Callable[[Function], Function]:
    """Let probes see the calls of an attention function of your own.

    The decorated function behaves as before: it is the torch function protocol by which a probe, during a
    forward pass that it observes, is told of the call. Code compiled by ``torch.compile`` contains nothing
    of it.

    Parameters
    ----------
    constant : what holds of every call, by the names of :class:`~osp_diag.seams.attention.AttentionCall`

    The function's own parameters are read by those names too: it needs ``query``, ``key`` and ``value``,
    each (batch, head, token, channel), and may have ``scale``, ``causal``, ``window``, ``mask``,
    ``mask_function``, ``softcap`` and ``sink_logits``. A ``mask`` may be FlexAttention's ``BlockMask``. A
    ``scale`` that is missing or None is 1/√channels. Offsets of documents in the rows (``cu_seqlens``,
    ``cu_seqlens_q``) keep these apart. Parameters of other names are not looked at.

    Raises
    ------
    CaptureError : a constant that no attention call has, or a function without query, key and value

    Examples
    --------
    >>> @attention_function(causal=True)
    ... def attend(query, key, value, sink_logits=None): ...
    """
    unknown = sorted(set(constant) - _FIELDS)
    if unknown:
        raise CaptureError(
            f"attention_function({', '.join(unknown)}=…): an attention call has no such field; it has "
            f"{', '.join(sorted(_FIELDS))}"
        )

    def declare(function: Function) -> Function:
        signature = inspect.signature(function)
        missing = [name for name in ("query", "key", "value") if name not in signature.parameters]
        if missing:
            raise CaptureError(
                f"{function.__qualname__} has no parameter {' or '.join(missing)}; an attention function is "
                "declared by the names of its parameters: query, key and value, as torch calls them"
            )

        @functools.wraps(function)
        def declared(*args: Any, **kwargs: Any) -> Any:
            # has_torch_function asks for function modes too, if it is given any tensor.
            if not torch.compiler.is_compiling() and has_torch_function(args or tuple(kwargs.values())):
                return handle_torch_function(declared, args or tuple(kwargs.values()), *args, **kwargs)
            return function(*args, **kwargs)

        declared.__attention__ = signature, constant  # type: ignore[attr-defined]
        return declared  # type: ignore[return-value]

    return declare


def is_declared(function: Any) -> bool:
    """Whether :func:`attention_function` made it."""
    return hasattr(function, "__attention__")


def describe_declared(
    function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], module: torch.nn.Module | None
) -> AttentionCall:
    """The call of a declared function."""
    signature, constant = function.__attention__
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    arguments = {name: value for name, value in bound.arguments.items() if name in _FIELDS} | constant
    block_mask = arguments.get("mask")
    if hasattr(block_mask, "mask_mod"):
        arguments |= {"mask": None, "mask_function": block_mask.mask_mod}
    offsets = [v for n, v in bound.arguments.items() if DOCUMENT_OFFSETS.search(n) and torch.is_tensor(v)]
    if offsets and offsets[0].ndim == 1 and arguments.get("mask_function") is None:
        arguments["mask_function"] = _within_documents(offsets[0], arguments["query"].shape[2])
    if arguments.get("scale") is None:
        arguments["scale"] = arguments["query"].shape[-1] ** -0.5
    return AttentionCall(**arguments, seam="declared function", module=module)


def _within_documents(offsets: torch.Tensor, tokens: int) -> MaskFunction:
    """Keys of a query's own document, of rows of ``tokens`` that are read one after the other."""

    def within_documents(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        one, other = (
            torch.searchsorted(offsets, (batch * tokens + place).contiguous(), right=True)
            for place in (query, key)
        )
        return one == other

    return within_documents
