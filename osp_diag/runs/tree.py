"""What a run consists of, and whether what is to be written fits into it."""

from __future__ import annotations

import math
import operator
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, SupportsIndex

import numpy as np
import xarray as xr

from osp_diag.errors import StoreError
from osp_diag.runs.declared import DeclaredGroup, GroupStep, ProbedStep, parts_of, unmeasured
from osp_diag.runs.format import METADATA, ArrayLayout, compact, jsonable
from osp_diag.schema import LOGGED_STEP, SERIES, STEP, group_path

__all__ = ["Plan", "Tree", "checked_path", "scalar", "step_label"]

GROWING_DIMS = (STEP, LOGGED_STEP)
_STATIC_CHUNK_BYTES = 4 * 1024 * 1024
_SHOWN = 6


def checked_path(name: str) -> str:
    """The path of a group that is to be written: :func:`osp_diag.schema.group_path`, if it can be one."""
    path = group_path(name)
    parts = path.split("/")
    if not path or any(not part or part.startswith((".", "__")) or part == METADATA for part in parts):
        raise StoreError(f"a group cannot be named {name!r}; use the name of a site, such as 'residual_post'")
    return path


def step_label(step: SupportsIndex) -> np.ndarray:
    """A step as it is stored."""
    try:
        return np.asarray(operator.index(step), dtype=np.int64)
    except TypeError:
        raise StoreError(f"a step is a whole number, not {step!r}") from None


def scalar(name: str, value: Any) -> np.ndarray:
    """One value of a series as it is stored."""
    if not name or "/" in name or name in (*GROWING_DIMS, METADATA) or name.startswith("."):
        raise StoreError(f"a series cannot be named {name!r}; use a plain name such as 'loss'")
    try:
        return np.asarray(float(value), dtype=np.float64)
    except (TypeError, ValueError):
        raise StoreError(f"series {name!r} is {value!r}, not a number; give a float") from None


@dataclass
class Plan:
    """Arrays that are new to the run, checked and in memory."""

    groups: dict[str, dict[str, Any]] = field(default_factory=dict)
    static: dict[str, tuple[ArrayLayout, np.ndarray]] = field(default_factory=dict)
    growing: dict[str, ArrayLayout] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    replaced: list[str] = field(default_factory=list)


class Tree:
    """Groups, static arrays and the signature of the growing ones."""

    def __init__(self, root: Path, *, logged: bool = False) -> None:
        self.root = root
        self._is_logged = logged
        """Whether these are the groups below ``series``, whose arrays grow along ``logged_step``."""
        self.groups: dict[str, dict[str, Any]] = {}
        self.static: dict[str, tuple[ArrayLayout, tuple[int, ...]]] = {}
        self.growing: dict[str, ArrayLayout] = {}
        """Layout of one row of each array along ``step``, or of the logged groups along ``logged_step``."""
        self._coordinates: dict[str, np.ndarray] = {}
        self._shared_labels: dict[str, DeclaredGroup] = {}
        """Group → labels that were compared with the run's, so that steps which share them need not be."""
        self._static_texts: dict[str, str] = {}

    # -- state -----------------------------------------------------------------------------------------

    def adopt(self, plan: Plan) -> None:
        """The plan's arrays are on disk: they belong to the run now."""
        self.groups = self.groups | plan.groups
        for path, (layout, values) in plan.static.items():
            self.static[path] = (layout, values.shape)
            if values.ndim <= 1:
                self._coordinates[path] = values
        self.growing = self.growing | plan.growing

    def add_group(self, path: str) -> None:
        self.groups.setdefault(path, {})

    def forget(self, path: str) -> None:
        self.static.pop(path)
        self._coordinates.pop(path, None)
        self._static_texts.pop(path, None)

    def drop_group(self, group: str) -> bool:
        """Forget a group that does not grow, with all in it; whether there was one."""
        if self.grows(group):
            raise StoreError(f"{group!r} of {self.root} grows with the steps; it cannot be replaced")
        inside = [path for path in self.static if path.startswith(f"{group}/")]
        for path in inside:
            self.forget(path)
        return self.groups.pop(group, None) is not None

    def restore(self, path: str, entry: Mapping[str, Any]) -> None:
        """Take up a group or static array from committed metadata."""
        if entry["node_type"] == "group":
            self.groups[path] = dict(entry["attributes"])
        else:
            self.static[path] = (ArrayLayout.from_metadata(entry, path), tuple(entry["shape"]))

    def restore_growing(self, layouts: Mapping[str, ArrayLayout]) -> None:
        """Take up the growing arrays; their first dimension is the step."""
        for path, layout in layouts.items():
            self.growing[path] = replace(layout, dims=layout.dims[1:], chunk=layout.chunk[1:])

    def forget_groups_that_do_not_grow(self) -> None:
        """Drop the coordinates and groups of which no growing array is left."""
        for path in [path for path in self.static if not self.grows(path.rpartition("/")[0])]:
            self.forget(path)
        grown = tuple(self.growing)
        self.groups = {
            group: attributes
            for group, attributes in self.groups.items()
            if any(path.startswith(f"{group}/") for path in grown)
        }

    def static_metadata(self) -> dict[str, str]:
        """Metadata of all static arrays; the text of one is made once, as nothing in it changes."""
        for path in self.static.keys() - self._static_texts.keys():
            layout, shape = self.static[path]
            self._static_texts[path] = compact(layout.metadata(shape))
        return {path: self._static_texts[path] for path in self.static}

    def _static_values(self, path: str) -> np.ndarray:
        if path not in self._coordinates:
            layout, shape = self.static[path]
            self._coordinates[path] = layout.read_all(self.root / path, shape)
        return self._coordinates[path]

    def declare(self, groups: Mapping[str, xr.Dataset]) -> None:
        """The labels of these groups are the run's: steps that share them need not be compared."""
        for name, part in parts_of(groups).items():
            if isinstance(part, GroupStep):
                self._shared_labels[checked_path(name)] = part.declared

    # -- a further step --------------------------------------------------------------------------------

    def grows(self, name: str) -> bool:
        """Whether the run's steps have this group."""
        group = group_path(name)
        return any(path.rpartition("/")[0] == group for path in self.growing)

    def fits(self, name: str, part: xr.Dataset | GroupStep) -> bool:
        """Whether a further step may have this group as it is."""
        try:
            self.check_step(ProbedStep({name: part}), partial=True)
        except StoreError:
            return False
        return True

    def layers(self, name: str) -> list[int] | None:
        """The layers that a group has; None where the run has no such group."""
        path = f"{group_path(name)}/layer"
        return self._static_values(path).tolist() if path in self.static else None

    def check_step(self, groups: Mapping[str, xr.Dataset], *, partial: bool = False) -> dict[str, np.ndarray]:
        """The rows of one more step, which must have what the first step had, no less and no more.

        With ``partial`` whole groups may be missing; what stands for them is :func:`unmeasured`.
        """
        rows: dict[str, np.ndarray] = {}
        differences: list[str] = []
        coordinates: set[str] = set()
        for name, part in parts_of(groups).items():
            group = checked_path(name)
            if isinstance(part, GroupStep) and self._shared_labels.get(group) is part.declared:
                coordinates.update(f"{group}/{key}" for key in part.declared.coordinates)
                differences += self._further_rows(group, part.arrays, rows)
                continue
            dataset = part.dataset if isinstance(part, GroupStep) else part
            before = len(differences)
            # Not `data_vars` and `coords`, which make a labelled array of each of hundreds.
            for key, variable in dataset.variables.items():
                path = f"{group}/{key}"
                if key in dataset.coords:
                    coordinates.add(path)
                    differences += self._coordinate_differences(path, variable)
                else:
                    differences += self._row_differences(path, variable.dims, variable.shape, variable.dtype)
                    rows[path] = np.array(variable.values)
            if isinstance(part, GroupStep) and len(differences) == before:
                self._shared_labels[group] = part.declared
        if partial:
            here = {group_path(name) for name in groups}
            away = {path: own for path, own in self.growing.items() if path.rpartition("/")[0] not in here}
            rows |= {path: unmeasured(own.chunk, own.memory_dtype) for path, own in away.items()}
        stepped = {path.rpartition("/")[0] for path in self.growing}
        if partial:
            stepped &= here
        expected = [*self.growing, *(path for path in self.static if path.rpartition("/")[0] in stepped)]
        differences = [
            f"{path} is missing" for path in expected if path not in rows and path not in coordinates
        ] + differences
        if differences:
            more = f"\n  … and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
            raise StoreError(
                f"this step does not match the steps already in {self.root}:\n  "
                + "\n  ".join(differences[:_SHOWN])
                + more
                + "\nEvery step of a run has the same variables; record others in another run."
            )
        return rows

    def _further_rows(
        self, group: str, arrays: Mapping[str, np.ndarray], rows: dict[str, np.ndarray]
    ) -> list[str]:
        """Put the arrays of a group whose labels are known into ``rows``; what differs in shape or type."""
        differences: list[str] = []
        for name, values in arrays.items():
            path = f"{group}/{name}"
            layout = self.growing.get(path)
            if layout is None or values.shape != layout.chunk or values.dtype != layout.memory_dtype:
                dims = None if layout is None else layout.dims
                differences += self._row_differences(path, dims, values.shape, values.dtype)
            rows[path] = np.array(values)
        return differences

    def _row_differences(
        self, path: str, dims: tuple[Hashable, ...] | None, shape: tuple[int, ...], dtype: np.dtype
    ) -> list[str]:
        layout = self.growing.get(path)
        if layout is None:
            return [f"{path} is new"]
        differences = []
        if dims != layout.dims:
            differences.append(f"{path} has dimensions {dims}, before {layout.dims}")
        elif shape != layout.chunk:
            differences.append(f"{path} has shape {shape}, before {layout.chunk}")
        if dtype.name != layout.dtype:
            differences.append(f"{path} has type {dtype.name}, before {layout.dtype}")
        return differences

    def _coordinate_differences(self, path: str, coordinate: xr.Variable | xr.DataArray) -> list[str]:
        if path not in self.static:
            return [f"coordinate {path} is new"]
        before, now = self._static_values(path), _plain_values(coordinate)
        if before.shape != now.shape:
            return [f"coordinate {path} has shape {now.shape}, before {before.shape}"]
        return [] if _equal(before, now) else [f"coordinate {path} is {_brief(now)}, before {_brief(before)}"]

    # -- new arrays ------------------------------------------------------------------------------------

    def plan(self, groups: Mapping[str, xr.Dataset], *, growing: bool, exchange: bool = False) -> Plan:
        """What these datasets add to the run; :class:`StoreError` if xarray could not open it with them."""
        plan = Plan()
        for name, dataset in groups.items():
            group = checked_path(name)
            if group.split("/")[0] == SERIES and not self._is_logged:
                raise StoreError(
                    "the group 'series' holds scalars; record them with append_series, and arrays beside "
                    "them with append_logged"
                )
            for dim in GROWING_DIMS:
                if dim in dataset.dims or dim in dataset.variables:
                    raise StoreError(
                        f"the dataset of {name!r} has {dim!r} in it; give one step at a time, without it"
                    )
            self._plan_group(plan, group, dataset)
            for key, coordinate in dataset.coords.items():
                self._plan_coordinate(plan, f"{group}/{key}", coordinate)
            for key, variable in dataset.data_vars.items():
                path = f"{group}/{key}"
                layout = _layout(path, variable)
                exists = path in self.static or path in self.growing
                if exists and not growing and self._already_written(path, variable):
                    continue
                if exists and not (exchange and path in self.static):
                    raise StoreError(f"{path} is already in {self.root}; pass replace=True to exchange it")
                if exists:
                    plan.replaced.append(path)
                if growing:
                    if not variable.size:
                        raise StoreError(f"{path} has no elements (shape {variable.shape}); leave it out")
                    if layout.dtype == "string":
                        raise StoreError(
                            f"{path} is text, which cannot be recorded by step; use write_static"
                        )
                    if self._is_logged and not layout.dtype.startswith("float"):
                        raise StoreError(
                            f"{path} has type {layout.dtype}; give floats, since steps without it read NaN"
                        )
                    plan.growing[path] = layout
                    plan.rows[path] = np.array(variable.values)
                else:
                    plan.static[path] = (_split(layout), _plain_values(variable))
        self._refuse_collisions(plan)
        self._refuse_misalignment(plan)
        return plan

    def _already_written(self, path: str, variable: xr.DataArray) -> bool:
        """Whether a static array has these very values, so that a repeated write has nothing to do."""
        if path not in self.static:
            return False
        layout, shape = self.static[path]
        if (layout.dims, shape) != (variable.dims, variable.shape):
            return False
        return _equal(layout.read_all(self.root / path, shape), _plain_values(variable))

    def _plan_group(self, plan: Plan, group: str, dataset: xr.Dataset) -> None:
        parts = group.split("/")
        for depth in range(1, len(parts) + 1):
            path = "/".join(parts[:depth])
            plan.groups.setdefault(path, dict(self.groups.get(path, {})))
        attributes = plan.groups[group] | jsonable(dict(dataset.attrs), f"attributes of {group}")
        # CF's way to say which variables are coordinates although no dimension has their name.
        coordinates = {str(key) for key in dataset.coords if key not in dataset.dims}
        coordinates |= set(attributes.get("coordinates", "").split())
        if coordinates:
            attributes["coordinates"] = " ".join(sorted(coordinates))
        plan.groups[group] = attributes

    def _plan_coordinate(self, plan: Plan, path: str, coordinate: xr.DataArray) -> None:
        if path in self.static:
            differences = self._coordinate_differences(path, coordinate)
            if differences:
                raise StoreError(f"{differences[0]} in {self.root}; a group has one set of coordinates")
            return
        if " " in path:
            raise StoreError(f"coordinate {path!r} has a space in its name; rename it")
        plan.static[path] = (_layout(path, coordinate), _plain_values(coordinate))

    def _refuse_collisions(self, plan: Plan) -> None:
        arrays = {*self.static, *self.growing, *plan.static, *plan.growing, "step"}
        conflicts = sorted(arrays & {*self.groups, *plan.groups})
        if conflicts:
            raise StoreError(
                f"{conflicts[0]!r} would be a group and a variable of {self.root}; rename one of them"
            )
        for path in plan.growing.keys() | plan.static.keys():
            key = path.rsplit("/", 1)[1]
            if key == METADATA or key.startswith((".", "__")):
                raise StoreError(f"a variable cannot be named {key!r}; rename it")

    def _refuse_misalignment(self, plan: Plan) -> None:
        """xarray gives a group the coordinates of the groups above it, and refuses trees where they clash."""
        layouts = {path: (layout.dims, shape) for path, (layout, shape) in self.static.items()}
        layouts |= {path: (layout.dims, values.shape) for path, (layout, values) in plan.static.items()}
        for path, layout in (self.growing | plan.growing).items():
            layouts[path] = (layout.dims, layout.chunk)
        sizes: dict[str, dict[str, int]] = {}
        for path, (dims, shape) in layouts.items():
            sizes.setdefault(path.rpartition("/")[0], {}).update(zip(dims, shape, strict=True))
        for group, lengths in sizes.items():
            parts = group.split("/")
            for above in ("/".join(parts[:depth]) for depth in range(1, len(parts))):
                for dim in lengths:
                    path, lower = f"{above}/{dim}", f"{group}/{dim}"
                    if path not in layouts or layouts[path][0] != (dim,):
                        continue
                    clash = layouts[path][1] != (lengths[dim],)
                    if not clash and lower in layouts:
                        clash = not _equal(self._values(plan, path), self._values(plan, lower))
                    if clash:
                        raise StoreError(
                            f"{dim!r} in {group} differs from {dim!r} in {above}, which it would inherit; "
                            "give them the same coordinates or different names"
                        )

    def _values(self, plan: Plan, path: str) -> np.ndarray:
        return plan.static[path][1] if path in plan.static else self._static_values(path)


def _plain_values(variable: xr.Variable | xr.DataArray) -> np.ndarray:
    values = np.array(variable.values)
    if values.dtype.kind not in "UTO":
        return values
    # A tokenizer may give half a surrogate pair, which no UTF-8 can hold.
    texts = [str(text).encode(errors="replace").decode() for text in values.flat]
    return np.array(texts, dtype=object).reshape(values.shape)


def _layout(path: str, variable: xr.DataArray) -> ArrayLayout:
    attributes = jsonable(dict(variable.attrs), f"attributes of {path}")
    dims = tuple(str(dim) for dim in variable.dims)
    return ArrayLayout.of(np.asarray(variable.values), dims, attributes, path)


def _split(layout: ArrayLayout) -> ArrayLayout:
    """Chunks of at most a few MiB, cut along the leading dimensions (so that one layer is read alone)."""
    chunk = list(layout.chunk)
    item_bytes = layout.memory_dtype.itemsize
    for position in range(len(chunk)):
        inner_bytes = math.prod(chunk[position + 1 :]) * item_bytes
        if chunk[position] * inner_bytes <= _STATIC_CHUNK_BYTES:
            break
        chunk[position] = max(1, _STATIC_CHUNK_BYTES // inner_bytes)
    return replace(layout, chunk=tuple(chunk))


def _equal(left: np.ndarray, right: np.ndarray) -> bool:
    if left.shape != right.shape:
        return False
    floats = left.dtype.kind == "f" and right.dtype.kind == "f"
    return bool(np.array_equal(left, right, equal_nan=floats))


def _brief(values: np.ndarray) -> str:
    flat = values.ravel().tolist()
    return str(flat) if len(flat) <= 8 else f"[{flat[0]}, {flat[1]}, …, {flat[-1]}]"
