"""The laboratory of a run of any other loop: what its checkpoints tell, without its data and its code.

See :class:`osp_diag.laboratory.Laboratory`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
import xarray as xr

from osp_diag.checkpoints.optimizer_state import OptimizerState, read_optimizer_state
from osp_diag.checkpoints.saved_steps import SavedStep, read_saved, saved_in
from osp_diag.checkpoints.stored_tensors import StoredTensors
from osp_diag.checkpoints.trainer_state import TrainerState, read_trainer_state
from osp_diag.errors import CheckpointError, OspDiagError, TrainingError
from osp_diag.laboratory import CheckpointState, Counterfactual, Fork, FunctionRecord, Replay, WeightPart
from osp_diag.probing.series import CHECKPOINTS
from osp_diag.probing.settings import OpeningSettings, TokenSettings
from osp_diag.runs.headline import headline_kurtosis
from osp_diag.runs.run import Run
from osp_diag.schema import CHECKPOINT_FOLDER, HIDDEN_STATES, KURTOSIS
from osp_diag.trainer.laboratory.foreign_config import configuration, head_size_of, roles_of
from osp_diag.trainer.laboratory.foreign_model import ForeignModels, replaced
from osp_diag.trainer.laboratory.weight_changes import rows_that_deviate, weight_changes
from osp_diag.trainer.laboratory.words import words_of
from osp_diag.wording import listed

__all__ = ["ForeignLaboratory"]

NOT_RUN = (OspDiagError, torch.OutOfMemoryError)
"""What is raised where a model cannot be opened or run."""
OF_ANOTHER_LOOP = (
    "the batches, and which of them came when: another loop's data are not in its run, so that a replay, "
    "remedies and short trainings cannot be tried",
    "clipping of gradients, and which optimizer moves which parameter: checkpoints of other loops "
    "do not record them (training_args.bin is a pickle, which is not read, since that would run code)",
)


class ForeignLaboratory:
    """Reads the checkpoints that a loop other than ours left; the run and they are only read.

    Weights are mapped from their files and compared tensor by tensor; one model is in memory at a time, and
    only where an edit is undone or the function is asked about.

    Parameters
    ----------
    run : of :class:`osp_diag.Probe`, of a callback, or of several checkpoints
    checkpoints : the directory that holds them; None: where the run says that they are
    tokens : to run models on; None: the run's own, where they can be made again
    opening : how models are opened
    progress : told (what, done, in all)

    Raises
    ------
    UsageError : the directory that was named holds no checkpoints
    """

    trains = False
    """Another loop's steps cannot be made again."""

    def __init__(
        self,
        run: Run,
        checkpoints: Path | None = None,
        *,
        tokens: TokenSettings | None = None,
        opening: OpeningSettings | None = None,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> None:
        self.run, self.progress = run, progress
        self.missing: list[str] = list(OF_ANOTHER_LOOP)
        self._models = ForeignModels(run, tokens, opening or OpeningSettings(), progress)
        saved, unread = _saved(run, checkpoints)
        self.missing += unread
        self._by_step: dict[int, SavedStep] = {}
        self._tensors: dict[int, StoredTensors] = {}
        for one in saved:
            try:
                self._tensors[one.step] = StoredTensors(one.files)
                self._by_step[one.step] = one
            except CheckpointError as error:
                self.missing.append(str(error))

    @cached_property
    def checkpoints(self) -> tuple[CheckpointState, ...]:
        """What each says without its weights being read."""
        since: tuple[int, int] | None = None
        states = []
        lacking = []
        for one in self._by_step.values():
            optimizer = self._optimizer_of(one)
            if optimizer is None or not optimizer.settings:
                lacking.append(one.path.name)
            trainer = self._trainer_states.get(one.step)
            batch_size = None if trainer is None else trainer.batch_size
            config, origins = configuration(one, self._tensors[one.step], optimizer, batch_size)
            if optimizer is not None and optimizer.age is not None:
                since = _since(one.step, optimizer.age, since)
                config["optimizer.states_since"] = since[0]
                origins["optimizer.states_since"] = "the state of the optimizer"
            states.append(self._state(one, config, origins))
        if lacking:
            self.missing.append(
                f"learning rate, decay and constants of the optimizer at {listed(lacking, 4)}: no "
                "state of an optimizer that can be read lies there (optimizer.pt)"
            )
        return tuple(states)

    def _state(
        self, one: SavedStep, config: Mapping[str, Any], origins: Mapping[str, str]
    ) -> CheckpointState:
        shapes = self._tensors[one.step].shapes
        is_probed = one.step in self.run.steps and "token_fingerprint" in self.run.attrs
        return CheckpointState(
            step=one.step,
            path=one.path,
            config=config,
            owners={},
            configured_owners={},
            roles=roles_of(shapes, config),
            head_size=head_size_of(config),
            shapes=shapes,
            function={"probed": True} if is_probed else None,
            origins=origins,
        )

    def _optimizer_of(self, one: SavedStep) -> OptimizerState | None:
        try:
            return read_optimizer_state(one)
        except CheckpointError as error:
            self.missing.append(str(error))
            return None

    @cached_property
    def _trainer_states(self) -> dict[int, TrainerState]:
        """Step → what trainer_state.json of its checkpoint says."""
        states = {}
        for step, one in self._by_step.items():
            try:
                state = read_trainer_state(one.path) if one.path.is_dir() else None
            except CheckpointError as error:
                self._lack(str(error))
                continue
            if state is not None:
                states[step] = state
        return states

    @property
    def scalars(self) -> xr.Dataset:
        """What transformers' Trainer logged; the latest checkpoint tells all of it, unless it began anew."""
        rows: dict[int, dict[str, float]] = {}
        for state in self._trainer_states.values():
            for step, values in state.scalars.items():
                rows.setdefault(step, {}).update(values)
        steps = sorted(rows)
        names = dict.fromkeys(name for values in rows.values() for name in values)
        return xr.Dataset(
            {name: ("step", [rows[step].get(name, np.nan) for step in steps]) for name in names},
            coords={"step": np.array(steps, np.int64)},
        )

    # Weights

    def weight_changes(self, before: int, after: int) -> xr.Dataset:
        """See :func:`osp_diag.trainer.laboratory.weight_changes.weight_changes`."""
        steps = list(self._by_step)
        place = steps.index(before)
        earlier = self._tensors[steps[place - 1]] if place else {}
        shapes = self._tensors[after].shapes
        outer = {
            name
            for name, role in roles_of(shapes, self.checkpoints[place].config).items()
            if role in ("embedding", "head")
        }

        def told(done: int, total: int) -> None:
            if self.progress is not None:
                self.progress(f"comparing steps {before} and {after}", done, total)

        return weight_changes(
            self._tensors[before],
            self._tensors[after],
            earlier=lambda name: earlier[name] if name in outer and name in earlier else None,
            progress=told,
        )

    def changed_part(
        self, before: int, after: int, parameter: str, axis: str
    ) -> tuple[tuple[int, ...], float]:
        """Rows or columns of a parameter that moved unlike the rest, and the ratio of their norms."""
        return rows_that_deviate(self._tensors[before][parameter], self._tensors[after][parameter], axis)

    # Models

    def functions(self, steps: Sequence[int]) -> list[FunctionRecord]:
        """Of each checkpoint that the run probed, the hidden state whose kurtosis differs most from then.

        Only where the run's own tokens can be had.
        """
        records: list[FunctionRecord] = []
        refused: dict[int, str] = {}
        for step in steps:
            one = self._by_step[step]
            try:
                self._models.batches(self._models.opened(one))
                if not self._models.are_the_runs:
                    self._lack(
                        "the function that the weights are of: the tokens that the run was probed "
                        "on cannot be made again; give them with --ids FILE or as they were made (tokens=)"
                    )
                    return records
                records.append(self._function(step, self._models.measured(one, f"step {step} once more")))
            except NOT_RUN as error:
                refused[step] = str(error)
        if refused:
            which = f"step{'s' if len(refused) > 1 else ''} {listed(list(map(str, refused)))}"
            self._lack(f"the function of the weights of {which}: {next(iter(refused.values()))}")
        return records

    def _function(self, step: int, again: Run) -> FunctionRecord:
        differences = []
        for site in again.sites:
            if site not in HIDDEN_STATES or site not in self.run.sites:
                continue
            now = again.at(site)[KURTOSIS].sel(stratum="all").isel(step=0)
            was = self.run.at(site)[KURTOSIS].sel(stratum="all", step=step)
            for layer in np.intersect1d(now["layer"].values, was["layer"].values):
                one, two = float(was.sel(layer=layer)), float(now.sel(layer=layer))
                where = f"kurtosis of {site}" + (f", layer {layer}" if now.sizes["layer"] > 1 else "")
                differences.append((abs(two - one) / max(1.0, abs(one)), where, one, two))
        if not differences:
            raise TrainingError("the run has no kurtosis of the hidden states at that step")
        _, where, one, two = max(differences)
        return FunctionRecord(step, where, one, two)

    def reverted(self, step: int, before: int, part: WeightPart) -> Counterfactual | None:
        """A checkpoint with a part of a weight as an earlier one has it; None where it cannot be run."""
        one, old = self._by_step[step], self._tensors[before][part.parameter]
        words = words_of(part, old.ndim, before)
        try:
            model = self._models.opened(one).model
            kurtosis_before, loss_before = self._numbers(one, "the checkpoint as it is")
            with replaced(model, part, old):
                kurtosis, loss = self._numbers(one, words)
        except NOT_RUN as error:
            self._lack(f"what undoing an edit at step {step} changes: {error}")
            return None
        name = self._models.loss_name
        return Counterfactual(words, step, kurtosis, loss, kurtosis_before, loss_before, name)

    def _numbers(self, one: SavedStep, what: str) -> tuple[float, float]:
        kurtosis = headline_kurtosis(self._models.measured(one, what)).get("all", float("nan"))
        return kurtosis, self._models.loss(one)

    def _lack(self, sentence: str) -> None:
        if sentence not in self.missing:
            self.missing.append(sentence)

    # What only a trainer of ours can do

    def edited(self, step: int, edit: str) -> Counterfactual:
        """Refused: the edits are of our own model's parts."""
        self._refuse()

    def seconds_per_step(self) -> float | None:
        """None: no step is made here."""
        return None

    def replay(self, start: int, until: int) -> Replay:
        """Refused: see :data:`OF_ANOTHER_LOOP`."""
        self._refuse()

    def fork(self, start: int, until: int, label: str, changes: Mapping[str, Any], *, order: int = 0) -> Fork:
        """Refused: see :data:`OF_ANOTHER_LOOP`."""
        self._refuse()

    def control(self, start: int, until: int, label: str, reset: Sequence[str], *, order: int = 0) -> Fork:
        """Refused: see :data:`OF_ANOTHER_LOOP`."""
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise TrainingError(f"this run is of another loop: {OF_ANOTHER_LOOP[0]}")


def _saved(run: Run, directory: Path | None) -> tuple[list[SavedStep], list[str]]:
    """The checkpoints in the directory, or those that the run names; a sentence for each that is not read."""
    if directory is not None:
        return saved_in(directory)
    measured = run.attrs.get(CHECKPOINTS)
    if isinstance(measured, Mapping):
        sources = {int(step): Path(str(entry["source"])) for step, entry in measured.items()}
        there = [(path, step) for step, path in sources.items() if path.exists()]
        gone = [str(path) for path in sources.values() if not path.exists()]
        lost = (
            [
                f"the weights of {listed(gone, 4)}: they are no files here; name their directory with "
                "--checkpoints"
            ]
            if gone
            else []
        )
        saved, unread = read_saved(there, "the run") if there else ([], [])
        return saved, unread + lost
    folder = Path(str(run.attrs[CHECKPOINT_FOLDER]))
    try:
        return saved_in(folder)
    except OspDiagError as error:
        return [], [f"the run says that its checkpoints lie in {folder}: {error}"]


def _since(step: int, age: int, before: tuple[int, int] | None) -> tuple[int, int]:
    """(since which step the optimizer's states exist, their age); skipped steps make none younger."""
    if before is not None and age >= before[1]:
        return before[0], age
    return step - age, age
