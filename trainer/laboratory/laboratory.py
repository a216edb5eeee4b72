"""The laboratory of one of our training runs: see :class:`osp_diag.laboratory.Laboratory`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor

from osp_diag.errors import TrainingError
from osp_diag.laboratory import CheckpointState, Counterfactual, Fork, FunctionRecord, Replay, WeightPart
from osp_diag.runs.headline import headline_kurtosis
from osp_diag.runs.run import Run, open_run
from osp_diag.schema import HIDDEN_STATES, KURTOSIS
from osp_diag.tokens import TokenBatches
from osp_diag.trainer.checkpoint import TrainingCheckpoint, complete_folders, folder_of, read_checkpoint
from osp_diag.trainer.config import TrainConfig
from osp_diag.trainer.config_values import as_dictionary, with_changes
from osp_diag.trainer.data import open_data
from osp_diag.trainer.devices import autocast_of
from osp_diag.trainer.exporting import trained_model
from osp_diag.trainer.fingerprint import reference_loss
from osp_diag.trainer.held_out import HeldOutLoss, held_out_batches
from osp_diag.trainer.laboratory.edits import EDITS
from osp_diag.trainer.laboratory.replaying import compared
from osp_diag.trainer.laboratory.weight_changes import rows_that_deviate, weight_changes
from osp_diag.trainer.laboratory.words import words_of
from osp_diag.trainer.loop import train
from osp_diag.trainer.model import Llama
from osp_diag.trainer.optimizers import route
from osp_diag.trainer.recording import Recording

__all__ = ["TrainingLaboratory", "is_own"]

MODEL, OPTIMIZER = "model.", "optimizer."


def is_own(run: Run) -> bool:
    """Whether a run is of our trainer, and on disk."""
    return run.path is not None and isinstance(run.attrs.get("config"), Mapping) and "routing" in run.attrs


class TrainingLaboratory:
    """Reads the checkpoints beside a run and trains in folders of its own; the run is only read.

    Parameters
    ----------
    run : of our trainer, on disk
    progress : told (what, steps done, steps in all) while something is trained
    """

    trains = True
    """Steps can be made again from its checkpoints."""

    def __init__(self, run: Run, progress: Callable[[str, int, int], None] | None = None) -> None:
        assert run.path is not None
        self.run, self.path, self.progress = run, Path(run.path), progress
        self.missing: list[str] = []
        self._by_step: dict[int, TrainingCheckpoint] = {}
        for folder in complete_folders(folder_of(self.path)):
            try:
                checkpoint = read_checkpoint(folder)
                checkpoint.sizes()
                self._by_step[checkpoint.step] = checkpoint
            except TrainingError as error:
                self.missing.append(str(error))
        if not self._by_step:
            self.missing.append(
                f"weights, optimizers, the function and replays: there is no checkpoint in "
                f"{folder_of(self.path)}; train with checkpoint.every and keep the folder beside the run"
            )
        self._tokens: TokenBatches | None = None
        self._measured: dict[int, tuple[float, float]] = {}
        self._weights = lru_cache(maxsize=3)(self._read_weights)

    @cached_property
    def checkpoints(self) -> tuple[CheckpointState, ...]:
        """What each says without its weights being read."""
        return tuple(self._state(self._by_step[step]) for step in sorted(self._by_step))

    @property
    def scalars(self) -> xr.Dataset:
        """None beside those of the run."""
        return xr.Dataset(coords={"step": np.empty(0, np.int64)})

    def _state(self, checkpoint: TrainingCheckpoint) -> CheckpointState:
        owners, shapes = {}, {}
        for name, size in checkpoint.sizes().items():
            if name.startswith(MODEL):
                shapes[name.removeprefix(MODEL)] = size
            elif name.startswith(OPTIMIZER):
                owner, _, rest = name.removeprefix(OPTIMIZER).partition(".")
                owners[rest.rpartition(".")[0]] = owner
        with torch.device("meta"):
            routes = route(Llama(checkpoint.config.model), checkpoint.config).routes
        return CheckpointState(
            checkpoint.step,
            checkpoint.path,
            as_dictionary(checkpoint.config),
            owners,
            {entry.name: entry.optimizer for entry in routes},
            {entry.name: entry.role for entry in routes},
            checkpoint.config.model.head_size,
            shapes,
            checkpoint.function,
        )

    # Weights and function

    def functions(self, steps: Sequence[int]) -> list[FunctionRecord]:
        """The losses of those checkpoints that recorded one; a forward pass each."""
        records = []
        for step in steps:
            checkpoint = self._by_step[step]
            function = checkpoint.function or {}
            ids, loss = function.get("reference_ids"), function.get("reference_loss")
            if ids is None or loss is None:
                continue
            with torch.no_grad():
                now = reference_loss(
                    trained_model(checkpoint), torch.as_tensor(ids), _autocast(checkpoint.config)
                )
            records.append(FunctionRecord(step, "loss", float(loss), now))
        return records

    def weight_changes(self, before: int, after: int) -> xr.Dataset:
        """See :func:`osp_diag.trainer.laboratory.weight_changes.weight_changes`."""
        return weight_changes(self._weights(before), self._weights(after))

    def changed_part(
        self, before: int, after: int, parameter: str, axis: str
    ) -> tuple[tuple[int, ...], float]:
        """Rows or columns of a parameter that moved unlike the rest, and the ratio of their norms."""
        return rows_that_deviate(self._weights(before)[parameter], self._weights(after)[parameter], axis)

    def _read_weights(self, step: int) -> dict[str, Tensor]:
        tensors = self._by_step[step].tensors(MODEL)
        return {name.removeprefix(MODEL): value for name, value in tensors.items()}

    # Counterfactual edits

    def reverted(self, step: int, before: int, part: WeightPart) -> Counterfactual:
        """A checkpoint with a part of a weight as an earlier one has it."""
        old = self._weights(before)[part.parameter]

        def revert(model: Llama) -> None:
            weight = dict(model.named_parameters())[part.parameter]
            earlier = old.expand(weight.shape).to(weight)
            index: Any = slice(None) if part.axis == "all" else list(part.indices)
            if part.axis == "column":
                weight[:, index] = earlier[:, index]
            else:
                weight[index] = earlier[index]

        return self._counterfactual(step, words_of(part, old.ndim, before), revert)

    def edited(self, step: int, edit: str) -> Counterfactual:
        """A checkpoint with one of :data:`~osp_diag.trainer.laboratory.edits.EDITS`."""
        words, change = EDITS[edit]
        return self._counterfactual(step, words, change)

    def _counterfactual(self, step: int, words: str, change: Callable[[Llama], None]) -> Counterfactual:
        if step not in self._measured:
            self._measured[step] = self._numbers(trained_model(self._by_step[step]), step)
        before = self._measured[step]
        model = trained_model(self._by_step[step])
        with torch.no_grad():
            change(model)
        now = self._numbers(model, step)
        return Counterfactual(words, step, now[0], now[1], before[0], before[1])

    def _numbers(self, model: Llama, step: int) -> tuple[float, float]:
        """(mean OSP kurtosis of the hidden states over all tokens, held-out loss)."""
        config = self._by_step[step].config
        recording = Recording(
            self._held_out(config),
            every=lambda _: True,
            sites=[site for site in HIDDEN_STATES if site in self.run.sites] or None,
            estimators=[KURTOSIS],
        )
        recording.begin(model, 0, autocast=_autocast(config), loss=HeldOutLoss(model))
        recording.after_step(0)
        measured = recording.run
        recording.end()
        kurtosis = headline_kurtosis(measured).get("all", float("nan"))
        return kurtosis, float(measured.series["held_out_loss"][-1])

    def _held_out(self, config: TrainConfig) -> TokenBatches:
        if self._tokens is None:
            vocabulary = config.model.vocabulary_size
            data = open_data(config.data, batch_size=config.batch_size, vocabulary_size=vocabulary)
            self._tokens = held_out_batches(config, data)
        return self._tokens

    # Trainings beside the run

    def seconds_per_step(self) -> float | None:
        """The median of what was recorded."""
        series = self.run.series
        if "step_seconds" not in series or not np.isfinite(series["step_seconds"]).any():
            return None
        return float(np.nanmedian(series["step_seconds"]))

    def replay(self, start: int, until: int) -> Replay:
        """The steps after a checkpoint once more, as its own configuration has them."""
        config = with_changes(self._by_step[start].config, {"probe.every": 0, "log_every": 1})
        with self._trained(start, until, config, "replaying") as again:
            return compared(self.run, again, start)

    def fork(self, start: int, until: int, label: str, changes: Mapping[str, Any], *, order: int = 0) -> Fork:
        """Training from a checkpoint to a step under a changed configuration, probed when the run was."""
        return self._fork(start, until, label, changes, (), order)

    def control(self, start: int, until: int, label: str, reset: Sequence[str], *, order: int = 0) -> Fork:
        """Training under its own configuration, with the optimizer states reset that are named there."""
        return self._fork(start, until, label, {}, [entry.partition(": ")[2] for entry in reset], order)

    def _fork(
        self,
        start: int,
        until: int,
        label: str,
        changes: Mapping[str, Any],
        forget: Sequence[str],
        order: int,
    ) -> Fork:
        own = self._by_step[start].config
        # The run's own schedule, so that both can be compared probe by probe; no probes are none.
        schedule = {} if own.probe.every else {"probe.every": until - start, "probe.dense_until": 0}
        sites = tuple(site for site in HIDDEN_STATES if site in self.run.sites)
        config = with_changes(own, {**schedule, "probe.sites": sites, **changes})
        if order:
            config = with_changes(config, {"data.seed": config.data.seed + order})
        with self._trained(start, until, config, label, forget) as run:
            kurtosis = [headline_kurtosis(run, step=int(step)).get("all", np.nan) for step in run.steps]
            losses = run.series["held_out_loss"].sel(step=run.steps).values
            return Fork(
                label,
                dict(changes),
                tuple(map(int, run.steps)),
                tuple(map(float, kurtosis)),
                tuple(map(float, losses)),
                tuple(run.attrs["parent"]["reset"]),
            )

    @contextmanager
    def _trained(
        self, start: int, until: int, config: TrainConfig, label: str, forget: Sequence[str] = ()
    ) -> Iterator[Run]:
        def progress(step: int, _: int, __: Mapping[str, float]) -> None:
            if self.progress is not None:
                self.progress(label, step - start, until - start)

        config = with_changes(config, {"checkpoint.every": 0})
        if config.steps < until:
            raise TrainingError(f"{label}: step {until} is beyond the {config.steps} steps of the run")
        with tempfile.TemporaryDirectory(prefix="osp-diag-") as folder:
            out = Path(folder) / "again.zarr"
            path = self._by_step[start].path
            train(config, out, start=path, until=until, forget=forget, progress=progress)
            yield open_run(out)


def _autocast(config: TrainConfig) -> Callable[[], AbstractContextManager[None]]:
    return lambda: autocast_of(config, torch.device("cpu"))
