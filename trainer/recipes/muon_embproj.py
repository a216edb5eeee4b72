"""Muon with learnable projections behind the embedding and before the head."""

from __future__ import annotations

from typing import Any

from osp_diag.trainer.config import TrainConfig

ROW = 5

__all__ = ["ROW", "changes"]


def changes(config: TrainConfig) -> dict[str, Any]:
    """Muon and projections, a gain per channel."""
    return {"optimizer.name": "muon", "model.norm": "rmsnorm", "model.embedding_projection": True}
