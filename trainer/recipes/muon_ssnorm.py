"""Muon with Single-Scale RMSNorm: one gain a norm in place of one a channel."""

from __future__ import annotations

from typing import Any

from osp_diag.trainer.config import TrainConfig

ROW = 4

__all__ = ["ROW", "changes"]


def changes(config: TrainConfig) -> dict[str, Any]:
    """Muon and SSNorm, no projections."""
    return {"optimizer.name": "muon", "model.norm": "ssnorm", "model.embedding_projection": False}
