"""What a logged step did beside its scalars: the optimizers' settings, the batch, a sketch of the weights."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from osp_diag.probing.host import copy_under_way
from osp_diag.probing.ranks import is_distributed
from osp_diag.runs.declared import ProbedStep
from osp_diag.schema import OPTIMIZER_SETTINGS, WEIGHT_SKETCH
from osp_diag.trainer.batch_statistics import BatchCounts
from osp_diag.trainer.config import TrainConfig
from osp_diag.trainer.data import Batch, TrainingData
from osp_diag.trainer.optimizers import Optimizers
from osp_diag.trainer.optimizers.settings import OptimizerSettings
from osp_diag.trainer.parallel import summed
from osp_diag.trainer.weight_sketch import WeightSketch, sketch_period

__all__ = ["StepRecords"]


@dataclass
class _Pending:
    """Numbers of one step, some of them still on their way to the host."""

    step: int
    position: float
    numbers: dict[str, Tensor] = field(default_factory=dict)


class StepRecords:
    """Takes records while steps are launched, and gives them out when their numbers have reached the host.

    Nothing waits for the device: the batch is counted on the host, and copies lie in the stream before the
    clock with which :class:`~osp_diag.trainer.scalars.Scalars` tells that a step has arrived.

    Parameters
    ----------
    config : of the run
    data : whose batches are recorded
    optimizers : whose settings and parameters are
    device : of the model
    """

    def __init__(
        self, config: TrainConfig, data: TrainingData, optimizers: Optimizers, device: torch.device
    ) -> None:
        self._device, self._log_every = device, config.log_every
        self._counts = BatchCounts(config.model.vocabulary_size, data.dealing)
        self._settings = OptimizerSettings(optimizers)
        parameters = optimizers.parameters
        self._period = sketch_period(config, sum(value.numel() for value in parameters.values()))
        self._sketch = WeightSketch(parameters) if self._period else None
        self._queue: deque[_Pending] = deque()

    def after_step(self, step: int, batch: Batch, state: Mapping[str, Any], *, always: bool) -> None:
        """Update number ``step`` was launched, and is logged. A collective where there are several ranks.

        Parameters
        ----------
        batch : this rank's part, on the host
        state : of the data after it
        always : sketch the weights whatever the period
        """
        sequences = state["position"].get("sequences")
        pending = _Pending(step, math.nan if sequences is None else float(sequences))
        counts = self._counts.of(batch)
        if is_distributed():
            counts = copy_under_way(summed(self._on_device(counts)))
        pending.numbers["batch"] = counts
        pending.numbers[OPTIMIZER_SETTINGS] = torch.from_numpy(self._settings.values())
        if self._sketch is not None and (always or self._is_period(step)):
            pending.numbers[WEIGHT_SKETCH] = copy_under_way(self._sketch.take())
        self._queue.append(pending)

    def arrived(self, step: int) -> tuple[dict[str, float], ProbedStep]:
        """The series and the labelled arrays of a step of which Scalars said that it has arrived."""
        while self._queue and self._queue[0].step < step:
            self._queue.popleft()
        if not self._queue or self._queue[0].step != step:
            return {}, ProbedStep()
        pending = self._queue.popleft()
        numbers = {name: value.numpy() for name, value in pending.numbers.items()}
        groups = {OPTIMIZER_SETTINGS: self._settings.labelled(numbers[OPTIMIZER_SETTINGS])}
        if self._sketch is not None and WEIGHT_SKETCH in numbers:
            groups[WEIGHT_SKETCH] = self._sketch.labelled(numbers[WEIGHT_SKETCH])
        return self._counts.statistics(numbers["batch"], pending.position), ProbedStep(groups)

    def _is_period(self, step: int) -> bool:
        """Whether the period ended since the regular logged step before this one."""
        if step % self._log_every:
            return False
        return step // self._period != (step - self._log_every) // self._period

    def _on_device(self, value: Tensor) -> Tensor:
        if self._device.type != "cuda":
            return value
        # A copy from memory that is not pinned would wait for what the device is at.
        return value.pin_memory().to(self._device, non_blocking=True)
