"""What determines the numbers of a training run, as attributes of its store."""

from __future__ import annotations

from typing import Any

from trainer.checkpoint import identity_of
from trainer.config import TrainConfig
from trainer.data import TrainingData
from trainer.optimizers import Optimizers
from trainer.parallel import rank_and_ranks

__all__ = ["run_attributes"]


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
        "ranks": rank_and_ranks()[1],
    }
