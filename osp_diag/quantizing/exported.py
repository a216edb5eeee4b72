"""What a training's checkpoint is worth: its outliers under both protocols, its perplexity at few bits."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr

from osp_diag.checkpoints import open_checkpoint
from osp_diag.probing.checkpoint import probe_checkpoint
from osp_diag.quantizing.cases import cases_of
from osp_diag.quantizing.results import FEW_BITS, HELD_OUT, MAXIMUM_SITES, OSP_CONVENTION
from osp_diag.quantizing.setting import Setting
from osp_diag.quantizing.sweep import sweep
from osp_diag.quantizing.tables import TABLES
from osp_diag.runs.run import Run
from osp_diag.schema import ATTENTION, HIDDEN_STATES, KURTOSIS
from osp_diag.tokens import make_batches

__all__ = ["CheckpointMeasurements", "measure_checkpoint"]


@dataclass(frozen=True)
class CheckpointMeasurements:
    """All that is measured of one checkpoint on the same held-out tokens."""

    sequence: Run
    """probed on real sequences: kurtosis, max/median, magnitudes, sinks"""
    published: Run
    """the kurtosis as the released OSP script takes it: every token a sequence of its own"""
    few_bits: xr.Dataset
    """perplexity without rounding, at :data:`FEW_BITS`, and as Table 2 of the OSP paper has it: see
    :mod:`osp_diag.quantizing.results`"""


def measure_checkpoint(
    path: str | os.PathLike[str], tokens: Any, *, device: str | torch.device = "auto"
) -> CheckpointMeasurements:
    """Measure a Hugging Face directory in float32.

    Parameters
    ----------
    tokens : held-out ids of shape (sequence, position); under the protocol ``osp-published`` opening tokens
        are left out
    device : as in :func:`osp_diag.open_checkpoint`

    Raises
    ------
    CheckpointError, TokenError : it cannot be opened, or ``tokens`` are not for it
    """
    checkpoint = open_checkpoint(path, dtype="float32", device=device)
    limits: dict[str, Any] = {
        "max_length": checkpoint.max_length,
        "vocabulary_size": checkpoint.vocabulary_size,
    }
    light: dict[str, Any] = {"keep_raw": False, "snapshot_tokens": 0}
    # Headline kurtosis, maxima and sinks alone: the table of the ablation needs no more.
    sequence = probe_checkpoint(
        checkpoint,
        make_batches(checkpoint.tokenizer, ids=tokens, **limits),
        sites=(*HIDDEN_STATES, *MAXIMUM_SITES, ATTENTION),
        estimators=(KURTOSIS, "max_median_ratio", "token_scale", "sink_rate"),
        **light,
    )
    # The published protocol feeds no BOS, so the training's opening tokens are masked out.
    opening = getattr(checkpoint.tokenizer, "bos_token_id", None)
    mask = None if opening is None else np.asarray(tokens) != opening
    single_tokens = make_batches(
        checkpoint.tokenizer, ids=tokens, attention_mask=mask, protocol="osp-published", **limits
    )
    published = probe_checkpoint(
        checkpoint, single_tokens, sites=HIDDEN_STATES, estimators=(KURTOSIS,), **light
    )
    few_bits = sweep(
        checkpoint.model,
        np.asarray(tokens),
        [
            *cases_of([Setting(*FEW_BITS)]),
            *cases_of(TABLES[2].settings, tuple(TABLES[2].methods), OSP_CONVENTION),
        ],
        token_source=HELD_OUT,
        model_fingerprint=checkpoint.fingerprint,
    )
    return CheckpointMeasurements(sequence, published, few_bits)
