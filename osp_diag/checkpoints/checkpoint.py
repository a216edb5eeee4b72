"""What an opened checkpoint is: a model, its tokenizer, and what identifies them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from osp_diag.errors import CheckpointError
from osp_diag.text.tokenizer import vocabulary_length

if TYPE_CHECKING:
    from torch import nn

__all__ = [
    "Checkpoint",
    "assemble",
    "attention_cap",
    "evaluation_mode",
    "learned_positions",
    "vocabulary_size_of",
]

NO_LIMIT = 10**9
"""Tokenizers write 10³⁰ where they know of no maximum length."""

LENGTH_FIELDS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_sequence_length",
    "n_ctx",
    "block_size",
)
"""What configurations call the longest sequence the model was made for."""


POSITIONS = re.compile(r"(^|[._])(wpe|pos|positions?|pos(ition(al)?)?_?(emb|enc)\w*)([._]|$)")
"""Names of tables of learned positions in hand-written models."""


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint.

    Attributes
    ----------
    model
        The module. One that osp_diag loaded is in evaluation mode and its parameters need no
        gradients; one that the caller holds is left as it is (see :meth:`evaluation`).
    tokenizer
        Its tokenizer, or None.
    name
        Short name for titles: of the directory, file, hub repository, loader or class.
    source
        What it was opened from, as the caller wrote it.
    architecture
        Name of the model's class.
    fingerprint
        Hexadecimal identity of the parameters: see :func:`osp_diag.checkpoints.weights.fingerprint`.
    max_length
        Longest sequence it was made for, in tokens; None where it has no limit or none is known.
    vocabulary_size
        Rows of the embedding: ids below this are valid. None where there is no embedding.
    config
        The model's configuration object, or None.
    dtype, device
        Of the parameters, as names; several are joined by "+".
    notes
        What the user should know of how it was opened, one sentence each.
    """

    model: nn.Module
    tokenizer: Any | None
    name: str
    source: str
    architecture: str
    fingerprint: str
    max_length: int | None
    vocabulary_size: int | None
    config: Any | None
    dtype: str
    device: str
    notes: tuple[str, ...] = ()

    @contextmanager
    def evaluation(self) -> Iterator[nn.Module]:
        """The model in evaluation mode, so that dropout is off; afterwards every module is as it was."""
        with evaluation_mode(self.model):
            yield self.model


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode; afterwards every module is in the mode it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def assemble(
    model: nn.Module,
    tokenizer: Any | None,
    *,
    name: str,
    source: str,
    notes: tuple[str, ...] = (),
    allow_nonfinite: bool = False,
) -> Checkpoint:
    """Check a model against its tokenizer, scan its weights, and describe it.

    Raises
    ------
    CheckpointError
        The model has no parameters, or weights that are NaN or infinite.
    """
    from osp_diag.checkpoints.weights import fingerprint, nonfinite_weights

    parameters = list(model.parameters())
    if not parameters:
        raise CheckpointError(
            f"{name} ({type(model).__name__}) has no parameters: there is no model to measure. "
            "Pass the model itself, after its weights are made"
        )
    vocabulary_size = vocabulary_size_of(model)
    entries = 0 if tokenizer is None else vocabulary_length(tokenizer)
    if vocabulary_size is not None and entries > vocabulary_size:
        notes += (
            f"the tokenizer has {entries:,} tokens and the embedding {vocabulary_size:,} rows; a text "
            "that uses one beyond them is refused.",
        )
    notes += _cap_notes(model)
    nonfinite = nonfinite_weights(model)
    if nonfinite and not allow_nonfinite:
        first, count = next(iter(nonfinite.items()))
        in_all = (
            f", {sum(nonfinite.values())} in all, in {len(nonfinite)} tensors" if len(nonfinite) > 1 else ""
        )
        raise CheckpointError(
            f"the weights of {name} hold NaN or Inf: {count} values of {first!r}{in_all}. The checkpoint is "
            "damaged or training diverged; use an earlier one, or allow_nonfinite=True to measure it all the "
            "same"
        )
    if nonfinite:
        notes += (
            f"{sum(nonfinite.values())} weights are NaN or Inf, the first in {next(iter(nonfinite))!r}.",
        )
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        name=name,
        source=source,
        architecture=type(model).__name__,
        fingerprint=fingerprint(model),
        max_length=_max_length(model, tokenizer),
        vocabulary_size=vocabulary_size,
        config=getattr(model, "config", None),
        dtype="+".join(sorted({str(p.dtype).removeprefix("torch.") for p in parameters})),
        device="+".join(sorted({str(p.device) for p in parameters})),
        notes=notes,
    )


def attention_cap(config: Any | None) -> float | None:
    """The soft cap c of attention logits, c · tanh(x / c) before the softmax; None without."""
    text_config: Any = config
    if config is not None and hasattr(config, "get_text_config"):
        text_config = config.get_text_config()
    return getattr(text_config, "attn_logit_softcapping", None)


def _cap_notes(model: nn.Module) -> tuple[str, ...]:
    """PyTorch's fused attention leaves the cap out without a word, so that another model is measured."""
    config = getattr(model, "config", None)
    implementation, cap = str(getattr(config, "_attn_implementation", None)), attention_cap(config)
    if cap is None or "sdpa" not in implementation:
        return ()
    return (
        f"the model caps attention logits at {cap:g}, and {implementation} leaves the cap out: attention is "
        "not the trained model's. Open it with attention='eager' (--attention eager).",
    )


def vocabulary_size_of(model: nn.Module) -> int | None:
    """Rows of the token embedding."""
    from torch import nn

    try:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        embedding = None
    rows = getattr(embedding, "num_embeddings", 0)  # a sharded weight may have fewer
    rows = rows or getattr(getattr(embedding, "weight", None), "shape", (0,))[0]
    if rows:
        return int(rows)
    # A foreign module: its largest table is the only bound that is safe to assume.
    return max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=None)


def _max_length(model: nn.Module, tokenizer: Any | None) -> int | None:
    config = getattr(model, "config", None)
    if config is not None:
        text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
        for field in LENGTH_FIELDS:
            value = getattr(text_config, field, None)
            if isinstance(value, int) and value > 0:
                return value - _unusable_positions(model)
    table = learned_positions(model)
    if table is not None:
        return table[1]
    limit = getattr(tokenizer, "model_max_length", None)
    return int(limit) if config is not None and isinstance(limit, int) and limit < NO_LIMIT else None


def learned_positions(model: nn.Module) -> tuple[str, int] | None:
    """The table of learned positions of a module without a configuration: its name, and how many it holds."""
    for name, parameter in model.named_parameters():
        if POSITIONS.search(name) and parameter.ndim > 1 and max(parameter.shape[:-1]) > 1:
            return name, max(parameter.shape[:-1])
    return None


def _unusable_positions(model: nn.Module) -> int:
    """RoBERTa and its kin count positions from padding_idx + 1, so that so many rows are never reached."""
    from torch import nn

    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0
