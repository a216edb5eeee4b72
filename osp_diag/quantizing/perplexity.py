"""How well a causal language model predicts tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from osp_diag.checkpoints.checkpoint import evaluation_mode
from osp_diag.errors import TokenError, UsageError
from osp_diag.quantizing.divergence import ReferencePredictions
from osp_diag.quantizing.results import perplexity_of
from osp_diag.tokens import make_batches

__all__ = [
    "Perplexity",
    "SequencePredictions",
    "logits_of",
    "perplexity",
    "predictions",
    "refuse_what_sees_ahead",
]

_TOKENS_A_PASS = 1024
"""Tokens a forward pass by default."""
_SEES_AHEAD = 16.0
"""Rounding errors of the model's dtype by which logits of one token may differ in two runs."""
_LOGITS_AT_ONCE = 2**22
"""Logits that are float64 at one time: 32 MiB."""


@dataclass(frozen=True, kw_only=True)
class Perplexity:
    """How surprised a model is at tokens."""

    negative_log_likelihood: float
    """mean over the predicted tokens, in nats; NaN or infinite if the model's logits are"""
    tokens: int
    """how many were predicted: all but the first of each sequence"""

    @property
    def perplexity(self) -> float:
        """exp of the mean; infinite where that is too large for a float."""
        return perplexity_of(self.negative_log_likelihood)


@dataclass(frozen=True, kw_only=True)
class SequencePredictions:
    """What a model predicts of each sequence.

    Attributes
    ----------
    surprise
        Σ −log p(x_t | x_<t) in nats.
    divergence
        Σ KL(full ‖ model) in nats over the same positions; NaN where no reference is kept.
    tokens
        how many are predicted of each sequence.
    """

    surprise: Float[np.ndarray, " sequence"]
    divergence: Float[np.ndarray, " sequence"]
    tokens: int


def perplexity(
    model: nn.Module, tokens: Any, *, batch_size: int | None = None, known_causal: bool = False
) -> Perplexity:
    """exp(−1/N Σ log p(x_t | x_<t)) over all next-token predictions, sequence by sequence.

    Log-probabilities and their sum are float64, whatever the dtype of the logits. The context of a token
    is its own sequence from the beginning; no window slides. Dropout is off meanwhile.

    Parameters
    ----------
    model : causal language model; ``model(input_ids).logits`` is (sequence, position, vocabulary)
    tokens : ids of shape (sequence, position), without padding
    batch_size : sequences a forward pass; None: about 1,024 tokens
    known_causal : leave out the two passes that ask whether the model sees what comes later

    Raises
    ------
    TokenError : ids of another shape, foreign to the model, or too few to predict one
    UsageError : the model is no causal language model (it is trained on masked tokens, is an encoder and
        decoder, or its predictions depend on what comes later), returns no logits of that shape, or
        ``batch_size`` is below 1
    """
    found = predictions(model, tokens, batch_size=batch_size, known_causal=known_causal)
    count = len(found.surprise) * found.tokens
    return Perplexity(negative_log_likelihood=float(found.surprise.sum()) / count, tokens=count)


def predictions(
    model: nn.Module,
    tokens: Any,
    *,
    batch_size: int | None = None,
    known_causal: bool = False,
    reference: ReferencePredictions | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SequencePredictions:
    """The same of each sequence, and how far the predictions lie from those of the full-precision model.

    Parameters
    ----------
    model, tokens, batch_size, known_causal : as in :func:`perplexity`
    reference : an empty one is filled with the predictions of this model; one that holds those of the
        full-precision model on the same tokens is compared with
    progress : told (sequences done, sequences in all)

    Raises
    ------
    TokenError, UsageError : as :func:`perplexity`
    """
    ids = _checked(tokens, model)
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: a forward pass needs 1 or more sequences")
    size = batch_size or max(1, _TOKENS_A_PASS // ids.shape[1])
    if not known_causal:
        refuse_what_sees_ahead(model, ids)
    if reference is not None:
        reference.rewind()
    surprise, divergence = [], []
    with evaluation_mode(model), torch.no_grad():
        for batch in ids.split(size):
            logits, batch = logits_of(model, batch)
            for of_sequence, targets in zip(logits, batch, strict=True):
                # The logits at position t predict the token at t + 1; the last ones nothing that is known.
                surprise.append(_surprise(of_sequence[:-1], targets[1:]))
                if reference is None:
                    divergence.append(math.nan)
                elif reference.complete:
                    divergence.append(reference.divergence(of_sequence[:-1]))
                else:
                    divergence.append(0.0 if reference.add(of_sequence[:-1]) else math.nan)
            if progress is not None:
                progress(len(surprise), len(ids))
    if reference is not None:
        reference.complete = True
    return SequencePredictions(
        surprise=np.array(surprise), divergence=np.array(divergence), tokens=ids.shape[1] - 1
    )


def refuse_what_sees_ahead(model: nn.Module, tokens: Any) -> None:
    """Change the last token of a sequence: where a prediction of an earlier one moves, it is no prediction.

    Parameters
    ----------
    model, tokens : as in :func:`perplexity`; the first sequence is run twice

    Raises
    ------
    TokenError, UsageError : as :func:`perplexity`
    """
    kind = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UsageError(
            f"perplexity needs a causal language model, and {kind} is an encoder with a decoder, which "
            "needs a source beside the text"
        )
    ids = _checked(tokens, model)[:1]
    other = ids.clone()
    # An id that the model knows, since it occurs.
    other[:, -1] = next((token for token in ids[0] if token != ids[0, -1]), ids[0, -1])
    # One after the other: a mixture of experts rounds differently for other company in the batch.
    with evaluation_mode(model), torch.no_grad():
        first, second = (logits_of(model, part)[0][:, :-1] for part in (ids, other))
    dtypes = {first.dtype, *(p.dtype for p in model.parameters() if p.is_floating_point())}
    coarsest = max(torch.finfo(dtype).eps for dtype in dtypes)
    difference = (first.float() - second.float()).abs().amax()
    if bool(difference > _SEES_AHEAD * coarsest * first.float().abs().amax()):
        raise UsageError(
            f"perplexity needs a causal language model, and {kind} is none: a prediction depends on the "
            "tokens after it, as in models trained on masked tokens (BERT), and what it would give is no "
            "perplexity"
        )


def logits_of(model: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The logits (sequence, position, vocabulary) of a batch of ids, and the ids on the model's device.

    Raises
    ------
    UsageError : the model returns none of that shape
    """
    # A cache of keys and values that no one reads would only take memory.
    options = {"use_cache": False} if hasattr(getattr(model, "config", None), "use_cache") else {}
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    ids = ids.to(device)
    return _logits(model(ids, **options), ids), ids


def _checked(tokens: Any, model: nn.Module) -> Int64[Tensor, "sequence position"]:
    shape = tuple(getattr(tokens, "shape", ()))
    if len(shape) != 2 or shape[1] < 2:
        raise TokenError(
            f"perplexity takes token ids of shape (sequence, position) with 2 or more positions, not of "
            f"shape {shape}"
        )
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)]
    return torch.from_numpy(make_batches(ids=tokens, vocabulary_size=max(tables, default=None)).tokens)


def _logits(output: Any, ids: Tensor) -> Tensor:
    # A hand-written model may return them bare, or before its loss.
    bare = output[0] if isinstance(output, tuple) and output else output
    logits = getattr(output, "logits", bare if isinstance(bare, Tensor) else None)
    if logits is None or logits.shape[:2] != ids.shape:
        description = "no logits" if logits is None else f"logits of shape {tuple(logits.shape)}"
        raise UsageError(
            "perplexity needs a causal language model, whose output has logits of shape (sequence, position, "
            f"vocabulary); {type(output).__name__} has {description} for ids of shape {tuple(ids.shape)}"
        )
    return logits


def _surprise(logits: Float[Tensor, "token vocabulary"], targets: Int64[Tensor, " token"]) -> float:
    """Σ −log p of the targets, in nats."""
    rows = max(1, _LOGITS_AT_ONCE // logits.shape[-1])
    parts = [
        functional.cross_entropy(part.double(), truth.to(part.device), reduction="sum")
        for part, truth in zip(logits.split(rows), targets.split(rows), strict=True)
    ]
    return float(torch.stack(parts).sum())
