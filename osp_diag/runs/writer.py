"""Writing a run: an append-only, crash-consistent Zarr v3 hierarchy.

What is on disk (``osp_diag.runs.run`` reads it, and so does ``xarray.open_datatree(path, engine="zarr")``):

* the root holds ``step`` and the attributes that determine the numbers;
* one group per site, variables (step, layer, …); ``raw/<site>`` the same for raw sums;
* ``snapshot/…`` and whatever else does not grow; ``series``: scalars along ``logged_step``, which has
  its own name because it is denser than ``step``, and a tree shares coordinates of one name;
  ``series/<group>``: labelled arrays along it.

**Commit.** Chunks are written first; then the root's ``zarr.json``, which consolidates the metadata of
all arrays with their lengths, is replaced atomically and synced. That file is the commit pointer: a
reader sees committed steps only, all of them whole. A killed writer loses at most what was appended
after the last commit; a resumed one forgets what lies beyond it. Why a writer of our own, and why that
file stays whole: docs/decisions.md, Runs.
"""

from __future__ import annotations

import operator
import os
from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, SupportsIndex

import numpy as np
import xarray as xr

from osp_diag.errors import StoreError
from osp_diag.runs.axis import GrowingAxis
from osp_diag.runs.declared import GroupStep, ProbedStep, parts_of
from osp_diag.runs.folder import (
    FORMAT_KEY,
    FORMAT_VERSION,
    check_destination,
    disk_errors,
    read_root,
    survey,
    sweep,
)
from osp_diag.runs.format import (
    METADATA,
    ArrayLayout,
    compact,
    group_metadata,
    jsonable,
    replace_file,
    root_document,
)
from osp_diag.runs.lock import WriterLock
from osp_diag.runs.segments import (
    OF_MEASUREMENT,
    changed_attributes,
    segment_group,
    segments_of,
)
from osp_diag.runs.tree import Plan, Tree, checked_path, scalar, step_label
from osp_diag.schema import CHECKPOINT_FOLDER, LOGGED_STEP, PARENT, SEGMENTS, SERIES, STEP
from osp_diag.wording import differences

__all__ = ["RunWriter", "check_destination"]


CIRCUMSTANCES = ("created", "command", "versions", "device", "ranks")
"""Attributes in which the two halves of a resumed run may differ; the later ones go into ``resumed``."""
VOLATILE = (
    *CIRCUMSTANCES, "resumed", "absent_sites", "notes", "later_estimators", CHECKPOINT_FOLDER, PARENT,
    SEGMENTS,
)  # fmt: skip

_CHUNK_BYTES = 256 * 1024
_SERIES_CHUNK = 4096
_PENDING_BYTES = 256 * 1024 * 1024


class RunWriter:
    """The one writer of the run at ``path``.

    Parameters
    ----------
    path : a folder, by custom ``*.zarr``; made with its parents if it does not exist
    attributes : everything that determines a number (NumPy scalars, sets, paths and dates are converted)
    resume : continue the run that is there (or begin one). The attributes must be equal, save
        those of ``CIRCUMSTANCES``, which are appended to the attribute ``resumed``.
    segment_after : with ``resume``: go on after this step under other attributes, which begin a new
        segment (:mod:`osp_diag.runs.segments`); those that say what a number is have to be equal. What the
        run holds beyond that step is for :meth:`truncate_after` to drop.
    overwrite : delete the run that is there. Nothing but a run is ever deleted.
    block : commit every so many probed steps; until then they are in memory. 1 loses at most the step
        being written when the process is killed; larger blocks write less.
    series_block : commit every so many rows of :meth:`append_series`
    chunk_steps : positions per chunk along ``step``, fewer where one step takes more than a few KiB

    Raises
    ------
    StoreError : something else is there, another process writes it, or the attributes do not match

    Use it as a context manager: leaving it, also by an exception, commits what was appended. A trainer
    calls :meth:`flush` before it saves a checkpoint and, resumed from it, :meth:`truncate_after`.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        attributes: Mapping[str, Any],
        *,
        resume: bool = False,
        segment_after: int | None = None,
        overwrite: bool = False,
        block: int = 1,
        series_block: int = 64,
        chunk_steps: int = 64,
    ) -> None:
        if resume and overwrite:
            raise StoreError("a run is either resumed or overwritten: give one of resume and overwrite")
        for name, value in (("block", block), ("series_block", series_block), ("chunk_steps", chunk_steps)):
            if value < 1:
                raise StoreError(f"{name} must be at least 1, not {value}")
        self.path = Path(path)
        self.block, self.series_block, self.chunk_steps = block, series_block, chunk_steps
        self._attributes: dict[str, Any] = {FORMAT_KEY: FORMAT_VERSION} | jsonable(dict(attributes))
        self._axis = GrowingAxis(STEP, STEP, "training step")
        self._series = GrowingAxis(
            LOGGED_STEP, f"{SERIES}/{LOGGED_STEP}", "training step of the scalars", open_end=True
        )
        self._names_in_segment: dict[str, str] = {}
        self._tree, self._logged = Tree(self.path), Tree(self.path, logged=True)
        self._on_disk: set[str] = set()
        self._owner = os.getpid()
        self._open = False
        survey(self.path, resume=resume, overwrite=overwrite)
        with self._disk_errors():
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = WriterLock(self.path)
            self._lock.acquire()
        try:
            with self._disk_errors():
                # Asked again, because only now nobody else can begin a run here.
                if survey(self.path, resume=resume, overwrite=overwrite) and resume:
                    self._resume(segment_after)
                self._commit()
                self._sweep()
        except BaseException:
            self._lock.release()
            raise
        self._open = True

    # -- what is there ---------------------------------------------------------------------------------

    @property
    def steps(self) -> list[int]:
        """Probed steps recorded so far, committed or not."""
        return self._axis.labels

    @property
    def last_step(self) -> int | None:
        """The last probed step, committed or not; None in an empty run."""
        return self._axis.last

    @property
    def attributes(self) -> dict[str, Any]:
        """The root attributes as they are on disk."""
        return dict(self._attributes)

    def __contains__(self, group: str) -> bool:
        """Whether the run has this group (so that a resumed probe need not write its snapshot again)."""
        return checked_path(group) in self._tree.groups

    def layers(self, group: str) -> list[int] | None:
        """The layers that the steps have of a group; None where it is not in the run."""
        return self._tree.layers(group)

    def __repr__(self) -> str:
        state = "open" if self._open else "closed"
        return f"<RunWriter {self.path} ({state}): {len(self._axis)} steps, last {self.last_step}>"

    # -- recording -------------------------------------------------------------------------------------

    def append(
        self,
        step: SupportsIndex,
        groups: Mapping[str, xr.Dataset],
        *,
        partial: bool = False,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """Record one probed step.

        Parameters
        ----------
        step : greater than every step recorded before
        groups : site or group name ("residual_post", "linear_input:mlp.down_proj", "raw/residual_post")
            → Dataset without a ``step`` dimension, usually with ``layer`` first. The first step decides
            which groups, variables, dimensions, coordinates and types the run has. Of a
            :class:`~osp_diag.runs.declared.ProbedStep` whose labels were compared once, only shapes and
            types are looked at.
        partial : whole groups may be missing, whose numbers then read NaN at this step, and new ones may
            come, which read NaN at the steps before: parts of a model that do not run in every step
        attributes : of the run, which this step changes, and which are committed with it
        """
        self._require_open()
        label = step_label(step)
        self._refuse_repetition(label, self._axis)
        groups = self._in_segment(groups)
        with self._disk_errors():
            new = {name for name in groups if not self._tree.grows(name)} if partial else set()
            if not self._axis.arrays:
                rows = self._begin(groups)
            elif new:
                rows = self._tree.check_step(_part(groups, set(groups) - new), partial=True)
                rows |= self._begin(_part(groups, new))
            else:
                rows = self._tree.check_step(groups, partial=partial)
            self._attributes |= jsonable(dict(attributes or {}))
            self._axis.add({STEP: label, **rows})
            if self._axis.unsaved >= self.block or self._axis.pending_bytes > _PENDING_BYTES:
                self._commit()

    def _begin(self, groups: Mapping[str, xr.Dataset]) -> dict[str, np.ndarray]:
        plan = self._tree.plan(groups, growing=True)
        if not plan.growing:
            raise StoreError(f"the first step of {self.path} has no variables; record at least one")
        self._write_static_arrays(plan, self._tree)
        self._axis.declare(plan.growing, self.chunk_steps, _CHUNK_BYTES)
        self._tree.declare(groups)
        return plan.rows

    @property
    def _segment(self) -> int | None:
        """The step after which the last segment begins, where there are several."""
        segments = self._attributes.get(SEGMENTS)
        return segments[-1]["after_step"] if segments else None

    def _in_segment(self, groups: Mapping[str, xr.Dataset]) -> Mapping[str, xr.Dataset]:
        """The groups by the names that they go on under: a segment's own where their labels are others."""
        if self._segment is None:
            return groups
        return ProbedStep(
            {self._name_in_segment(name, part): part for name, part in parts_of(groups).items()}
        )

    def _name_in_segment(self, name: str, part: xr.Dataset | GroupStep, prefix: str = "") -> str:
        names, tree, path = self._names_in_segment, self._logged if prefix else self._tree, prefix + name
        if self._segment is None:
            return path
        if path not in names:
            fits = not tree.grows(path) or tree.fits(path, part)
            names[path] = path if fits else prefix + segment_group(self._segment, name)
        return names[path]

    def append_series(
        self,
        step: SupportsIndex,
        values: Mapping[str, float],
        attributes: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> None:
        """Record scalars (loss, learning_rate, probe_seconds …) of one step, at its own rhythm.

        New names may come at any time (earlier steps read NaN); several calls may complete one step.
        ``attributes`` (name → units, long_name, definition) are kept when a name is first seen.
        """
        self._require_open()
        paths = {f"{SERIES}/{name}": scalar(name, value) for name, value in values.items()}
        label = step_label(step)
        with self._disk_errors():
            self._refuse_logged(label, paths)
            self._declare_series(values, attributes or {})
            self._log(label, paths)

    def append_logged(self, step: SupportsIndex, groups: Mapping[str, xr.Dataset]) -> None:
        """Record labelled arrays of one step in the rows of :meth:`append_series`.

        Parameters
        ----------
        step : as for :meth:`append_series`, with which it shares rows; either may complete the other's
        groups : name → Dataset of floats without a dimension of steps. The first one of a name decides
            variables, coordinates and types; a group may come at any time and be missing at others, which
            reads NaN
        """
        self._require_open()
        prefix = f"{SERIES}/"
        below = ProbedStep({self._name_in_segment(n, p, prefix): p for n, p in parts_of(groups).items()})
        label, tree, axis = step_label(step), self._logged, self._series
        with self._disk_errors():
            self._refuse_logged(label, [f"{name}/{key}" for name in below for key in _variables(below, name)])
            for name in below.keys() & {*axis.arrays, axis.labels_path}:
                raise StoreError(f"{name!r} of {self.path} is a series of scalars; name the group otherwise")
            begun = {name for name in below if tree.grows(name)}
            rows = tree.check_step(_part(below, begun), partial=True) if begun else {}
            rows = {path: values for path, values in rows.items() if path.rpartition("/")[0] in begun}
            if new := _part(below, set(below) - begun):
                plan = tree.plan(new, growing=True)
                self._write_static_arrays(plan, tree)
                self._tree.add_group(SERIES)
                axis.declare(plan.growing, _SERIES_CHUNK, _CHUNK_BYTES)
                tree.declare(new)
                rows |= plan.rows
            self._log(label, rows)

    def _refuse_logged(self, label: np.ndarray, paths: Iterable[str]) -> None:
        axis = self._series
        if not axis.pending or label != axis.last:
            self._refuse_repetition(label, axis)
        elif repeated := [path.removeprefix(f"{SERIES}/") for path in paths if path in axis.pending[-1]]:
            raise StoreError(
                f"series {', '.join(repeated)} of step {label} is already recorded in {self.path}; "
                "record each name once per step"
            )

    def _log(self, label: np.ndarray, values: dict[str, np.ndarray]) -> None:
        """Put checked values into the row of a step."""
        axis = self._series
        if axis.pending and label == axis.last:
            axis.complete(values)
        else:
            axis.add({axis.labels_path: label, **values})
        if axis.unsaved >= self.series_block or axis.pending_bytes > _PENDING_BYTES:
            self._commit()

    def _declare_series(self, names: Mapping[str, Any], attributes: Mapping[str, Any]) -> None:
        axis = self._series
        layouts = {}
        for name in names:
            path = f"{SERIES}/{name}"
            if path in self._logged.groups:
                raise StoreError(f"{path!r} of {self.path} is a group of arrays; name the series otherwise")
            if path not in axis.arrays:
                described = jsonable(dict(attributes.get(name, {})), f"attributes of {path}")
                layouts[path] = ArrayLayout((), "float64", (), described)
        if layouts:
            self._tree.add_group(SERIES)
            axis.declare(layouts, _SERIES_CHUNK, _CHUNK_BYTES)

    def write_static(self, group: str, dataset: xr.Dataset, *, replace: bool = False) -> None:
        """Write and commit what does not grow: snapshots, the probe's tokens.

        Variables that the group has already with these values are left as they are; with other values
        they are refused, or with ``replace`` exchanged (a crash in between loses them, nothing else).
        """
        self._require_open()
        with self._disk_errors():
            plan = self._tree.plan({group: dataset}, growing=False, exchange=replace)
            if plan.replaced:
                for path in plan.replaced:
                    self._tree.forget(path)
                self._commit()
                self._sweep()
            self._write_static_arrays(plan, self._tree)
            self._commit()

    def replace_group(self, group: str, dataset: xr.Dataset) -> None:
        """Write and commit a group that does not grow, in place of all that it held under other labels.

        A crash in between loses the group, nothing else.
        """
        self._require_open()
        with self._disk_errors():
            if self._tree.drop_group(checked_path(group)):
                self._commit()
                self._sweep()
        self.write_static(group, dataset)

    def _write_static_arrays(self, plan: Plan, tree: Tree) -> None:
        for path, (layout, values) in plan.static.items():
            self._make(path, compact(layout.metadata(values.shape)))
            layout.write_all(self.path / path, values)
        tree.adopt(plan)

    def note_absent_sites(self, reasons: Mapping[str, str]) -> None:
        """Keep why sites are not there (site → reason) when that shows only once the model runs."""
        self._require_open()
        noted = self._attributes.get("absent_sites", {})
        if reasons.items() - noted.items():
            self._attributes["absent_sites"] = noted | jsonable(dict(reasons), "absent_sites")
            with self._disk_errors():
                self._commit()

    def note(self, notes: Iterable[str]) -> None:
        """Keep what the reader of the numbers should know, when that shows only once the model runs."""
        self._require_open()
        noted = self._attributes.get("notes", [])
        if more := [note for note in notes if note not in noted]:
            self._attributes["notes"] = [*noted, *more]
            with self._disk_errors():
                self._commit()

    def note_estimators(self, parameters: Mapping[str, Mapping[str, Any]]) -> None:
        """Keep which estimators came after the first step: identifier → parameters."""
        self._require_open()
        noted = self._attributes.get("later_estimators", {})
        if parameters.keys() - noted.keys():
            self._attributes["later_estimators"] = noted | jsonable(dict(parameters), "later_estimators")
            with self._disk_errors():
                self._commit()

    # -- committing ------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Commit what was appended: once this returns, a kill loses none of it."""
        self._require_open()
        if self._axis.unsaved or self._series.unsaved:
            with self._disk_errors():
                self._commit()

    def truncate_after(self, step: SupportsIndex) -> int:
        """Drop every recorded step (and series row) after ``step``; returns how many probed steps.

        For a trainer that resumes from a checkpoint older than the run, so that steps trained again
        are neither refused nor recorded twice.
        """
        self._require_open()
        with self._disk_errors():
            self._drop_segments(lambda after_step: after_step > operator.index(step))
            self._commit()
            dropped = self._axis.cut(operator.index(step))
            if dropped + self._series.cut(operator.index(step)):
                self._commit()
                self._axis.write_metadata(self.path)
                self._series.write_metadata(self.path)
                self._sweep()
                self._series.reopen(self.path)
                self._drop_what_began_later()
        return dropped

    def _drop_what_began_later(self) -> None:
        """Forget arrays that have nothing in the steps that are left."""
        empty = [path for axis in (self._axis, self._series) for path in axis.without_values(self.path)]
        for path in empty:
            for tree, axis in ((self._tree, self._axis), (self._logged, self._series)):
                tree.growing.pop(path, None)
                axis.forget(path)
        self._logged.forget_groups_that_do_not_grow()
        if empty:
            self._commit()
            self._sweep()

    def close(self) -> None:
        """Commit and let other writers in. Closing twice does nothing."""
        if not self._open:
            return
        self._require_open()
        try:
            self.flush()
            with self._disk_errors():
                self._axis.write_metadata(self.path)
                self._series.write_metadata(self.path)
        finally:
            self._open = False
            self._lock.release()

    def __enter__(self) -> RunWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except StoreError as failure:
            if error is None:
                raise
            # The user's own exception matters more; what happened to the run is told beside it.
            error.add_note(f"While closing the run after this: {failure}")

    def _commit(self) -> None:
        for axis in (self._axis, self._series):
            for path in axis.arrays:
                if path not in self._on_disk:
                    self._make(path, axis.arrays[path].metadata(0))
            axis.write(self.path)
        all_groups = self._tree.groups | self._logged.groups
        groups = {path: compact(group_metadata(attrs)) for path, attrs in all_groups.items()}
        for path, text in groups.items():
            if path not in self._on_disk:
                self._make(path, text)
        nodes = groups | self._tree.static_metadata() | self._logged.static_metadata()
        nodes |= self._axis.metadata() | self._series.metadata()
        replace_file(self.path / METADATA, root_document(self._attributes, nodes), durable=True)
        self._axis.settle()
        self._series.settle()

    def _make(self, path: str, metadata: str) -> None:
        folder = self.path / path
        folder.mkdir(parents=True, exist_ok=True)
        replace_file(folder / METADATA, metadata.encode())
        self._on_disk.add(path)

    def _sweep(self) -> None:
        """Delete the files of ours that the committed metadata do not speak of."""

        def alive(node: str, name: str) -> bool:
            if name == METADATA:
                return node in self._on_disk and node in nodes
            for axis in (self._axis, self._series):
                if node in axis.arrays:
                    return axis.holds_chunk(node, name)
            return node in static

        static = {*self._tree.static, *self._logged.static}
        nodes = {"", *self._tree.groups, *self._logged.groups, *static}
        nodes |= {*self._axis.arrays, *self._series.arrays}
        self._on_disk &= nodes
        self._on_disk.add("")
        sweep(self.path, alive)

    # -- opening again ---------------------------------------------------------------------------------

    def _resume(self, segment_after: int | None) -> None:
        root = read_root(self.path)
        attributes, own = root["attributes"], self._attributes
        self._attributes = attributes
        if segment_after is not None:
            self._drop_segments(lambda after_step: after_step >= segment_after)
            attributes = self._attributes
        last = segments_of(attributes)[-1]
        volatile = VOLATILE if segment_after is None else (*VOLATILE, *own.keys() - {*OF_MEASUREMENT})
        changes = differences(last.attributes, own, volatile)
        if changes:
            raise StoreError(
                f"{self.path} cannot be resumed: it was written under other conditions (in the run → now)\n  "
                + "\n  ".join(changes)
                + "\nWrite to another path, or pass overwrite=True to start this one again."
            )
        nodes = root["consolidated_metadata"]["metadata"]
        growing: dict[str, dict[str, Any]] = {STEP: {}, LOGGED_STEP: {}}
        for path, entry in nodes.items():
            dims = entry.get("dimension_names") or [None]
            if dims[0] in growing:
                growing[dims[0]][path] = entry
            else:
                (self._logged if path.startswith(f"{SERIES}/") else self._tree).restore(path, entry)
        self._axis.restore(growing[STEP], self.path)
        self._series.restore(growing[LOGGED_STEP], self.path)
        self._tree.restore_growing(
            {path: array.layout for path, array in self._axis.arrays.items() if path != STEP}
        )
        logged = {path: array.layout for path, array in self._series.arrays.items() if path.count("/") > 1}
        self._logged.restore_growing(logged)
        self._on_disk = {"", *nodes}
        circumstances = {key: own[key] for key in CIRCUMSTANCES if key in own}
        history = [*attributes.get("resumed", []), circumstances | {"after_step": self.last_step}]
        self._attributes = attributes | {"resumed": history}
        if segment_after is not None:
            self._begin_segment(segment_after, last.attributes, own)

    def _begin_segment(self, after_step: int, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
        changed = changed_attributes(
            *({key: value for key, value in part.items() if key not in VOLATILE} for part in (before, now))
        )
        if changed:
            if PARENT in now:
                changed[PARENT] = now[PARENT]
            entry = {"after_step": after_step, "attributes": changed}
            self._attributes = self._attributes | {SEGMENTS: [*self._attributes.get(SEGMENTS, []), entry]}

    def _drop_segments(self, is_dropped: Callable[[int], bool]) -> None:
        segments = self._attributes.get(SEGMENTS)
        if segments:
            left = [entry for entry in segments if not is_dropped(entry["after_step"])]
            self._attributes = self._attributes | {SEGMENTS: left}
            self._names_in_segment = {}

    # -- refusing --------------------------------------------------------------------------------------

    def _refuse_repetition(self, label: np.ndarray, axis: GrowingAxis) -> None:
        if axis.last is not None and label <= axis.last:
            raise StoreError(
                f"step {label} cannot be appended to {self.path}, which already reaches step {axis.last}; "
                "after going back to a checkpoint, call truncate_after(<the checkpoint's step>) first"
            )

    def _require_open(self) -> None:
        if not self._open:
            raise StoreError(f"the writer of {self.path} is closed; open the run again with resume=True")
        if os.getpid() != self._owner:
            raise StoreError(
                f"{self.path} is written by process {self._owner}, not by its forked child {os.getpid()}; "
                "send the numbers to the parent"
            )

    def _disk_errors(self) -> AbstractContextManager[None]:
        return disk_errors(self.path, self._axis.settled)


def _variables(step: ProbedStep, group: str) -> list[str]:
    part = step.groups[group]
    return list(map(str, part.arrays if isinstance(part, GroupStep) else part.data_vars))


def _part(groups: Mapping[str, xr.Dataset], names: Collection[str]) -> ProbedStep:
    """Some groups of a step."""
    return ProbedStep({name: part for name, part in parts_of(groups).items() if name in names})
