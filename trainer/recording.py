"""A probe in a training loop, ours or anybody's: what it measures when, and the loop's scalars beside it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack

import torch
import xarray as xr
from jaxtyping import Int
from torch import nn

from osp_diag.errors import StoreError, UsageError
from osp_diag.monitoring import Finding
from osp_diag.probing.control import LoopActions, RunControl
from osp_diag.probing.feeding import Feeding
from osp_diag.probing.identity import token_attributes
from osp_diag.probing.ranks import is_first_rank
from osp_diag.probing.schedule import Schedule, dense_early, schedule_of
from osp_diag.probing.session import Probe
from osp_diag.probing.settings import MeasurementOptions, MeasurementSettings, Settings, keyword_form
from osp_diag.runs.declared import ProbedStep, parts_of
from osp_diag.runs.run import Run, open_run
from osp_diag.schema import CHECKPOINT_FOLDER
from osp_diag.sites.trace import unwrap
from osp_diag.tokens import TokenBatches, make_batches
from osp_diag.trainer.config import ProbeConfig
from osp_diag.trainer.headline import HeadlineLog
from osp_diag.trainer.held_out import HeldOutLoss
from osp_diag.trainer.loggers import Logger, RichLogger, open_loggers
from osp_diag.trainer.monitoring import TrainingMonitor

__all__ = ["IN_TRAINING", "HeldOut", "Recording", "RecordingOptions", "RecordingSettings", "due_steps"]

HeldOut = TokenBatches | Int[Any, "sequence position"]
"""Token ids as they are to be run, or with all that :func:`osp_diag.tokens.make_batches` knows of them."""

IN_TRAINING = MeasurementSettings(keep_raw=False)
"""What is measured by default."""


@dataclass(frozen=True, kw_only=True)
class RecordingSettings(Settings):
    """When a training is probed, and where the numbers go.

    Attributes
    ----------
    out : path of the run; None keeps the numbers in memory
    every : as for :class:`osp_diag.Probe`; None: every 10 steps up to 100, then every 50, and the last one
    on : measure the held-out tokens in evaluation mode, or the training steps' own forward passes
    batch_size : held-out sequences of a forward pass; None: about 1,024 tokens, 8,192 on a GPU
    measurement_settings : what to measure; None: the default, without the sums behind the numbers
    tokenizer : tells delimiters, and makes the built-in text into tokens; None: the loop's, if it has one
    attributes, deferred : see :class:`osp_diag.Probe`
    loggers : names (``"trackio"``, ``"wandb"``, ``"tensorboard"``), or one object of yours, which you close:
        where the headline (:func:`osp_diag.trainer.headline.headline`) of every probe is sent; that of a
        deferred one with the next scalars, checkpoint or probe
    run_name : on those dashboards; None: the stem of ``out``
    overwrite : replace the run at ``out`` when training begins from step 0

    Raises
    ------
    UsageError : ``every`` or ``on`` has no meaning
    """

    out: str | Path | None = None
    every: int | Collection[int] | Schedule | None = None
    on: Literal["held_out", "training"] = "held_out"
    batch_size: int | None = None
    measurement_settings: MeasurementSettings | None = None
    tokenizer: Any = None
    attributes: Mapping[str, Any] | None = None
    deferred: bool | Literal["auto"] = "auto"
    loggers: Sequence[str] | Logger = ()
    run_name: str | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        if self.on not in ("held_out", "training"):
            raise UsageError(f"on={self.on!r}: probe 'held_out' tokens or the 'training' steps' own")
        if self.every is not None:
            schedule_of(self.every)  # refuses a period below 1 before anything is built


class RecordingOptions(MeasurementOptions, total=False):
    """The keyword form of :class:`RecordingSettings` and :class:`osp_diag.MeasurementSettings`."""

    out: str | Path | None
    every: int | Collection[int] | Schedule | None
    on: Literal["held_out", "training"]
    batch_size: int | None
    measurement_settings: MeasurementSettings | None
    tokenizer: Any
    attributes: Mapping[str, Any] | None
    deferred: bool | Literal["auto"]
    loggers: Sequence[str] | Logger
    run_name: str | None
    overwrite: bool


def due_steps(config: ProbeConfig, last: int | None, *, first: int | None = None) -> Schedule:
    """Which steps are probed: dense early, sparser later, and the last one; none where ``every`` is 0.

    ``last`` is None where the loop does not know its end, ``first`` a step that is probed as well: where
    the training of another run goes on.
    """
    if config.every == 0:
        return lambda step: False
    regular = dense_early(every=config.every, dense_until=config.dense_until, dense_every=config.dense_every)
    return lambda step: step in (first, last) or regular(step)


class Recording:
    """A probe in a loop that says when it begins, makes a step, saves, and ends.

    Steps count optimizer updates. Step s holds what belongs to the s-th update: its loss, learning rate and
    gradient norm, and a probe either of the weights that it made (``on="held_out"``, which measures step 0 as
    well) or of its own forward passes, all micro-batches together (``on="training"``).

    Where training goes on from a checkpoint of step s, the run goes on too: what it had recorded after s is
    dropped, since it will be made again. All ranks have to call everything; the first one writes. Why one
    class for all loops: docs/decisions.md, Training.

    Parameters
    ----------
    held_out : the tokens of every probe; None: 4,096 of the built-in English text. Unused on training steps
    options : fields of :class:`RecordingSettings`, and of :class:`osp_diag.MeasurementSettings`, which change
        its ``measurement_settings``

    Raises
    ------
    UsageError : gradients are asked for of held-out tokens
    """

    @keyword_form(RecordingSettings(), IN_TRAINING)
    def __init__(self, held_out: HeldOut | None = None, **options: Unpack[RecordingOptions]) -> None:
        measurement: dict[str, Any] = dict(options)
        self.held_out = held_out
        self.settings = RecordingSettings().changed(measurement)
        self.measurement = (self.settings.measurement_settings or IN_TRAINING).changed(measurement)
        if self.settings.on == "held_out":
            self.measurement.check_held_out()
        self.probe: Probe | None = None
        """The one that measures now; None before training and after it."""
        self.control: RunControl | None = None
        """Takes requests while training; None where no run is written."""
        self._in_memory: Probe | None = None
        self._release: Callable[[], Any] = _nothing

    # The loop's events

    def begin(
        self,
        model: nn.Module,
        step: int,
        *,
        last: int | None = None,
        resume: bool | None = None,
        segment: bool = False,
        tokenizer: Any = None,
        config: Mapping[str, Any] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        eager: bool = False,
        beside: Callable[[], Mapping[str, xr.Dataset]] | None = None,
        loss: HeldOutLoss | None = None,
        loss_scale: float = 1.0,
        monitor: TrainingMonitor | None = None,
        checkpoints: str | Path | None = None,
    ) -> None:
        """Training goes on after ``step`` updates: 0, or those of the checkpoint that it resumed from.

        Parameters
        ----------
        last : the last step, where the loop knows it
        resume : go on with the run at ``out``; None: if ``step`` is not 0
        segment : going on after ``step`` the run has other attributes, which begin a segment of it
        tokenizer : the loop's
        config : shown on dashboards
        autocast : makes the context in which the loop runs the model
        eager : whether the loop compiled the model from outside, where the model itself does not show it
        beside : what the optimizer holds, as datasets of a probed step
        loss : also keep ``held_out_loss``
        loss_scale : what the loop multiplies its loss by before ``backward``, by which gradients are divided
        monitor : judges what is recorded, on the first rank
        checkpoints : the directory in which the loop leaves its own, for a diagnosis

        Raises
        ------
        UsageError : there are no tokens to probe: none were given, and no tokenizer
        StoreError : ``out`` holds another run, or one of other conditions
        """
        self.end()
        settings, measurement = self.settings, self.measurement
        tokenizer = settings.tokenizer if settings.tokenizer is not None else tokenizer
        attributes: dict[str, Any] = {"probed_on": settings.on}
        if checkpoints is not None:
            attributes[CHECKPOINT_FOLDER] = str(Path(checkpoints).absolute())
        if settings.on == "held_out":
            self._batches = self._held_out_batches(model, tokenizer)
            measurement = measurement.for_batches(self._batches)
            attributes |= token_attributes(self._batches)
        resume = step > 0 if resume is None else resume
        self._resumed_after = step if step > 0 and resume else None
        with ExitStack() as stack:
            probe = Probe(
                model,
                every=due_steps(ProbeConfig(), last) if settings.every is None else settings.every,
                out=settings.out,
                measurement_settings=measurement,
                tokenizer=tokenizer,
                attributes=attributes | dict(settings.attributes or {}),
                deferred=settings.deferred,
                beside=beside,
                loss_scale=loss_scale,
                resume=resume and settings.out is not None,
                segment_after=step if segment else None,
                overwrite=settings.overwrite and not resume,
                control=False,  # between the steps of the loop, which this object knows
            )
            stack.callback(probe.close)
            if resume:
                probe.truncate_after(step if step > 0 else -1)
            control = None
            if settings.out is not None:
                control = RunControl(probe, Path(settings.out), first=step + 1, last=last)
                stack.callback(control.close)
            logger = self._open_logger(config or {}, stack)
            self._logger = logger if settings.loggers and is_first_rank() else None
            self._headlines = HeadlineLog(probe, self._logger, monitor)
            # A loop that raises tells nobody: what is buffered is written when this object, or Python, ends.
            self._release = weakref.finalize(self, stack.pop_all().close)
        self.control = control
        self.probe, self._autocast, self._eager, self._loss = probe, autocast, eager, loss
        self._open: tuple[int, ExitStack] | None = None
        self._row: tuple[int, set[str]] = (step if step > 0 else -1, set())

    def due(self, step: int) -> bool:
        """Whether ``step`` is probed."""
        return self.probe is not None and self.probe.due(step)

    def measures_passes_of(self, step: int) -> bool:
        """Whether the forward passes that make update number ``step`` are measured."""
        return self.settings.on == "training" and self.due(step)

    def open_step(self, step: int) -> None:
        """Update number ``step`` is about to be made; its first forward pass comes next."""
        if self.probe is None or self._open is not None or not self.measures_passes_of(step):
            return
        self._headlines.write()
        with ExitStack() as stack:
            if self._eager:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(self.probe.step(step))
            self._open = (step, stack.pop_all())

    def close_step(self) -> None:
        """All forward passes of the update are done."""
        if self.probe is None or self._open is None:
            return
        (step, stack), self._open = self._open, None
        stack.close()
        self._after_probe(step, {})

    def after_step(self, step: int) -> None:
        """Update number ``step`` has been made; 0 before the first one."""
        if self.probe is None or self.settings.on != "held_out" or not self.probe.due(step):
            return
        self._headlines.write()
        batches: Iterable[Mapping[str, Any]] = Feeding(
            self.probe.model,
            self._batches,
            batch_size=self.settings.batch_size,
            passes=self.probe.settings.token_groups,
        )
        loss = self._loss
        if loss is not None:
            batches = map(loss.labelled, batches)
        with self._autocast(), loss or nullcontext():
            self.probe.measure(step, batches)
        self._after_probe(step, {} if loss is None else {"held_out_loss": loss.mean()})

    def take_request(self, step: int, actions: LoopActions) -> None:
        """Do what ``osp-diag control`` asks of the run, once update number ``step`` is made and recorded.

        Every rank calls this after every step: it is a collective, for which nothing waits.
        """
        if self.control is not None:
            self.control.between_steps(step + 1, actions)

    def scalars(
        self,
        step: int,
        values: Mapping[str, float],
        *,
        logged: bool = False,
        attributes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Keep numbers of ``step``. What a step has already, and what the resumed run has, stays as it is.

        ``logged`` sends them to the loggers too, for a loop that has none of its own; ``attributes`` (name →
        units, definition) say what they are.
        """
        if self.probe is None or step == self._resumed_after:
            return
        # A validation between the micro-batches of an update belongs to the update under way.
        step = max(step, self._row[0])
        fresh = self._append(step, values, attributes)
        if fresh:
            self._headlines.write()
            if self._headlines.monitor is not None:
                self._headlines.monitor.scalars(step, fresh)
            if logged and self._logger is not None:
                self._logger.log(step, fresh)

    def logged(self, step: int, groups: Mapping[str, xr.Dataset]) -> None:
        """Keep labelled arrays of ``step`` beside its numbers, by the same rules."""
        if self.probe is None or step == self._resumed_after:
            return
        step, names = self._row_of(max(step, self._row[0]))
        fresh = {name: part for name, part in parts_of(groups).items() if name not in names}
        names.update(fresh)
        if fresh:
            self.probe.append_logged(step, ProbedStep(fresh))

    def note(self, notes: Iterable[str]) -> None:
        """Keep what the reader of the numbers should know, in the run's notes, each once."""
        if self.probe is not None:
            self.probe.note(notes)

    def alert(self, finding: Finding) -> None:
        """Send the loggers what the monitor says."""
        if isinstance(self._logger, RichLogger):
            self._logger.alert(finding)

    def flush(self) -> None:
        """Commit what was recorded. A checkpoint must not be newer than the run that it belongs to."""
        if self.probe is not None:
            self.probe.flush()
            self._headlines.write()

    def end(self) -> None:
        """Let go of the model and of the run, in whatever state training is. Ending twice does nothing."""
        if self.probe is None:
            return
        if self._open is not None:
            (_, stack), self._open = self._open, None
            # As if the step had raised: it is not whole, so nothing of it is recorded.
            stack.__exit__(RuntimeError, RuntimeError("training ended within a step"), None)
        self._in_memory, self.probe = self.probe if self.settings.out is None else None, None
        self.control = None
        try:
            self._headlines.write()
        finally:
            self._release()

    @property
    def run(self) -> Run:
        """What was recorded so far.

        Raises
        ------
        StoreError : nothing is
        """
        if self.settings.out is not None:
            self.flush()
            return open_run(self.settings.out)
        probe = self.probe or self._in_memory
        if probe is None:
            raise StoreError("there is no run yet: training has not begun")
        return probe.run

    # Parts

    def _after_probe(self, step: int, values: Mapping[str, float]) -> None:
        """A probe of ``step`` is done; ``values`` belong to it."""
        self._headlines.after_probe(step, self._append(step, values))

    def _append(
        self,
        step: int,
        values: Mapping[str, float],
        attributes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> dict[str, float]:
        """Append what the row of ``step`` does not have yet, and return that."""
        assert self.probe is not None
        _, names = self._row_of(step)
        fresh = {name: float(value) for name, value in values.items() if name not in names}
        names.update(fresh)
        if fresh:
            self.probe.append_series(step, fresh, attributes)
        return fresh

    def _row_of(self, step: int) -> tuple[int, set[str]]:
        """The row of a step, and the names of what is in it; one that is begun if it is another."""
        if step != self._row[0]:
            self._row = (step, set())
        return self._row

    def _held_out_batches(self, model: nn.Module, tokenizer: Any) -> TokenBatches:
        if isinstance(self.held_out, TokenBatches):
            return self.held_out
        settings = getattr(unwrap(model), "config", None)
        if self.held_out is not None:
            ids = torch.as_tensor(self.held_out).cpu().numpy()
            if ids.ndim != 2:
                raise UsageError(
                    f"held_out has shape {ids.shape}; give token ids of shape (sequence, position)"
                )
            return make_batches(tokenizer, ids=ids, vocabulary_size=getattr(settings, "vocab_size", None))
        if tokenizer is None:
            raise UsageError(
                "there are no tokens to probe: give held_out (token ids of shape (sequence, position)), a "
                "tokenizer, with which built-in text is taken, or on='training'"
            )
        longest = getattr(settings, "max_position_embeddings", None)
        return make_batches(tokenizer, tokens=ProbeConfig().tokens, max_length=longest)

    def _open_logger(self, config: Mapping[str, Any], stack: ExitStack) -> Logger:
        loggers, out = self.settings.loggers, self.settings.out
        if isinstance(loggers, Logger):
            return loggers
        name = self.settings.run_name or ("run" if out is None else Path(out).stem)
        logger = open_loggers(loggers, run=name, config=config, resumed_after=self._resumed_after)
        stack.callback(logger.close)
        return logger


def _nothing() -> None:
    """What there is to release before training."""
