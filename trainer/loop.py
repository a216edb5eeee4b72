"""The training loop: data, forward, backward, optimizer; probes, scalars and checkpoints beside them."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from osp_diag.errors import DivergenceError, TrainingError
from osp_diag.monitoring import Finding
from osp_diag.probing.checkpoint import joined_ranks
from osp_diag.probing.identity import token_attributes
from osp_diag.probing.ranks import is_first_rank, rank_of_all
from osp_diag.probing.saving import check_out
from osp_diag.runs.folder import check_destination
from osp_diag.runs.run import Run, open_run
from osp_diag.schema import PARENT
from osp_diag.sites.trace import unwrap
from osp_diag.tokens import TokenBatches
from osp_diag.trainer.batch_statistics import BATCH_SERIES
from osp_diag.trainer.checkpoint import (
    TrainingCheckpoint,
    check_beside,
    delete_checkpoints,
    folder_of,
    latest,
    without_single_process_warnings,
)
from osp_diag.trainer.checkpoint_folder import CheckpointFolder
from osp_diag.trainer.config import TrainConfig
from osp_diag.trainer.control import loop_actions
from osp_diag.trainer.data import Batch, Prefetched, TrainingData, open_data
from osp_diag.trainer.data.batch import IGNORED
from osp_diag.trainer.devices import autocast_of, device_of, memory_advice
from osp_diag.trainer.divergence import Watch, first_bad_tensor, unseen_cause
from osp_diag.trainer.fingerprint import code_fingerprint, function_record, reference_tokens
from osp_diag.trainer.held_out import HeldOutLoss, held_out_batches
from osp_diag.trainer.identity import announcement, run_attributes
from osp_diag.trainer.interruption import Interruption
from osp_diag.trainer.model import Llama
from osp_diag.trainer.monitoring import TrainingMonitor
from osp_diag.trainer.optimizers import build_optimizer, learning_rate_factor, optimizer_evidence
from osp_diag.trainer.parallel import (
    accumulating,
    check_ranks,
    distribute,
    first_of_ranks,
    gathered,
    is_sharded,
    summed,
)
from osp_diag.trainer.recording import Recording, due_steps
from osp_diag.trainer.scalars import Clock, Scalars
from osp_diag.trainer.starting import (
    Origin,
    check_segment,
    checkpoint_at,
    is_segment_of,
    start_from,
)
from osp_diag.trainer.step_records import StepRecords
from osp_diag.trainer.throughput import model_flops_utilisation

__all__ = ["Progress", "train"]

Progress = Callable[[int, int, Mapping[str, float]], None]
"""(steps done, steps in all, the scalars that came last)"""


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    start: str | Path | None = None,
    segment: bool = False,
    forget: Collection[str] = (),
    until: int | None = None,
    loggers: Sequence[str] = (),
    progress: Progress | None = None,
    announce: Callable[[str], None] | None = None,
) -> Run:
    """Train a model with the probes on.

    Parameters
    ----------
    config : the run; see :mod:`osp_diag.trainer.presets`
    out : the run store to write, a folder ending in .zarr; checkpoints go beside it (``name.checkpoints``)
    resume : go on from the newest checkpoint, or begin where there is none
    overwrite : replace an earlier run and its checkpoints; of a ``segment``, what lies beyond ``start``
    start : a checkpoint's folder, or a run for its newest one: begin from its weights and, where they fit,
        its optimizer state and position in the data, under ``config``. Steps go on counting. The run knows
        its parent, what was converted and what was reset (attribute ``parent``)
    segment : ``out`` is the run that ``start`` belongs to, and goes on as a new segment of it
    forget : parameters whose optimizer state begins anew although that of ``start`` would fit
    until : stop after this step, on the way to ``config.steps``, which the schedule goes by; it is probed and
        saved as the last one would be
    loggers : "trackio", "wandb", "tensorboard": where scalars are sent as well
    progress : told after every recorded step
    announce : told, before the first step, which parameters go to which optimizer, and of anything unusual

    Returns
    -------
    Run : under ``torchrun`` the work is shared by the ranks, rank 0 writes, and all return the run

    Raises
    ------
    UsageError, TokenError, StoreError, TrainingError : before the first step, for anything that can be known
    DivergenceError : a step diverged under ``divergence.policy=stop``; the last good state is saved
    KeyboardInterrupt : Ctrl-C or SIGTERM, after the step under way, with the state saved
    """
    out = Path(out)
    origin = None if start is None else checkpoint_at(start)
    if segment:
        check_segment(out, origin, resume=resume, overwrite=overwrite)
    elif resume:
        check_destination(out, resume=True)
    else:
        check_out(out, overwrite=overwrite)
    check_beside(out, resume=resume or segment, overwrite=overwrite)
    with joined_ranks(), without_single_process_warnings(), ExitStack() as stack:
        training = Training(
            config,
            out,
            stack,
            resume=resume,
            overwrite=overwrite,
            origin=origin,
            segment=segment,
            forget=forget,
            until=until,
            loggers=loggers,
        )
        training.progress = progress
        training.announce = announce if is_first_rank() else None
        if announce is not None and is_first_rank():
            announce(announcement(config, training.optimizers, training.data, training.device, training.step))
        training.run()
    return open_run(out)


class Training:
    """One run under way: everything built and checked by the constructor, then :meth:`run`."""

    def __init__(
        self,
        config: TrainConfig,
        out: Path,
        stack: ExitStack,
        *,
        resume: bool,
        overwrite: bool,
        loggers: Sequence[str],
        origin: TrainingCheckpoint | None = None,
        segment: bool = False,
        forget: Collection[str] = (),
        until: int | None = None,
    ) -> None:
        self.config = config
        self.last_step = config.steps if until is None else min(until, config.steps)
        self.rank, self.ranks = rank_of_all()
        check_ranks(config, self.ranks)
        self.device = device_of(config.device)
        self.progress: Progress | None = None
        checkpoint = latest(folder_of(out)) if resume else None
        if checkpoint is not None and is_segment_of(out, checkpoint, config):
            # Killed before the first checkpoint of a segment: begun anew, from the one that it began from.
            checkpoint, origin, segment = None, checkpoint, True
        if checkpoint is not None:
            origin = None
            checkpoint.check(config)
        self.data = open_data(
            config.data,
            batch_size=config.batch_size,
            vocabulary_size=config.model.vocabulary_size,
            rank=self.rank,
            ranks=self.ranks,
        )
        if self.device.type == "cuda":
            prefetched = Prefetched(self.data, pin_memory=True)
            stack.callback(prefetched.close)
            self.data = cast(TrainingData, prefetched)
        self._build_model()
        self.optimizers = build_optimizer(self.model, config)
        self.records = StepRecords(config, self.data, self.optimizers, self.device)
        self.interruption = Interruption()
        self.must_stop = False
        self.announce: Callable[[str], None] | None = None
        self._has_findings = False
        self.has_request = False
        self.watch = Watch(config.divergence, self.device)
        self.scalars = Scalars(self.device)
        self.step = 0
        self.batches: deque[tuple[int, Batch]] = deque(maxlen=8)
        held_out = held_out_batches(config, self.data)
        self.reference_ids, self.code = reference_tokens(held_out.tokens), code_fingerprint()
        if checkpoint is not None:
            self._restore(checkpoint)
        self.origin = None if origin is None else self._start_from(origin, forget)
        self.is_fork = self.origin is not None and not segment
        is_judged = config.monitor.on and is_first_rank()
        self.monitor = TrainingMonitor(config.monitor) if is_judged else None
        self.recording = self._begin_recording(
            held_out,
            out,
            resume=segment or (resume and not self.is_fork),
            segment=segment,
            overwrite=overwrite and not segment,
            loggers=loggers,
        )
        stack.callback(self.recording.end)
        self._opening_notes = self.data.notes
        stack.callback(self._note_data)
        if self.monitor is not None:
            self.monitor.hook, self.monitor.note = self.recording.alert, self._note
            stack.callback(self.monitor.close)
            if self.step and not self.is_fork and out.exists():
                self.recording.flush()
                self.monitor.resume(open_run(out))
        if overwrite and self.rank == 0:
            delete_checkpoints(folder_of(out), after=self.step if segment else -1)
        self.checkpoints = CheckpointFolder(folder_of(out), config.checkpoint)
        self._tell_findings()
        stack.callback(self.checkpoints.wait)
        self._rehearse()
        self.data_states: deque[tuple[int, dict[str, Any]]] = deque(
            [(self.step, self.data.state_dict())], maxlen=8
        )

    # Building

    def _build_model(self) -> None:
        torch.manual_seed(self.config.seed)
        sharded = is_sharded(self.config)
        with torch.device("meta" if sharded else "cpu"):
            model = Llama(self.config.model)
        self.flops_per_token = model.flops_per_token(self.config.data.sequence_length)
        if not sharded:
            model.to(self.device)
        if self.config.activation_checkpointing:
            model.set_activation_checkpointing(True)
        self.model: nn.Module = distribute(model, model.blocks, self.config, self.device)
        if sharded:
            model.initialise_shards()
        if self.config.compile:
            model.compile_parts()

    def _begin_recording(
        self,
        held_out: TokenBatches,
        out: Path,
        *,
        resume: bool,
        segment: bool,
        overwrite: bool,
        loggers: Sequence[str],
    ) -> Recording:
        probe, attributes = self.config.probe, run_attributes(self.config, self.data, self.optimizers)
        if self.origin is not None:
            attributes[PARENT] = asdict(self.origin)
        if probe.gradients:
            attributes["gradient_of"] = (
                "the mean loss over all labels of the step, of all micro-batches and ranks"
            )
        recording = Recording(
            held_out,
            out=out,
            every=due_steps(probe, self.last_step, first=self.step if self.is_fork else None),
            on=probe.on,
            sites=probe.sites or None,
            estimators=probe.estimators or None,
            delimiter_ids=held_out.delimiter_ids,
            keep_raw=probe.keep_raw,
            token_groups=probe.token_groups,
            gradients=probe.gradients,
            attributes=token_attributes(held_out) | attributes,
            loggers=loggers,
            overwrite=overwrite,
        )
        recording.begin(
            self.model,
            self.step,
            last=self.last_step,
            resume=resume,
            segment=segment,
            config=attributes["config"],
            autocast=self._autocast,
            beside=lambda: optimizer_evidence(unwrap(self.model), self.optimizers),
            loss=HeldOutLoss(self.model),
            loss_scale=float(self.ranks),  # as ``_gradients`` does
            monitor=self.monitor,
        )
        recording.note(self.optimizers.routing.warnings)
        return recording

    def _restore(self, checkpoint: TrainingCheckpoint) -> None:
        tensors = self._tensors()
        checkpoint.load(tensors)
        unwrap(self.model).load_state_dict(tensors["model"])
        self.optimizers.load_state_dict(tensors["optimizer"])
        self.watch.load_state_dict(tensors["watch"])
        self.data.load_state_dict(checkpoint.data)
        self.step = checkpoint.step

    def _start_from(self, checkpoint: TrainingCheckpoint, forget: Collection[str]) -> Origin:
        self.step = checkpoint.step
        model = unwrap(self.model)
        return start_from(
            checkpoint, model, self.optimizers, self.watch, self.data, self.config, forget=forget
        )

    def _tensors(self) -> dict[str, Any]:
        return {
            "model": unwrap(self.model).state_dict(),
            "optimizer": self.optimizers.state_dict(),
            "watch": self.watch.state_dict(),
        }

    def _autocast(self) -> AbstractContextManager[None]:
        return autocast_of(self.config, self.device)

    def _rehearse(self) -> None:
        """One forward and backward pass whose gradients are thrown away, so that memory runs out now.

        Only where memory is the device's own: on a CPU it would cost a step and tell nothing.
        """
        if self.device.type != "cuda":
            return
        state = self.data.state_dict()
        with memory_advice(self.config, self.device, self.ranks):
            self._gradients(self.data.next_batch())
        self.optimizers.zero_grad()
        self.data.load_state_dict(state)

    # Running

    def run(self) -> None:
        """Train to the last step."""
        if self.step == 0 or self.is_fork:
            self.recording.after_step(self.step)
        if self.is_fork:
            self._save_now(self.step)  # so that --resume finds the weights that it began from
        with self.interruption:
            while self.step < self.last_step:
                if self.recording.measures_passes_of(self.step + 1):
                    self._record(wait=True)  # it records while the step runs, and rows come in order
                with memory_advice(self.config, self.device, self.ranks):
                    self._train_step(self.step + 1)
                self.step += 1
                self._record(wait=self._wants_host(self.step))
                self.recording.after_step(self.step)
                self._act_on_findings()  # before a new checkpoint makes the last good one go
                self._save(self.step)
                if self.has_request:
                    self._obey()
                if self.must_stop:
                    self._interrupt()
        self._record(wait=True)
        self._save_now(self.step)
        self._tell_findings()

    def _wants_host(self, step: int) -> bool:
        return self.recording.due(step) or step == self.last_step or self._is_checkpoint_step(step)

    def _is_checkpoint_step(self, step: int) -> bool:
        every = self.config.checkpoint.every
        return every > 0 and step % every == 0

    def _train_step(self, step: int) -> None:
        start = Clock(self.device)
        batch = self.data.next_batch()
        self.batches.append((step, batch))
        self.data_states.append((step, self.data.state_dict()))
        logged = step % self.config.log_every == 0 or self._wants_host(step)
        self.optimizers.record_updates(logged)
        factor = learning_rate_factor(step, self.config.steps, self.config.schedule)
        self.optimizers.set_learning_rate(factor)
        self.recording.open_step(step)
        loss = self._gradients(batch)
        self.recording.close_step()
        norm = self._clip()
        bad = self.watch.judge(loss, norm)
        self.optimizers.step(skip=bad)
        self.optimizers.zero_grad()
        signals, requests = self._counts(step)
        numbers = {
            "loss": loss,
            "gradient_norm": norm,
            "skipped": bad,
            "signals": signals,
            "requests": requests,
        }
        if logged:
            updates = self.optimizers.update_rms()
            numbers |= {f"update_rms_{name.replace('.', '_')}": value for name, value in updates.items()}
            state = self.data_states[-1][1]
            self.records.after_step(step, batch, state, always=self._wants_host(step))
        host = {"learning_rate": factor * self.config.optimizer.lr} if logged else {}
        self.scalars.add(step, numbers, host, start)

    def _gradients(self, batch: Batch) -> Tensor:
        """Accumulate the gradients of one batch; returns the mean loss over all ranks' tokens."""
        # The mean over all labels: Σ over micro-batches and ranks of mean loss · (its labels / all labels).
        parts = list(self._micro_batches(batch))
        label_counts = torch.stack([(part.labels != IGNORED).sum() for part in parts])
        total = summed(label_counts.sum().float())
        losses = []
        for number, part in enumerate(parts):
            with accumulating(self.model, last=number == len(parts) - 1):
                loss = self._loss(part) * (label_counts[number] / total)
                # DDP and FSDP take the mean of the ranks' gradients; this is a share of the whole loss.
                (loss * self.ranks).backward()
            losses.append(loss.detach())
        return summed(torch.stack(losses).sum())

    def _counts(self, step: int) -> Tensor:
        """How many ranks were sent a signal, and have a request: all stop, and obey, after the same step."""
        signal, control = self.interruption.is_requested, self.recording.control
        request = control is not None and control.takes_request(step + 1)
        # Filled on the device: a copy from the host would wait for it.
        counts = [torch.full((), float(one), device=self.device) for one in (signal, request)]
        return summed(torch.stack(counts))

    def _loss(self, batch: Batch) -> Tensor:
        with self._autocast():
            return self.model(batch.input_ids, labels=batch.labels, document_ids=batch.document_ids).loss

    def _micro_batches(self, batch: Batch) -> Iterator[Batch]:
        size = self.config.micro_batch_size or len(batch.input_ids)
        for start in range(0, len(batch.input_ids), size):
            yield batch[start : start + size].to(self.device)

    def _clip(self) -> Tensor:
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = gathered(torch.nn.utils.get_total_norm(gradients))
        limit = self.config.optimizer.gradient_clip
        if limit is not None:
            # g ← g · min(1, limit / ‖g‖), without waiting for the norm on the host.
            torch._foreach_mul_(gradients, torch.clamp(limit / (norm + 1e-6), max=1.0))
        return norm

    # Beside the steps

    def _record(self, *, wait: bool = False) -> None:
        """Write the scalars that have reached the host, and look whether a step went wrong."""
        for step, values in self.scalars.arrived(wait=wait):
            bad, is_interrupted = values.pop("skipped") > 0, values.pop("signals") > 0
            self.has_request |= values.pop("requests") > 0
            if bad and self.config.divergence.policy == "stop":
                self._stop(step, values)
            if "learning_rate" in values:
                self._write(step, values | ({"skipped_step": 1.0} if bad else {}))
            self.must_stop |= is_interrupted

    def _write(self, step: int, values: dict[str, float]) -> None:
        rate = self.config.tokens_per_step / values["step_seconds"]
        values["tokens_per_second"] = rate
        utilisation = model_flops_utilisation(rate, self.flops_per_token, self.device, self.ranks)
        if utilisation is not None:
            values["model_flops_utilisation"] = utilisation
        self.recording.scalars(step, values, logged=True)
        batch_statistics, groups = self.records.arrived(step)
        self.recording.scalars(step, batch_statistics, attributes=BATCH_SERIES)
        self.recording.logged(step, groups)
        if self.progress is not None and is_first_rank():
            self.progress(step, self.config.steps, values)

    def _act_on_findings(self) -> None:
        """Do what ``monitor.action`` says; what all ranks do they do at probes, where they meet."""
        action = self.config.monitor.action
        self._has_findings |= self._tell_findings()
        if action not in ("checkpoint", "stop") or not self.recording.due(self.step):
            return
        ranks_with_findings = summed(torch.tensor(float(self._has_findings), device=self.device))
        self._has_findings = False
        if float(ranks_with_findings) > 0:
            self._save_now(self.step)
            if action == "stop":
                raise TrainingError(
                    f"monitor.action=stop: stopped after step {self.step}, whose state is saved; `osp-diag "
                    "watch` says why. Go on with --resume --set monitor.action=log"
                )

    def _note_data(self) -> None:
        """Say and keep what is to be said of the data: of a stream it shows when it is left."""
        self.recording.note(self.data.notes)
        announce = self.announce
        for note in self.data.notes:
            if announce is not None and note not in self._opening_notes:
                announce(f"note: {note}")

    def _tell_findings(self) -> bool:
        """Announce what is new, and keep the checkpoint before it where asked; whether there was anything."""
        findings = [] if self.monitor is None else self.monitor.take()
        for finding in findings:
            if self.announce is not None:
                self.announce(f"{finding.severity}: {finding.sentence}")
        if findings and self.config.monitor.action != "log":
            try:
                self._pin(findings)
            except TrainingError as error:
                self._note(f"monitor.action={self.config.monitor.action}: no checkpoint is pinned: {error}")
        if self.monitor is not None:
            self.checkpoints.judged_step = self.monitor.last_probe
        return bool(findings)

    def _pin(self, findings: Sequence[Finding]) -> None:
        """Keep the checkpoints before what is the matter. Where it is one for several, the worst says why."""
        if self.ranks == 1:
            self.checkpoints.wait()  # one that is being written may be it
        reasons: dict[int, str] = {}
        for finding in sorted(findings, key=lambda finding: finding.rank):
            if finding.last_good_step is not None:
                at = self.checkpoints.newest_up_to(finding.last_good_step)
                reasons |= {} if at is None or at in reasons else {at: finding.sentence}
        for step, reason in reasons.items():
            self.checkpoints.pin(step, reason)

    def _note(self, text: str) -> None:
        self.recording.note([text])
        if self.announce is not None:
            self.announce(text)

    def _save(self, step: int) -> None:
        self.checkpoints.poll()
        if self._is_checkpoint_step(step) and step < self.last_step:
            self._save_now(step, background=None)

    def _save_now(self, step: int, *, background: bool | None = False) -> None:
        self.recording.flush()
        self._has_findings |= self._tell_findings()  # of a deferred probe, before saving deletes
        data = dict(self.data_states)[step]
        function = function_record(self.model, self.reference_ids, self._autocast, code=self.code)
        self.checkpoints.save(
            step, self._tensors(), data, self.config, function=function, background=background
        )
        if background is False:
            self.checkpoints.wait()

    def _obey(self) -> None:
        """Do what ``osp-diag control`` asks, between this step and the next."""
        self.has_request = False
        if self.recording.control is not None:
            actions = loop_actions(self.checkpoints, self.step, self._save_on_request, self._stop_on_request)
            self.recording.control.obey(self.step + 1, actions)

    def _save_on_request(self) -> None:
        self._record(wait=True)
        self._save_now(self.step, background=None)

    def _stop_on_request(self) -> None:
        self.must_stop = True

    def _interrupt(self) -> None:
        """Only once the step's probe is recorded: resumed after this step, the run would lack it."""
        self._record(wait=True)
        self._save_now(self.step)
        interruption = KeyboardInterrupt()
        interruption.add_note(f"the state after step {self.step} is saved; --resume goes on from there.")
        raise interruption

    def _stop(self, step: int, values: Mapping[str, float]) -> None:
        """A step diverged; nothing has moved since. Save the state before it and name the cause."""
        self.optimizers.zero_grad()
        batch = dict(self.batches)[step]
        with torch.compiler.set_stance("force_eager"):
            parts = (self._loss(part) for part in self._micro_batches(batch))
            cause = first_of_ranks(first_bad_tensor(self.model, parts)) or unseen_cause(values)
        self.optimizers.zero_grad()
        self.step = step - 1
        if self.step:
            self._save_now(self.step)
        # So that who watches the run sees it; resuming takes it back.
        self._write(step, {**values, "stopped_step": 1.0})
        numbers = f"loss {values['loss']:.4g}, gradient norm {values['gradient_norm']:.4g}"
        kind = "diverged" if not math.isfinite(values["loss"] + values["gradient_norm"]) else "spiked"
        raise DivergenceError(
            f"step {step} {kind} ({numbers}): {cause}; the state after step {self.step} is saved. Go on with "
            "--resume and divergence.policy=skip to pass over such steps, or begin again with a lower "
            "optimizer.lr"
        )
