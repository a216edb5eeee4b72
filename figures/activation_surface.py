"""|activation| over channel × token as a surface: Figure 2 of the OSP paper.

Attention input above, FFN input below, one column a run, each surface on its own height unless
``z_scale="shared"``. Neighbouring channels and tokens are pooled by their maximum, so that a spike of
one channel at one token keeps its height.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from figures._caption import caption
from figures._colours import ColourScale
from figures._decimate import bin_starts, max_pool, number
from figures._runs import labels_of, last_step, name_of, per_run, shown_token, snapshot, token_texts
from figures.backend import Backend, Canvas, Panel
from figures.styles import Style
from osp_diag.errors import StoreError, UsageError

ALIASES = ("fig2", "surface")
Z_SCALES = ("own", "shared")
_FEW_TOKENS = 12

__all__ = ["ALIASES", "draw", "prepare"]


def prepare(
    runs: list[Any],
    *,
    sites: str | Sequence[str] = ("attention_input", "mlp_input"),
    layer: int | None = None,
    z_scale: str = "own",
    channels: int = 72,
    tokens: int = 48,
) -> xr.Dataset:
    """The magnitudes of one layer's activations, pooled to what a picture can hold.

    Parameters
    ----------
    sites : one row each; any site of which the run keeps a snapshot
    layer : by default, in each run, the layer with the largest maximum over these sites
    z_scale : ``own`` height for every surface, as in the paper, or one ``shared`` by all
    channels, tokens : the most points along each side

    Returns
    -------
    ``magnitude`` (run, site, token, channel) with the coordinates ``first_channel``, ``first_token`` of
    each pooled cell, ``layer`` (run), and ``peak``, ``peak_channel``, ``peak_token`` (run, site).
    """
    chosen = [sites] if isinstance(sites, str) else list(sites)
    if z_scale not in Z_SCALES:
        raise UsageError(f"activation_surface: z_scale is {' or '.join(Z_SCALES)}, not {z_scale!r}")
    if channels < 2 or tokens < 2 or not chosen:
        raise UsageError("activation_surface: a surface needs a site and at least 2 channels and 2 tokens")
    parts = [_of_run(run, chosen, layer, channels, tokens) for run in runs]
    steps = [last_step(run) for run in runs]
    dataset = per_run(parts, labels_of(runs, steps))
    title = f"|activation| over channel and token at {' and '.join(chosen)}"
    layers = ", ".join(dict.fromkeys(str(int(part["layer"])) for part in parts))
    how = f"layer {layers}" if layer is not None else f"layer {layers} (where the maximum is largest)"
    dataset.attrs = {
        "title": title,
        "caption": caption(
            f"{title}, {how}, first sequence of the probe",
            runs,
            steps,
            [],
            [f"Raw activations; cells show the maximum where channels exceed {channels} or tokens {tokens}"],
        ),
        "z_scale": z_scale,
    }
    return dataset


def _of_run(run: Any, sites: list[str], layer: int | None, channels: int, tokens: int) -> xr.Dataset:
    arrays = {site: abs(snapshot(run, site, "activation_surface")) for site in sites}
    for site, array in arrays.items():
        if array.dims != ("layer", "token", "channel"):
            raise UsageError(
                f"activation_surface: {site!r} has the dimensions {array.dims}; give a site with channels"
            )
        if array.sizes["token"] < 2:
            raise StoreError(
                f"activation_surface: the snapshot of {name_of(run)} has one token only (as under the "
                f"protocol osp-published); draw it from a run of the protocol `sequence`"
            )
    index = _layer(run, arrays, layer)
    surfaces = [
        _surface(array.sel(layer=index).values.astype(np.float64), channels, tokens)
        for array in arrays.values()
    ]
    part = xr.concat(
        surfaces,
        dim=xr.DataArray(sites, dims="site", name="site"),
        join="outer",
        data_vars="all",
        coords="minimal",
        compat="override",
    )
    texts = token_texts(run, next(iter(arrays.values())).sizes["token"])
    starts = part["first_token"].isel(site=0).values
    named = [
        texts[int(start)] if np.isfinite(start) and len(starts) == len(texts) else "" for start in starts
    ]
    return part.assign(layer=float(index), token_text=(("token",), named))


def _layer(run: Any, arrays: dict[str, xr.DataArray], layer: int | None) -> int:
    """The layer asked for, or the one whose activations reach highest at any of the sites."""
    shared = sorted(set.intersection(*({int(v) for v in array["layer"].values} for array in arrays.values())))
    if layer is not None:
        if layer not in shared:
            raise UsageError(
                f"activation_surface: the snapshot of {name_of(run)} has no layer {layer}; it has "
                f"{', '.join(map(str, shared))}"
            )
        return layer
    peaks = [
        max(float(np.nanmax(array.sel(layer=index).values)) for array in arrays.values()) for index in shared
    ]
    return shared[int(np.argmax(peaks))]


def _surface(values: np.ndarray, channels: int, tokens: int) -> xr.Dataset:
    count, width = values.shape
    peak_token, peak_channel = np.unravel_index(int(np.nanargmax(values)), values.shape)
    pooled = max_pool(max_pool(values, 0, tokens), 1, channels)
    return xr.Dataset(
        {
            "magnitude": (("token", "channel"), pooled),
            "first_token": (("token",), bin_starts(count, tokens).astype(float)),
            "first_channel": (("channel",), bin_starts(width, channels).astype(float)),
            "peak": float(values.max()),
            "peak_token": float(peak_token),
            "peak_channel": float(peak_channel),
        },
        coords={"token": np.arange(pooled.shape[0]), "channel": np.arange(pooled.shape[1])},
    )


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """A grid of surfaces: a row a site, a column a run."""
    rows, columns = dataset.sizes["site"], dataset.sizes["run"]
    inches = style.widths[width]
    turned = columns == 1 and rows > 1 and inches > 5
    if turned:
        rows, columns = columns, rows
    height = min(inches / columns * 0.8, 3.0) * rows
    canvas = backend.canvas(rows, columns, width=inches, height=height, style=style, three_dimensional=True)
    shared = float(dataset["peak"].max()) if dataset.attrs["z_scale"] == "shared" else None
    for site_index, site in enumerate(dataset["site"].values):
        for run_index, run in enumerate(dataset["run"].values):
            part = dataset.isel(site=site_index, run=run_index)
            title = f"{run}: {site}" if dataset.sizes["run"] > 1 else str(site)
            peak = (
                f"layer {int(part['layer'])}, max {number(float(part['peak']))} at channel "
                f"{int(part['peak_channel'])}, token {int(part['peak_token'])}"
            )
            row, column = (run_index, site_index) if turned else (site_index, run_index)
            panel = canvas.panel(
                row,
                column,
                title=title,
                subtitle=peak,
                x_label="channel",
                y_label="token",
                z_label="|activation|",
            )
            _draw_surface(panel, part, shared or float(part["peak"]), style)
    return canvas


def _draw_surface(panel: Panel, part: xr.Dataset, top: float, style: Style) -> None:
    values = part["magnitude"].dropna("token", how="all").dropna("channel", how="all")
    token = part["first_token"].values[: values.sizes["token"]]
    channel = part["first_channel"].values[: values.sizes["channel"]]
    scale = ColourScale(0.0, top if top > 0 else 1.0)
    panel.surface(
        values.values, channel, token, scale=scale, colour_map=style.surface_map, quantity="|activation|"
    )
    panel.limits("z", 0.0, scale.high)
    texts = [shown_token(str(text)) for text in part["token_text"].values[: len(token)]]
    if len(token) <= _FEW_TOKENS and all(texts):
        panel.ticks("y", token.tolist(), texts)
