"""The probe that a training run carries: when it is due, on which tokens, and what is recorded beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import xarray as xr
from torch import Tensor, nn

from osp_diag.errors import UsageError
from osp_diag.probing.feeding import Feeding
from osp_diag.probing.identity import token_attributes
from osp_diag.probing.session import Probe
from osp_diag.sites.trace import unwrap
from osp_diag.tokens import make_batches
from osp_diag.trainer.config import TrainConfig
from osp_diag.trainer.data import TrainingData
from osp_diag.trainer.data.batch import IGNORED
from osp_diag.trainer.parallel import summed
from osp_diag.trainer.probe_schedule import due_steps

__all__ = ["RunProbe"]


class RunProbe:
    """A :class:`osp_diag.Probe` bound to a training run.

    Parameters
    ----------
    model : as the loop calls it, wrapped or sharded
    config : of the run
    data : which holds out the probe's tokens
    out : the run store
    attributes : what else determines the numbers
    beside : what the optimizer holds, as datasets of a probed step
    autocast : makes the context in which the model runs

    Raises
    ------
    UsageError : fewer held-out tokens than one sequence
    """

    def __init__(
        self,
        model: nn.Module,
        config: TrainConfig,
        data: TrainingData,
        out: Path,
        *,
        attributes: Mapping[str, Any],
        beside: Callable[[], Mapping[str, xr.Dataset]],
        autocast: Callable[[], AbstractContextManager[None]],
        resume: bool,
        overwrite: bool,
    ) -> None:
        self.model, self.config = model, config
        self.due = due_steps(config.probe, config.steps)
        self._autocast = autocast
        if config.probe.tokens < config.data.sequence_length:
            raise UsageError(
                f"probe.tokens={config.probe.tokens} is less than one sequence "
                f"(data.sequence_length={config.data.sequence_length}); give that many or more"
            )
        held_out = data.held_out(config.probe.tokens)
        self._batches = make_batches(
            data.tokenizer, ids=held_out, vocabulary_size=config.model.vocabulary_size
        )
        groups = min(config.probe.token_groups, len(self._batches.tokens))
        self._token_groups = groups if groups > 1 else 0
        self.held_out_loss: Tensor | None = None
        self.probe = Probe(
            model,
            every=self.due,
            out=out,
            sites=config.probe.sites or None,
            estimators=config.probe.estimators or None,
            delimiter_ids=self._batches.delimiter_ids,
            keep_raw=config.probe.keep_raw,
            token_groups=self._token_groups,
            attributes={**self._tokens_identity(data), **attributes, "probed_on": config.probe.on},
            beside=beside,
            resume=resume,
            overwrite=overwrite,
        )

    def _tokens_identity(self, data: TrainingData) -> dict[str, Any]:
        source = {"token_source": f"the held-out part of {data.description}", "bos": self.config.data.bos}
        return {**token_attributes(self._batches), **source}

    def measures_training(self, step: int) -> bool:
        """Whether this training step's own forward passes are measured."""
        return self.config.probe.on == "training" and self.due(step)

    def training_step(self, step: int) -> AbstractContextManager[Any]:
        """Around the forward passes of a training step, where those are to be measured."""
        return self.probe.step(step) if self.config.probe.on == "training" else nullcontext()

    def after_step(self, step: int) -> bool:
        """Probe the held-out tokens if ``step`` is due; whether it was."""
        if self.config.probe.on != "held_out" or not self.due(step):
            return False
        with self._autocast(), self._loss_kept():
            self.probe.measure(step, self._labelled(self._feeding()))
        return True

    def _feeding(self) -> Feeding:
        return Feeding(self.model, self._batches, passes=self._token_groups)

    def _labelled(self, feeding: Feeding) -> Iterator[Mapping[str, Any]]:
        for arguments in feeding:
            ids = arguments["input_ids"]
            labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)
            yield {**arguments, "labels": labels}

    @contextmanager
    def _loss_kept(self) -> Iterator[None]:
        """The forward passes that are probed give the loss on the held-out tokens as well."""
        losses: list[Tensor] = []

        def keep(_: nn.Module, arguments: object, output: Any) -> None:
            losses.append(output.loss.detach().float() * len(output.logits))

        handle = unwrap(self.model).register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()
        total = summed(torch.stack(losses).sum())
        self.held_out_loss = total / len(self._batches.tokens)
