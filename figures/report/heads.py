"""How each head makes its sink, for the map of heads, the panel of a chosen head, and the statement."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.analyses.sinks.implementation import DEFINITIONS, sink_implementation
from osp_diag.analyses.sinks.statement import sink_statement
from osp_diag.analyses.thinned_run import thinned_run
from osp_diag.errors import OspDiagError
from osp_diag.figures._sink_heads import sink_strength
from osp_diag.figures.report.encoding import packed
from osp_diag.runs.run import Run

__all__ = ["EVIDENCE", "Heads", "heads_of"]

STEPS = 12
"""Probed steps that the emergence of sinks is told by."""
EVIDENCE = (
    "sink_rate", "sink_mass", "sink_logit", "other_logit", "negative_part", "channels_90",
    "query_key_overlap", "sink_cosine", "norm_factor", "value_drain", "residual_spike", "emergence_step",
)  # fmt: skip
"""Numbers of a head that the page shows, of those of ``sink_implementation``."""
WORDS = ("kind", "channel_use", "geometry")
MOST = 200
"""Heads of which the parts of the sink logit are kept, strongest sinks first."""


@dataclass
class Heads:
    """What a page says of a run's heads at its last step."""

    implementation: xr.Dataset | None = None
    """what ``sink_implementation`` returned"""
    statement: str = ""
    problem: str = ""
    """why there is nothing"""
    rows: list[dict[str, Any]] = field(default_factory=list)
    """a dictionary a head, strongest sink first: layer, head, the words and the evidence"""
    parts: dict[str, Any] = field(default_factory=dict)
    """packed: ``channel`` and ``frequency`` (head of rows, part)"""


def heads_of(run: Run) -> Heads:
    """Classes, evidence and the parts of the sink logit of every head."""
    try:
        implementation = sink_implementation(thinned_run(run, STEPS))
        statement = sink_statement(implementation)
    except OspDiagError as reason:
        return Heads(problem=str(reason))
    at = implementation.isel(step=-1)
    layers, heads = at["layer"].values, at["head"].values
    strength = sink_strength(at["sink_rate"].values, at["sink_mass"].values)
    order = np.argsort(-strength, axis=None, kind="stable")
    columns = {name: _by_head(at, name) for name in (*WORDS, *EVIDENCE) if name in at}
    rows = []
    for flat in order:
        row, column = np.unravel_index(int(flat), strength.shape)
        values = {name: _plain(by_head[row, column]) for name, by_head in columns.items()}
        rows.append({"layer": int(layers[row]), "head": int(heads[column]), **values})
    parts: dict[str, Any] = {}
    for key, name, dim in (
        ("channel", "sink_logit_contribution", "head_channel"),
        ("frequency", "frequency_contribution", "frequency"),
    ):
        if name in at:
            by_head = at[name].transpose("layer", "head", dim).values
            parts[key] = packed(by_head.reshape(-1, by_head.shape[-1])[order[:MOST]])
    if "wavelength" in at.coords:
        parts["wavelength"] = [float(value) for value in at["wavelength"].values]
    return Heads(implementation, statement, "", rows, parts)


def _by_head(at: xr.Dataset, name: str) -> np.ndarray:
    values = at[name]
    missing = [dim for dim in ("layer", "head") if dim not in values.dims]
    sizes = {dim: at.sizes[dim] for dim in missing}
    whole: np.ndarray = values.expand_dims(sizes).transpose("layer", "head").values
    return whole


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return str(value)
    return float(value) if np.isfinite(value) else None


def definitions() -> dict[str, str]:
    """What the words and numbers of a head mean."""
    return {name: DEFINITIONS[name] for name in (*WORDS, *EVIDENCE)}
