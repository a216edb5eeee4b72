"""What our training loop does when ``osp-diag control`` asks for it."""

from __future__ import annotations

from collections.abc import Callable

from osp_diag.errors import TrainingError
from osp_diag.probing.control import LoopActions
from osp_diag.trainer.checkpoint_folder import CheckpointFolder

__all__ = ["loop_actions"]


def loop_actions(
    checkpoints: CheckpointFolder, step: int, save: Callable[[], object], stop: Callable[[], object]
) -> LoopActions:
    """Saving, pinning and stopping after ``step``; called by all ranks.

    Parameters
    ----------
    checkpoints : of the run
    save : saves the state
    stop : lets the loop save its state and end before the next step
    """

    def checkpoint() -> str:
        save()
        return f"the checkpoint of step {step} is saved, or being written"

    def pin(at: int) -> str:
        checkpoints.wait()
        pinned = checkpoints.pin(at, "osp-diag control")
        if pinned is None:
            raise TrainingError(f"there is no checkpoint at or before step {at}")
        return f"the checkpoint of step {pinned} is pinned"

    def ended() -> str:
        stop()
        return f"training ends after step {step}; --resume goes on from there"

    return LoopActions(checkpoint=checkpoint, pin=pin, stop=ended)
