"""The held-out tokens of one of our training runs, and the loss on them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from osp_diag.errors import UsageError
from osp_diag.seams.threads import of_this_thread
from osp_diag.sites.trace import unwrap
from osp_diag.tokens import TokenBatches, make_batches
from osp_diag.trainer.config import TrainConfig
from osp_diag.trainer.data import TrainingData
from osp_diag.trainer.data.batch import IGNORED
from osp_diag.trainer.parallel import summed

__all__ = ["HeldOutLoss", "held_out_batches"]


def held_out_batches(config: TrainConfig, data: TrainingData) -> TokenBatches:
    """The sequences that every probe runs: ``probe.tokens`` of what the data hold out.

    Raises
    ------
    UsageError : fewer than one sequence is asked for
    TokenError : there are too few held-out tokens
    """
    if config.probe.tokens < config.data.sequence_length:
        raise UsageError(
            f"probe.tokens={config.probe.tokens} is less than one sequence "
            f"(data.sequence_length={config.data.sequence_length}); give that many or more"
        )
    ids = data.held_out(config.probe.tokens)
    batches = make_batches(data.tokenizer, ids=ids, vocabulary_size=config.model.vocabulary_size)
    return replace(batches, source=f"the held-out part of {data.description}", bos=config.data.bos)


class HeldOutLoss:
    """The loss on held-out tokens, of the very forward passes that a probe runs within a ``with`` block.

    Parameters
    ----------
    model : one of ours: called with ``labels``, it gives the mean ``loss`` of a batch
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        self._sums: list[Tensor] = []
        self._sequences = 0
        self._hook: RemovableHandle | None = None

    def labelled(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """The arguments of a forward pass with the next tokens as labels."""
        ids = arguments["input_ids"]
        labels = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], IGNORED)], dim=1)
        return {**arguments, "labels": labels}

    def __enter__(self) -> None:
        self._sums, self._sequences = [], 0
        self._hook = self._model.register_forward_hook(of_this_thread(self._add))

    def __exit__(self, *exception: object) -> None:
        if self._hook is not None:
            self._hook.remove()

    def _add(self, _: nn.Module, arguments: object, output: Any) -> None:
        self._sums.append(output.loss.detach().float() * len(output.logits))
        self._sequences += len(output.logits)

    def mean(self) -> float:
        """Over the sequences of all ranks, all of one length."""
        # Σ (mean loss · sequences) of the passes, over all sequences; both summed over the ranks.
        total = torch.stack(self._sums).sum()
        total, sequences = summed(torch.stack([total, torch.full_like(total, self._sequences)]))
        return float(total / sequences)
