"""Which step a checkpoint's name tells, and the checkpoints that lie in a directory under such names."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

__all__ = ["checkpoints_in", "named_shortly", "pattern_of", "step_in_name"]

_STEP = re.compile(
    r"(?:^|[-_.])(?:checkpoint|ckpt|step|iter|iteration)[-_]?(\d+)(?![0-9A-Za-z])", re.IGNORECASE
)
"""``checkpoint-500``, ``step1000``, ``global_step1000``, ``step1000-tokens4B``; not ``step-50K``."""


def step_in_name(name: str) -> int | None:
    """The step that a name tells; None where it tells none, or several."""
    numbers = _STEP.findall(name)
    return int(numbers[0]) if len(numbers) == 1 else None


def checkpoints_in(directory: str | os.PathLike[str]) -> list[Path]:
    """The directories in a directory whose names tell a step, in the order of steps."""
    path = Path(directory).expanduser()
    inside = {entry: step_in_name(entry.name) for entry in path.iterdir() if entry.is_dir()}
    steps = [(step, entry) for entry, step in inside.items() if step is not None]
    return [entry for _, entry in sorted(steps)]


def pattern_of(inside: Sequence[Path], directory: str | os.PathLike[str]) -> str:
    """What a shell takes for all of them: ``runs/checkpoint-*``."""
    return str(Path(directory) / f"{re.split('[0-9]', inside[0].name)[0]}*")


def named_shortly(paths: Sequence[Path]) -> str:
    """Their names, of many the first and the last."""
    names = [path.name for path in paths]
    return ", ".join(names) if len(names) < 4 else f"{names[0]}, {names[1]} … {names[-1]}"
