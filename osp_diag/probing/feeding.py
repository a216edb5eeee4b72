"""From token sequences to a model's arguments: batches of one rank, on the device that takes them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from osp_diag.errors import CaptureError, UsageError
from osp_diag.probing.ranks import is_distributed
from osp_diag.sites.trace import unwrap
from osp_diag.tokens import TokenBatches

__all__ = ["Feeding", "Progress"]

Progress = Callable[[int, int], None]
"""(sequences done, sequences in all)"""

CPU_TOKENS, GPU_TOKENS = 1024, 8192
"""Tokens a forward pass by default: what a CPU's caches hold, and what keeps a GPU busy (docs/decisions.md,
Capture)."""


class Feeding:
    """The batches that this rank runs, and how many sequences it has run.

    Parameters
    ----------
    model : whose arguments to make
    batches : all sequences; with several ranks, this one takes every n-th, so that all run equally many
        give or take one
    batch_size : sequences a forward pass; None: about 1,024 tokens, 8,192 on a GPU, or fewer for ``passes``
    passes : at least so many forward passes on all ranks together, where there are as many sequences
    progress : told after every forward pass

    Raises
    ------
    UsageError : a batch size below 1
    CaptureError : a model sharded over ranks, and sequences that do not divide evenly among them
    """

    def __init__(
        self,
        model: nn.Module,
        batches: TokenBatches,
        *,
        batch_size: int | None = None,
        passes: int = 1,
        progress: Progress | None = None,
    ) -> None:
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size={batch_size}: a forward pass needs 1 or more sequences")
        self.device = _input_device(model)
        budget = GPU_TOKENS if self.device.type == "cuda" else CPU_TOKENS
        largest = budget // batches.sequence_length
        if passes > 1:
            largest = min(largest, len(batches.tokens) // passes)
        self.batch_size = batch_size or max(1, largest)
        self.progress = progress
        self.sequence_count = 0
        """Sequences of this rank whose forward pass is over, so far."""
        self._batches = batches
        self._arguments = _Arguments(model)
        # Which of the batches' sequences are this rank's.
        self._rows = np.arange(len(batches.tokens))
        if is_distributed():
            ranks = dist.get_world_size()
            if _is_sharded(model) and len(self._rows) % ranks:
                even = max(1, len(self._rows) // ranks) * ranks
                raise CaptureError(
                    f"{len(self._rows)} sequences do not divide evenly among {ranks} ranks, and a model "
                    "sharded by FSDP waits until every rank runs equally many; run "
                    f"{even} sequences (tokens={even * batches.sequence_length})"
                )
            self._rows = self._rows[dist.get_rank() :: ranks]

    def ask_for_cache(self) -> None:
        """Call the model with a new cache in every pass, in which alone the states of its mixers are seen."""
        self._arguments.asks_for_cache = True

    def __iter__(self) -> Iterator[Mapping[str, Any]]:
        padded = not bool(np.all(self._batches.attention_mask))
        for start in range(0, len(self._rows), self.batch_size):
            rows = self._rows[start : start + self.batch_size]
            ids = torch.as_tensor(self._batches.tokens[rows], device=self.device)
            mask = torch.as_tensor(self._batches.attention_mask[rows], device=self.device) if padded else None
            yield self._arguments.of(ids, mask)
            self.sequence_count += len(rows)
            if self.progress is not None:
                self.progress(self.sequence_count, len(self._rows))

    @property
    def token_count(self) -> int:
        """Tokens of those sequences, padding left out."""
        return int(self._batches.attention_mask[self._rows[: self.sequence_count]].sum())


class _Arguments:
    """How a model wants to be called."""

    def __init__(self, model: nn.Module) -> None:
        model = unwrap(model)
        config = getattr(model, "config", None)
        parameters = inspect.signature(model.forward).parameters
        positional = [
            name
            for name, parameter in parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        ]
        # A wrapper's forward(*args, **kwargs) tells no names; what it wraps is then a Hugging Face model.
        takes_ids = "input_ids" in parameters or not positional
        self._ids = "input_ids" if takes_ids else positional[0]
        self._decoder = bool(getattr(config, "is_encoder_decoder", False))
        self._decoder_mask = "decoder_attention_mask" in parameters
        self._cache = hasattr(config, "use_cache")
        self.asks_for_cache = False

    def of(self, ids: torch.Tensor, mask: torch.Tensor | None) -> dict[str, Any]:
        arguments: dict[str, Any] = {self._ids: ids}
        if self._decoder:
            arguments["decoder_input_ids"] = ids
        if mask is not None:
            arguments["attention_mask"] = mask
            if self._decoder and self._decoder_mask:
                arguments["decoder_attention_mask"] = mask
        if self._cache:
            arguments["use_cache"] = self.asks_for_cache
        return arguments


def _input_device(model: nn.Module) -> torch.device:
    model = unwrap(model)
    try:
        weight = model.get_input_embeddings().weight  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        weight = next(model.parameters())
    # A weight that accelerate keeps elsewhere until it is used is on the meta device.
    if weight.is_meta:
        real = next((p for p in model.parameters() if not p.is_meta), None)
        return torch.device("cpu") if real is None else real.device
    return weight.device


def _is_sharded(model: nn.Module) -> bool:
    return any(hasattr(parameter, "to_local") for parameter in model.parameters())
