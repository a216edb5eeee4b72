"""``torch.compile`` for small functions that exist in many variants."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch

__all__ = ["compile_apart", "compile_once"]

_COMPILED: dict[tuple[Any, ...], Callable[..., Any]] = {}


def compile_once(name: tuple[Any, ...], function: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled function of that name, made from ``function`` if there is none yet.

    Kept for the process's life: the next probed step measures the same sites.
    """
    if name not in _COMPILED:
        _COMPILED[name] = compile_apart(function)
    return _COMPILED[name]


def compile_apart(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compile a function or bound method as one graph for the shapes it is first called with.

    dynamo counts recompilations by code object and gives up after a few. Functions that are made in a loop
    share theirs, so each gets a copy of its own here. It stays compiled where a stance has the
    observed model run eagerly: that is for the model's hooks, and measurements have none.
    """
    owner = getattr(function, "__self__", None)
    plain: Any = function.__func__ if owner is not None else function  # type: ignore[attr-defined]
    code = plain.__code__.replace(co_name=plain.__name__)
    copy: Any = types.FunctionType(
        code, plain.__globals__, plain.__name__, plain.__defaults__, plain.__closure__
    )
    if owner is not None:
        copy = types.MethodType(copy, owner)
    compiled = torch.compile(copy, fullgraph=True, dynamic=False)

    def run(*args: Any, **kwargs: Any) -> Any:
        with torch.compiler.set_stance("default"):
            return compiled(*args, **kwargs)

    return run
