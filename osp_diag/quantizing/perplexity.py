"""How well a causal language model predicts tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int64
from torch import Tensor, nn
from torch.nn import functional

from osp_diag.checkpoints.checkpoint import evaluation_mode
from osp_diag.errors import TokenError, UsageError
from osp_diag.quantizing.results import perplexity_of
from osp_diag.tokens import make_batches

__all__ = ["Perplexity", "logits_of", "perplexity", "refuse_what_sees_ahead"]

_TOKENS_A_PASS = 1024
"""Tokens a forward pass by default."""
_SEES_AHEAD = 16.0
"""Rounding errors of the model's dtype by which logits of one token may differ in two runs."""
_LOGITS_AT_ONCE = 2**24
"""Logits that are float64 at one time: 128 MiB."""


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
    ids = _checked(tokens, model)
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: a forward pass needs 1 or more sequences")
    size = batch_size or max(1, _TOKENS_A_PASS // ids.shape[1])
    if not known_causal:
        refuse_what_sees_ahead(model, ids)
    total = 0.0
    with evaluation_mode(model), torch.no_grad():
        for batch in ids.split(size):
            logits, batch = logits_of(model, batch)
            total += _surprise(logits, batch)
    count = ids.shape[0] * (ids.shape[1] - 1)
    return Perplexity(negative_log_likelihood=total / count, tokens=count)


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


def _surprise(logits: Tensor, ids: Tensor) -> float:
    """Σ −log p of the tokens after the first ones, in nats."""
    # The logits at position t predict the token at t + 1; the last ones predict nothing that is known.
    predicted, targets = logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    rows = max(1, _LOGITS_AT_ONCE // predicted.shape[-1])
    parts = [
        functional.cross_entropy(part.double(), truth.to(part.device), reduction="sum")
        for part, truth in zip(predicted.split(rows), targets.split(rows), strict=True)
    ]
    return float(torch.stack(parts).sum())
