"""The tokens that verbs at few bits run, as options and conventions have them, and whose run is whose."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from osp_diag.cli.checkpoint_options import check_tokens
from osp_diag.errors import UsageError
from osp_diag.probing.settings import TokenSettings

if TYPE_CHECKING:
    import numpy as np

    from osp_diag.checkpoints import Checkpoint
    from osp_diag.quantizing.calibration import Calibration
    from osp_diag.runs.run import Run
    from osp_diag.tokens import TokenBatches

__all__ = [
    "as_convention",
    "calibration_tokens_of",
    "check_same_model",
    "check_sequences",
    "evaluated_batches",
    "held_out_tokens_of",
    "memory_advice",
]

_MEMORY = re.compile(r"not enough memory|out of memory|allocate memory", re.IGNORECASE)


def check_sequences(settings: TokenSettings, calibration_tokens: int) -> None:
    """Refuse tokens that make no sense before a model is opened.

    Raises
    ------
    UsageError : too few, or none in a context
    """
    check_tokens(settings, fewest=2, why=", so that a token can be predicted")
    if settings.protocol != "sequence":
        raise UsageError(
            f"--protocol {settings.protocol}: perplexity is of real sequences, where a token has a context"
        )
    if calibration_tokens < 1:
        raise UsageError(f"--calibration-tokens {calibration_tokens}: give 1 or more")


@contextmanager
def memory_advice(name: str, kept: str = "") -> Iterator[None]:
    """Where memory runs out, what to do about it.

    Parameters
    ----------
    name : of the model
    kept : a sentence on what is not lost

    Raises
    ------
    UsageError : memory ran out
    """
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not _MEMORY.search(str(error)):
            raise
        raise UsageError(
            f"{name} ran out of memory: take fewer sequences a pass (--batch-size 1), shorter ones "
            "(--seq-len), or fewer --calibration-tokens; rounded weights need as much memory again as the "
            f"blocks' own. {kept}".rstrip()
        ) from error


def as_convention(settings: TokenSettings, convention: str, opened: Checkpoint) -> TokenSettings:
    """Sequences as the convention has them, where the user says nothing else."""
    from osp_diag.quantizing.conventions import convention_named

    rules = convention_named(convention)
    if settings.seq_len is None and rules.sequence_length is not None and settings.ids is None:
        length = min(rules.sequence_length, settings.tokens, opened.max_length or rules.sequence_length)
        settings = replace(settings, seq_len=length)
    if settings.bos == "auto" and not rules.opening_tokens:
        settings = replace(settings, bos="no")
    return settings


def evaluated_batches(
    opened: Checkpoint, settings: TokenSettings, training_tokens: Any | None
) -> TokenBatches:
    """The tokens that are asked for, or those that a training held out."""
    if training_tokens is None:
        return settings.batches(opened)
    from osp_diag.tokens import make_batches

    return make_batches(
        opened.tokenizer,
        ids=training_tokens,
        max_length=opened.max_length,
        vocabulary_size=opened.vocabulary_size,
    )


def calibration_tokens_of(
    opened: Checkpoint,
    settings: TokenSettings,
    batches: TokenBatches,
    source: str | None,
    tokens: int,
    training: Run | None,
) -> Calibration:
    """A text of the user's own, or what follows the evaluated tokens in their source."""
    from osp_diag.quantizing.calibration import calibration_from, calibration_of

    if source is not None:
        return calibration_from(opened, source, settings, batches, tokens)
    longer = replace(settings, tokens=batches.tokens.size + tokens, seq_len=batches.sequence_length)
    of_training = None if training is None else held_out_tokens_of(training, longer)
    following = longer.batches(opened).tokens if of_training is None else of_training
    return calibration_of(following, batches.source, batches.tokens)


def held_out_tokens_of(run: Run | None, settings: TokenSettings) -> np.ndarray[Any, Any]:
    """What the training that wrote a run held out."""
    from osp_diag.cli.train_ablation import held_out_tokens

    sources = [name for name in ("text", "dataset", "ids", "random_tokens") if getattr(settings, name)]
    if run is None or sources:
        raise UsageError(
            "--held-out takes the tokens of --run's training: give --run, and no --text, --dataset, --ids or "
            "--random-tokens"
        )
    config = run.attrs.get("config")
    if not config:
        raise UsageError(
            f"--held-out: {run.path} was not written by `osp-diag train`; give --text or --dataset"
        )
    from osp_diag.trainer.config import from_dictionary

    return held_out_tokens(from_dictionary(dict(config)), settings.tokens)


def check_same_model(run: Run, checkpoint: Checkpoint) -> None:
    """Refuse results of one model in the run of another.

    A run of a training holds no fingerprint of what was exported from it; there, depth and width have to do.
    """
    attributes = run.attrs
    fingerprint = attributes.get("model_fingerprint")
    if fingerprint is not None:
        if fingerprint != checkpoint.fingerprint:
            raise UsageError(
                f"{run.path} is the run of {attributes.get('model_name', 'another model')}, whose weights "
                f"are not those of {checkpoint.name}; give the run that was probed from this checkpoint"
            )
        return
    # Equal sizes do not prove equal weights, but other sizes are another model.
    for name, field in (("number_of_layers", "num_hidden_layers"), ("hidden_size", "hidden_size")):
        size = getattr(checkpoint.config, field, None)
        if size is not None and size != attributes.get(name):
            raise UsageError(
                f"{run.path} is the run of a model with {name.replace('_', ' ')} {attributes.get(name)}, and "
                f"{checkpoint.name} has {size}; give what `osp-diag export {run.path}` writes"
            )
