"""Where the queries of chosen heads look: attention over query × key of one sequence.

A run keeps no T×T array. It keeps the queries and keys of its first sequence, and what makes logits of them
(scale, soft cap, bias and mask, sink logits); the maps of the few heads that are drawn are computed from
these, exactly as the model computes them: docs/decisions.md, Figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import OspDiagError, StoreError, UsageError
from osp_diag.figures._caption import caption
from osp_diag.figures._colours import KINDS, ColourScale
from osp_diag.figures._placement import SMOLLM2, InGallery, InReport
from osp_diag.figures._runs import (
    check_label,
    nothing_finite,
    snapshot,
    snapshot_step,
    token_label,
    token_texts,
)
from osp_diag.figures._sink_heads import heads_by_sink
from osp_diag.figures.backend import Backend, Canvas
from osp_diag.figures.styles import Style
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run

ALIASES = ("attention",)
REPORT = InReport("Where the strongest sink looks", place=80, raw_activations=True)
GALLERY = InGallery(SMOLLM2, "Where the queries of sink heads look.", place=190)
_NAMED = 32
"""Tokens that an axis can name."""
_LONGEST = 8
"""characters of a token's text"""
_SMALLEST = 1e-4
"""Foot of logarithmic colours."""

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run],
    *,
    heads: str | Sequence[str] | None = None,
    tokens: int = 24,
    colours: str = "linear",
) -> xr.Dataset:
    """Attention of chosen heads among the first tokens of the first sequence.

    softmax over keys of softcap·tanh(scale·q·kᵀ / softcap) + bias, with −∞ where a key is not allowed and one
    more logit where the head has a sink logit; without a soft cap scale·q·kᵀ + bias.

    Parameters
    ----------
    heads : ``LAYER:HEAD``, one or several, the same in every run; by default the strongest sink heads, one a
        layer (three of one run, one of each of several), and the head that attends least to the first token
    tokens : how many queries and keys, from the first on; a softmax always runs over all keys that it has
    colours : scale of the colours, ``linear``, ``log`` or ``symlog``

    Returns
    -------
    ``attention`` (run, map, query_token, key_token), NaN where a key is not allowed; ``layer``, ``head`` and
    ``key_head`` (run, map); ``token_text`` (run, query_token).

    Raises
    ------
    StoreError : a run without snapshots of queries and keys, or that does not say how logits are made
    UsageError : a head that is not there
    """
    if colours not in KINDS:
        raise UsageError(f"attention_map: colours is one of {', '.join(KINDS)}, not {colours!r}")
    if tokens < 2:
        raise UsageError(f"attention_map: tokens is 2 or more, not {tokens}")
    named_heads = None if heads is None else _parsed_heads([heads] if isinstance(heads, str) else heads)
    # Snapshots are of the first probed step.
    steps = [snapshot_step(run) for run in runs]
    snapshots = [_AttentionSnapshot(run) for run in runs]
    sinks = 3 if len(runs) == 1 else 1
    pairs_of_runs = [
        named_heads or run_snapshot.default_heads(sinks, step)
        for run_snapshot, step in zip(snapshots, steps, strict=True)
    ]
    maps = [run_snapshot.maps(pairs) for run_snapshot, pairs in zip(snapshots, pairs_of_runs, strict=True)]
    dataset = _side_by_side(snapshots, pairs_of_runs, maps, tokens).assign_coords(run=labels_of(runs, steps))
    title = "Attention of chosen heads by query and key"
    choice = (
        "heads as given"
        if named_heads
        else "strongest sink heads (sink_rate/1 at ε = 0.3, one a layer), and the head that attends least to "
        "the first token (first_token_attention/1)"
    )
    remarks = [
        f"First {dataset.sizes['query_token']} tokens of the first sequence, {choice}",
        "Softmax of the recorded queries and keys in float64, with the model's own scale, mask, soft cap and "
        "sink logits",
    ]
    dataset.attrs = {
        "title": title,
        "caption": caption(title, runs, steps, [], remarks),
        "colours": colours,
    }
    return dataset


def _parsed_heads(heads: Sequence[str]) -> list[tuple[int, int]]:
    """``["4:1"]`` → [(4, 1)]."""
    pairs = []
    for text in heads:
        layer, separator, head = str(text).partition(":")
        if not separator or not layer.strip().isdigit() or not head.strip().isdigit():
            raise UsageError(f"attention_map: heads are LAYER:HEAD, such as 4:1, not {text!r}")
        pairs.append((int(layer), int(head)))
    if not pairs:
        raise UsageError("attention_map: heads names no head; give LAYER:HEAD, such as 4:1")
    return pairs


class _AttentionSnapshot:
    """What a run keeps of the attention of its first sequence.

    In ``truncated_layers`` queries also see keys behind the tokens of the snapshot.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.query = snapshot(run, "query_post_rope", "attention_map")
        self.key = snapshot(run, "key_post_rope", "attention_map")
        try:
            self.rule = run.snapshot("attention").load()
        except (OspDiagError, KeyError):
            raise StoreError(
                f"attention_map: the run of {model_name(run.attrs)} does not say with which scale and mask "
                "its logits are made; probe again with this version"
            ) from None
        layer_sets = [set(array["layer"].values.tolist()) for array in (self.query, self.key, self.rule)]
        self.layers = sorted(set.intersection(*layer_sets))
        self.truncated_layers = {
            int(layer) for layer in self.rule["layer"].values[self.rule["sees_beyond"].values > 0]
        }

    def default_heads(self, sinks: int, step: int) -> list[tuple[int, int]]:
        """The strongest sink heads, one a layer, and the head that attends least to the first token."""
        complete_layers = [
            layer for layer in self.layers if layer not in self.truncated_layers
        ] or self.layers
        ranked = heads_by_sink(self.run, complete_layers, "attention_map", step=step)
        strongest = np.unique(ranked["layer"].values, return_index=True)[1]  # the strongest of each layer
        least = int(np.argmin(ranked["first_token_attention"].values))
        places = dict.fromkeys([*sorted(strongest)[:sinks], least])
        return [(int(ranked["layer"][place]), int(ranked["head"][place])) for place in places]

    def maps(self, pairs: Sequence[tuple[int, int]]) -> Float[np.ndarray, "map query key"]:
        """Attention of these heads."""
        return np.stack([self._map(layer, head) for layer, head in pairs])

    def key_head(self, head: int) -> int:
        """The key head that a head reads, under grouped-query attention."""
        return head * self.key.sizes["head"] // self.query.sizes["head"]

    def _map(self, layer: int, head: int) -> Float[np.ndarray, "query key"]:
        source = f"the snapshot of {model_name(self.run.attrs)}"
        check_label("attention_map", source, "layer", layer, self.layers)
        check_label("attention_map", source, "head", head, range(self.query.sizes["head"]))
        if layer in self.truncated_layers:
            raise StoreError(
                f"attention_map: in layer {layer} of {model_name(self.run.attrs)} queries also see keys "
                f"behind the {self.query.sizes['token']} tokens that were kept; probe again with "
                "snapshot_tokens as long as the sequence"
            )
        rule = self.rule.sel(layer=layer)
        table = min(head, rule.sizes["bias_head"] - 1)
        query, key = (
            array.sel(layer=layer).isel(head=which).transpose("token", "head_channel").values.astype(float)
            for array, which in ((self.query, head), (self.key, self.key_head(head)))
        )
        # scale·q·kᵀ, then the soft cap, then bias and mask (−∞): the order in which models apply them.
        logits = float(rule["scale"]) * query @ key.T
        softcap = float(rule["softcap"])
        if np.isfinite(softcap):
            logits = softcap * np.tanh(logits / softcap)
        bias = rule["logit_bias"].isel(bias_head=table).values.astype(float)
        if np.isnan(logits).all():
            raise StoreError(nothing_finite(self.run, f"layer {layer}, head {head}", "attention_map"))
        return _softmax(logits + bias, float(rule["sink_logit"].isel(head=head)))


def _softmax(logits: Float[np.ndarray, "query key"], sink: float) -> Float[np.ndarray, "query key"]:
    """Over keys and the sink logit; NaN where a key is not allowed."""
    allowed = np.isfinite(logits)
    # exp(l − max l), so that no exponential overflows; of a query that sees nothing the maximum is −∞.
    top = np.maximum(np.max(logits, axis=1, keepdims=True, initial=sink), -1e300)
    weights = np.exp(logits - top)
    # The sink logit takes its share of the sum, and has no column of its own.
    total = weights.sum(axis=1, keepdims=True) + np.exp(sink - top)
    return np.divide(weights, total, out=np.full(logits.shape, np.nan), where=allowed & (total > 0))


def _side_by_side(
    snapshots: Sequence[_AttentionSnapshot],
    pairs_of_runs: Sequence[Sequence[tuple[int, int]]],
    maps: Sequence[np.ndarray],
    tokens: int,
) -> xr.Dataset:
    """All runs in one dataset, the smaller ones padded."""
    most = max(map(len, pairs_of_runs))
    length = min(tokens, max(maps_of_run.shape[1] for maps_of_run in maps))
    attention = np.full((len(maps), most, length, length), np.nan)
    places = np.full((3, len(maps), most), np.nan)
    texts = np.full((len(maps), length), "", dtype=object)
    for index, (run_snapshot, pairs, maps_of_run) in enumerate(
        zip(snapshots, pairs_of_runs, maps, strict=True)
    ):
        part = maps_of_run[:, :length, :length]
        attention[index, : len(pairs), : part.shape[1], : part.shape[2]] = part
        places[:, index, : len(pairs)] = np.array(
            [(*pair, run_snapshot.key_head(pair[1])) for pair in pairs]
        ).T
        texts[index, : part.shape[1]] = token_texts(run_snapshot.run, part.shape[1])
    attributes = {"units": "1", "definition": "share of the query's attention that the key receives"}
    return xr.Dataset(
        {
            "attention": (("run", "map", "query_token", "key_token"), attention, attributes),
            **{name: (("run", "map"), places[i]) for i, name in enumerate(("layer", "head", "key_head"))},
            "token_text": (("run", "query_token"), texts.astype(str)),
        },
        coords={"query_token": np.arange(length), "key_token": np.arange(length)},
    )


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A panel a head, queries downwards; the runs one after the other."""
    inches = style.widths[width]
    columns = 1 if inches < 5 else 2
    panels = [
        (run, index)
        for run in range(dataset.sizes["run"])
        for index in np.flatnonzero(np.isfinite(dataset["layer"].values[run]))
    ]
    rows = -(-len(panels) // columns)
    canvas = backend.canvas(rows, columns, width=inches, height=3.2 * rows, style=style)
    kind = dataset.attrs["colours"]
    scale = ColourScale(_SMALLEST if kind == "log" else 0.0, 1.0, kind, threshold=0.01)
    colours: dict[str, Any] = {"scale": scale, "colour_map": style.share_map}
    map_panels = []
    for place, (run, index) in enumerate(panels):
        row, column = divmod(place, columns)
        part = dataset.isel(run=run, map=index)
        values = part["attention"].dropna("query_token", how="all").dropna("key_token", how="all")
        texts = [
            token_label(text, _LONGEST) for text in part["token_text"].values[: values.sizes["key_token"]]
        ]
        token_names = [f"{place} \u201c{text}\u201d" for place, text in enumerate(texts)]
        first = float(values.isel(key_token=0).mean())
        panel = canvas.panel(
            row,
            column,
            title=str(part["run"].item()) if place == 0 or panels[place - 1][0] != run else "",
            subtitle=f"layer {int(part['layer'])}, head {int(part['head'])}: {first:.0%} to the first token",
            x_label="key" if place >= len(panels) - columns else "",
            y_label="query" if column == 0 else "",
        )
        x, y = values["key_token"].values.astype(float), values["query_token"].values.astype(float)
        # Queries go downwards, as one reads.
        panel.heat_map(
            values.values[::-1],
            x,
            y[::-1],
            quantity="attention",
            x_texts=token_names,
            y_texts=token_names[::-1],
            **colours,
        )
        if len(texts) <= _NAMED:
            panel.ticks("x", x.tolist(), texts)
            panel.ticks("y", y.tolist(), texts)
        map_panels.append(panel)
    canvas.colour_bar(map_panels, label="attention", **colours)
    return canvas
