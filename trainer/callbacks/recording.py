"""What both callbacks do: probe a loop that is not ours, and keep its scalars beside the probes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path
from typing import Any, Literal, TypedDict

import torch
from jaxtyping import Int
from torch import nn

from osp_diag.errors import StoreError, UsageError
from osp_diag.probing.asked import Asked
from osp_diag.probing.feeding import Feeding
from osp_diag.probing.identity import token_attributes
from osp_diag.probing.ranks import is_first_rank
from osp_diag.probing.schedule import Schedule, schedule_of
from osp_diag.probing.session import Probe
from osp_diag.runs.run import Run, open_run
from osp_diag.sites.trace import unwrap
from osp_diag.tokens import TokenBatches, make_batches
from osp_diag.trainer.config import ProbeConfig
from osp_diag.trainer.headline import ProbeTold
from osp_diag.trainer.loggers import Logger, open_loggers
from osp_diag.trainer.probe_schedule import due_steps

__all__ = ["HeldOut", "Options", "Recording"]

HeldOut = TokenBatches | Int[Any, "sequence position"]
"""Token ids as they are to be run, or with all that :func:`osp_diag.tokens.make_batches` knows of them."""


class Options(TypedDict, total=False):
    """Keyword arguments of :class:`Recording`, which explains them."""

    out: str | Path | None
    every: int | Collection[int] | Schedule | None
    on: Literal["held_out", "training"]
    batch_size: int | None
    sites: Sequence[str] | None
    estimators: Asked | None
    tokenizer: Any
    keep_raw: bool
    attributes: Mapping[str, Any] | None
    deferred: bool | str
    loggers: Sequence[str] | Logger
    run_name: str | None
    overwrite: bool


class Recording:
    """A probe in a loop that says when it begins, makes a step, saves, and ends.

    Steps count optimizer updates. Step s holds what belongs to the s-th update: its loss, learning rate and
    gradient norm, and a probe either of the weights that it made (``on="held_out"``, which measures step 0 as
    well) or of its own forward passes, all micro-batches together (``on="training"``).

    Where training goes on from a checkpoint of step s, the run goes on too: what it had recorded after s is
    dropped, since it will be made again. All ranks have to call everything; the first one writes.

    Parameters
    ----------
    held_out : the tokens of every probe; None: 4,096 of the built-in English text. Unused on training steps
    out : path of the run; None keeps the numbers in memory
    every : as for :class:`osp_diag.Probe`; None: every 10 steps up to 100, then every 50, and the last one
    on : measure the held-out tokens in evaluation mode, or the training steps' own forward passes
    batch_size : held-out sequences of a forward pass; None: about 1,024 tokens, 8,192 on a GPU
    sites, estimators, keep_raw, attributes, deferred : see :class:`osp_diag.Probe`
    tokenizer : tells delimiters, and makes the built-in text into tokens; None: the loop's, if it has one
    loggers : names (``"trackio"``, ``"wandb"``, ``"tensorboard"``), or one object of yours, which you close:
        told the headline (:func:`osp_diag.trainer.headline.headline`) of every probe; of a deferred one with
        the next scalars, checkpoint or probe
    run_name : on those dashboards; None: the stem of ``out``
    overwrite : replace the run at ``out`` when training begins from step 0
    """

    def __init__(
        self,
        held_out: HeldOut | None = None,
        *,
        out: str | Path | None = None,
        every: int | Collection[int] | Schedule | None = None,
        on: Literal["held_out", "training"] = "held_out",
        batch_size: int | None = None,
        sites: Sequence[str] | None = None,
        estimators: Asked | None = None,
        tokenizer: Any = None,
        keep_raw: bool = False,
        attributes: Mapping[str, Any] | None = None,
        deferred: bool | str = "auto",
        loggers: Sequence[str] | Logger = (),
        run_name: str | None = None,
        overwrite: bool = False,
    ) -> None:
        if on not in ("held_out", "training"):
            raise UsageError(f"on={on!r}: probe 'held_out' tokens or the 'training' steps' own")
        if every is not None:
            schedule_of(every)  # refuses a period below 1 before anything is built
        self.held_out, self.out, self.every, self.on = held_out, out, every, on
        self.batch_size, self.tokenizer = batch_size, tokenizer
        self.sites, self.estimators, self.keep_raw = sites, estimators, keep_raw
        self.attributes, self.deferred = dict(attributes or {}), deferred
        self.loggers, self.run_name, self.overwrite = loggers, run_name, overwrite
        self.probe: Probe | None = None
        """The one that measures now; None before training and after it."""
        self._in_memory: Probe | None = None
        self._release: Callable[[], Any] = _nothing

    # The loop's events

    def begin(
        self,
        model: nn.Module,
        step: int,
        *,
        last: int | None = None,
        tokenizer: Any = None,
        config: Mapping[str, Any] | None = None,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
        eager: bool = False,
    ) -> None:
        """Training goes on after ``step`` updates: 0, or those of the checkpoint that it resumed from.

        Parameters
        ----------
        last : the last step, where the loop knows it
        tokenizer : the loop's
        config : shown on dashboards
        autocast : makes the context in which the loop runs the model
        eager : whether the loop compiled the model from outside, where the model itself does not show it

        Raises
        ------
        UsageError : there are no tokens to probe: none were given, and no tokenizer
        StoreError : ``out`` holds another run, or one of other conditions
        """
        self.end()
        tokenizer = self.tokenizer if self.tokenizer is not None else tokenizer
        attributes: dict[str, Any] = {"probed_on": self.on}
        options: dict[str, Any] = {"tokenizer": tokenizer}
        if self.on == "held_out":
            self._batches = self._held_out(model, tokenizer)
            attributes |= token_attributes(self._batches)
            options["delimiter_ids"] = self._batches.delimiter_ids
        resumed = step > 0
        with ExitStack() as stack:
            probe = Probe(
                model,
                every=self._schedule(last),
                out=self.out,
                sites=self.sites,
                estimators=self.estimators,
                keep_raw=self.keep_raw,
                attributes=attributes | self.attributes,
                deferred=self.deferred,
                resume=resumed and self.out is not None,
                overwrite=self.overwrite and not resumed,
                **options,
            )
            stack.callback(probe.close)
            if resumed:
                probe.truncate_after(step)
            self._resumed_after = step if resumed else None
            logger = self._opened_logger(config or {}, stack)
            self._told = ProbeTold(probe, logger if self.loggers and is_first_rank() else None)
            # A loop that raises tells nobody: what is buffered is written when this object, or Python, ends.
            self._release = weakref.finalize(self, stack.pop_all().close)
        self.probe, self._autocast, self._eager = probe, autocast, eager
        self._open: tuple[int, ExitStack] | None = None
        self._row: tuple[int, set[str]] = (step if resumed else -1, set())
        if not resumed:
            self.after_step(0)

    def open_step(self, step: int) -> None:
        """Update number ``step`` is about to be made; its first forward pass comes next."""
        if self.probe is None or self.on != "training" or self._open is not None or not self.probe.due(step):
            return
        self._told.now()
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
        self._begin_row(step)
        self._told.after(step)

    def after_step(self, step: int) -> None:
        """Update number ``step`` has been made."""
        if self.probe is None or self.on != "held_out" or not self.probe.due(step):
            return
        self._told.now()
        with self._autocast():
            self.probe.measure(step, Feeding(self.probe.model, self._batches, batch_size=self.batch_size))
        self._begin_row(step)
        self._told.after(step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Keep numbers of ``step``. What a step has already, and what the resumed run has, stays as it is."""
        if self.probe is None or step == self._resumed_after:
            return
        # A validation between the micro-batches of an update belongs to the update under way.
        step = max(step, self._row[0])
        self._begin_row(step)
        known = self._row[1]
        fresh = {name: float(value) for name, value in values.items() if name not in known}
        known.update(fresh)
        if fresh:
            self.probe.append_series(step, fresh)
            self._told.now()

    def flush(self) -> None:
        """Commit what was recorded. A checkpoint must not be newer than the run that it belongs to."""
        if self.probe is not None:
            self.probe.flush()
            self._told.now()

    def end(self) -> None:
        """Let go of the model and of the run, in whatever state training is. Ending twice does nothing."""
        if self.probe is None:
            return
        if self._open is not None:
            (_, stack), self._open = self._open, None
            # As if the step had raised: it is not whole, so nothing of it is recorded.
            stack.__exit__(RuntimeError, RuntimeError("training ended within a step"), None)
        self._in_memory, self.probe = self.probe if self.out is None else None, None
        try:
            self._told.now()
        finally:
            self._release()

    @property
    def run(self) -> Run:
        """What was recorded so far.

        Raises
        ------
        StoreError : nothing is
        """
        if self.out is not None:
            self.flush()
            return open_run(self.out)
        probe = self.probe or self._in_memory
        if probe is None:
            raise StoreError("there is no run yet: training has not begun")
        return probe.run

    # Parts

    def _schedule(self, last: int | None) -> Schedule:
        if self.every is not None:
            return schedule_of(self.every)
        return due_steps(ProbeConfig(), last)

    def _held_out(self, model: nn.Module, tokenizer: Any) -> TokenBatches:
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

    def _opened_logger(self, config: Mapping[str, Any], stack: ExitStack) -> Logger:
        if isinstance(self.loggers, Logger):
            return self.loggers
        name = self.run_name or (Path(self.out).stem if self.out is not None else "run")
        opened = open_loggers(self.loggers, run=name, config=config, resumed_after=self._resumed_after)
        stack.callback(opened.close)
        return opened

    def _begin_row(self, step: int) -> None:
        if step != self._row[0]:
            self._row = (step, set())


def _nothing() -> None:
    """What there is to release before training."""
