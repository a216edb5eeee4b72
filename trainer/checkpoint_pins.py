"""Pins: checkpoints that are never deleted, with the reason, in one small file beside them."""

from __future__ import annotations

import json
from pathlib import Path

from osp_diag.errors import TrainingError
from osp_diag.json_text import parse_object
from osp_diag.plain_files import read_plain
from osp_diag.runs.format import replace_file

__all__ = ["PINS", "read_pins", "write_pins"]

PINS = "pins.json"
"""Its name within the folder of checkpoints; it holds an object of step → reason."""
_MOST_BYTES = 2**20


def read_pins(folder: Path) -> dict[int, str]:
    """Step → why its checkpoint is pinned; empty where there are no pins.

    Raises
    ------
    TrainingError : the file is a link, or damaged
    """
    path = folder / PINS
    try:
        values = parse_object(read_plain(path, _MOST_BYTES))
        return {_step(name): _reason(name, reason) for name, reason in values.items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise TrainingError(
            f"{path}, which names the checkpoints that are never deleted, cannot be read ({reason}); delete "
            "it to go on without pins"
        ) from error


def write_pins(folder: Path, pins: dict[int, str]) -> None:
    """Replace the pins of a folder, whole or not at all; once this returns, a kill loses none.

    Raises
    ------
    TrainingError : the disk refuses, or there would be too many
    """
    path = folder / PINS
    data = json.dumps({str(step): pins[step] for step in sorted(pins)}, indent=1).encode()
    if len(data) > _MOST_BYTES:
        raise TrainingError(
            f"{path} would have more than {_MOST_BYTES:,} bytes; unpin some checkpoints first"
        )
    try:
        replace_file(path, data, durable=True)
    except OSError as error:
        raise TrainingError(f"{path} cannot be written ({error.strerror}); nothing was pinned") from error


def _step(name: str) -> int:
    if not (name.isascii() and name.isdecimal() and len(name) <= 18):
        raise ValueError(f"{name[:20]!r} is no step")
    return int(name)


def _reason(name: str, reason: object) -> str:
    if not isinstance(reason, str):
        raise ValueError(f"the reason of step {name} is no text")
    return reason
