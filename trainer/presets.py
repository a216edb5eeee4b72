"""Runs to begin from: Python functions that return a whole configuration, and the six rows of OSP's Table 2.

All presets are full OSP: Muon with decoupled embeddings, single-scale RMSNorm, embedding projections.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping

from osp_diag.errors import UsageError
from osp_diag.trainer.config import (
    CheckpointConfig,
    DataConfig,
    ModelConfig,
    OptimizerConfig,
    ProbeConfig,
    ScheduleConfig,
    TrainConfig,
)
from osp_diag.trainer.config_values import with_changes
from osp_diag.trainer.data.mixture import OSP_TOKENIZER, osp_mixture
from osp_diag.trainer.recipes import recipe, recipes
from osp_diag.wording import did_you_mean

__all__ = [
    "PRESETS",
    "ablation",
    "osp_1_4b",
    "osp_3b",
    "osp_7b",
    "preset",
    "small",
    "tiny",
    "with_recipe",
]


def tiny() -> TrainConfig:
    """1.9M parameters on the built-in text: about a minute and a half on a laptop's CPU."""
    return TrainConfig(
        steps=300,
        batch_size=16,
        model=ModelConfig(vocabulary_size=4096, hidden_size=128, layers=4, heads=4, max_length=256),
        optimizer=OptimizerConfig(lr=8e-3),
        data=DataConfig(sequence_length=128),
        probe=ProbeConfig(every=50, dense_until=100, dense_every=20, tokens=2048),
        # 20 MB each, and 15 ms of the loop.
        checkpoint=CheckpointConfig(every=25),
    )


def small() -> TrainConfig:
    """42M parameters on one GPU: minutes. Give it a corpus (``data.source``, ``data.path``)."""
    return TrainConfig(
        steps=2200,
        batch_size=64,
        dtype="bfloat16",
        compile=True,
        log_every=10,
        model=ModelConfig(vocabulary_size=16_384, hidden_size=512, layers=8, heads=8),
        optimizer=OptimizerConfig(lr=2e-3),
        schedule=ScheduleConfig(warmup=200),
        # Sinks grow on a token that is always first.
        data=DataConfig(sequence_length=512, bos="sequence"),
        probe=ProbeConfig(every=100, dense_until=400, dense_every=25, tokens=16_384),
        # 0.41 GB each.
        checkpoint=CheckpointConfig(every=200),
    )


def osp_1_4b() -> TrainConfig:
    """The paper's 1.4B model: 1T tokens in batches of 4M, Muon at 5e-4, Adam (on embeddings) at 5e-3.

    Not stated there, and chosen here: Adam's β and ε, the initialisation, and gradient clipping. For the
    ablation's 100B tokens: ``--set steps=23842``.
    """
    return _large(ModelConfig(vocabulary_size=49_152, hidden_size=2048, layers=24, heads=16))


def osp_3b() -> TrainConfig:
    """2.8B parameters, a scale that the paper leaves open; sharded over ranks."""
    return with_changes(
        _large(ModelConfig(vocabulary_size=49_152, hidden_size=2560, layers=32, heads=20)),
        {"name": "osp_3b", "parallel.mode": "fsdp", "activation_checkpointing": True},
    )


def osp_7b() -> TrainConfig:
    """6.9B parameters, a scale that the paper leaves open; sharded over ranks."""
    return with_changes(
        _large(ModelConfig(vocabulary_size=49_152, hidden_size=4096, layers=32, heads=32)),
        {"name": "osp_7b", "parallel.mode": "fsdp", "activation_checkpointing": True, "optimizer.lr": 3e-4},
    )


def _large(model: ModelConfig) -> TrainConfig:
    tokens, batch, length = 10**12, 2048, 2048
    return TrainConfig(
        steps=round(tokens / (batch * length)),
        batch_size=batch,
        micro_batch_size=8,
        dtype="bfloat16",
        compile=True,
        log_every=10,
        model=model,
        optimizer=OptimizerConfig(lr=5e-4, embedding_lr=5e-3, muon_form="osp"),
        # 5B tokens of warm-up, and the last fifth to decay.
        schedule=ScheduleConfig(warmup=round(5 * 10**9 / (batch * length)), decay=0.2),
        data=DataConfig(
            source="mixture", mixture=osp_mixture(), tokenizer=OSP_TOKENIZER, sequence_length=length
        ),
        probe=ProbeConfig(every=500, dense_until=2000, dense_every=50, tokens=65_536),
        # 8 to 12 bytes a parameter each.
        checkpoint=CheckpointConfig(every=1000, keep=3, ladder=2),
    )


PRESETS: dict[str, Callable[[], TrainConfig]] = {
    "tiny": tiny,
    "small": small,
    "osp_1_4b": osp_1_4b,
    "3b": osp_3b,
    "7b": osp_7b,
}
"""Name → what it is."""


def preset(name: str) -> TrainConfig:
    """A preset by name, or what ``module:function`` returns.

    Raises
    ------
    UsageError : there is none of that name, or the function returns something else
    """
    if ":" in name:
        return _from_function(name)
    if name not in PRESETS:
        advice = did_you_mean(name, PRESETS, "or give module:function")
        raise UsageError(f"there is no preset {name!r}; {advice}")
    return PRESETS[name]()


def _from_function(name: str) -> TrainConfig:
    module, _, function = name.partition(":")
    try:
        config = getattr(importlib.import_module(module), function)()
    except (ImportError, AttributeError) as error:
        raise UsageError(f"preset {name!r} cannot be loaded: {error}") from error
    if not isinstance(config, TrainConfig):
        raise UsageError(f"preset {name!r} returns {type(config).__name__}; it has to return a TrainConfig")
    return config


def with_recipe(config: TrainConfig, name: str) -> TrainConfig:
    """The same run under another recipe (:mod:`osp_diag.trainer.recipes`).

    Raises
    ------
    UsageError : there is no such recipe
    """
    return with_changes(config, {"name": name, **recipe(name).changes(config)})


def ablation(config: TrainConfig) -> Mapping[str, TrainConfig]:
    """The rows of Table 2 of the OSP paper, derived from one run."""
    return {name: with_recipe(config, name) for name, row in recipes().items() if row.row is not None}
