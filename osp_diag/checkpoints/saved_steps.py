"""What any training loop left in a directory: weights by step, and what is said beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from osp_diag.checkpoints.opening import WEIGHT_SUFFIXES
from osp_diag.checkpoints.step_names import checkpoints_in, step_in_name
from osp_diag.checkpoints.trainer_state import read_trainer_state
from osp_diag.checkpoints.weight_files import (
    WeightFiles,
    check_pickle,
    check_safetensors,
    find_weights,
    folder_of_weights,
)
from osp_diag.errors import CheckpointError, UsageError
from osp_diag.wording import listed

__all__ = ["SavedStep", "contents_of", "read_saved", "saved_in"]

STEP_KEYS = ("global_step", "step", "iter_num", "iteration")
"""Under which loops keep the step in one file with the weights: Lightning's first."""


@dataclass(frozen=True)
class SavedStep:
    """The weights of one step.

    Attributes
    ----------
    step : updates that they have had
    path : a directory (``checkpoint-500``) or a file (``step-500.ckpt``)
    files : that hold them
    """

    step: int
    path: Path
    files: WeightFiles

    @property
    def config_file(self) -> Path | None:
        """``config.json`` of the model, where one lies with the weights."""
        path = (self.path if self.path.is_dir() else self.path.parent) / "config.json"
        return path if path.is_file() else None


def saved_in(directory: Path) -> tuple[list[SavedStep], list[str]]:
    """The checkpoints in a directory, ascending, and a sentence for each that cannot be read.

    These are directories with a step in their names, and files of weights whose name, or which themselves,
    say one.

    Raises
    ------
    UsageError : there is no such directory, or nothing in it is a checkpoint
    """
    if not directory.is_dir():
        raise UsageError(
            f"{directory} is no directory; name the one that holds checkpoint-500 and so on with "
            "--checkpoints (checkpoints=)"
        )
    files = [
        entry
        for entry in sorted(directory.iterdir())
        if entry.is_file() and entry.suffix in WEIGHT_SUFFIXES and entry.suffix != ".gguf"
    ]
    return read_saved([(path, None) for path in (*checkpoints_in(directory), *files)], str(directory))


def read_saved(paths: Sequence[tuple[Path, int | None]], where: str) -> tuple[list[SavedStep], list[str]]:
    """As :func:`saved_in`, of (path, step) that are named; a step of None is looked for.

    Raises
    ------
    UsageError : none of them is a checkpoint
    """
    by_step: dict[int, SavedStep] = {}
    unread: list[str] = []
    nameless = []
    for path, known in paths:
        try:
            step = _step_of(path) if known is None else known
            if step is None:
                nameless.append(path.name)
                continue
            one = SavedStep(step, path, _files(path))
        except CheckpointError as error:
            unread.append(str(error))
            continue
        if step in by_step:
            unread.append(f"{path} is left out: {by_step[step].path.name} is of step {step} too")
        else:
            by_step[step] = one
    if not by_step and not unread:
        files = f" ({listed(nameless, 4)} say no step)" if nameless else ""
        raise UsageError(
            f"{where} holds no checkpoints{files}: no directory such as checkpoint-500, and no "
            "file of weights with a step in its name or in itself"
        )
    return [by_step[step] for step in sorted(by_step)], unread


def _files(path: Path) -> WeightFiles:
    if path.is_dir():
        return find_weights(folder_of_weights(path))
    safe = path.suffix == ".safetensors"
    (check_safetensors if safe else check_pickle)(path)
    return WeightFiles((path,), safe)


def _step_of(path: Path) -> int | None:
    """The step that the name tells, or trainer_state.json, or the file itself."""
    if path.is_file():
        named = step_in_name(path.stem)
        return named if named is not None or path.suffix == ".safetensors" else _step_within(path)
    named, state = step_in_name(path.name), read_trainer_state(path)
    if named is not None and state is not None and state.step not in (None, named):
        raise CheckpointError(
            f"{path} is left out: its name says step {named}, and its trainer_state.json {state.step}"
        )
    return named


def _step_within(path: Path) -> int | None:
    content = contents_of(path)
    for key in STEP_KEYS:
        value = content.get(key)
        if type(value) is int and value >= 0:
            return value
    return None


def contents_of(path: Path) -> Mapping[str, Any]:
    """What a file of torch holds by name, tensors left on the disk; nothing is run to read it.

    Raises
    ------
    CheckpointError : it is damaged, or holds what only running it would read
    """
    import pickle
    import zipfile

    import torch

    check_pickle(path)
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, ValueError, EOFError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not read: it holds more than tensors and numbers, or is damaged, and "
            "reading it would run code that came with it"
        ) from error
    return content if isinstance(content, Mapping) else {}
