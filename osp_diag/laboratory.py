"""What a diagnosis asks of whoever can read a training's checkpoints and run it again: evidence alone.

The trainer answers (``osp_diag.trainer.laboratory``; of other loops what their checkpoints tell), the rules
of ``osp_diag.analyses.diagnosis`` judge the answers; neither imports the other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import xarray as xr

__all__ = [
    "CheckpointState",
    "Counterfactual",
    "Fork",
    "FunctionRecord",
    "Laboratory",
    "Replay",
    "WeightPart",
]


@dataclass(frozen=True)
class CheckpointState:
    """What a checkpoint says without its weights being read.

    Attributes
    ----------
    step : updates done
    path : its folder or file
    config : of the training that wrote it, by dotted key
    owners : parameter → the optimizer that holds a state of it; empty where that is not recorded
    configured_owners : the same, as its configuration sends them
    roles : parameter → ``hidden``, ``embedding_projection``, ``embedding``, ``head`` or ``vector``
    head_size : rows of a head of q_proj and k_proj; 0 where that is not known
    shapes : parameter → its size
    function : what it recorded of its function (``constants``, ``reference_loss``, ``code``); None if nothing
    origins : dotted key of ``config`` → the file that says it; empty of a configuration of ours
    """

    step: int
    path: Path
    config: Mapping[str, Any]
    owners: Mapping[str, str]
    configured_owners: Mapping[str, str]
    roles: Mapping[str, str]
    head_size: int
    shapes: Mapping[str, tuple[int, ...]]
    function: Mapping[str, Any] | None
    origins: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FunctionRecord:
    """What a checkpoint gives on fixed tokens, as it was recorded and as today's code computes it."""

    step: int
    quantity: str
    """``loss``, or a kurtosis and where"""
    recorded: float
    now: float


@dataclass(frozen=True)
class WeightPart:
    """A part of a weight: rows or columns of a matrix, entries of a vector (its rows), or all of it."""

    parameter: str
    axis: str
    """``row``, ``column`` or ``all``"""
    indices: tuple[int, ...] = ()


@dataclass(frozen=True)
class Counterfactual:
    """What an edit of a checkpoint's weights changes.

    Attributes
    ----------
    edit : in words
    step : of the checkpoint
    kurtosis, loss : mean OSP kurtosis of the hidden states over all tokens, and held-out loss, after the edit
    kurtosis_before, loss_before : of the checkpoint as it is, on the same tokens
    loss_name : of which tokens the loss is; NaN of a model that predicts no next token
    """

    edit: str
    step: int
    kurtosis: float
    loss: float
    kurtosis_before: float
    loss_before: float
    loss_name: str = "held-out loss"

    @property
    def sentence(self) -> str:
        """What the edit changed, with the loss beside it."""
        numbers = [
            f"{name} {now:.{digits}g} in place of {before:.{digits}g}"
            for name, now, before, digits in (
                ("kurtosis", self.kurtosis, self.kurtosis_before, 3),
                (self.loss_name, self.loss, self.loss_before, 4),
            )
            if not (math.isnan(now) and math.isnan(before))
        ]
        return f"with {self.edit}, the checkpoint of step {self.step} has {', and '.join(numbers)}"


@dataclass(frozen=True)
class Replay:
    """Steps of a training made again from a checkpoint, beside what its run recorded.

    Attributes
    ----------
    start : step of the checkpoint
    steps : Dataset (step) with ``loss``, ``replayed_loss``, ``batch_agrees`` (1, 0, NaN where not recorded)
        and ``weights_agree`` (share of the parameters whose sketch is the same to the bit)
    parameters : Dataset (parameter) at the first step at which the weights differ: ``is_same``,
        ``relative_difference`` ‖Δ − Δreplay‖ / ‖Δ‖, and the least squares fit Δ ≈ a · Δreplay + b · W of its
        sketch: ``step_factor`` a, ``decay`` −b, ``residual`` as a share of ‖Δ‖; None where none differ or no
        sketches were recorded
    """

    start: int
    steps: xr.Dataset
    parameters: xr.Dataset | None


@dataclass(frozen=True)
class Fork:
    """A training that went on from a checkpoint under another configuration, for a few steps.

    Attributes
    ----------
    label : in words, what was changed
    changes : of the configuration, by dotted key
    steps, kurtosis, held_out_loss : at its probes, kurtosis as the headline has it
    reset : what began anew
    """

    label: str
    changes: Mapping[str, Any]
    steps: tuple[int, ...]
    kurtosis: tuple[float, ...]
    held_out_loss: tuple[float, ...]
    reset: tuple[str, ...]


class Laboratory(Protocol):
    """Reads checkpoints, and runs the training of a run again beside it; writes nothing into the run."""

    @property
    def checkpoints(self) -> Sequence[CheckpointState]:
        """Those that are left, ascending; a damaged one is left out and named in :attr:`missing`."""
        ...

    @property
    def missing(self) -> Sequence[str]:
        """What cannot be asked, a sentence each with what would have to be recorded."""
        ...

    @property
    def trains(self) -> bool:
        """Whether it can make steps of the training again; if not, it answers neither a replay nor a fork."""
        ...

    @property
    def scalars(self) -> xr.Dataset:
        """Numbers by step (dimension ``step``) that the loop left beside its checkpoints; empty if none."""
        ...

    def functions(self, steps: Sequence[int]) -> list[FunctionRecord]:
        """What those of the checkpoints give now that recorded it; a forward pass each."""
        ...

    def weight_changes(self, before: int, after: int) -> xr.Dataset:
        """How far every parameter moved between two checkpoints, and its rows and columns
        (``osp_diag.trainer.laboratory.weight_changes`` has the variables)."""
        ...

    def changed_part(
        self, before: int, after: int, parameter: str, axis: str
    ) -> tuple[tuple[int, ...], float]:
        """Rows or columns of a parameter that moved unlike the rest, and the ratio of their norms."""
        ...

    def reverted(self, step: int, before: int, part: WeightPart) -> Counterfactual | None:
        """A checkpoint with a part of a weight as an earlier one has it; None where it cannot be run."""
        ...

    def edited(self, step: int, edit: str) -> Counterfactual:
        """A checkpoint with an edit by name: ``clip_rows``, ``average_gains``, ``equal_heads``."""
        ...

    def seconds_per_step(self) -> float | None:
        """What a step took when the run was trained; None where nothing is recorded."""
        ...

    def replay(self, start: int, until: int) -> Replay:
        """The steps after the checkpoint of step ``start`` once more, as its own configuration has them."""
        ...

    def fork(self, start: int, until: int, label: str, changes: Mapping[str, Any], *, order: int = 0) -> Fork:
        """Training from a checkpoint to a step under a changed configuration; probed at both and where the
        run is."""
        ...

    def control(self, start: int, until: int, label: str, reset: Sequence[str], *, order: int = 0) -> Fork:
        """Training under its own configuration, with the states reset that a fork had to reset.

        ``order`` 0 of both is the run's own order of the batches, others are others.
        """
        ...
