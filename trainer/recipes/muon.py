"""Muon on hidden matrices, Adam on embedding and head; otherwise stock."""

from __future__ import annotations

from typing import Any

from osp_diag.trainer.config import TrainConfig

ROW = 3

__all__ = ["ROW", "changes"]


def changes(config: TrainConfig) -> dict[str, Any]:
    """Stock parts under Muon."""
    return {"optimizer.name": "muon", "model.norm": "rmsnorm", "model.embedding_projection": False}
