"""Outlier-Safe Pre-Training: Muon, Single-Scale RMSNorm and embedding projections."""

from __future__ import annotations

from typing import Any

from osp_diag.trainer.config import TrainConfig

ROW = 6

__all__ = ["ROW", "changes"]


def changes(config: TrainConfig) -> dict[str, Any]:
    """All three parts."""
    return {"optimizer.name": "muon", "model.norm": "ssnorm", "model.embedding_projection": True}
