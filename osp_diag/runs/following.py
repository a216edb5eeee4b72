"""Following a run that is being written: each look reads what was committed since the last one.

:func:`osp_diag.runs.run.open_run` opens a run as it is now. A view that looks every second for days would
read ten thousand steps again each time; here rows that were read once are kept, and only new ones are read
(docs/decisions.md, Pages).
"""

from __future__ import annotations

import math
import os
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from osp_diag.errors import StoreError
from osp_diag.runs.chunks import is_lost
from osp_diag.runs.folder import read_root
from osp_diag.runs.followed_groups import FollowedGroups
from osp_diag.runs.format import METADATA, PARTIAL, ArrayLayout
from osp_diag.runs.lock import LOCK_NAME, WriterState, writer_state
from osp_diag.runs.reduction import Reduction
from osp_diag.runs.run import Run, open_tree
from osp_diag.schema import LOGGED_STEP, SERIES, group_path

__all__ = ["FollowedRun", "RunState"]

RunState = Literal["absent", "empty", "recording", "unreadable"]

MOST_COLUMNS = 96
"""How many arrays are kept up to date; those asked for least recently are read again when they are needed."""
_COMMITS_A_LOOK = 3
"""How many commits one look takes up, of a run that is committed while it is read."""
_LOGGED = f"{SERIES}/{LOGGED_STEP}"


class FollowedRun(Run):
    """The run at ``path`` through all that can happen to it; nothing there is ever written or locked.

    Call :meth:`refresh`, then ask as one asks any :class:`~osp_diag.runs.run.Run`. ``steps``, ``series`` and
    :meth:`values` read only what is new; the rest (``at``, ``snapshot``, ``run[name]`` …) opens the run as it
    was last looked at, when it is first asked for. The run may not exist yet, be resumed from an earlier
    step, be deleted and begun anew: then everything is read again, and ``generation`` counts up.

    Attributes
    ----------
    lock : threads that share one hold it to ask several things of the same moment
    state : "absent" (nothing there yet, or no more), "empty" (no step yet), "recording" (there are steps,
        whether or not more come), "unreadable" (``problem`` says why)
    problem : what is wrong, and what to do; empty if nothing is
    """

    path: Path

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(xr.DataTree(), Path(path))
        self.state: RunState = "absent"
        self.problem = ""
        self.generation = 0
        self.writer: WriterState = "closed"
        self.lock = threading.RLock()
        self._signature: tuple[int, ...] | None = None
        self._attributes: dict[Hashable, Any] = {}
        self._nodes: dict[str, Any] = {}
        self._by_group = FollowedGroups({})
        self._columns: OrderedDict[tuple[Any, ...], _Column] = OrderedDict()
        self._coordinates: dict[str, np.ndarray] = {}
        self._series: xr.Dataset | None = None

    # -- looking ---------------------------------------------------------------------------------------

    def refresh(self) -> FollowedRun:
        """Look again; returns itself. :attr:`version` tells whether anything is different."""
        with self.lock:
            self.writer = writer_state(self.path)
            try:
                for _ in range(_COMMITS_A_LOOK):
                    if not self._advance():
                        break
            except (StoreError, OSError) as error:
                self._fail(error)
        return self

    @property
    def version(self) -> tuple[Any, ...]:
        """Differs whenever what there is to show does."""
        return (self.generation, self.state, self.problem, self.writer, self._signature)

    def _advance(self) -> bool:
        """Take up one commit; whether there may be a later one already."""
        signature = self._signature_on_disk()
        if signature is not None and signature == self._signature and not self.problem:
            return False
        root = read_root(self.path)
        attrs = root["attributes"]
        if _life(attrs) != _life(self._attributes):
            self._forget()
        self._nodes = root["consolidated_metadata"]["metadata"]
        self._attributes = attrs
        self._by_group = FollowedGroups(self._nodes)
        self._close()
        if not all(self._extend(column) for column in self._columns.values()):
            # Steps were taken back and trained again: nothing that was read can be trusted.
            self._forget()
        step_count = self._length("step") or self._length(_LOGGED)
        self.state, self.problem = "recording" if step_count else "empty", ""
        self._signature = signature
        return self._signature_on_disk() != signature

    def _signature_on_disk(self) -> tuple[int, ...] | None:
        with suppress(OSError):
            status = os.stat(self.path / METADATA)
            return (status.st_ino, status.st_mtime_ns, status.st_size)
        return None

    def _fail(self, error: StoreError | OSError) -> None:
        if _nothing_yet(self.path):
            if self._signature is not None or self._attributes:
                self._forget()
            self.state, self.problem, self._attributes = "absent", "", {}
            self._nodes, self._by_group, self._signature = {}, FollowedGroups({}), None
            self._close()
        else:
            # What was read stays on view.
            self.state, self.problem = "unreadable", str(error)
            if not self._nodes:
                self._close()

    def _forget(self) -> None:
        self.generation += 1
        self._columns.clear()
        self._coordinates.clear()
        self._close()

    def _close(self) -> None:
        """What was opened is no longer the run that was last looked at."""
        self._tree = self._series = None
        self._texts = {}

    def _length(self, path: str) -> int:
        return int(self._nodes[path]["shape"][0]) if path in self._nodes else 0

    # -- asking ----------------------------------------------------------------------------------------

    @property
    def attrs(self) -> dict[Hashable, Any]:
        return dict(self._attributes)

    def moment(self) -> Run:
        """The run as it was last looked at, which stays so while this one goes on."""
        with self.lock:
            return Run(self.tree, self.path)

    @property
    def tree(self) -> xr.DataTree:
        """The whole run as it was last looked at; empty where there is none.

        Raises
        ------
        StoreError : it is damaged, or was begun anew since
        """
        with self.lock:
            if self._tree is None:
                self._tree = self._open_tree()
            return self._tree

    def _open_tree(self) -> xr.DataTree:
        if self.state in ("absent", "empty"):
            return xr.DataTree(xr.Dataset(attrs=self.attrs))
        if not self._nodes:
            raise StoreError(self.problem)
        tree = open_tree(self.path)
        lengths = {"step": len(self.steps), LOGGED_STEP: self._length(_LOGGED)}
        if self._signature_on_disk() != self._signature:  # steps may have come since
            tree = tree.isel({dim: slice(size) for dim, size in lengths.items()}, missing_dims="ignore")
        steps = tree.coords["step"].values if "step" in tree.coords else np.empty(0, np.int64)
        if not np.array_equal(steps, self.steps):
            raise StoreError(f"{self._subject} was begun anew while it was read; look again")
        return tree

    @property
    def steps(self) -> np.ndarray:
        return self._rows(("step",), "step", _unchanged, np.int64)

    @property
    def series(self) -> xr.Dataset:
        with self.lock:
            if self._series is None:
                self._series = self._read_series()
            return self._series

    def _read_series(self) -> xr.Dataset:
        if SERIES not in self._nodes:
            return xr.Dataset(coords={"step": np.empty(0, np.int64)})
        steps = self._rows((SERIES,), _LOGGED, _unchanged, np.int64)
        scalars = {}
        for path in self._nodes:
            group, _, name = path.rpartition("/")
            if group == SERIES and path != _LOGGED and self._nodes[path]["node_type"] == "array":
                values = self._rows((SERIES, name), path, _unchanged, np.float64)[: len(steps)]
                # Lengths differ where a damaged chunk stopped one of them.
                values = np.pad(values, (0, len(steps) - len(values)), constant_values=np.nan)
                scalars[name] = ("step", values, dict(self._nodes[path]["attributes"]))
        coordinate = ("step", steps, dict(self._nodes[_LOGGED]["attributes"]))
        return xr.Dataset(scalars, {"step": coordinate}, dict(self._nodes[SERIES]["attributes"]))

    @property
    def _groups(self) -> list[str]:
        return self._by_group.names

    def statistics_at(self, site: str) -> dict[str, tuple[str, ...]]:
        return self._by_group.statistics(group_path(site))

    def labels(self, site: str, dimension: str) -> np.ndarray:
        group = group_path(site)
        with self.lock:
            if not self._by_group.goes_on(group):
                return self._labels_at(f"{group}/{dimension}")
            whole = self._joined(group, None, 0, 0)
            return whole[dimension].values if dimension in whole.coords else np.empty(0)

    def _labels_at(self, path: str) -> np.ndarray:
        if path not in self._coordinates:
            entry = self._nodes.get(path)
            if entry is None:
                return np.empty(0)
            layout = ArrayLayout.from_metadata(entry, path)
            self._coordinates[path] = layout.read_all(self.path / path, entry["shape"])
        return self._coordinates[path]

    def _reduced(
        self, site: str, statistic: str, reduction: Reduction
    ) -> tuple[np.ndarray, dict[Hashable, Any]]:
        group = group_path(site)
        if self._by_group.goes_on(group):
            rows, attributes = self._rows_between(group, statistic, 0, len(self.steps))
            return reduction(rows), attributes
        path = f"{group}/{statistic}"
        rows = self._rows((path, reduction), path, reduction.__call__, np.float64)
        return rows[: len(self.steps)], dict(self._nodes[path]["attributes"])

    def _rows_between(
        self, group: str, statistic: str, start: int, stop: int
    ) -> tuple[np.ndarray, dict[Hashable, Any]]:
        group = group_path(group)
        with self.lock:
            if self._by_group.goes_on(group):
                whole = self._joined(group, statistic, start, stop)[statistic]
                return whole.values, dict(whole.attrs)
            path = f"{group}/{statistic}"
            return self._rows_at(path, start, stop), dict(self._nodes[path]["attributes"])

    def _rows_at(self, path: str, start: int, stop: int) -> np.ndarray:
        return _Column(path, _unchanged, open_end=False).between(self.path, self._nodes[path], start, stop)

    def _joined(self, group: str, statistic: str | None, start: int, stop: int) -> xr.Dataset:
        """A group that goes on in later segments; of the statistic only these rows are read."""

        def rows(path: str) -> np.ndarray:
            return self._rows_at(path, start, stop)

        return self._by_group.joined(group, statistic, self.steps[start:stop], self._labels_at, rows)

    def __repr__(self) -> str:
        return f"<osp_diag.FollowedRun {self.path}: {self.problem or self.state}>"

    def _rows(
        self, key: tuple[Any, ...], path: str, pick: Callable[[np.ndarray], np.ndarray], kind: Any
    ) -> np.ndarray:
        with self.lock:
            if path not in self._nodes:
                return np.empty(0, kind)
            if key not in self._columns:
                column = _Column(path, pick, open_end=path.startswith(f"{SERIES}/"))
                try:
                    self._extend(column)
                except StoreError as error:
                    self._fail(error)
                    raise
                self._columns[key] = column
                if len(self._columns) > MOST_COLUMNS:
                    self._columns.popitem(last=False)
            self._columns.move_to_end(key)
            return self._columns[key].rows

    def _extend(self, column: _Column) -> bool:
        entry = self._nodes.get(column.path)
        return column.extend(self.path, entry) if entry is not None else not column.length


class _Column:
    """What was read of one growing array: its rows, reduced by ``pick`` as they come.

    With ``open_end`` the last row may still be completed after it was committed.
    """

    def __init__(self, path: str, pick: Callable[[np.ndarray], np.ndarray], *, open_end: bool) -> None:
        self.path, self.pick, self.open_end = path, pick, open_end
        self.length = 0
        self._room = np.empty((0,))

    @property
    def rows(self) -> np.ndarray:
        rows = self._room[: self.length]
        rows.flags.writeable = False
        return rows

    def extend(self, root: Path, entry: Mapping[str, Any]) -> bool:
        """Read the rows that are new; False if those known are no longer what is on disk.

        A trainer that resumes takes back its last steps, so it is enough to compare the end of what is
        known, which lies in a chunk that has to be read for the new rows anyway.
        """
        layout = ArrayLayout.from_metadata(entry, self.path)
        length, chunk_rows = int(entry["shape"][0]), layout.chunk[0]
        length_before = self.length
        if length < length_before:
            return False
        start = (length_before - 1) // chunk_rows * chunk_rows if length_before else 0
        while start < length:
            stop = min(start + chunk_rows, length)
            chunk = self._chunk(layout, root, start // chunk_rows, math.ceil(length / chunk_rows))
            rows = self.pick(chunk[: stop - start])
            settled = min(length_before - self.open_end, stop)
            if settled > start and not _equal(rows[: settled - start], self._room[start:settled]):
                return False
            self._put(start, rows)
            start = stop
        self.length = length
        return True

    def between(self, root: Path, entry: Mapping[str, Any], start: int, stop: int) -> np.ndarray:
        """The rows from ``start`` to before ``stop``, of which nothing is kept."""
        layout = ArrayLayout.from_metadata(entry, self.path)
        length, size = int(entry["shape"][0]), layout.chunk[0]
        first = start // size
        chunks = [
            self._chunk(layout, root, index, math.ceil(length / size))
            for index in range(first, math.ceil(min(stop, length) / size))
        ]
        rows = np.concatenate(chunks) if chunks else layout.empty_chunk()[:0]
        return self.pick(rows[start - first * size : stop - first * size])

    def _chunk(self, layout: ArrayLayout, root: Path, index: int, count: int) -> np.ndarray:
        folder, beyond = root / self.path, [0] * (len(layout.chunk) - 1)
        chunk = layout.read_chunk(folder, (index, *beyond))
        if chunk is not None:
            return chunk

        def exists(place: int) -> bool:
            return layout.chunk_path(folder, (place, *beyond)).exists()

        growing = self.path not in ("step", _LOGGED)
        if is_lost((index, *beyond), (count, *[1] * len(beyond)), growing, exists):
            path = layout.chunk_path(folder, (index, *beyond))
            raise StoreError(f"chunk {path} is missing; restore the run from a copy")
        return layout.empty_chunk()

    def _put(self, start: int, rows: np.ndarray) -> None:
        stop = start + len(rows)
        if stop > len(self._room):
            # Room for as many again, so that a run's life costs each row one copy or two.
            room = np.empty((2 * stop, *rows.shape[1:]), rows.dtype)
            room[:start] = self._room[:start] if start else 0
            self._room = room
        self._room[start:stop] = rows


def _life(attrs: Mapping[Any, Any]) -> tuple[Any, ...]:
    """What differs when a run was begun anew or resumed."""
    return (attrs.get("created"), attrs.get("command"), len(attrs.get("resumed") or ()))


def _nothing_yet(path: Path) -> bool:
    """Whether a writer could begin here, or is just about to."""
    if not path.exists():
        return True
    with suppress(OSError):
        return path.is_dir() and all(n == LOCK_NAME or n.endswith(PARTIAL) for n in os.listdir(path))
    return False


def _unchanged(rows: np.ndarray) -> np.ndarray:
    return rows


def _equal(left: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.array_equal(left, right, equal_nan=left.dtype.kind == "f"))
