"""The groups of a run that is followed: each in one piece, also where it goes on in a later segment."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.runs.segments import join, parts_in_segments
from osp_diag.schema import STEP, group_path, site_of_path

__all__ = ["FollowedGroups"]


class FollowedGroups:
    """What the metadata of a run says of its groups.

    Attributes
    ----------
    names : of the groups that hold more than coordinates, as sites are named
    """

    def __init__(self, nodes: Mapping[str, Any]) -> None:
        self._nodes = nodes
        self._parts = parts_in_segments(
            path for path, entry in nodes.items() if entry["node_type"] == "group"
        )
        in_segments = {path for parts in self._parts.values() for _, path in parts}
        self._dims: dict[str, dict[str, tuple[str, ...]]] = {}
        """Group → what it records by step → dimensions without the step."""
        self._labels: dict[str, list[str]] = {}
        """Group → its arrays that do not grow."""
        for path, entry in nodes.items():
            group, _, name = path.rpartition("/")
            if group and entry["node_type"] == "array":
                dims = entry.get("dimension_names") or ("",)
                if dims[0] == STEP:
                    self._dims.setdefault(group, {})[name] = tuple(dims[1:])
                else:
                    self._labels.setdefault(group, []).append(name)
        self.names = [name for name in _groups_of(nodes) if group_path(name) not in in_segments]

    def statistics(self, group: str) -> dict[str, tuple[str, ...]]:
        """What a group, by its path, records by step: name → dimensions without the step."""
        dims: dict[str, tuple[str, ...]] = {}
        for path in self._paths(group):
            dims = self._dims.get(path, {}) | dims
        return dims

    def goes_on(self, group: str) -> bool:
        """Whether a group, by its path, has other labels in a later segment."""
        return group in self._parts

    def joined(
        self,
        group: str,
        statistic: str | None,
        steps: np.ndarray,
        labels: Callable[[str], np.ndarray],
        rows: Callable[[str], np.ndarray],
    ) -> xr.Dataset:
        """A group in one piece, as opening the run joins it: its labels, and one statistic at ``steps``.

        Parameters
        ----------
        labels, rows : path of an array → its values; its rows at ``steps``
        """

        def part(path: str) -> xr.Dataset:
            coords = {
                name: (self._nodes[f"{path}/{name}"]["dimension_names"], labels(f"{path}/{name}"))
                for name in self._labels.get(path, ())
            }
            dims = {} if statistic is None else self._dims.get(path, {})
            if statistic not in dims:
                return xr.Dataset(coords=coords | {STEP: steps})
            entry = self._nodes[f"{path}/{statistic}"]
            values = ((STEP, *dims[statistic]), rows(f"{path}/{statistic}"), dict(entry["attributes"]))
            return xr.Dataset({statistic: values}, coords | {STEP: steps})

        whole = part(group)
        for after_step, path in self._parts.get(group, ()):
            whole = join(whole, part(path), STEP, int((steps <= after_step).sum()))
        return whole

    def _paths(self, group: str) -> list[str]:
        return [group, *(path for _, path in self._parts.get(group, ()))]


def _groups_of(nodes: Mapping[str, Any]) -> list[str]:
    """The groups with an array that is more than a coordinate, as sites are named."""
    groups: dict[str, None] = {}
    for path, entry in nodes.items():
        group, _, name = path.rpartition("/")
        if group and entry["node_type"] == "array" and entry.get("dimension_names") != [name]:
            coordinates = str(nodes[group]["attributes"].get("coordinates", "")).split()
            groups |= {} if name in coordinates else {site_of_path(group): None}
    return list(groups)
