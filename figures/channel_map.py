"""Which channels are hot, layer by layer: a map of a channel statistic, logarithmic in colour."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int

from osp_diag.analyses.channels.profiles import is_hot, relative_rms
from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import UsageError
from osp_diag.figures._caption import caption
from osp_diag.figures._colours import ColourScale
from osp_diag.figures._decimate import bin_centres, bin_starts, max_pool, spans
from osp_diag.figures._placement import SMOLLM2, InGallery, InReport
from osp_diag.figures._runs import identifier, per_run, statistics
from osp_diag.figures.backend import Backend, Canvas
from osp_diag.figures.styles import Style
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

ALIASES = ("channels",)
REPORT = InReport(linked_charts=True)
GALLERY = InGallery(SMOLLM2, "Which channels are hot, layer by layer.", place=120)

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run],
    *,
    site: str = "residual_post",
    statistic: str = "channel_rms",
    stratum: str = "all",
    pixels: int = 320,
    hot: int = 6,
    step: int | None = None,
) -> xr.Dataset:
    """A statistic by layer and channel, and the channels that stand out.

    Parameters
    ----------
    statistic : ``channel_rms``, ``channel_absolute_maximum`` or another with the dimension ``channel``
    stratum : the tokens it speaks of
    pixels : neighbouring channels are pooled by their maximum down to this many columns
    hot : how many channels are named at most; a channel is hot if somewhere it exceeds 5 times the
        median channel of its layer

    Returns
    -------
    ``value`` (run, layer, column), ``first_channel`` (run, column): the first channel of each column,
    ``channels`` (run) and ``hot_channel`` (run, place), hottest first, NaN where there are fewer.
    """
    if pixels < 1 or hot < 0:
        raise UsageError(f"channel_map: pixels must be at least 1 and hot at least 0, not {pixels} and {hot}")
    parts, steps, identifiers = [], [], []
    for run in runs:
        by_channel = statistics(run, site, (statistic,), "channel_map", step)[statistic]
        if "channel" not in by_channel.dims:
            raise UsageError(
                f"channel_map: {statistic} has no channels; give one that has, such as channel_rms"
            )
        if "stratum" in by_channel.dims:
            strata = [str(name) for name in by_channel["stratum"].values]
            if stratum not in strata:
                raise UsageError(
                    f"channel_map: no stratum is named {stratum!r}; there are {', '.join(strata)}"
                )
            by_channel = by_channel.sel(stratum=stratum, drop=True)
        identifiers.append(identifier(by_channel))
        values = np.abs(by_channel.transpose("layer", "channel").values.astype(np.float64))
        parts.append(_pooled(values, by_channel["layer"].values, pixels, hot))
        steps.append(step_of(run, step))
    dataset = per_run(parts, labels_of(runs, steps))
    title = f"{statistic} of {site} by layer and channel, {stratum} tokens"
    remark = f"Columns are the maximum over neighbouring channels where there are more than {pixels}"
    pooled = bool((dataset["channels"] > pixels).any())
    dataset.attrs = {
        "title": title,
        "caption": caption(title, runs, steps, identifiers, [remark] if pooled else []),
        "quantity": ", ".join(dict.fromkeys(identifiers)),
    }
    return dataset


def _pooled(values: np.ndarray, layers: np.ndarray, pixels: int, hot: int) -> xr.Dataset:
    channels = values.shape[1]
    hot_channels = hottest(values, hot)
    return xr.Dataset(
        {
            "value": (("layer", "column"), max_pool(values, 1, pixels)),
            "first_channel": (("column",), bin_starts(channels, pixels).astype(float)),
            "channels": float(channels),
            "hot_channel": (
                ("place",),
                np.pad(hot_channels.astype(float), (0, hot - len(hot_channels)), constant_values=np.nan),
            ),
        },
        coords={"layer": layers, "column": np.arange(min(channels, pixels)), "place": np.arange(hot)},
    )


def hottest(values: Float[np.ndarray, "layer channel"], count: int) -> Int[np.ndarray, " place"]:
    """The hot channels of any layer, at most ``count``, hottest first."""
    ratio = np.nan_to_num(relative_rms(values)).max(axis=0)
    order = np.argsort(-ratio, kind="stable")[:count]
    return order[is_hot(ratio[order])]


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """One map a run, one under the other, all on the same colours."""
    runs = dataset.sizes["run"]
    canvas = backend.canvas(runs, 1, width=style.widths[width], height=2.15 * runs, style=style)
    scale = ColourScale.over(dataset["value"].values, kind="log")
    colours: dict[str, Any] = {"scale": scale, "colour_map": style.magnitude_map}
    panels = []
    for row in range(runs):
        part = dataset.isel(run=row)
        channels = int(part["channels"].item())
        columns = int(np.isfinite(part["first_channel"].values).sum())
        layers = part["layer"].values[np.isfinite(part["value"].values).any(axis=1)]
        panel = canvas.panel(
            row,
            0,
            title=str(part["run"].item()),
            y_label="layer",
            x_label="channel" if row == runs - 1 else "",
        )
        values = part["value"].sel(layer=layers).values[:, :columns]
        panel.heat_map(
            values,
            bin_centres(channels, columns),
            layers.astype(float),
            quantity=dataset.attrs["quantity"],
            x_texts=spans(channels, columns),
            **colours,
        )
        hot = [int(channel) for channel in part["hot_channel"].values if np.isfinite(channel)]
        panel.marks([float(channel) for channel in sorted(hot)], [str(channel) for channel in sorted(hot)])
        panels.append(panel)
    canvas.colour_bar(panels, label=dataset.attrs["quantity"], **colours)
    return canvas
