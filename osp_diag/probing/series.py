"""Probing the checkpoints of one training, one after the other, into one run over steps."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Unpack

from osp_diag.checkpoints import Checkpoint, open_checkpoint
from osp_diag.checkpoints.alike import another_tokenizer, check_alike, tokenizer_difference
from osp_diag.checkpoints.series import StepCheckpoint, checkpoints_of
from osp_diag.errors import CheckpointError, OspDiagError, StoreError, UsageError
from osp_diag.probing.checkpoint import ProbeOptions, joined_ranks, measure_passes, session_of
from osp_diag.probing.feeding import Progress
from osp_diag.probing.ranks import on_first_rank
from osp_diag.probing.records import Records
from osp_diag.probing.saving import check_out
from osp_diag.probing.session import Probe
from osp_diag.probing.settings import MeasurementSettings, TokenSettings, keyword_form
from osp_diag.runs.declared import ProbedStep
from osp_diag.runs.folder import read_root, survey
from osp_diag.runs.run import Run, open_run
from osp_diag.runs.writer import VOLATILE
from osp_diag.tokens import TokenBatches
from osp_diag.wording import counted, differences

__all__ = ["CHECKPOINTS", "OF_A_SERIES", "probe_series"]

OF_A_SERIES = MeasurementSettings()
"""What is measured by default of each checkpoint: no pictures of single tokens, which are of one step."""

CHECKPOINTS = "checkpoints"
"""Attribute of the run: step → source and fingerprint of the checkpoint that was measured."""

OF_ONE_CHECKPOINT = (
    *VOLATILE,
    CHECKPOINTS,
    "model_name",
    "model_source",
    "model_fingerprint",
    "tokenizer_fingerprint",
)
"""Attributes in which the checkpoints of a training may differ; tokenizers are compared by themselves."""

ProgressOf = Callable[[str], AbstractContextManager[Progress | None]]
"""Label of a checkpoint → a context whose value is told after every forward pass."""


@keyword_form(TokenSettings(), OF_A_SERIES, open_checkpoint)
def probe_series(
    sources: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    token_settings: TokenSettings | None = None,
    measurement_settings: MeasurementSettings | None = None,
    *,
    steps: Sequence[int] | None = None,
    revisions: Sequence[str] | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    progress: ProgressOf | None = None,
    **options: Unpack[ProbeOptions],
) -> Run:
    """The checkpoints of one training, measured on the same tokens, as one run over steps.

    One model is in memory at a time. Every checkpoint is committed when it is measured, so that a run that
    was stopped holds what was done until then.

    Parameters
    ----------
    sources : checkpoints, or a directory that holds them (``checkpoint-500``, ``step1000``, …), or the hub
        repository that ``revisions`` are of
    token_settings, measurement_settings, options : as of :func:`osp_diag.probe`; by default neither raw
        activations nor token groups are kept
    steps : of the checkpoints, in their order; None: the number in each name, or else ``global_step`` in its
        ``trainer_state.json``
    revisions : branches, tags or commits of the hub repository
    out : where to write the run, a folder ending in .zarr; None keeps it in memory
    resume : go on with the run that is at ``out``, if one is: only checkpoints of later steps are measured
    overwrite : replace a run that is already there
    progress : gives for every checkpoint, by its label ("step 500, checkpoint 1 of 3"), a context whose value
        is told after every forward pass

    Returns
    -------
    Run : over steps. What ``trainer_state.json`` says of loss, learning rate and gradient norm is in its
        series ``loss``, ``learning_rate``, ``gradient_norm`` and ``validation_loss``. Attributes are those
        of a probe; ``checkpoints`` says by step what was measured, and ``model_fingerprint`` is of the last

    Raises
    ------
    UsageError : which checkpoints are meant, or of which steps they are, is not clear
    CheckpointError : one is damaged, or of another model or tokenizer; what was measured before stays
    TokenError, SiteError, CaptureError, StoreError : as of :func:`osp_diag.probe`
    """
    opening: dict[str, Any] = dict(options)
    tokens = (token_settings or TokenSettings()).changed(opening)
    settings = (measurement_settings or OF_A_SERIES).changed(opening)
    if opening.get("revision") is not None:
        raise UsageError("revision is of one checkpoint; a series takes revisions, several (--revisions)")
    if resume and (out is None or overwrite):
        raise UsageError(
            "resume (--resume) goes on with the run at out (--out); "
            + ("say which that is" if out is None else "leave overwrite (--overwrite) out")
        )
    if tokens.batch_size is not None and tokens.batch_size < 1:
        raise UsageError(f"batch_size={tokens.batch_size}: a forward pass needs 1 or more sequences")
    if out is not None:
        check_out(out, overwrite=overwrite, resume=resume)
    named = [sources] if isinstance(sources, str | os.PathLike) else list(sources)
    members = checkpoints_of(named, steps=steps, revisions=revisions)
    with joined_ranks():
        on_first_rank(lambda: check_alike(members, compare_tokenizers=opening.get("tokenizer") is None))
        series = _Series(members, tokens, settings, opening, Path(out) if out is not None else None, progress)
        return series.measured(resume=resume, overwrite=overwrite)


@dataclass
class _Series:
    """What all checkpoints of one call share."""

    members: tuple[StepCheckpoint, ...]
    tokens: TokenSettings
    settings: MeasurementSettings
    opening: Mapping[str, Any]
    out: Path | None
    progress: ProgressOf | None
    records: Records | None = None
    batches: TokenBatches | None = None
    tokenizer: Any = None
    """Of the first checkpoint that was opened, as are the batches."""
    attributes: dict[str, Any] = field(default_factory=dict)
    """Of the run."""
    before: Run | None = None
    """The run that is resumed, as it was."""
    logged: int = -1
    """Scalars up to this step are in the run."""

    def measured(self, *, resume: bool, overwrite: bool) -> Run:
        """Measure what is not in the run yet."""
        self.before = self._run_there() if resume else None
        known = {} if self.before is None else dict(self.before.attrs[CHECKPOINTS])
        self.logged = -1 if self.before is None else _last_logged(self.before)
        done = [one for one in self.members if str(one.step) in known]
        remaining = [one for one in self.members if str(one.step) not in known]
        self._refuse_between(remaining)
        try:
            if done:
                self._compare(done[-1], known[str(done[-1].step)])
            for one in remaining:
                self._measure(one, known, resume=resume, overwrite=overwrite)
        finally:
            if self.records is not None:
                self.records.close()
        on_first_rank(lambda: None)  # the others read the run when it is written
        if self.out is not None:
            return open_run(self.out)
        assert self.records is not None
        return self.records.run()

    def _run_there(self) -> Run | None:
        """The run that is to be resumed, if there is one with a step in it."""
        if self.out is None or not survey(self.out, resume=True, overwrite=False):
            return None
        attributes = read_root(self.out)["attributes"]
        if not isinstance(attributes.get(CHECKPOINTS), dict):
            raise StoreError(
                f"{self.out} cannot be resumed: it is no run of several checkpoints (it lacks the attribute "
                f"{CHECKPOINTS!r}); write to another path, or replace it with overwrite=True (--overwrite)"
            )
        return open_run(self.out) if attributes[CHECKPOINTS] else None

    def _refuse_between(self, remaining: Sequence[StepCheckpoint]) -> None:
        last = -1 if self.before is None else int(self.before.steps[-1])
        early = [one for one in remaining if one.step < last]
        if early:
            raise UsageError(
                f"{early[0].name} of step {early[0].step} lies before step {last}, which {self.out} already "
                "reaches, and steps are only appended; leave it out, or measure all checkpoints anew with "
                "--overwrite (overwrite=True) or at another --out"
            )

    def _compare(self, one: StepCheckpoint, recorded: Mapping[str, str]) -> None:
        """Refuse to go on with another training, or under other conditions, by the last step in common."""
        checkpoint, session, _ = self._opened(one, None)
        if checkpoint.fingerprint != recorded.get("fingerprint"):
            raise CheckpointError(
                f"{one.name} is not the checkpoint whose step {one.step} is in {self.out} (that was "
                f"{recorded.get('source')}): its weights are others; name the checkpoints of that training, "
                "or write to another --out"
            )
        self._begin(session, checkpoint, resume=True, overwrite=False, is_same=True)

    def _measure(self, one: StepCheckpoint, known: dict[str, Any], *, resume: bool, overwrite: bool) -> None:
        place = f"checkpoint {self.members.index(one) + 1} of {len(self.members)}"
        with self._bar(f"step {one.step}, {place}") as bar:
            with self._located(one, place):
                checkpoint, session, feeding = self._opened(one, bar)
            if self.records is None:
                self._begin(session, checkpoint, resume=resume, overwrite=overwrite)
            with self._located(one, place):
                self._refuse_differences(one, session)
                self._log(one, before_step=True)
                started = time.perf_counter()
                assert self.batches is not None
                measure_passes(session, feeding, one.name, self.batches, one.step)
            known[str(one.step)] = {"source": one.name, "fingerprint": checkpoint.fingerprint}
            self._record(one, session, known, time.perf_counter() - started)

    def _record(self, one: StepCheckpoint, session: Probe, known: Mapping[str, Any], seconds: float) -> None:
        """Commit what was measured of a checkpoint, and with it which one it was."""
        assert self.records is not None
        fingerprint = known[str(one.step)]["fingerprint"]
        attributes = {CHECKPOINTS: dict(known), "model_fingerprint": fingerprint}
        self.attributes["absent_sites"] |= session.absent
        self.records.step(one.step, lambda: ProbedStep(dict(session.latest)), session.absent, attributes)
        begins = "" if len(known) == 1 else f"first at step {one.step}: "
        noted = self.attributes["notes"]
        new = [note for note in session.attributes["notes"] if not any(n.endswith(note) for n in noted)]
        self.records.note([begins + note for note in new])
        for group, dataset in session.static.items():
            if group not in self.records:
                self.records.write_static(group, dataset)
        self.records.append_series(one.step, {"probe_seconds": seconds})
        self._log(one, before_step=False)
        self.records.flush()

    def _bar(self, label: str) -> AbstractContextManager[Progress | None]:
        return nullcontext() if self.progress is None else self.progress(label)

    def _opened(self, one: StepCheckpoint, bar: Progress | None) -> tuple[Checkpoint, Probe, Any]:
        """A checkpoint, its probe in memory and its batches; its tokenizer is known to be the first one's."""
        gc.collect()  # a model is full of circles, and the one before has to be gone
        checkpoint = open_checkpoint(one.source, **{**self.opening, "revision": one.revision})
        if self.batches is None:
            self.batches, self.tokenizer = self.tokens.batches(checkpoint), checkpoint.tokenizer
        elif difference := tokenizer_difference(checkpoint.tokenizer, self.tokenizer):
            raise another_tokenizer(one.name, "those before", difference)
        settings, batch_size = self.settings, self.tokens.batch_size
        session, feeding = session_of(checkpoint, self.batches, settings, batch_size=batch_size, progress=bar)
        session.attributes["vocabulary_size"] = checkpoint.vocabulary_size
        return checkpoint, session, feeding

    def _begin(
        self,
        session: Probe,
        checkpoint: Checkpoint,
        *,
        resume: bool,
        overwrite: bool,
        is_same: bool = False,
    ) -> None:
        """Open the run, whose attributes are those of its first checkpoint but for what names that one.

        ``is_same`` says that a checkpoint was found to be the one that the run has.
        """
        attributes = {
            **session.attributes,
            "notes": list(session.attributes["notes"]),
            "absent_sites": dict(session.attributes["absent_sites"]),
            **self._names(),
            "model_fingerprint": checkpoint.fingerprint,
            CHECKPOINTS: {},
        }
        if self.before is not None:  # what grows with the run, or where it lies, is no condition of it
            of_the_run = ("model_source", "model_fingerprint", CHECKPOINTS)
            attributes |= {key: self.before.attrs[key] for key in of_the_run}
            attributes["notes"] = list(self.before.attrs["notes"])
            if is_same:
                attributes["model_name"] = self.before.attrs["model_name"]
        self.records = Records(self.out, attributes, resume=resume, overwrite=overwrite, deferred=False)
        self.attributes = attributes

    def _names(self) -> dict[str, str]:
        """What the training is called: the directory that its checkpoints are in, or the hub repository."""
        first = self.members[0]
        if first.revision is not None:
            return {"model_name": first.source, "model_source": first.source}
        directories = [one.directory for one in self.members if one.directory is not None]
        parents = {directory.absolute().parent for directory in directories}
        if len(parents) != 1 or len(directories) < len(self.members):
            return {"model_name": Path(first.source).name, "model_source": first.source}
        return {"model_name": parents.pop().name, "model_source": str(Path(first.source).parent)}

    def _refuse_differences(self, one: StepCheckpoint, session: Probe) -> None:
        changes = differences(self.attributes, {**self.attributes, **session.attributes}, OF_ONE_CHECKPOINT)
        if changes:
            raise CheckpointError(
                f"{one.name} differs from the checkpoints before it in what a run over steps holds fixed "
                "(in the run → now):\n  "
                + "\n  ".join(changes)
                + "\nLeave it out; one dtype can be set for all with --dtype (dtype=), and what is "
                "measured with --sites (sites=)."
            )

    def _log(self, one: StepCheckpoint, *, before_step: bool) -> None:
        """What the Trainer logged up to this checkpoint; its own step comes with the probe's scalars."""
        assert self.records is not None
        for step, values in ({} if one.state is None else one.state.scalars).items():
            if self.logged < step < one.step + (not before_step):
                self.records.append_series(step, values)
                self.logged = step

    @contextmanager
    def _located(self, one: StepCheckpoint, place: str) -> Iterator[None]:
        """Say in an error which checkpoint it is of, and what is safe."""
        try:
            yield
        except (OspDiagError, KeyboardInterrupt) as error:
            error.add_note(f"That was step {one.step} ({one.name}, {place}). {self._safe()}")
            raise

    def _safe(self) -> str:
        if self.out is None:
            return "The run was not to be written, so nothing is kept."
        steps: list[int] = [] if self.before is None else self.before.steps.tolist()
        if self.records is not None and self.records.writer is not None:
            steps = self.records.writer.steps
        if not steps:
            return "Nothing was measured before it."
        return (
            f"{self.out} holds {counted(len(steps), 'step')} up to {steps[-1]}; the same command "
            "with --resume (resume=True) goes on from there."
        )


def _last_logged(run: Run) -> int:
    steps = run.series["step"].values
    return int(steps[-1]) if steps.size else -1
