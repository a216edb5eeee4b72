"""Seam 1: transformers' attention interface.

Every ported architecture looks its attention function up in a table, by the name in its config. For the
length of one observed forward, each config that attention modules read gets a private name under which the
table holds our function; ours observes and calls the function that would have been called.
"""

from __future__ import annotations

import functools
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from osp_diag.errors import CaptureError
from osp_diag.seams.call import AttentionCall, MaskFunction, add_bias

__all__ = ["InterfaceSwitch", "ObservedName", "arguments_after_value", "describe_call"]

Suspension = Callable[[], AbstractContextManager[None]]
"""A context in which nothing is observed."""
Observe = Callable[[Callable[[], AttentionCall], Callable[[], Any]], Any]
"""(how to describe the call, how to compute it) → what the computation returned."""


# Why a name and not a patched table or function: docs/decisions.md, Capture.
class ObservedName(str):
    """The name of an attention implementation that reads like the original but is another table key.

    Modelling code asks ``== "sdpa"``, ``in ("eager", "sdpa")`` or ``"flash" in name`` and takes another
    path, so a name of our own would change outputs. This one compares equal to the original and differs in
    its hash, which is what a dictionary looks at first. A copy or pickle of it (someone saves the config
    during the forward) is the plain original name, so no trace can leak.
    """

    original: str
    """the name that it stands for, perhaps an observed one itself"""
    gone: bool = False
    """whether what observes under it has ended"""
    _token: object

    def __new__(cls, original: str, like: ObservedName | None = None) -> ObservedName:
        name = super().__new__(cls, original)
        name._token = object() if like is None else like._token
        name.original = original
        return name

    def __hash__(self) -> int:
        return hash(self._token)

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) if isinstance(other, str) else NotImplemented

    def __ne__(self, other: object) -> bool:
        return str.__ne__(self, other) if isinstance(other, str) else NotImplemented

    def __reduce__(self) -> tuple[type, tuple[str]]:
        return str, (str(self),)


def _codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)


def _functions_with_interface(kind: type) -> Iterator[tuple[FunctionType, set[str]]]:
    """Methods of a class that look an attention function up, with the global names that they mention."""
    for base in kind.__mro__:
        source = sys.modules.get(base.__module__)
        # PreTrainedModel mentions the table too, to check names against it.
        if base.__module__ == "transformers.modeling_utils" or not hasattr(source, "ALL_ATTENTION_FUNCTIONS"):
            continue
        for attribute in vars(base).values():
            function = getattr(attribute, "__func__", attribute)
            if not isinstance(function, FunctionType):
                continue
            function = inspect.unwrap(function)
            if not isinstance(function, FunctionType):
                continue
            names = {name for code in _codes(function.__code__) for name in code.co_names}
            if "ALL_ATTENTION_FUNCTIONS" in names:
                yield function, names


def _is_attention_function(candidate: Any) -> bool:
    if not isinstance(candidate, FunctionType):
        return False
    parameters = list(inspect.signature(candidate).parameters)
    return parameters[:1] == ["module"] and "attention_mask" in parameters


def eager_function(kind: type) -> Callable[..., Any] | None:
    """The function that ``get_interface(name, default)`` falls back to in the methods of ``kind``.

    The table never sees ``default``, so it is read from the method: of the global names in its code, the one
    that is an attention function. Modules with several (llama4's text and vision) differ by method.
    """
    for function, names in _functions_with_interface(kind):
        module_globals = function.__globals__
        candidates = [name for name in sorted(names) if _is_attention_function(module_globals.get(name))]
        candidates.sort(key=lambda name: "eager" not in name)
        if candidates:
            return module_globals[candidates[0]]
        if _is_attention_function(module_globals.get("eager_attention_forward")):
            return module_globals["eager_attention_forward"]
    return None


def _table(kind: type) -> Mapping[str, Callable[..., Any]]:
    """The table that the class consults: a modelling file may hold an instance with local entries."""
    for function, _ in _functions_with_interface(kind):
        if "ALL_ATTENTION_FUNCTIONS" in function.__globals__:
            return function.__globals__["ALL_ATTENTION_FUNCTIONS"]
    return _tables()[0]


def _tables() -> tuple[Any, Any]:
    """transformers' tables of attention functions and of mask functions."""
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    return ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS


def _register(table: Any, name: ObservedName, function: Callable[..., Any]) -> None:
    """Enter a function under a name for as long as anybody holds the name.

    Another thread may have read it from the config just before it is taken back, and looks it up just after.
    """
    key = ObservedName(str(name), like=name)  # the same entry, which does not keep the name alive
    table.register(key, function)
    weakref.finalize(name, type(table)._global_mapping.pop, key, None).atexit = False


class InterfaceSwitch:
    """Puts configs on observed names and back. ``enter`` and ``exit`` bracket one forward."""

    def __init__(self, model: nn.Module, observe: Observe, suspension: Suspension) -> None:
        self._observe, self._suspension = observe, suspension
        self._configs: dict[int, Any] = {}
        self._without_eager: set[int] = set()
        self._eager: dict[type, Callable[..., Any] | None] = {}
        self._restore: list[tuple[Any, ObservedName]] = []
        if "transformers" in sys.modules:
            self._collect_configs(model)

    def _collect_configs(self, model: nn.Module) -> None:
        # Only the configs that attention modules read. The model's own config, by which masks are made, is
        # usually the same object; where it isn't, masks are made under the original name, which is as good.
        interface: dict[type, bool] = {}
        for module in model.modules():
            kind = type(module)
            if kind not in interface:
                interface[kind] = any(True for _ in _functions_with_interface(kind))
                self._eager[kind] = eager_function(kind) if interface[kind] else None
            config = getattr(module, "config", None)
            if interface[kind] and hasattr(config, "_attn_implementation_internal"):
                self._configs[id(config)] = config
                if self._eager[kind] is None:
                    self._without_eager.add(id(config))

    def enter(self) -> None:
        """Switch every config to an observed name."""
        if not self._configs:
            return
        functions, mask_functions = _tables()
        names: dict[str, ObservedName] = {}
        for key, config in self._configs.items():
            original = config._attn_implementation_internal
            # "paged|…" belongs to continuous batching, which packs requests and has no (B, T).
            if original is None or original.startswith("paged|"):
                continue
            if original == "eager" and original not in functions and key in self._without_eager:
                continue
            if original not in names:
                name = names[original] = ObservedName(original)
                _register(functions, name, self._function(original))
                if original in mask_functions:
                    _register(mask_functions, name, self._mask_function(mask_functions[original]))
            self._restore.append((config, names[original]))
            config._attn_implementation_internal = names[original]

    def exit(self) -> None:
        """Give every config its own name back, with which ours and its entries in the tables go."""
        while self._restore:
            config, name = self._restore.pop()
            name.gone = True
            # Two switches of one model need not end in the reverse order of their start.
            current = config._attn_implementation_internal
            while isinstance(current, ObservedName) and current.gone:
                current = current.original
            config._attn_implementation_internal = current

    @property
    def configs(self) -> list[Any]:
        """The configs that are switched."""
        return list(self._configs.values())

    def _mask_function(self, original: Callable[..., Any]) -> Callable[..., Any]:
        # FlexAttention compiles the making of its mask, once more for every set of function modes.
        @functools.wraps(original)
        def make_mask(*args: Any, **kwargs: Any) -> Any:
            with self._suspension():
                return original(*args, **kwargs)

        return make_mask

    def _delegate(self, module: nn.Module, original: str) -> Callable[..., Any]:
        kind = type(module)
        table = _table(kind)
        if original in table:
            return table[original]
        if kind not in self._eager:
            self._eager[kind] = eager_function(kind)
        function = self._eager[kind]
        if function is None:
            raise CaptureError(
                f"the eager attention function of {kind.__module__}.{kind.__qualname__} was not found; "
                'open the model with attn_implementation="sdpa", or leave out attention statistics'
            )
        return function

    def _function(self, original: str) -> Callable[..., Any]:
        def observed_attention(
            module: nn.Module, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any
        ) -> Any:
            delegate, inner = self._delegate(module, original), self._innermost(module, original)
            return self._observe(
                lambda: describe_call(original, inner, module, query, key, value, args, kwargs),
                lambda: delegate(module, query, key, value, *args, **kwargs),
            )

        return self._marked(observed_attention, original)

    def _marked(self, function: Any, original: str) -> Callable[..., Any]:
        """A function of ours in the table, by which others on the same model find what it stands for."""
        function.delegate, function.original = self._delegate, original
        return function

    def _innermost(self, module: nn.Module, original: str) -> Callable[..., Any]:
        """The model's own attention function, also under other captures and edits of the same model."""
        inner: Any = self._delegate(module, original)
        while hasattr(inner, "delegate"):
            inner = inner.delegate(module, inner.original)
        return inner


def arguments_after_value(
    signature: inspect.Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """What an attention function is called with after (module, query, key, value), by name."""
    return dict(zip(list(signature.parameters)[4:], args, strict=False)) | dict(kwargs)


def describe_call(
    original: str,
    delegate: Callable[..., Any],
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> AttentionCall:
    """The call of an attention function that the table has under the name ``original``.

    Parameters
    ----------
    delegate : the function itself
    args, kwargs : what it is called with after ``value``
    """
    signature = inspect.signature(delegate)
    arguments = arguments_after_value(signature, args, kwargs)
    eager, scaled_dot_product = original == "eager", original == "sdpa"

    def option(name: str) -> Any:
        # What a function has no parameter for it swallows and ignores; the statistics must ignore it too.
        return arguments.get(name) if not eager or name in signature.parameters else None

    scale = arguments.get("scaling")
    if isinstance(scale, Tensor):
        query, scale = query * scale, 1.0
    flash = "flash" in original
    causal, mask, function = _mask(arguments, module, key, full_without_mask=eager or "flex" in original)
    bias = None if flash else option("position_bias")
    if bias is not None:
        mask = add_bias(bias[..., : key.shape[-2]], mask)
    return AttentionCall(
        query=query,
        key=key,
        value=value,
        scale=query.shape[-1] ** -0.5 if scale is None else scale,
        seam="attention interface",
        module=module,
        causal=causal,
        window=arguments.get("sliding_window") if flash else None,
        mask=mask,
        mask_function=function,
        softcap=None if scaled_dot_product else option("softcap"),
        sink_logits=None if scaled_dot_product else _sinks(delegate, module, option("s_aux")),
    )


def _mask(
    arguments: Mapping[str, Any], module: nn.Module, key: Tensor, *, full_without_mask: bool
) -> tuple[bool, Tensor | None, MaskFunction | None]:
    """(causal, tensor, function) of a call. ``full_without_mask``: without a mask every key is allowed."""
    mask = arguments.get("attention_mask")
    if mask is not None and hasattr(mask, "mask_mod"):
        return False, None, mask.mask_mod
    # Eager and flex functions do what the mask says and nothing more; the others take "no mask" (and flash
    # a mask of padded keys) to mean causal, unless the call or the module says otherwise.
    causal = False
    if not full_without_mask and (mask is None or mask.ndim == 2):
        flag = arguments.get("is_causal")
        causal = bool(getattr(module, "is_causal", True) if flag is None else flag)
    if mask is not None:
        mask = mask[..., : key.shape[-2]]
        mask = mask[:, None, None, :].to(torch.bool) if mask.ndim == 2 else mask
    return causal, mask, None


def _sinks(delegate: Callable[..., Any], module: nn.Module, sink_logits: Tensor | None) -> Tensor | None:
    """gpt-oss's eager function takes the sink logits from the module, fused ones from the call."""
    code = getattr(inspect.unwrap(delegate), "__code__", None)
    if sink_logits is None and code is not None and "sinks" in code.co_names:
        sink_logits = getattr(module, "sinks", None)
    return None if sink_logits is None else sink_logits.reshape(-1)
