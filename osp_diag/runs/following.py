"""Following a run that is being written: each look reads what was committed since the last one.

:class:`osp_diag.runs.run.Run` opens a run as it is now. A view that looks every second for days would read
ten thousand steps again each time; here rows that were read once are kept, and only new ones are read.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import xarray as xr

from osp_diag.errors import StoreError
from osp_diag.runs.folder import read_root
from osp_diag.runs.format import METADATA, PARTIAL, ArrayLayout
from osp_diag.runs.lock import LOCK_NAME, WriterState, writer_state
from osp_diag.schema import in_site_order, is_site, site_of_path

__all__ = ["FollowedRun", "RunState"]

RunState = Literal["absent", "empty", "recording", "unreadable"]

MOST_COLUMNS = 96
"""How many arrays are kept up to date; those asked for least recently are read again when wanted."""
_AGAIN = 3


class FollowedRun:
    """The run at ``path`` through all that can happen to it; nothing there is ever written or locked.

    Call :meth:`refresh`, then ask. It may not exist yet, be resumed from an earlier step, be deleted and
    begun anew: then everything is read again, and ``generation`` counts up.

    Attributes
    ----------
    lock : threads that share one hold it to ask several things of the same moment
    state : "absent" (nothing there yet, or no more), "empty" (no step yet), "recording" (there are steps,
        whether or not more come), "unreadable" (``problem`` says why)
    problem : what is wrong, and what to do; empty if nothing is
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.state: RunState = "absent"
        self.problem = ""
        self.generation = 0
        self.attrs: dict[str, Any] = {}
        self.writer: WriterState = "closed"
        self.lock = threading.RLock()
        self._signature: tuple[int, ...] | None = None
        self._nodes: dict[str, Any] = {}
        self._recorded: dict[str, dict[str, tuple[str, ...]]] = {}
        """Group → what it records by step → dimensions without the step."""
        self._columns: OrderedDict[tuple[Any, ...], _Column] = OrderedDict()
        self._coordinates: dict[str, np.ndarray] = {}

    # -- looking ---------------------------------------------------------------------------------------

    def refresh(self) -> bool:
        """Look again; whether anything is different."""
        with self.lock:
            before = self.version
            self.writer = writer_state(self.path)
            try:
                for _ in range(_AGAIN):
                    if not self._advance():
                        break
            except (StoreError, OSError) as error:
                self._fail(error)
            return self.version != before

    @property
    def version(self) -> tuple[Any, ...]:
        """Differs whenever what there is to show does."""
        return (self.generation, self.state, self.problem, self.writer, self._signature)

    def _advance(self) -> bool:
        """Take up one commit; whether there may be a later one already."""
        signature = self._signed()
        if signature is not None and signature == self._signature and not self.problem:
            return False
        root = read_root(self.path)
        attrs = root["attributes"]
        if _lives(attrs) != _lives(self.attrs):
            self._forget()
        nodes = root["consolidated_metadata"]["metadata"]
        # A run may come from anybody: nothing beside it is ever opened.
        self._nodes = {path: nodes[path] for path in nodes if ".." not in path and not path.startswith("/")}
        self.attrs = attrs
        self._recorded = _recorded_by_step(self._nodes)
        if not all(self._extend(column) for column in self._columns.values()):
            # Steps were taken back and trained again: nothing that was read can be trusted.
            self._forget()
        recorded = self._length("step") or self._length("series/logged_step")
        self.state, self.problem = "recording" if recorded else "empty", ""
        self._signature = signature
        return self._signed() != signature

    def _signed(self) -> tuple[int, ...] | None:
        with suppress(OSError):
            found = os.stat(self.path / METADATA)
            return (found.st_ino, found.st_mtime_ns, found.st_size)
        return None

    def _fail(self, error: StoreError | OSError) -> None:
        if _nothing_yet(self.path):
            if self._signature is not None or self.attrs:
                self._forget()
            self.state, self.problem, self.attrs = "absent", "", {}
            self._nodes, self._recorded, self._signature = {}, {}, None
        else:
            # What was read stays on view.
            self.state, self.problem = "unreadable", str(error)

    def _forget(self) -> None:
        self.generation += 1
        self._columns.clear()
        self._coordinates.clear()

    def _length(self, path: str) -> int:
        return int(self._nodes[path]["shape"][0]) if path in self._nodes else 0

    # -- asking ----------------------------------------------------------------------------------------

    @property
    def age(self) -> float | None:
        """Seconds since the run was last written; None where there is none."""
        with suppress(OSError):
            return max(0.0, time.time() - os.stat(self.path / METADATA).st_mtime)
        return None

    @property
    def steps(self) -> np.ndarray:
        """The probed steps, ascending."""
        return self._rows(("step",), "step", _as_it_is, np.int64)

    @property
    def series_steps(self) -> np.ndarray:
        """The steps at which scalars were recorded."""
        return self._rows(("series",), "series/logged_step", _as_it_is, np.int64)

    @property
    def series_names(self) -> list[str]:
        """The scalars there are."""
        names = [path.removeprefix("series/") for path in self._nodes if path.startswith("series/")]
        return [name for name in names if name != "logged_step"]

    def series(self, name: str) -> np.ndarray:
        """A scalar at :attr:`series_steps`; NaN where it was not recorded, empty if it never was."""
        path = f"series/{name}"
        if path not in self._nodes:
            return np.empty(0)
        with self.lock:
            known = self._rows(("series", name), path, _as_it_is, np.float64)
            lacking = len(self.series_steps) - len(known)
        # Lengths differ where a damaged chunk stopped one of them.
        return np.pad(known, (0, lacking), constant_values=np.nan) if lacking > 0 else known

    def sites_with(self, statistic: str) -> list[str]:
        """The sites at which a statistic is recorded by step."""

        declared = self.attrs.get("sites") or ()
        groups = [site_of_path(path) for path, names in self._recorded.items() if statistic in names]
        return in_site_order(group for group in groups if is_site(group, declared))

    def statistics_at(self, site: str) -> dict[str, tuple[str, ...]]:
        """What is recorded by step at a site: name → dimensions without the step."""
        return self._recorded.get(_path(site), {})

    def labels(self, site: str, dimension: str) -> np.ndarray:
        """The labels along a dimension of a site, such as its strata; empty if there are none."""
        path = f"{_path(site)}/{dimension}"
        with self.lock:
            if path not in self._coordinates:
                entry = self._nodes.get(path)
                if entry is None:
                    return np.empty(0)
                layout = ArrayLayout.from_metadata(entry, path)
                self._coordinates[path] = layout.read_all(self.path / path, entry["shape"])
            return self._coordinates[path]

    def values(
        self, site: str, statistic: str, select: Mapping[str, Any] | None = None, mean: tuple[str, ...] = ()
    ) -> xr.DataArray:
        """A statistic over all steps, as a DataArray (step, …).

        Parameters
        ----------
        select : dimension → label that is taken of it (``{"stratum": "all"}``)
        mean : dimensions over which the mean of what is not NaN is taken

        Raises
        ------
        StoreError : the run does not hold that statistic there, or the label
        """
        if statistic not in self.statistics_at(site):
            raise StoreError(f"the run at {self.path} has no {statistic!r} at {site!r} by step")
        path = f"{_path(site)}/{statistic}"
        dims = ("step", *self.statistics_at(site)[statistic])
        chosen = {dim: self._place(site, dim, label) for dim, label in (select or {}).items()}
        index = tuple(chosen.get(dim, slice(None)) for dim in dims)
        left = [dim for dim in dims if dim not in chosen]
        axes = tuple(left.index(dim) for dim in mean)

        def pick(rows: np.ndarray) -> np.ndarray:
            rows = rows[index].astype(np.float64)
            return _mean(rows, axes) if axes else rows

        rows = self._rows((path, tuple(chosen.items()), mean), path, pick, np.float64)
        kept = [dim for dim in left if dim not in mean]
        steps = self.steps[: len(rows)]
        coordinates = {dim: self.labels(site, dim) for dim in kept[1:]}
        labelled = {dim: values for dim, values in coordinates.items() if len(values)}
        return xr.DataArray(
            rows[: len(steps)],
            dims=kept,
            coords={"step": steps, **labelled},
            attrs=dict(self._nodes[path]["attributes"]),
        )

    def _place(self, site: str, dimension: str, label: Any) -> int:
        labels = self.labels(site, dimension)
        same = np.isclose(labels, label) if labels.dtype.kind == "f" else labels == label
        places = np.flatnonzero(same)
        if not places.size:
            raise StoreError(
                f"the run at {self.path} has no {dimension} {label!r} at {site!r}; it has "
                f"{', '.join(map(str, labels)) or 'none'}"
            )
        return int(places[0])

    def _rows(
        self, key: tuple[Any, ...], path: str, pick: Callable[[np.ndarray], np.ndarray], kind: Any
    ) -> np.ndarray:
        with self.lock:
            if path not in self._nodes:
                return np.empty(0, kind)
            if key not in self._columns:
                column = _Column(path, pick, open_end=path.startswith("series/"))
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
        found = self._room[: self.length]
        found.flags.writeable = False
        return found

    def extend(self, root: Path, entry: Mapping[str, Any]) -> bool:
        """Read the rows that are new; False if those known are no longer what is on disk.

        A trainer that resumes takes back its last steps, so it is enough to compare the end of what is
        known, which lies in a chunk that has to be read for the new rows anyway.
        """
        layout = ArrayLayout.from_metadata(entry, self.path)
        length, height = int(entry["shape"][0]), layout.chunk[0]
        known = self.length
        if length < known:
            return False
        start = (known - 1) // height * height if known else 0
        while start < length:
            stop = min(start + height, length)
            rows = self.pick(self._chunk(layout, root, start // height)[: stop - start])
            settled = min(known - self.open_end, stop)
            if settled > start and not _same(rows[: settled - start], self._room[start:settled]):
                return False
            self._put(start, rows)
            start = stop
        self.length = length
        return True

    def _chunk(self, layout: ArrayLayout, root: Path, index: int) -> np.ndarray:
        path = layout.chunk_path(root / self.path, (index, *[0] * (len(layout.chunk) - 1)))
        try:
            return layout.decode(path.read_bytes(), str(path))
        except FileNotFoundError:
            if self.open_end:  # a scalar that was first recorded later
                return layout.empty_chunk()
            raise StoreError(f"chunk {path} is missing; restore the run from a copy") from None
        except OSError as error:
            raise StoreError(f"chunk {path} cannot be read: {error.strerror or error}") from error

    def _put(self, start: int, rows: np.ndarray) -> None:
        stop = start + len(rows)
        if stop > len(self._room):
            # Room for as many again, so that a run's life costs each row one copy or two.
            room = np.empty((2 * stop, *rows.shape[1:]), rows.dtype)
            room[:start] = self._room[:start] if start else 0
            self._room = room
        self._room[start:stop] = rows


def _recorded_by_step(nodes: Mapping[str, Any]) -> dict[str, dict[str, tuple[str, ...]]]:
    found: dict[str, dict[str, tuple[str, ...]]] = {}
    for path, entry in nodes.items():
        dims = entry.get("dimension_names") or ("",)
        group, _, name = path.rpartition("/")
        if group and dims[0] == "step":
            found.setdefault(group, {})[name] = tuple(dims[1:])
    return found


def _lives(attrs: Mapping[str, Any]) -> tuple[Any, ...]:
    """What differs when a run was begun anew or resumed."""
    return (attrs.get("created"), attrs.get("command"), len(attrs.get("resumed") or ()))


def _nothing_yet(path: Path) -> bool:
    """Whether a writer could begin here, or is just about to."""
    if not path.exists():
        return True
    with suppress(OSError):
        return path.is_dir() and all(n == LOCK_NAME or n.endswith(PARTIAL) for n in os.listdir(path))
    return False


def _path(site: str) -> str:
    """The group of a site; one that the run does not have is found nowhere in its metadata."""
    return site.replace(":", "/")


def _as_it_is(rows: np.ndarray) -> np.ndarray:
    return rows


def _mean(rows: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    known = np.isfinite(rows)
    count = known.sum(axis=axes)
    total = np.where(known, rows, 0.0).sum(axis=axes)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _same(first: np.ndarray, second: np.ndarray) -> bool:
    return bool(np.array_equal(first, second, equal_nan=first.dtype.kind == "f"))
