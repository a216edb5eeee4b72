"""Adam on every matrix, a gain per channel, no embedding projections."""

from __future__ import annotations

from typing import Any

from osp_diag.trainer.config import TrainConfig

ROW = 1

__all__ = ["ROW", "changes"]


def changes(config: TrainConfig) -> dict[str, Any]:
    """Stock parts, at the learning rate that the preset gives Adam (``optimizer.embedding_lr``), if any."""
    stock: dict[str, Any] = {
        "optimizer.name": "adamw",
        "model.norm": "rmsnorm",
        "model.embedding_projection": False,
    }
    rate = config.optimizer.embedding_lr
    return stock if rate is None else stock | {"optimizer.lr": rate}
