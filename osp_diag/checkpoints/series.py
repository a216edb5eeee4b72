"""The checkpoints of one training: which there are and of which steps, told before any is opened."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from osp_diag.checkpoints.opening import WEIGHT_SUFFIXES, kind_of
from osp_diag.checkpoints.pretrained import check_files
from osp_diag.checkpoints.step_names import checkpoints_in, named_shortly, pattern_of, step_in_name
from osp_diag.checkpoints.trainer_state import TrainerState, read_trainer_state
from osp_diag.errors import UsageError
from osp_diag.wording import counted, listed

__all__ = ["StepCheckpoint", "checkpoints_of", "is_model"]

Source = str | os.PathLike[str]


@dataclass(frozen=True)
class StepCheckpoint:
    """One checkpoint of a training.

    Attributes
    ----------
    step : updates that its weights have had
    source : as :func:`osp_diag.open_checkpoint` takes it
    revision : of a hub repository, or None
    state : what transformers' Trainer wrote beside it, or None
    """

    step: int
    source: str
    revision: str | None = None
    state: TrainerState | None = None

    @property
    def name(self) -> str:
        """As messages call it."""
        return self.source if self.revision is None else f"{self.source}@{self.revision}"

    @property
    def directory(self) -> Path | None:
        """Where it lies, if that is a directory."""
        path = Path(self.source).expanduser()
        return path if self.revision is None and path.is_dir() else None


def is_model(source: Source) -> bool:
    """Whether a directory holds a model of its own, whatever else is in it; what is no directory does."""
    path = Path(source).expanduser()
    return not path.is_dir() or (path / "config.json").is_file()


def checkpoints_of(
    sources: Sequence[Source], *, steps: Sequence[int] | None = None, revisions: Sequence[str] | None = None
) -> tuple[StepCheckpoint, ...]:
    """The checkpoints that are meant, in the order of their steps.

    Parameters
    ----------
    sources : checkpoints, or directories of checkpoints
    steps : of the checkpoints, in their order; None: the number in a checkpoint's name, or else
        ``global_step`` in its ``trainer_state.json``
    revisions : of the one hub repository that ``sources`` then names

    Raises
    ------
    UsageError : which are meant, or of which steps they are, is not clear
    CheckpointError : there is no such checkpoint, or a ``trainer_state.json`` is damaged
    """
    if revisions:
        checkpoints = _of_the_hub(sources, revisions)
    else:
        checkpoints = [one for source in sources for one in _at(source, sources)]
    if not checkpoints:
        raise UsageError(
            "which checkpoints? Give their paths, or a directory that holds checkpoint-500 and so on"
        )
    if steps is None:
        members = [_with_its_step(one) for one in checkpoints]
        _refuse_nameless([one for one in members if one.step < 0])
    else:
        _check_steps(steps, checkpoints, sources)
        members = [replace(one, step=step) for one, step in zip(checkpoints, steps, strict=True)]
    members.sort(key=lambda one: one.step)
    for one, other in pairwise(members):
        if one.step == other.step:
            raise UsageError(
                f"{one.name} and {other.name} are both of step {one.step}; leave one out, or say the steps "
                "of all with --steps (steps=)"
            )
    return tuple(members)


UNKNOWN = -1
"""Of a checkpoint whose step is not known yet."""


def _of_the_hub(sources: Sequence[Source], revisions: Sequence[str]) -> list[StepCheckpoint]:
    if len(sources) != 1:
        raise UsageError(f"revisions are of one hub repository, and {len(sources)} checkpoints were named")
    source = os.fspath(sources[0])
    if kind_of(source)[0] != "hub":
        raise UsageError(f"revisions are of a hub repository, and {source} is none; leave them out")
    return [StepCheckpoint(UNKNOWN, source, revision) for revision in revisions]


def _at(source: Source, sources: Sequence[Source]) -> list[StepCheckpoint]:
    """The checkpoint at a path, or those in a directory that is none itself."""
    if not isinstance(source, str | os.PathLike):
        raise UsageError(
            f"the checkpoints of a training are opened one after the other, so that each is a path or a hub "
            f"id and not a {type(source).__name__}; a model in hand goes to osp_diag.Probe(model, out=...)"
        )
    text = os.fspath(source)
    kind, place = kind_of(source)
    inside = checkpoints_in(place) if kind == "directory" else []
    if not inside and not is_model(source):
        check_files(Path(place))
    if not inside or (is_model(source) and _beside_its_own(inside, sources)):
        state = read_trainer_state(Path(place)) if kind == "directory" else None
        return [StepCheckpoint(UNKNOWN, text, state=state)]
    if is_model(source):
        pattern = pattern_of(inside, text)
        raise UsageError(
            f"{text} is a model and holds {len(inside)} checkpoints too ({named_shortly(inside)}); name "
            f"those that are meant: {pattern} for the checkpoints, {pattern} {text} for these and the model"
        )
    parent = Path(text)
    return [
        StepCheckpoint(UNKNOWN, str(parent / path.name), state=read_trainer_state(path)) for path in inside
    ]


def _beside_its_own(inside: Sequence[Path], sources: Sequence[Source]) -> bool:
    """Whether some of the checkpoints in a model's directory are named by themselves."""
    named = {
        Path(source).expanduser().resolve() for source in sources if isinstance(source, str | os.PathLike)
    }
    return any(path.resolve() in named for path in inside)


def _with_its_step(one: StepCheckpoint) -> StepCheckpoint:
    if one.revision is None:
        name = Path(one.source).expanduser().resolve().name if one.directory else Path(one.source).name
        name = name.removesuffix(next((end for end in WEIGHT_SUFFIXES if name.endswith(end)), ""))
    else:
        name = one.revision
    named, logged = step_in_name(name), None if one.state is None else one.state.step
    if named is not None and logged is not None and named != logged:
        raise UsageError(
            f"{one.name} is called step {named}, and its trainer_state.json says global_step {logged}; say "
            "the steps of all checkpoints with --steps (steps=)"
        )
    step = logged if named is None else named
    return one if step is None else replace(one, step=step)


def _refuse_nameless(nameless: Sequence[StepCheckpoint]) -> None:
    if nameless:
        names = listed([one.name for one in nameless], 4)
        raise UsageError(
            f"of which step is {names}? No number stands in the name as in checkpoint-500 or step1000, and "
            "no trainer_state.json beside the weights; say the steps of all checkpoints, in their order, "
            "with --steps (steps=)"
        )


def _check_steps(
    steps: Sequence[int], checkpoints: Sequence[StepCheckpoint], sources: Sequence[Source]
) -> None:
    if any(step < 0 for step in steps):
        raise UsageError(f"--steps {min(steps)}: a step is a number of updates, 0 or more")
    if len(checkpoints) > len(sources) and all(one.revision is None for one in checkpoints):
        raise UsageError(
            "--steps (steps=) goes with checkpoints that are named one by one; those in a directory have "
            "their steps in their names"
        )
    if len(steps) != len(checkpoints):
        raise UsageError(
            f"{counted(len(checkpoints), 'checkpoint')} and {len(steps)} of --steps (steps=); give one "
            "for each, in the order of the checkpoints"
        )
