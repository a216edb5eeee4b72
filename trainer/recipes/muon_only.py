"""Muon on everything, embedding and head included; otherwise stock."""

from __future__ import annotations

from typing import Any

from osp_diag.trainer.config import TrainConfig

ROW = 2

__all__ = ["ROW", "changes"]


def changes(config: TrainConfig) -> dict[str, Any]:
    """Stock parts under Muon alone."""
    return {"optimizer.name": "muon_only", "model.norm": "rmsnorm", "model.embedding_projection": False}
