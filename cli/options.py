"""From a verb's typed function and the words on the command line to the arguments of one call.

Only ``osp_diag.cli.main`` imports this, once a verb is being run.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
import re
import shutil
import textwrap
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Union, get_args, get_origin

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    PrimitiveTypeInfo,
    UnsupportedTypeAnnotationError,
)

__all__ = ["Call", "call_described_by", "description"]


class Call(NamedTuple):
    """The arguments to call a verb's function with."""

    positional: tuple[Any, ...]
    keywords: dict[str, Any]


def call_described_by(words: Sequence[str], function: Callable[..., Any], command: str) -> Call:
    """Read ``words`` by the signature of ``function``; ``command`` names the program in the help.

    Raises
    ------
    SystemExit
        After ``--help`` (code 0), or after a usage error that has been shown (code 2).
    """
    # tyro calls the function that it parses for. Recording the arguments instead keeps an exit or an
    # error of the verb itself apart from those of the parser.
    recorded = Call((), {})

    def record(*positional: Any, **keywords: Any) -> None:
        nonlocal recorded
        recorded = Call(positional, keywords)

    record.__signature__ = inspect.signature(function, eval_str=True)  # type: ignore[attr-defined]
    record.__annotations__ = inspect.get_annotations(function, eval_str=True)
    record.__doc__ = inspect.getdoc(function)
    # tyro would join the lines of a paragraph and show it unwrapped, so the description is ours to print.
    if not {"-h", "--help"}.isdisjoint(words):
        print(description(function), end="\n\n")
    tyro.cli(
        record,
        prog=command,
        description="",
        args=list(words),
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.PositionalRequiredArgs),
        registry=_registry(),
    )
    return recorded


def description(function: Callable[..., Any]) -> str:
    """The docstring's description and its examples; tyro shows the parameters itself."""
    text = inspect.getdoc(function) or ""
    before, *sections = re.split(r"^(Args|Returns|Raises|Examples?):\s*$", text, flags=re.MULTILINE)
    by_title = dict(zip(sections[0::2], sections[1::2], strict=True))
    examples = (by_title.get("Examples") or by_title.get("Example") or "").strip("\n")
    paragraphs = "\n\n".join(map(_wrapped, re.split(r"\n\s*\n", before.strip())))
    return f"{paragraphs}\n\nExamples:\n{examples}" if examples else paragraphs


def _wrapped(paragraph: str) -> str:
    """The paragraph at the terminal's width; one with indented lines is laid out by hand and stays so."""
    if any(line.startswith(" ") for line in paragraph.splitlines()):
        return paragraph
    return textwrap.fill(paragraph, min(shutil.get_terminal_size().columns, 100))


def _registry() -> ConstructorRegistry:
    """How tyro reads ``X | None``: as ``X``, so that help and errors speak of ``--out PATH`` alone.

    What may be text or a path is read as text.
    """
    registry = ConstructorRegistry()

    @registry.primitive_rule
    def optional(
        info: PrimitiveTypeInfo,
    ) -> PrimitiveConstructorSpec[Any] | UnsupportedTypeAnnotationError | None:
        members = get_args(info.type)
        if get_origin(info.type) not in (Union, types.UnionType) or type(None) not in members:
            return None
        others = [m for m in members if m is not type(None) and not (m is Path and str in members)]
        kind: Any = functools.reduce(operator.or_, others)
        inner = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(kind, info.markers))
        if isinstance(inner, UnsupportedTypeAnnotationError):
            return inner
        return dataclasses.replace(
            inner,
            is_instance=lambda value: value is None or inner.is_instance(value),
            str_from_instance=lambda value: ["none"] if value is None else inner.str_from_instance(value),
        )

    return registry
