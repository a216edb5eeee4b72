"""What optimizers say of themselves in a checkpoint: their rates, decays and constants, and their age."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from osp_diag.checkpoints.saved_steps import SavedStep, contents_of

__all__ = ["OptimizerState", "read_optimizer_state"]

FILE = "optimizer.pt"
"""Beside the weights, by the Trainer of transformers."""
WITHIN = ("optimizer_states", "optimizer_state_dict", "optimizer")
"""In one file with the weights: Lightning's, and what loops by hand use."""
CONSTANTS = {
    "initial_lr": "lr",
    "weight_decay": "weight_decay",
    "betas": "betas",
    "eps": "epsilon",
    "momentum": "momentum",
    "nesterov": "nesterov",
}
"""Of a parameter group → what a configuration of ours calls it. ``lr`` itself follows the schedule, and
``initial_lr`` is what the schedule multiplies."""


@dataclass(frozen=True)
class OptimizerState:
    """Of one checkpoint.

    Attributes
    ----------
    settings : constant → its value, or the different ones of the parameter groups
    age : the most steps that a parameter's state has had; None where none is recorded
    """

    settings: Mapping[str, Any]
    age: int | None


def read_optimizer_state(one: SavedStep) -> OptimizerState | None:
    """What ``optimizer.pt``, or the part of a file that is the optimizer's, says; None where there is none.

    Raises
    ------
    CheckpointError : it is damaged, or holds what only running it would read
    """
    if one.path.is_dir():
        path = one.path / FILE
        if not path.is_file():
            return None
        found: Any = contents_of(path)
    else:
        if one.files.safe:
            return None
        content = contents_of(one.path)
        found = next((content[key] for key in WITHIN if key in content), None)
    states = [state for state in (found if isinstance(found, list) else [found]) if _is_state(state)]
    if not states:
        return None
    groups = [group for state in states for group in state["param_groups"]]
    settings = {
        ours: _joined([_plain(group[name]) for group in groups if name in group])
        for name, ours in CONSTANTS.items()
        if any(name in group for group in groups)
    }
    ages = [
        int(entry["step"])
        for state in states
        for entry in state["state"].values()
        if isinstance(entry, Mapping) and "step" in entry
    ]
    return OptimizerState(settings, max(ages, default=None))


def _is_state(value: object) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("state"), Mapping)
        and isinstance(value.get("param_groups"), list)
        and all(isinstance(group, Mapping) for group in value["param_groups"])
    )


def _plain(value: Any) -> Any:
    if hasattr(value, "item"):
        return value.item()
    return [_plain(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def _joined(values: Sequence[Any]) -> Any:
    """The one value of all groups; several as a list. A group without decay is no other setting."""
    different = [value for place, value in enumerate(values) if value not in values[:place]]
    without_zero = [value for value in different if value != 0]
    different = without_zero or different
    return different[0] if len(different) == 1 else different
