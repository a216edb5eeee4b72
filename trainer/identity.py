"""What a training run is: in words before it starts, and as attributes of its store."""

from __future__ import annotations

from typing import Any

import torch

from osp_diag.probing.ranks import rank_of_all
from osp_diag.trainer.checkpoint import identity_of
from osp_diag.trainer.config import TrainConfig
from osp_diag.trainer.data import TrainingData
from osp_diag.trainer.optimizers import Optimizers

__all__ = ["announcement", "run_attributes"]


def run_attributes(config: TrainConfig, data: TrainingData, optimizers: Optimizers) -> dict[str, Any]:
    """Configuration, data and routing; what only says how the work was done is left to the checkpoints."""
    return {
        "model_name": config.name,
        "recipe": config.name,
        "config": identity_of(config),
        "training_data": data.description,
        "training_data_fingerprint": data.fingerprint,
        "tokens_per_step": config.tokens_per_step,
        "autocast": config.dtype,
        "routing": optimizers.routing.table(),
        "ranks": rank_of_all()[1],
    }


def announcement(
    config: TrainConfig, optimizers: Optimizers, data: TrainingData, device: torch.device, step: int
) -> str:
    """What a user should see before the first step."""
    parameters = sum(parameter.numel() for parameter in optimizers.parameters.values())
    ranks = rank_of_all()[1]
    lines = [
        f"{config.name}: {parameters / 1e6:.1f}M parameters on {device}"
        + (f" × {ranks} ({config.parallel.mode})" if ranks > 1 else ""),
        f"{config.steps} steps of {config.tokens_per_step:,} tokens: {data.description}",
        optimizers.routing.table(),
        *(f"note: {note}" for note in (*optimizers.routing.warnings, *data.notes)),
    ]
    if step:
        lines.append(f"going on after step {step}")
    return "\n".join(lines)
