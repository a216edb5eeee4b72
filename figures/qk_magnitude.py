"""|q| and |k| over token × channel in one head: Figure 5 of the OSP paper.

The paper shows "sink heads" without saying which; here the strongest sink head of each run is taken
unless a layer and a head are given.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr

from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures._caption import caption
from osp_diag.figures._colours import KINDS, ColourScale
from osp_diag.figures._decimate import bin_centres, max_pool
from osp_diag.figures._placement import SMOLLM2, InGallery, InReport
from osp_diag.figures._runs import check_label, nothing_finite, per_run, snapshot, snapshot_step
from osp_diag.figures._sink_heads import heads_by_sink
from osp_diag.figures.backend import Backend, Canvas
from osp_diag.figures.styles import Style
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run

ALIASES = ("fig5", "qk")
REPORT = InReport("Queries and keys of the strongest sink", place=90, raw_activations=True)
GALLERY = InGallery(
    SMOLLM2, "Few channels of a head's queries and keys are large, the same on all tokens.", place=50
)
ROTATIONS = ("post", "pre")

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run],
    *,
    layer: int | None = None,
    head: int | None = None,
    rope: str = "post",
    colours: str = "linear",
    tokens: int = 128,
) -> xr.Dataset:
    """Magnitudes of one head's queries and keys in the first sequence.

    Parameters
    ----------
    layer, head : of the queries; by default the head with the highest sink rate at ε = 0.3 (ties go to
        the one with more attention to the first token). Under grouped-query attention the keys are those
        that this head reads.
    rope : ``post`` or ``pre`` rotation
    colours : scale of the colours, ``linear``, ``log`` or ``symlog``
    tokens : the most rows; neighbouring tokens are pooled by their maximum beyond that

    Returns
    -------
    ``query`` and ``key`` (run, token, head_channel), with ``layer``, ``head``, ``key_head``,
    ``sink_rate`` and ``tokens`` (run).
    """
    if rope not in ROTATIONS:
        raise UsageError(f"qk_magnitude: rope is {' or '.join(ROTATIONS)}, not {rope!r}")
    if colours not in KINDS:
        raise UsageError(f"qk_magnitude: colours is one of {', '.join(KINDS)}, not {colours!r}")
    parts = [_of_run(run, layer, head, rope, tokens) for run in runs]
    steps = [snapshot_step(run) for run in runs]
    dataset = per_run(parts, labels_of(runs, steps))
    title = f"|q| and |k| by token and channel of one head, {rope}-RoPE"
    choice = (
        "the head given"
        if layer is not None and head is not None
        else ("the head with the highest sink_rate/1 at \u03b5 = 0.3, k = 0")
    )
    dataset.attrs = {
        "title": title,
        "caption": caption(
            title, runs, steps, [], [f"First sequence of the probe, {choice}; raw activations"]
        ),
        "colours": colours,
    }
    return dataset


def _of_run(run: Run, layer: int | None, head: int | None, rope: str, tokens: int) -> xr.Dataset:
    query = snapshot(run, f"query_{rope}_rope", "qk_magnitude")
    key = snapshot(run, f"key_{rope}_rope", "qk_magnitude")
    shared = sorted({int(v) for v in query["layer"].values} & {int(v) for v in key["layer"].values})
    heads, key_heads = query.sizes["head"], key.sizes["head"]
    source = f"the snapshot of {model_name(run.attrs)}"
    check_label("qk_magnitude", source, "layer", layer, shared)
    check_label("qk_magnitude", source, "head", head, range(heads))
    rate = float("nan")
    if layer is None or head is None:
        layers = shared if layer is None else [layer]
        strongest = heads_by_sink(run, layers, "qk_magnitude", head=head).isel(place=0)
        layer, head = int(strongest["layer"]), int(strongest["head"])
        rate = float(strongest["sink_rate"])
    key_head = head * key_heads // heads  # under grouped queries, heads / key_heads read one key head
    magnitudes = {
        name: np.abs(array.sel(layer=layer).isel(head=which).values.astype(np.float64))
        for name, array, which in (("query", query, head), ("key", key, key_head))
    }
    if not all(np.isfinite(values).any() for values in magnitudes.values()):
        raise StoreError(nothing_finite(run, f"layer {layer}, head {head}", "qk_magnitude"))
    return xr.Dataset(
        {
            **{
                name: (("token", "head_channel"), max_pool(values, 0, tokens))
                for name, values in magnitudes.items()
            },
            "layer": float(layer),
            "head": float(head),
            "key_head": float(key_head),
            "sink_rate": rate,
            "tokens": float(query.sizes["token"]),
        },
        coords={
            "token": np.arange(min(query.sizes["token"], tokens)),
            "head_channel": np.arange(query.sizes["head_channel"]),
        },
    )


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A row a run: queries left, keys right, both on the same colours."""
    runs = dataset.sizes["run"]
    canvas = backend.canvas(runs, 2, width=style.widths[width], height=2.1 * runs, style=style)
    for row in range(runs):
        part = dataset.isel(run=row)
        arrays = {
            kind: part[kind].dropna("token", how="all").dropna("head_channel", how="all")
            for kind in ("query", "key")
        }
        scale = ColourScale.over(
            *(array.values for array in arrays.values()),
            kind=dataset.attrs["colours"],
            low=0.0 if dataset.attrs["colours"] == "linear" else None,
        )
        colours: dict[str, Any] = {"scale": scale, "colour_map": style.magnitude_map}
        panels = []
        for column, (kind, array) in enumerate(arrays.items()):
            which = part["head"] if kind == "query" else part["key_head"]
            letter = kind[0]
            place = f"layer {int(part['layer'])}, {'' if kind == 'query' else 'key '}head {int(which)}"
            panel = canvas.panel(
                row,
                column,
                title=str(part["run"].item()) if column == 0 else "",
                subtitle=f"|{letter}|, {place}",
                x_label="head channel" if row == runs - 1 else "",
                y_label="" if column else "token",
            )
            panel.heat_map(
                array.values,
                array["head_channel"].values.astype(float),
                bin_centres(int(part["tokens"]), array.sizes["token"]),
                quantity=f"|{letter}|",
                **colours,
            )
            panels.append(panel)
        canvas.colour_bar(panels, label="|q|, |k|", **colours)
    return canvas
