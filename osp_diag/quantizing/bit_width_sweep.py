"""How prediction suffers as weights and activations get fewer bits: the sweep of the OSP paper's Figure 4."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr
from torch import nn

from osp_diag.errors import UsageError
from osp_diag.quantizing.perplexity import perplexity, refuse_what_sees_ahead
from osp_diag.quantizing.results import UNQUANTIZED, QuantizedResult, results_dataset
from osp_diag.quantizing.round_to_nearest import check_bits, round_to_nearest, rounded_share
from osp_diag.tokens import make_batches

__all__ = ["WIDTHS", "bit_width_sweep", "bit_widths"]

WIDTHS = (
    (UNQUANTIZED, UNQUANTIZED),
    *((bits, UNQUANTIZED) for bits in (8, 6, 5, 4, 3)),
    *((UNQUANTIZED, bits) for bits in (8, 6, 5, 4)),
    (8, 8), (4, 8), (4, 4),
)  # fmt: skip
"""Weights alone, activations alone, and the three that papers report of both."""

_NOTATION = re.compile(r"W(\d+)A(\d+)", re.IGNORECASE)


def bit_widths(text: str) -> tuple[int, int]:
    """``W4A16`` → (4, 16).

    Raises
    ------
    UsageError : it is written otherwise
    """
    match = _NOTATION.fullmatch(text.strip())
    if match is None:
        raise UsageError(f"{text!r} is no setting; write W4A4, W8A16 …, where 16 leaves a tensor as it is")
    return int(match[1]), int(match[2])


def bit_width_sweep(
    model: nn.Module,
    tokens: Any,
    widths: Sequence[tuple[int, int]] = WIDTHS,
    *,
    token_source: str = "ids in hand",
    model_fingerprint: str = "",
    blocks: str | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """Perplexity of the same tokens under each setting, rounded to nearest.

    Parameters
    ----------
    model : causal language model whose blocks osp_diag finds
    tokens : ids of shape (sequence, position), without padding
    widths : (bits of weights, bits of activations), each 2 to 8, or 16 for "as they are"
    token_source, model_fingerprint : recorded with the results
    blocks, batch_size : as :func:`~osp_diag.quantizing.round_to_nearest.round_to_nearest` and
        :func:`~osp_diag.quantizing.perplexity.perplexity` take them
    progress : called with (settings done, settings in all)

    Returns
    -------
    A Dataset with the dimension ``setting``, in the order given and each once; see
    :mod:`osp_diag.quantizing.results`.

    Raises
    ------
    UsageError : no setting, bits that have no meaning, or ``compressed-tensors`` is not installed; before
        any work
    TokenError, CheckpointError, SiteError : what :func:`~osp_diag.quantizing.perplexity.perplexity` and
        :func:`~osp_diag.quantizing.round_to_nearest.round_to_nearest` refuse
    """
    settings = list(dict.fromkeys(widths))
    if not settings:
        raise UsageError(
            "a sweep needs at least one setting, such as (4, 4) for 4-bit weights and activations"
        )
    for weight_bits, activation_bits in settings:
        check_bits(weight_bits, activation_bits)
    # Results compare only on the same tokens, so each row carries their fingerprint.
    fingerprint = make_batches(ids=np.asarray(tokens)).fingerprint
    share = rounded_share(model, blocks=blocks)
    results = []
    refuse_what_sees_ahead(model, tokens)  # before rounding, by which the least error may become a step
    for count, (weight_bits, activation_bits) in enumerate(settings, start=1):
        with round_to_nearest(model, weight_bits, activation_bits, blocks=blocks):
            prediction = perplexity(model, tokens, batch_size=batch_size, known_causal=True)
        results.append(
            QuantizedResult(
                weight_bits=weight_bits,
                activation_bits=activation_bits,
                negative_log_likelihood=prediction.negative_log_likelihood,
                tokens=prediction.tokens,
                sequence_length=int(tokens.shape[1]),
                token_source=token_source,
                token_fingerprint=fingerprint,
                model_fingerprint=model_fingerprint,
                rounded_share=share,
            )
        )
        if progress is not None:
            progress(count, len(settings))
    return results_dataset(results)
