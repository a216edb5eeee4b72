"""Densities of attention logits, of the sink key and of all other keys: Figure 6 of the OSP paper.

The paper calls them "Pos." and "Neg." and spells out neither these classes nor the heads. Here "Pos." is
the first token's key, "Neg." every other key; shown is the mean density over all sink heads of a run, or over
all heads where none sinks, or one head.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.analyses.run_labels import labels_of
from osp_diag.analyses.sinks.implementation import logit_edges
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures._caption import caption
from osp_diag.figures._placement import SMOLLM2, InGallery, InReport
from osp_diag.figures._runs import check_label, per_run, statistics
from osp_diag.figures.backend import Backend, Canvas
from osp_diag.figures.styles import Style
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

ALIASES = ("fig6", "logits")
REPORT = InReport("Attention logits of the sink key and of others", place=100)
GALLERY = InGallery(SMOLLM2, "The sink key's logits stand clear of all others.", place=60)
AXES = ("shared", "own")
CLASSES = {"sink": "sink key (Pos.)", "other": "other keys (Neg.)"}
MOST_COLUMNS = 2
POINTS = 120
"""Bins drawn on the axis: those of the run are far narrower around 0 than elsewhere."""
SINKS = 0.5
"""Share of sequences in which a sink head sinks, at ε = 0.3 and position 0."""

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run],
    *,
    layer: int | None = None,
    head: int | None = None,
    axes: str = "shared",
    limit: float | None = None,
    step: int | None = None,
) -> xr.Dataset:
    """Mean density of the logits over heads, by class of key.

    Parameters
    ----------
    layer, head : one head, or the sink heads (else all heads) of one layer; all layers by default
    axes : ``shared`` range of logits for all runs, or each its ``own``
    limit : draw logits from −limit to limit (the paper: 10); by default the middle 99% of both classes

    Returns
    -------
    ``density`` (run, key_class, logit_bin), ``low`` and ``high`` (run; of the axis), ``median`` (run,
    key_class) and ``heads`` (run; what was averaged, in words).
    """
    if axes not in AXES:
        raise UsageError(f"logit_densities: axes is {' or '.join(AXES)}, not {axes!r}")
    if limit is not None and not limit > 0:
        raise UsageError(f"logit_densities: limit is {limit:g}; it is the largest logit drawn, more than 0")
    if head is not None and layer is None:
        raise UsageError("logit_densities: which layer's head? give layer too")
    parts = [_of_run(run, layer, head, limit, step) for run in runs]
    centres = parts[0]["logit_bin"].values
    if any(not np.array_equal(part["logit_bin"].values, centres) for part in parts):
        raise UsageError(
            "logit_densities: the runs have different bins of logits; probe them with the same parameters of "
            "logit_distribution"
        )
    steps = [step_of(run, step) for run in runs]
    dataset = per_run(parts, labels_of(runs, steps))
    if axes == "shared":
        dataset["low"][:], dataset["high"][:] = dataset["low"].min(), dataset["high"].max()
    title = "Densities of attention logits, sink key and other keys"
    identifiers = list(dict.fromkeys(name for part in parts for name in part["density"].attrs["estimators"]))
    heads = _in_words(dataset["heads"].values)
    remark = f"Logits as they enter the softmax, at sampled queries. Mean over {heads}"
    dataset.attrs = {
        "title": title,
        "caption": caption(title, runs, steps, identifiers, [remark]),
        "density": identifiers[0],
    }
    return dataset


def _in_words(heads: np.ndarray) -> str:
    return " / ".join(dict.fromkeys(str(part) for part in heads))


def _of_run(
    run: Run, layer: int | None, head: int | None, limit: float | None, step: int | None
) -> xr.Dataset:
    attention = statistics(run, "attention", ("logit_density", "sink_rate"), "logit_densities", step)
    density = attention["logit_density"].transpose("layer", "head", "key_class", "logit_bin")
    for dim, label in (("layer", layer), ("head", head)):
        source = f"the run of {model_name(run.attrs)}"
        check_label("logit_densities", source, dim, label, density[dim].values)
    measured = np.isfinite(density.values).all(axis=(2, 3))
    averaged, heads = _heads(attention, measured, layer, head)
    if not averaged.any():
        raise StoreError(
            f"logit_densities: the run of {model_name(run.attrs)} has no logits in {heads}; sequences of one "
            "token have none but of the sink key, so probe real sequences"
        )
    mean = density.values[averaged].mean(axis=0)
    identifiers = [
        str(attention[name].attrs.get("estimator", name)) for name in ("logit_density", "sink_rate")
    ]
    edges = logit_edges(density["logit_bin"].values)
    quantiles = np.array([_quantiles(row, edges, (0.005, 0.5, 0.995)) for row in mean])
    low, high = (-limit, limit) if limit else (quantiles[:, 0].min(), quantiles[:, 2].max())
    return xr.Dataset(
        {
            "density": (("key_class", "logit_bin"), mean, {"estimators": identifiers}),
            "low": float(low),
            "high": float(high),
            "median": (("key_class",), quantiles[:, 1]),
            "heads": heads,
        },
        coords={
            "key_class": [str(k) for k in density["key_class"].values],
            "logit_bin": density["logit_bin"],
        },
    )


def _heads(
    attention: xr.Dataset, measured: np.ndarray, layer: int | None, head: int | None
) -> tuple[np.ndarray, str]:
    """Which heads to average over, as a mask over (layer, head), and in words."""
    rate = attention["sink_rate"]
    index = int(np.argmin(np.abs(rate["epsilon"].values - 0.3)))
    rate = rate.isel(epsilon=index).sel(sink_position=0).transpose("layer", "head")
    within = measured.copy()
    if layer is not None:
        within &= (attention["layer"].values == layer)[:, None]
    place = "" if layer is None else f" of layer {layer}"
    if head is not None:
        return within & (attention["head"].values == head)[None, :], f"layer {layer}, head {head}"
    sinks = within & (rate.values >= SINKS)
    count = int(within.sum())
    if sinks.any():
        return sinks, f"{int(sinks.sum())} sink heads of {count}{place}"
    return within, f"all {count} heads{place}, none sinks"


def _quantiles(density: np.ndarray, edges: np.ndarray, shares: tuple[float, ...]) -> list[float]:
    # The distribution function at the edges; a quantile is where it reaches that share of the whole.
    cumulative = np.concatenate([[0.0], np.cumsum(density * np.diff(edges))])
    return [float(np.interp(q * cumulative[-1], cumulative, edges)) for q in shares]


def _rebinned(density: np.ndarray, edges: np.ndarray, at: np.ndarray) -> np.ndarray:
    """The density in bins between the places ``at``; no mass is lost within them."""
    # Differences of the distribution function, over the widths of the new bins.
    cumulative = np.concatenate([[0.0], np.cumsum(density * np.diff(edges))])
    return np.asarray(np.diff(np.interp(at, edges, cumulative)) / np.diff(at))


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A panel a run, with two filled curves."""
    runs = dataset.sizes["run"]
    # No place is left empty.
    columns = MOST_COLUMNS if style.widths[width] > 5 and runs % MOST_COLUMNS == 0 else 1
    rows = -(-runs // columns)
    canvas = backend.canvas(rows, columns, width=style.widths[width], height=2.35 * rows, style=style)
    edges = logit_edges(dataset["logit_bin"].values)
    for index in range(runs):
        part = dataset.isel(run=index)
        row, column = divmod(index, columns)
        low, high = float(part["low"]), float(part["high"])
        at = np.linspace(low, high, POINTS + 1)
        medians = [
            f"{float(part['median'].sel(key_class=name)):+.2g}".replace("-", "\u2212") for name in CLASSES
        ]
        panel = canvas.panel(
            row,
            column,
            title=str(part["run"].item()),
            subtitle=f"{part['heads'].item()}; medians {' and '.join(medians)}",
            x_label="attention logit" if index + columns >= runs else "",
            y_label="" if column else f"density\n{dataset.attrs['density']}",
        )
        top = 0.0
        for place, (name, label) in enumerate(CLASSES.items()):
            density = _rebinned(part["density"].sel(key_class=name).values, edges, at)
            top = max(top, float(density.max(initial=0.0)))
            panel.line(
                (at[1:] + at[:-1]) / 2,
                density,
                label=label,
                colour=style.palette[1 - place],
                dash="solid" if name == "sink" else "dashed",
                lower=np.zeros_like(density),
                upper=density,
            )
        panel.limits("x", low, high)
        panel.limits("y", 0.0, 1.08 * top if top > 0 else 1.0)
        if index == 0:
            first = panel
    canvas.legend(first)
    return canvas
