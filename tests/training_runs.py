"""Training runs of a second or two, for the tests."""

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

SITES = (
    "embedding",
    "residual_post",
    "final_norm",
    "attention_input",
    "query_post_rope",
    "mlp_hidden",
    "mlp_down_weight",
    "attention",
)
"""Some of each kind; all of them take twice as long."""


def minute(**changes):
    """A config of a model that trains in seconds; changes by dotted key with ``__`` for the dot."""
    config = TrainConfig(
        name="minute",
        steps=6,
        batch_size=8,
        model=ModelConfig(vocabulary_size=4096, hidden_size=32, layers=2, heads=2, max_length=64),
        optimizer=OptimizerConfig(lr=4e-3, newton_schulz_dtype="float32"),
        schedule=ScheduleConfig(warmup=2),
        data=DataConfig(sequence_length=32),
        probe=ProbeConfig(every=3, dense_until=0, tokens=256, sites=SITES),
        checkpoint=CheckpointConfig(every=2),
    )
    return with_changes(config, {key.replace("__", "."): value for key, value in changes.items()})
