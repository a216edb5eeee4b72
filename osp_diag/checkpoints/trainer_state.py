"""What the Trainer of Hugging Face transformers writes beside a checkpoint: the step, and what it logged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osp_diag.checkpoints.weight_files import read_json
from osp_diag.errors import CheckpointError

__all__ = ["LOGGED_AS", "TrainerState", "read_trainer_state", "run_scalars"]

FILE = "trainer_state.json"

LOGGED_AS = {
    "loss": "loss",
    "learning_rate": "learning_rate",
    "grad_norm": "gradient_norm",
    "eval_loss": "validation_loss",
}
"""What the Trainer logs → what a run calls it."""


@dataclass(frozen=True)
class TrainerState:
    """Of one checkpoint.

    Attributes
    ----------
    step : updates that the checkpoint's weights have had; None where the file does not say
    scalars : step → the scalars that were logged at it, by a run's names, in the order of steps
    batch_size : sequences of a training batch of one process; None where the file does not say
    """

    step: int | None
    scalars: Mapping[int, Mapping[str, float]]
    batch_size: int | None = None


def run_scalars(logs: Mapping[str, Any]) -> dict[str, Any]:
    """Of one entry of the Trainer's log, what a run records, by its names there."""
    return {LOGGED_AS[name]: value for name, value in logs.items() if name in LOGGED_AS}


def read_trainer_state(directory: Path) -> TrainerState | None:
    """What ``trainer_state.json`` in a checkpoint's directory says; None where there is none.

    Raises
    ------
    CheckpointError : it is damaged
    """
    path = directory / FILE
    if not path.is_file():
        return None
    content = read_json(path)
    step = content.get("global_step")
    history = content.get("log_history", [])
    if not (step is None or _is_step(step)) or not isinstance(history, list):
        raise _damaged(path, "global_step is no number of steps, or log_history no list")
    scalars: dict[int, dict[str, float]] = {}
    for entry in history:
        if not isinstance(entry, dict):
            raise _damaged(path, "an entry of log_history is no object")
        values = run_scalars(entry)
        if not values:
            continue
        if not _is_step(entry.get("step")) or not all(map(_is_number, values.values())):
            raise _damaged(path, f"an entry of log_history has no step, or no number: {str(entry)[:100]}")
        scalars.setdefault(entry["step"], {}).update(
            {name: float(value) for name, value in values.items() if value is not None}
        )
    batch_size = content.get("train_batch_size")
    return TrainerState(step, dict(sorted(scalars.items())), batch_size if _is_step(batch_size) else None)


def _is_step(value: object) -> bool:
    return type(value) is int and value >= 0


def _is_number(value: object) -> bool:
    return value is None or type(value) in (int, float)


def _damaged(path: Path, why: str) -> CheckpointError:
    return CheckpointError(
        f"{path} is damaged: {why}. Copy it again, or remove it: the run then has no loss beside its steps"
    )
