"""What a probe has recorded, in memory or in a run that it writes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import xarray as xr

from osp_diag.probing.deferred import HostWork
from osp_diag.probing.ranks import is_first_rank
from osp_diag.probing.saving import write_run
from osp_diag.runs.declared import ProbedStep
from osp_diag.runs.run import Run, open_run
from osp_diag.runs.tree import scalar
from osp_diag.runs.writer import RunWriter

__all__ = ["Records"]

SERIES_ATTRIBUTES = {
    "probe_seconds": {
        "units": "s",
        "long_name": "time a probe took from the loop",
        "definition": "wall-clock time from the start of a probed block, with its forward passes, until the "
        "loop went on",
    },
    "probe_background_seconds": {
        "units": "s",
        "long_name": "time of a probe behind the loop",
        "definition": "wall-clock time in which a thread finished a probe's statistics and wrote them while "
        "the loop went on; not in probe_seconds",
    },
}


class Records:
    """Keeps what is measured, in order, and all of it through one :class:`HostWork`.

    Parameters
    ----------
    path : the run to write; None keeps everything in memory. Only the first rank writes
    attributes : of the run
    resume, segment_after, overwrite : what to do with a run that is already there; see
        :class:`~osp_diag.runs.writer.RunWriter`
    deferred : whether steps are finished and written by a thread while the caller goes on

    Raises
    ------
    StoreError : ``path`` holds another run
    """

    def __init__(
        self,
        path: Path | None,
        attributes: dict[str, Any],
        *,
        resume: bool,
        overwrite: bool,
        deferred: bool,
        segment_after: int | None = None,
    ) -> None:
        self._path, self._attributes = path, attributes
        self.writer: RunWriter | None = None
        if path is not None and is_first_rank():
            self.writer = RunWriter(
                path, attributes, resume=resume, segment_after=segment_after, overwrite=overwrite
            )
        self.static: dict[str, xr.Dataset] = {}
        """What this process was given that does not grow, by group."""
        self.steps = 0
        """How many steps this process has recorded or is about to."""
        self._latest = ProbedStep()
        self._begun = False
        self._memory: list[tuple[int, ProbedStep]] = []
        self._series: dict[str, dict[int, float]] = {}
        self._logged: dict[str, dict[int, xr.Dataset]] = {}
        self._deferred = deferred
        self._work = HostWork(deferred)

    @property
    def latest(self) -> ProbedStep:
        """The last step, whose datasets are made when they are looked at."""
        self._work.wait()
        return self._latest

    def layers(self, site: str) -> list[int] | None:
        """The layers of a site in the run that is resumed or written; None where it has none."""
        return None if self.writer is None else self.writer.layers(site.replace(":", "/"))

    def __contains__(self, group: str) -> bool:
        """Whether a group that does not grow is kept already, by this process or in the run it resumed."""
        self._work.wait()
        return group in self.static or (self.writer is not None and group in self.writer)

    def step(
        self,
        step: int,
        finished: Callable[[], ProbedStep],
        absent: Mapping[str, str],
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Record one step. If it is deferred, the step before has to be done first: memory holds one.

        Parameters
        ----------
        finished : makes the statistics, from what is on the host already
        absent : sites that turned out not to be there, and why; ``finished`` may add to them
        attributes : of the run, which this step changes

        A run begins with a step that has numbers: one before it in which no site was reached is noted.
        """

        self.steps += 1

        def record() -> None:
            started = time.perf_counter()
            groups = finished()
            self._latest = groups
            if not groups and not self._has_begun():
                self._note(
                    [
                        f"step {step} is not in the run, because no site was reached in it: no block "
                        "ran (LayerDrop leaves out blocks by chance), or the model is compiled or scripted "
                        "in a way that bypasses hooks; then probe the original module"
                    ]
                )
                return
            self._begun = True
            if self.writer is not None:
                self.writer.append(step, groups, partial=True, attributes=attributes)
                if absent:
                    self.writer.note_absent_sites(absent)
            elif self._path is None:
                self._memory.append((step, groups))
                self._attributes |= attributes or {}
            if self._deferred:
                seconds = time.perf_counter() - started
                self._add(step, {"probe_background_seconds": seconds}, {})

        self._work.wait()
        self._work.later(record)

    def _has_begun(self) -> bool:
        return self._begun or (self.writer is not None and bool(self.writer.steps))

    def note(self, notes: Iterable[str]) -> None:
        """Keep what the reader of the numbers should know, each once."""
        texts = list(notes)
        if texts:
            self._work.later(lambda: self._note(texts))

    def _note(self, notes: list[str]) -> None:
        known = self._attributes["notes"]
        known += [note for note in notes if note not in known]
        if self.writer is not None:
            self.writer.note(notes)

    @property
    def notes(self) -> list[str]:
        """What is noted, also in the run that was resumed; what a deferred step has to say may follow."""
        return list(self._attributes["notes"] if self.writer is None else self.writer.attributes["notes"])

    def note_estimators(self, parameters: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep the identifiers of estimators that the run did not begin with, and their parameters."""
        writer = self.writer
        if parameters and writer is not None:
            self._work.later(lambda: writer.note_estimators(parameters))

    def append_series(
        self,
        step: int,
        values: Mapping[str, float],
        attributes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Keep scalars of a step."""
        # Now, as the values are: a tensor could be another by the time that they are written.
        numbers = {name: float(scalar(name, value)) for name, value in values.items()}
        self._work.later(lambda: self._add(step, numbers, attributes or {}))

    def _add(
        self, step: int, numbers: Mapping[str, float], attributes: Mapping[str, Mapping[str, Any]]
    ) -> None:
        if self.writer is not None:
            self.writer.append_series(step, numbers, SERIES_ATTRIBUTES | dict(attributes))
        elif self._path is None:
            for name, number in numbers.items():
                self._series.setdefault(name, {})[step] = number

    def append_logged(self, step: int, groups: Mapping[str, xr.Dataset]) -> None:
        """Keep labelled arrays of a step beside its scalars."""

        def add() -> None:
            if self.writer is not None:
                self.writer.append_logged(step, groups)
            elif self._path is None:
                for name, dataset in groups.items():
                    self._logged.setdefault(name, {})[step] = dataset

        self._work.later(add)

    def write_static(self, group: str, dataset: xr.Dataset) -> None:
        """Keep what does not depend on the step; a resumed run keeps its own."""
        self._work.wait()
        self.static[group] = dataset
        if self.writer is not None and group not in self.writer:
            self.writer.write_static(group, dataset)

    def flush(self) -> None:
        """Commit everything."""
        self._work.wait()
        if self.writer is not None:
            self.writer.flush()

    def truncate_after(self, step: int) -> None:
        """Drop what is later than ``step``."""
        self._work.wait()
        if self.writer is not None:
            self.writer.truncate_after(step)

    def run(self) -> Run:
        """Everything so far, committed."""
        self._work.wait()
        if self._path is None:
            return Run.in_memory(self._memory, self.static, self._attributes, self._series, self._logged)
        if self.writer is not None:
            self.writer.flush()
        return open_run(self._path)

    def save(self, path: Path, *, overwrite: bool) -> None:
        """Write what is in memory as a run."""
        self._work.wait()
        parts = (self._memory, self.static, self._attributes, self._series)
        write_run(path, *parts, logged=self._logged, overwrite=overwrite)

    def close(self) -> None:
        """Write what is buffered, and let other writers in, also where something failed before."""
        self._work.close(None if self.writer is None else self.writer.close)
