"""Arrays of a run that grow along one dimension, and what keeps them of one length."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from osp_diag.runs.format import METADATA, ArrayLayout, compact, replace_file

__all__ = ["GrowingArray", "GrowingAxis", "Row"]

Row = Mapping[str, np.ndarray]
"""One position along the axis: array path → its values there. An array left out reads as its fill value."""

_LABELS_CHUNK = 4096
_THREADS = min(8, os.cpu_count() or 1)
_SHAPE = json.dumps("shape goes here")


@dataclass(eq=False)
class GrowingArray:
    """One array with chunks of several positions along its first dimension.

    The last, partly filled chunk is kept in memory, so that adding a position rewrites one small file
    and reads none.
    """

    layout: ArrayLayout
    tail_index: int = -1
    tail: np.ndarray | None = None

    def __post_init__(self) -> None:
        text = compact(self.layout.metadata(()) | {"shape": json.loads(_SHAPE)})
        before, after = text.split(_SHAPE, 1)
        # Only the length changes from commit to commit; as each writes all metadata, the text of
        # the rest is made once (docs/decisions.md, Runs).
        self._before = f"{before}["
        self._after = "".join(f",{size}" for size in self.row_shape) + f"]{after}"

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.layout.chunk[1:]

    def metadata(self, length: int) -> str:
        """The array's metadata as JSON text."""
        return f"{self._before}{length}{self._after}"

    def write(self, folder: Path, start: int, rows: Sequence[np.ndarray | None]) -> None:
        """Write ``rows`` at ``start``. What lies before ``start`` stays; what lay beyond is forgotten.

        Writing the same rows again gives the same files: an interrupted write is simply repeated.
        """
        steps = self.layout.chunk[0]
        position, end = start, start + len(rows)
        while position < end:
            index = position // steps
            stop = min(end, (index + 1) * steps)
            block = self._chunk(folder, index, position - index * steps)
            for place in range(position, stop):
                row = rows[place - start]
                block[place - index * steps] = self.layout.fill if row is None else row
            replace_file(self._path(folder, index), self.layout.encode(block))
            self.tail_index, self.tail = index, block
            position = stop
        if end % steps == 0:
            self.tail = None

    def is_empty(
        self, folder: Path, length: int, further: Sequence[np.ndarray], *, has_gaps: bool = False
    ) -> bool:
        """Whether nothing was recorded in the first ``length`` positions on disk, nor in ``further`` ones.

        With gaps an array can be absent from a row that others are in, so that a chunk may hold nothing.
        """
        if any(values.dtype.kind != "f" or not np.isnan(values).all() for values in further):
            return False
        rows = self.layout.chunk[0]
        chunks = range(math.ceil((length + len(further)) / rows))
        if self.row_shape and not has_gaps:
            return not any(self._path(folder, index).exists() for index in chunks)
        beyond = [0] * len(self.row_shape)
        blocks = ((index, self.layout.read_chunk(folder, (index, *beyond))) for index in chunks)
        return all(
            block is None or np.isnan(block[: max(0, length - index * rows)]).all() for index, block in blocks
        )

    def read(self, folder: Path, position: int) -> np.ndarray:
        """The values at one committed position."""
        index, place = divmod(position, self.layout.chunk[0])
        return np.asarray(self._chunk(folder, index, place + 1)[place])

    def _path(self, folder: Path, index: int) -> Path:
        return self.layout.chunk_path(folder, (index, *[0] * len(self.row_shape)))

    def _chunk(self, folder: Path, index: int, keep: int) -> np.ndarray:
        """The chunk ``index`` of which the first ``keep`` positions hold committed values."""
        block = self.layout.empty_chunk()
        if keep == 0:
            return block
        if self.tail is not None and self.tail_index == index:
            block[:keep] = self.tail[:keep]
            return block
        written = self.layout.read_chunk(folder, (index, *[0] * len(self.row_shape)))
        if written is not None:  # as where an array came later than the axis began
            block[:keep] = written[:keep]
        return block


class GrowingAxis:
    """All arrays along one dimension, and the rows that are not on disk yet.

    Rows are whole (every array of one position) and enter and leave in one operation, so that an
    interruption at any instruction leaves either all of a position or nothing of it.

    With ``open_end``, the last row stays pending after it is committed, so that it can still be completed
    (numbers of one step that come from several places); it is then written again with the next rows.
    """

    def __init__(self, dim: str, labels_path: str, long_name: str, *, open_end: bool = False) -> None:
        self.dim = dim
        self.long_name = long_name
        self.labels_path = labels_path
        self.open_end = open_end
        self.arrays: dict[str, GrowingArray] = {}
        self.unsaved = 0
        """How many rows were added since the last commit; 1 if one was only completed."""
        # One tuple, exchanged as a whole, so that no interruption comes between the two lists.
        self._rows: tuple[list[int], list[dict[str, np.ndarray]]] = ([], [])

    @property
    def settled(self) -> list[int]:
        """Labels of the positions that are on disk for good."""
        return self._rows[0]

    @property
    def pending(self) -> list[dict[str, np.ndarray]]:
        """Rows that follow the settled ones."""
        return self._rows[1]

    @property
    def labels(self) -> list[int]:
        return self.settled + [self._label(row) for row in self.pending]

    def _label(self, row: Row) -> int:
        return int(row[self.labels_path])

    def __len__(self) -> int:
        return len(self.settled) + len(self.pending)

    @property
    def last(self) -> int | None:
        """The label recorded last, committed or not."""
        if self.pending:
            return self._label(self.pending[-1])
        return self.settled[-1] if self.settled else None

    @property
    def pending_bytes(self) -> int:
        return sum(values.nbytes for row in self.pending for values in row.values())

    def add(self, row: dict[str, np.ndarray]) -> None:
        """Record one position."""
        self.unsaved += 1
        self.pending.append(row)

    def complete(self, values: Row) -> None:
        """Add values to the last position of an axis with an open end."""
        self.unsaved = max(1, self.unsaved)
        self.pending[-1].update(values)

    def declare(self, layouts: Mapping[str, ArrayLayout], chunk_steps: int, chunk_bytes: int) -> None:
        """Add arrays whose rows are laid out as ``layouts`` (path → layout of one position).

        A chunk holds up to ``chunk_steps`` positions, fewer where a row is large: the last chunk is
        rewritten whenever a position is added. The labels are declared along with the first arrays.
        """
        arrays = {}
        if self.labels_path not in self.arrays:
            labels = ArrayLayout((self.dim,), "int64", (_LABELS_CHUNK,), {"long_name": self.long_name})
            arrays[self.labels_path] = GrowingArray(labels)
        for path, layout in layouts.items():
            row_bytes = max(1, layout.memory_dtype.itemsize * math.prod(layout.chunk))
            steps = min(chunk_steps, max(1, chunk_bytes // row_bytes))
            arrays[path] = GrowingArray(
                replace(layout, dims=(self.dim, *layout.dims), chunk=(steps, *layout.chunk))
            )
        self.arrays = self.arrays | arrays

    def write(self, root: Path) -> None:
        """Write the pending rows as chunks. Readers do not see them before the root is committed.

        Several arrays at a time: compressing them and replacing their files wait for no one's Python.
        """
        if not self.unsaved:
            return
        start = len(self.settled)

        def write_one(path: str) -> None:
            self.arrays[path].write(root / path, start, [row.get(path) for row in self.pending])

        try:
            with ThreadPoolExecutor(_THREADS) as threads:
                for _ in threads.map(write_one, self.arrays):
                    pass
        except RuntimeError:  # Python is ending and starts no more threads
            for path in self.arrays:
                write_one(path)

    def settle(self) -> None:
        """The root now commits the pending rows."""
        if self.open_end and self.pending:
            self._rows = (self.labels[:-1], self.pending[-1:])
        else:
            self._rows = (self.labels, [])
        self.unsaved = 0

    def metadata(self) -> dict[str, str]:
        """Metadata of all arrays, at the length that includes the pending rows."""
        return {path: array.metadata(len(self)) for path, array in self.arrays.items()}

    def write_metadata(self, root: Path) -> None:
        """Write the arrays' own ``zarr.json``, for readers that do without consolidated metadata."""
        for path, text in self.metadata().items():
            replace_file(root / path / METADATA, text.encode())

    def cut(self, label: int) -> int:
        """Forget the positions after ``label``; returns how many."""
        before = len(self)
        self._rows = (
            [settled for settled in self.settled if settled <= label],
            [row for row in self.pending if self._label(row) <= label],
        )
        for array in self.arrays.values():
            array.tail = None
        return before - len(self)

    def without_values(self, root: Path) -> list[str]:
        """The arrays that began after the last position: no chunk is left, or all of it is NaN."""
        if not len(self):
            return []
        return [
            path
            for path, array in self.arrays.items()
            if path != self.labels_path
            and array.is_empty(root / path, len(self.settled), self._last_of(path), has_gaps=self.open_end)
        ]

    def _last_of(self, path: str) -> list[np.ndarray]:
        return [row[path] for row in self.pending if path in row]

    def forget(self, path: str) -> None:
        """Drop an array, all of it."""
        if path in self.arrays:
            self.arrays = {name: array for name, array in self.arrays.items() if name != path}
            for row in self.pending:
                row.pop(path, None)

    def holds_chunk(self, path: str, name: str) -> bool:
        """Whether chunk file ``name`` of array ``path`` lies within the axis."""
        return int(name.split(".")[1]) * self.arrays[path].layout.chunk[0] < len(self)

    def restore(self, metadata: Mapping[str, Any], root: Path) -> None:
        """Take up the axis as the committed ``metadata`` (path → array metadata) has it."""
        for path, entry in metadata.items():
            self.arrays[path] = GrowingArray(ArrayLayout.from_metadata(entry, path))
        if self.labels_path in metadata:
            shape = metadata[self.labels_path]["shape"]
            labels = self.arrays[self.labels_path].layout.read_all(root / self.labels_path, shape)
            self._rows = (labels.tolist(), [])
            self.reopen(root)

    def reopen(self, root: Path) -> None:
        """Take the last position back into the pending rows of an axis with an open end."""
        if not self.open_end or self.pending or not self.settled:
            return
        position = len(self.settled) - 1
        row = {path: array.read(root / path, position) for path, array in self.arrays.items()}
        # NaN is what an array reads as that was not recorded: it can still come.
        recorded = {path: values for path, values in row.items() if not np.isnan(values).all()}
        self._rows = (self.settled[:-1], [recorded])
