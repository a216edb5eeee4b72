"""Models of checkpoints that another loop wrote, run on fixed tokens: kurtosis and loss, with and without an
edit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from osp_diag.checkpoints import Checkpoint
from osp_diag.checkpoints.loaded import without_wrappers
from osp_diag.checkpoints.saved_steps import SavedStep
from osp_diag.errors import CheckpointError, TokenError, UsageError
from osp_diag.laboratory import WeightPart
from osp_diag.probing.checkpoint import probe_checkpoint
from osp_diag.probing.settings import MeasurementSettings, OpeningSettings, TokenSettings
from osp_diag.quantizing.perplexity import perplexity
from osp_diag.runs.run import Run
from osp_diag.schema import HIDDEN_STATES, KURTOSIS
from osp_diag.tokens import BeginningOfSequence, TokenBatches

__all__ = ["ForeignModels", "replaced"]


class ForeignModels:
    """Opens one checkpoint at a time, and measures it on the tokens that were given, or else the run's own.

    Parameters
    ----------
    run : whose tokens are made again where none are given
    tokens : which to run; None: the run's
    opening : how checkpoints are opened
    progress : told (what, sequences done, in all)
    """

    def __init__(
        self,
        run: Run,
        tokens: TokenSettings | None,
        opening: OpeningSettings,
        progress: Callable[[str, int, int], None] | None,
    ) -> None:
        self.run, self.tokens, self.opening, self.progress = run, tokens, opening, progress
        self._opened: tuple[int, Checkpoint] | None = None
        self._batches: TokenBatches | None = None

    def opened(self, one: SavedStep) -> Checkpoint:
        """The model of a checkpoint; the one before is let go of.

        Raises
        ------
        OspDiagError : it cannot be opened, or is not the one that the run measured
        """
        if self._opened is None or self._opened[0] != one.step:
            self._opened = None
            checkpoint = self.opening.open(one.path)
            self._refuse_another(one, checkpoint)
            self._opened = (one.step, checkpoint)
        return self._opened[1]

    def _refuse_another(self, one: SavedStep, checkpoint: Checkpoint) -> None:
        """Where the run says which weights it measured at a step, they have to be these."""
        measured = (self.run.attrs.get("checkpoints") or {}).get(str(one.step), {}).get("fingerprint")
        if measured is not None and self.opening.dtype == "auto" and measured != checkpoint.fingerprint:
            raise CheckpointError(
                f"{one.path} is not the checkpoint that the run measured at step {one.step}: its weights are "
                "others"
            )

    def batches(self, checkpoint: Checkpoint) -> TokenBatches:
        """The tokens that all checkpoints are run on.

        Raises
        ------
        TokenError, UsageError : they cannot be made
        """
        if self._batches is None:
            self._batches = (self.tokens or self._of_the_run(checkpoint)).batches(checkpoint)
        return self._batches

    def _of_the_run(self, checkpoint: Checkpoint) -> TokenSettings:
        attrs = self.run.attrs
        if checkpoint.tokenizer is None:
            raise TokenError(
                f"{checkpoint.name} has no tokenizer to make tokens with, and a run does not keep "
                "its own; give some with --ids FILE or --tokenizer NAME (tokens=, opening=)"
            )
        settings = TokenSettings()
        if type(attrs.get("tokens")) is int and type(attrs.get("sequence_length")) is int:
            own = attrs.get("bos")
            bos: BeginningOfSequence = "yes" if own == "yes" else "no" if own == "no" else "auto"
            settings = replace(settings, tokens=attrs["tokens"], seq_len=attrs["sequence_length"], bos=bos)
        return settings

    @property
    def are_the_runs(self) -> bool:
        """Whether the tokens are those of the run's probes."""
        own = self.run.attrs.get("token_fingerprint")
        return self._batches is not None and self._batches.fingerprint == own

    def measured(self, one: SavedStep, what: str) -> Run:
        """A probe of the hidden states of a checkpoint, as it is in memory."""
        checkpoint = self.opened(one)

        def told(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(what, done, total)

        sites = [site for site in HIDDEN_STATES if site in self.run.sites] or list(HIDDEN_STATES)
        settings = MeasurementSettings(sites=sites, estimators=[KURTOSIS], keep_raw=False)
        return probe_checkpoint(checkpoint, self.batches(checkpoint), settings, progress=told, step=one.step)

    def loss(self, one: SavedStep) -> float:
        """Mean −log p of the next tokens, in nats; NaN where the model, or the tokens, have none."""
        checkpoint = self.opened(one)
        batches = self.batches(checkpoint)
        if not np.all(batches.attention_mask):
            return float("nan")
        try:
            return perplexity(checkpoint.model, batches.tokens).negative_log_likelihood
        except (TokenError, UsageError):
            return float("nan")

    @property
    def loss_name(self) -> str:
        """Of which tokens the loss is."""
        assert self._batches is not None
        return f"loss on {self._batches.source}"


@contextmanager
def replaced(model: nn.Module, part: WeightPart, old: Tensor) -> Iterator[None]:
    """Within, a part of a weight is as in ``old``; afterwards it is what it was, to the bit.

    Raises
    ------
    OspDiagError : the model that was built has no such parameter, or one of another shape
    """
    weights = {
        without_wrappers(name): weight for name, weight in model.named_parameters(remove_duplicate=False)
    }
    # A file may have names with what stands before the model's own: a LightningModule's.
    names = [name for name in weights if f".{part.parameter}".endswith(f".{name}")]
    weight = weights[max(names, key=len)] if names else None
    if weight is None or weight.shape != old.shape:
        raise CheckpointError(
            f"{part.parameter} is no parameter of the {type(model).__name__} that was built, or has another "
            "shape there"
        )
    index: Any = slice(None) if part.axis == "all" else list(part.indices)
    place = (slice(None), index) if part.axis == "column" else (index,)
    with torch.no_grad():
        before = weight[place].clone()
        try:
            weight[place] = old[place].to(weight)
            yield
        finally:
            weight[place] = before
