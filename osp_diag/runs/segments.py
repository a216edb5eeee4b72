"""A run that changes: stretches of steps between which the training's configuration, routing or code differ.

The root's attributes are those of the first segment. A later one is an entry of the attribute ``segments``:
the step after which it begins, and the attributes that differ, each in full. A group of arrays whose labels
differ (another optimizer holds other matrices) goes on under ``segment-<after step>/<group>``, and readers
see one group, with NaN for what came or went.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import xarray as xr

from osp_diag.schema import LOGGED_STEP, PARENT, SEGMENTS, SERIES, STEP
from osp_diag.wording import differences

__all__ = [
    "Segment",
    "changed_attributes",
    "join",
    "joined_segments",
    "joined_steps",
    "parent_sentence",
    "parts_in_segments",
    "segment_group",
    "segments_of",
]

OF_MEASUREMENT = (
    "protocol",
    "token_fingerprint",
    "tokens",
    "sequence_length",
    "probed_on",
    "delimiter_ids",
    "estimator_parameters",
    "token_kinds",
    "stack",
    "number_of_layers",
    "hidden_size",
)
"""Attributes that no segment may change: they say what a number is, or of which layers and channels."""

_LONGEST = 120
_GROUP = re.compile(rf"(/{SERIES}|)/segment-(\d+)", re.ASCII)
_PART = re.compile(rf"({SERIES}/|)segment-(\d+)/(.+)", re.ASCII)


@dataclass(frozen=True)
class Segment:
    """Steps of a run that were made under the same conditions.

    Attributes
    ----------
    after_step : its first step is the next one; −1 of the first segment
    attributes : of the run as they were then, all of them
    changes : ``key: before → now`` of every value that differs from the segment before
    """

    after_step: int
    attributes: Mapping[str, Any]
    changes: tuple[str, ...] = ()

    @property
    def sentence(self) -> str:
        """What a reader of the numbers should know of it."""
        reset = (self.attributes.get(PARENT) or {}).get("reset") or ()
        return f"after step {self.after_step} the run went on with {'; '.join(self.changes)}{_anew(reset)}"


def segments_of(attributes: Mapping[str, Any]) -> tuple[Segment, ...]:
    """The segments of a run, from its root's attributes, in order."""
    now = {key: value for key, value in attributes.items() if key != SEGMENTS}
    segments = [Segment(-1, now)]
    for entry in attributes.get(SEGMENTS) or ():
        before, now = now, now | entry["attributes"]
        lines = differences(before, now, (PARENT,))
        changes = tuple(_brief(line.removeprefix("config.")) for line in lines)
        segments.append(Segment(int(entry["after_step"]), now, changes))
    return tuple(segments)


def parent_sentence(attributes: Mapping[str, Any]) -> str | None:
    """From which run's checkpoint a run began; None where it began with weights of its own."""
    parent = attributes.get(PARENT)
    if not isinstance(parent, Mapping):
        return None
    changes = "; ".join(map(str, parent.get("changes") or ())) or "nothing changed"
    return f"the run began from {parent.get('checkpoint')} of {parent.get('run')} ({changes})" + _anew(
        parent.get("reset") or ()
    )


def changed_attributes(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    """The attributes of ``now`` that differ, in full; None for one that is gone."""
    keys = [*now, *(key for key in before if key not in now)]
    return {key: now.get(key) for key in keys if before.get(key) != now.get(key)}


def _brief(line: str) -> str:
    """Within a sentence a long value is only named: a routing table has pages."""
    return line if len(line) <= _LONGEST else f"another {line.partition(':')[0]}"


def _anew(items: Sequence[str]) -> str:
    more = f" and {len(items) - 3} more" if len(items) > 3 else ""
    return f"; began anew: {', '.join(map(str, items[:3]))}{more}" if items else ""


def segment_group(after_step: int, group: str) -> str:
    """Where a group whose labels differ goes on in the segment after a step."""
    return f"segment-{after_step}/{group}"


def parts_in_segments(paths: Iterable[str]) -> dict[str, list[tuple[int, str]]]:
    """Which groups go on in later segments, of the paths of all: path → (after step, path there)."""
    parts: dict[str, list[tuple[int, str]]] = {}
    for path in paths:
        if match := _PART.fullmatch(path):
            parts.setdefault(match[1] + match[3], []).append((int(match[2]), path))
    return {group: sorted(of) for group, of in parts.items()}


def joined_segments(tree: xr.DataTree) -> xr.DataTree:
    """The tree with every group in one piece, and no groups of segments; the same tree where it has none.

    Labels are joined, and rows are NaN in what their own segment did not have. What is joined is read.
    """
    parts = sorted(
        (int(match[2]), match[1], node.path)
        for node in tree.subtree
        if (match := _GROUP.fullmatch(node.path))
    )
    if not parts:
        return tree
    nodes = {
        node.path: node.to_dataset(inherit=False)
        for node in tree.subtree
        if not any(f"{node.path}/".startswith(f"{path}/") for _, _, path in parts)
    }
    for after_step, above, path in parts:
        steps = LOGGED_STEP if above else STEP
        rows = int((tree[above or "/"].coords[steps].values <= after_step).sum())
        for node in tree[path].subtree:
            whole = above + node.path.removeprefix(path)
            if node.data_vars and whole in nodes:
                nodes[whole] = join(nodes[whole], node.to_dataset(inherit=False), steps, rows)
    return xr.DataTree.from_dict(nodes)


def join(before: xr.Dataset, after: xr.Dataset, steps: str, rows: int) -> xr.Dataset:
    """The first ``rows`` steps of one dataset, and the others of the other, under the labels of both."""
    parts = (before.isel({steps: slice(rows)}), after.isel({steps: slice(rows, None)}))
    return joined_steps(parts, steps, "outer")


def joined_steps(parts: Iterable[xr.Dataset], steps: str, labels: Literal["exact", "outer"]) -> xr.Dataset:
    """Steps of a group one behind the other, whose other labels are the same ("exact") or are united."""
    return xr.concat(
        parts,
        steps,
        data_vars="all",
        coords="minimal",
        compat="override",
        join=labels,
        combine_attrs="override",
    )
