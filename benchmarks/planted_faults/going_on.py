"""Going on from a checkpoint under another configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.planted_faults.planting import copy_fitting
from osp_diag.tokens import TokenBatches
from osp_diag.trainer import loop
from osp_diag.trainer.checkpoint import TrainingCheckpoint, _read
from osp_diag.trainer.config import TrainConfig
from osp_diag.trainer.model import Llama
from osp_diag.trainer.optimizers import build_optimizer
from osp_diag.trainer.recording import Recording

__all__ = ["train_on"]


def train_on(config: TrainConfig, out: Path, folder: Path) -> None:
    """Train a new run from a checkpoint: its weights, its step, its place in the data, and the optimizer
    states that fit."""
    checkpoint = _read(folder)

    class StartedTraining(loop.Training):
        def _begin_recording(self, held_out: TokenBatches, out: Path, **options: Any) -> Recording:
            _take_over(self, checkpoint)
            return super()._begin_recording(held_out, out, **options)

    with patch.object(loop, "Training", StartedTraining):
        loop.train(config, out)


@torch.no_grad()
def _take_over(training: loop.Training, checkpoint: TrainingCheckpoint) -> None:
    old = Llama(checkpoint.config.model)
    saved = {"model": old.state_dict(), "optimizer": build_optimizer(old, checkpoint.config).state_dict()}
    checkpoint.load(saved)
    training.model.load_state_dict(_converted(saved["model"], training.model.state_dict()))
    copy_fitting(saved["optimizer"], training.optimizers.state_dict())
    training.data.load_state_dict(checkpoint.data)
    training.step = checkpoint.step


def _converted(saved: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same function of other parameters: gains spread over channels, projections folded."""
    weights = dict(saved)
    if "model.embedding_projection.weight" not in present:
        # E·Pᵀ and W·P': osp_diag.trainer.folding.
        inner, outer = weights["model.embedding_projection.weight"], weights["unembedding_projection.weight"]
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"] @ inner.T
        weights["lm_head.weight"] = weights["lm_head.weight"] @ outer
    return {name: weights[name].expand(value.shape) for name, value in present.items()}
