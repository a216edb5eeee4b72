"""Interventions as text: ``zero residual_post:11:507@first``, ``mask-key first:0,1``."""

from __future__ import annotations

import re

from osp_diag.errors import UsageError
from osp_diag.interventions.intervention import KEYS, OF_WEIGHTS, OPERATIONS, Intervention, Operation
from osp_diag.schema import LINEAR_INPUT, PROJECTION_WEIGHT
from osp_diag.wording import did_you_mean

__all__ = ["FORMS", "read_intervention"]

FORMS: dict[Operation, str] = {
    "zero": "SITE[:LAYERS[:CHANNELS]][@TOKENS]",
    "mean": "SITE[:LAYERS[:CHANNELS]][@TOKENS]",
    "clip": "SITE[:LAYERS[:CHANNELS]][@TOKENS]=LARGEST",
    "scale": "SITE[:LAYERS[:CHANNELS]][@TOKENS]=FACTOR",
    "rotate": "SITE[:LAYERS[:CHANNELS]][@TOKENS]",
    "mask_key": "TOKENS[:LAYERS[:HEADS]]",
    "scale_rows": "WEIGHT[:LAYERS[:ROWS]]=FACTOR",
    "scale_columns": "WEIGHT[:LAYERS[:COLUMNS]]=FACTOR",
    "clip_rows": "WEIGHT[:LAYERS[:ROWS]][=MEDIANS]",
    "replace_gain": "WEIGHT[:LAYERS][=GAIN]",
}
"""How each operation is written. Numbers are ``11``, ``3,7``, ``0-4`` or ``*``, channels of one head
``h2.17`` (``h2`` for all of them); tokens a stratum, or positions."""
_HEAD = re.compile(r"h(?P<head>[^.]+)(\.(?P<channels>.+))?")


def read_intervention(operation: str, text: str) -> Intervention:
    """The intervention that a text means.

    Parameters
    ----------
    operation : with hyphens or underscores
    text : as :data:`FORMS` has it

    Raises
    ------
    UsageError : it is not written so; the message shows the form
    """
    name = operation.replace("-", "_")
    known = next((one for one in OPERATIONS if one == name), None)
    if known is None:
        names = [one.replace("_", "-") for one in OPERATIONS]
        raise UsageError(f"operation {operation!r} is unknown; {did_you_mean(operation, names)}")
    try:
        return _read(known, text)
    except _FormError as error:
        raise UsageError(
            f"--{known.replace('_', '-')} {text}: {error}; write {FORMS[known]}, numbers as 11, 3,7, 0-4 or *"
        ) from None


class _FormError(Exception):
    """A text is not written as it should be."""


def _read(operation: Operation, text: str) -> Intervention:
    head, equals, number = text.partition("=")
    value = _number(number) if equals else None
    place, at, tokens = head.partition("@")
    if operation == KEYS:
        parts = place.split(":")
        if len(parts) > 3 or at or equals:
            raise _FormError("it has tokens, layers and heads")
        layers, heads = ([*map(_numbers, parts[1:]), None, None])[:2]
        return Intervention(operation=operation, tokens=_tokens(parts[0]), layers=layers, heads=heads)
    site, rest = _site(place)
    if len(rest) > 2:
        raise _FormError("it has more than a site, layers and channels")
    if at and not tokens:
        raise _FormError("after @ stand the tokens")
    heads, channels = _channels(rest[1]) if len(rest) > 1 else (None, None)
    if operation in OF_WEIGHTS and at:
        raise _FormError("a weight has no tokens")
    return Intervention(
        operation=operation,
        site=site,
        layers=_numbers(rest[0]) if rest else None,
        channels=channels,
        heads=heads,
        tokens=_tokens(tokens) if at else "all",
        value=value,
    )


def _site(place: str) -> tuple[str, list[str]]:
    """(site, what follows): of single projections the name has a colon of its own."""
    parts = place.split(":")
    count = 2 if place.startswith((LINEAR_INPUT, PROJECTION_WEIGHT)) else 1
    return ":".join(parts[:count]), parts[count:]


def _channels(text: str) -> tuple[tuple[int, ...] | None, tuple[int, ...] | None]:
    head = _HEAD.fullmatch(text)
    if head is None:
        return None, _numbers(text)
    return _numbers(head["head"]), None if head["channels"] is None else _numbers(head["channels"])


def _tokens(text: str) -> str | tuple[int, ...]:
    if re.fullmatch(r"[\d,\-]+", text):
        return _numbers(text) or "all"
    return text


def _numbers(text: str) -> tuple[int, ...] | None:
    if text in ("*", ""):
        return None
    numbers: list[int] = []
    for part in text.split(","):
        span = re.fullmatch(r"(\d+)(-(\d+))?", part)
        if span is None:
            raise _FormError(f"{part!r} is no number")
        first = int(span[1])
        numbers += range(first, int(span[3] or first) + 1)
    if not numbers:
        raise _FormError(f"{text!r} names no number")
    return tuple(numbers)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise _FormError(f"{text!r} after = is no number") from None
