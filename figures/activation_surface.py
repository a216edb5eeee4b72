"""|activation| over channel × token as a surface: Figures 2, 8 and 9 of the OSP paper.

Attention input above, FFN input below, one column a run, each surface on its own height unless
``z_scale="shared"``. Figures 8 and 9 are ``sites="linear_input:*", layer=(1, 7, 15, 22)`` of a run that was
probed at these sites: the input of every Linear. Neighbouring channels and tokens are pooled by their
maximum, so that a spike of one channel at one token keeps its height.
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
import xarray as xr

from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures._caption import caption
from osp_diag.figures._decimate import bin_starts, max_pool
from osp_diag.figures._placement import SMOLLM2, InGallery, InReport
from osp_diag.figures._runs import (
    check_label,
    nothing_finite,
    per_run,
    snapshot,
    snapshot_sites,
    snapshot_step,
    token_texts,
)
from osp_diag.figures._surfaces import (
    Axes,
    check_z_scale,
    draw_surfaces,
    in_block_order,
    layer_columns,
    short_name,
    stacked,
    with_layers,
)
from osp_diag.figures.backend import Backend, Canvas
from osp_diag.figures.styles import Style
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run

ALIASES = ("fig2", "fig8", "fig9", "surface")
REPORT = InReport("What the activations of the hottest layer look like", place=30, raw_activations=True)
GALLERY = InGallery(
    SMOLLM2, "A spike of one channel on the first token; a channel hot on all others.", place=20
)
AXES = Axes(values="magnitude", quantity="|activation|", row="site", x="channel", y="token")

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run],
    *,
    sites: str | Sequence[str] = ("attention_input", "mlp_input"),
    layer: int | Sequence[int] | None = None,
    z_scale: str = "own",
    channels: int = 72,
    tokens: int = 48,
) -> xr.Dataset:
    """The magnitudes of one layer's activations, pooled to what a picture can hold.

    Parameters
    ----------
    sites : one row each; any site of which the run keeps a snapshot, also by pattern: ``linear_input:*``
    layer : one, or several side by side; by default, in each run, the layer with the largest maximum over
        these sites
    z_scale : ``own`` height for every surface, as in the paper, or one ``shared`` by all
    channels, tokens : the most points along each side

    Returns
    -------
    ``magnitude`` (run, site, token, channel) with the coordinates ``first_channel``, ``first_token`` of
    each pooled cell, ``layer`` (run), and ``peak``, ``peak_channel``, ``peak_token`` (run, site). With
    several layers ``run`` has an entry for each.
    """
    check_z_scale("activation_surface", z_scale)
    if channels < 2 or tokens < 2 or not sites:
        raise UsageError("activation_surface: a surface needs a site and at least 2 channels and 2 tokens")
    site_names = _site_names(runs, [sites] if isinstance(sites, str) else list(sites))
    columns = layer_columns(layer)
    parts = [_of_run(run, site_names, column, channels, tokens) for run in runs for column in columns]
    steps = [snapshot_step(run) for run in runs]
    labels = [label for label in labels_of(runs, steps) for _ in columns]
    dataset = per_run(parts, with_layers(labels, [int(part["layer"]) for part in parts]))
    title = f"|activation| over channel and token: {', '.join(map(short_name, site_names))}"
    layers = ", ".join(dict.fromkeys(str(int(part["layer"])) for part in parts))
    choice = f"layer {layers}" if layer is not None else f"layer {layers} (where the maximum is largest)"
    dataset.attrs = {
        "title": title,
        "caption": caption(
            f"{title}, {choice}, first sequence of the probe",
            runs,
            steps,
            [],
            [f"Raw activations; cells show the maximum where channels exceed {channels} or tokens {tokens}"],
        ),
        "z_scale": z_scale,
    }
    return dataset


def _site_names(runs: list[Run], sites: list[str]) -> list[str]:
    """Sites by name; a pattern stands for those of which every run keeps a snapshot."""
    names: list[str] = []
    for site in sites:
        if "*" not in site:
            names.append(site)
            continue
        shared = [name for name in snapshot_sites(runs[0]) if fnmatchcase(name, site)]
        shared = [name for name in shared if all(name in snapshot_sites(run) for run in runs[1:])]
        if not shared:
            raise StoreError(
                f"activation_surface: no snapshot that the runs share matches {site!r}; that of "
                f"{model_name(runs[0].attrs)} has {', '.join(snapshot_sites(runs[0])) or 'none'}; probe "
                "again with it among --sites"
            )
        # The head's input is there once, beside sites that every block has.
        depth = {name: runs[0].snapshot(name).sizes["layer"] for name in shared}
        deepest = max(depth.values())
        names += in_block_order(name for name in shared if depth[name] > 1 or deepest == 1)
    return list(dict.fromkeys(names))


def _of_run(run: Run, sites: list[str], layer: int | None, channels: int, tokens: int) -> xr.Dataset:
    arrays = {site: abs(snapshot(run, site, "activation_surface")) for site in sites}
    for site, array in arrays.items():
        if array.dims != ("layer", "token", "channel"):
            raise UsageError(
                f"activation_surface: {site!r} has the dimensions {array.dims}; give a site with channels"
            )
        if array.sizes["token"] < 2:
            raise StoreError(
                f"activation_surface: the snapshot of {model_name(run.attrs)} has one token only (as under "
                "the protocol osp-published); draw it from a run of the protocol `sequence`"
            )
    index = _layer(run, arrays, layer)
    for site, array in arrays.items():
        if not np.isfinite(array.sel(layer=index).values).any():
            raise StoreError(
                nothing_finite(run, f"layer {index} of the snapshot of {site!r}", "activation_surface")
            )
    surfaces = [
        _surface(array.sel(layer=index).values.astype(np.float64), channels, tokens)
        for array in arrays.values()
    ]
    part = stacked(surfaces, "site", sites)
    texts = token_texts(run, next(iter(arrays.values())).sizes["token"])
    starts = part["first_token"].isel(site=0).values
    token_labels = [
        texts[int(start)] if np.isfinite(start) and len(starts) == len(texts) else "" for start in starts
    ]
    return part.assign(layer=float(index), token_text=(("token",), token_labels))


def _layer(run: Run, arrays: dict[str, xr.DataArray], layer: int | None) -> int:
    """The layer asked for, or the one whose activations reach highest at any of the sites."""
    shared = sorted(set.intersection(*({int(v) for v in array["layer"].values} for array in arrays.values())))
    if layer is not None:
        source = f"the snapshot of {model_name(run.attrs)}"
        check_label("activation_surface", source, "layer", layer, shared)
        return layer
    peaks = [max(_largest(array.sel(layer=index)) for array in arrays.values()) for index in shared]
    return shared[int(np.argmax(peaks))]


def _largest(values: xr.DataArray) -> float:
    """The largest finite value; −∞ where all are NaN."""
    finite = values.values[np.isfinite(values.values)]
    return float(finite.max(initial=-np.inf))


def _surface(values: np.ndarray, channels: int, tokens: int) -> xr.Dataset:
    count, width = values.shape
    peak_token, peak_channel = np.unravel_index(int(np.nanargmax(values)), values.shape)
    pooled = max_pool(max_pool(values, 0, tokens), 1, channels)
    return xr.Dataset(
        {
            "magnitude": (("token", "channel"), pooled),
            "first_token": (("token",), bin_starts(count, tokens).astype(float)),
            "first_channel": (("channel",), bin_starts(width, channels).astype(float)),
            "peak": float(np.nanmax(values)),
            "peak_token": float(peak_token),
            "peak_channel": float(peak_channel),
        },
        coords={"token": np.arange(pooled.shape[0]), "channel": np.arange(pooled.shape[1])},
    )


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A grid of surfaces: a row a site, a column a run or layer."""
    return draw_surfaces(dataset, AXES, backend, style=style, width=width)
