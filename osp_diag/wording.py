"""How every message and page writes a number, a change, a near miss, a list and a time."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "change",
    "counted",
    "did_you_mean",
    "differences",
    "duration",
    "listed",
    "nearest",
    "number",
    "of_stack",
]


def number(value: float) -> str:
    """Three digits that a person can read, and whole thousands: 25,805 · 83.5 · 0.042 · 2.1e-07."""
    if not math.isfinite(value):
        return str(float(value))
    if abs(value) >= 1e7 or 0 < abs(value) < 1e-4:
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def change(before: Any, now: Any) -> str:
    """``0.004 → 0.001``, as JSON writes values; of long ones the first 200 letters."""
    return f"{_shown(before)} → {_shown(now)}"


def differences(
    before: Mapping[str, Any], now: Mapping[str, Any], leave_out: Collection[str] = ()
) -> list[str]:
    """``key: before → now`` of every value that differs, of tables within by their path; "absent" of none.

    Parameters
    ----------
    leave_out : keys of the outer tables that are not compared
    """
    lines = []
    for key in (key for key in dict.fromkeys((*before, *now)) if key not in leave_out):
        old, new = before.get(key, _ABSENT), now.get(key, _ABSENT)
        if isinstance(old, Mapping) and isinstance(new, Mapping):
            lines += [f"{key}.{line}" for line in differences(old, new)]
        elif old != new:
            lines.append(f"{key}: {change(old, new)}")
    return lines


_ABSENT = object()
_LONGEST = 200


def _shown(value: Any) -> str:
    text = "absent" if value is _ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def nearest(name: str, names: Iterable[str], most: int = 3) -> list[str]:
    """Up to ``most`` names like a misspelt ``name``, or else those that contain it; the likeliest first."""
    candidates = list(names)
    alike = difflib.get_close_matches(name, candidates, n=most, cutoff=0.5)
    if alike:
        # Beside a slip of one letter, a name that shares half of them is no help.
        likeness = {candidate: difflib.SequenceMatcher(None, candidate, name).ratio() for candidate in alike}
        alike = [candidate for candidate in alike if likeness[candidate] >= likeness[alike[0]] - 0.2]
    return (
        alike or [candidate for candidate in candidates if name and name.lower() in candidate.lower()][:most]
    )


def did_you_mean(name: str, names: Iterable[str], where: str = "") -> str:
    """The second half of a message about an unknown name: what was meant, or else what there is.

    Parameters
    ----------
    where : how to list all names ("run.statistics lists them")
    """
    candidates = list(names)
    likely = nearest(name, candidates)
    if likely:
        text = f"did you mean {' or '.join(likely)}?"
    elif candidates:
        text = f"there are {listed(candidates)}" if len(candidates) > 1 else f"there is only {candidates[0]}"
    else:
        text = "there are none"
    return f"{text} ({where})" if where and candidates else text


def listed(words: Sequence[str], most: int = 12) -> str:
    """Words with commas between them, the rest counted: ``a, b, … (7 more)``."""
    if len(words) <= most:
        return ", ".join(words)
    return f"{', '.join(words[:most])}, … ({len(words) - most} more)"


def duration(seconds: float) -> str:
    """A time that a person can read: 4 s, 12 min, 3.5 h, 2.1 days."""
    for unit, size in (("days", 86400.0), ("h", 3600.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def of_stack(text: str, stack: str) -> str:
    """A text with the name of a stack before every layer that it names by number; without one as it is."""
    return re.sub(r"\b(?=layers? \d)", f"{stack} ", text) if stack else text


def counted(count: int, what: str) -> str:
    """``1 probe``, ``2 probes``."""
    return f"{count:,} {what}{'' if count == 1 else 's'}"
