"""Two models' channels by layer, and their difference: which is hotter, where, by how much.

Every channel is shown relative to the median channel of its layer, so that scales do not matter. The
difference is that of channels with the same index, or, where widths differ, of sorted profiles: the hottest
channel against the hottest, the top 1% against the top 1%. Why so: docs/decisions.md, Analyses.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from osp_diag.analyses.channels.comparison import compare_channels
from osp_diag.analyses.channels.profiles import relative_rms
from osp_diag.errors import UsageError
from osp_diag.figures._caption import caption
from osp_diag.figures._colours import ColourScale
from osp_diag.figures._decimate import bin_centres, bin_starts, max_pool, spans
from osp_diag.figures._placement import ADAM_AND_OSP, InGallery, InReport
from osp_diag.figures._runs import per_run, statistics
from osp_diag.figures.backend import Backend, Canvas, Panel
from osp_diag.figures.styles import Style
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of
from osp_diag.wording import number

ALIASES = ()
REPORT = InReport("How the channels of two models differ", place=60, pairs=True)
GALLERY = InGallery(ADAM_AND_OSP, "Adam's hot channels, OSP's even ones, and their difference.", place=130)
MATCHES = ("index", "profile")
DIFFERENCE_MAP = "vik"

__all__ = ["ALIASES", "GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run],
    *,
    site: str = "residual_post",
    stratum: str = "all",
    match: str | None = None,
    pixels: int = 320,
    hot: int = 6,
    step: int | None = None,
    other_step: int | None = None,
) -> xr.Dataset:
    """Relative RMS by layer and channel of two runs, or of two steps of one, and their difference.

    Parameters
    ----------
    runs : two; or one, whose ``step`` (its first) is compared with ``other_step`` (its last)
    stratum : of which tokens
    match : ``index`` (channels with the same number) or ``profile`` (the k-th hottest channels); by default
        the index where both have the same width
    pixels : neighbouring channels are pooled down to this many columns, by their maximum, or by what
        differs most
    hot : how many channels are named at most in each map
    step, other_step : of the first and of the second; the last one of two runs by default

    Returns
    -------
    ``value`` (run, layer, column) and ``first_channel`` (run, column); ``difference`` (difference_layer,
    place) in decades, first minus second, by layer of the first and at ``place``: a channel, or log10 of a
    share of the width; ``hot_channel`` (run, rank), hottest first, NaN where fewer are above 5 medians.
    """
    if pixels < 1 or hot < 0:
        raise UsageError(
            f"channel_map_comparison: pixels must be at least 1 and hot at least 0, not {pixels} and {hot}"
        )
    if match is not None and match not in MATCHES:
        raise UsageError(f"channel_map_comparison: match is {' or '.join(MATCHES)}, not {match!r}")
    runs, steps = _sides(runs, step, other_step)
    comparison = compare_channels(
        runs[0], runs[1], step=steps[0], other_step=steps[1], stratum=stratum, sites=[site]
    )
    data = comparison.data.sel(site=site).sortby("layer")
    widths = [int(width) for width in data["width"].values]
    if match == "index" and widths[0] != widths[1]:
        raise UsageError(
            f"channel_map_comparison: {site} has {widths[0]} and {widths[1]} channels, which no index "
            "matches; give match=profile"
        )
    match = match or ("index" if widths[0] == widths[1] else "profile")
    dataset = _maps(runs, steps, site, stratum, pixels)
    dataset = dataset.assign(_difference(data, widths, match, pixels) | _hot(data, site, hot))
    title = f"Channels of {site} by layer, {stratum} tokens, and how two models differ"
    estimator = str(data["relative_rms"].attrs["estimator"])
    estimators = [f"channel_rms ({estimator}) over the median channel of its layer"]
    dataset.attrs = {
        "title": title,
        "caption": caption(title, runs, steps, estimators, _remarks(data, widths, match, pixels)),
        "match": match,
        "quantity": f"channel_rms / median\n{estimator}",
    }
    return dataset.assign_coords(run=data["run"].values)


def _sides(runs: list[Run], step: int | None, other_step: int | None) -> tuple[list[Run], list[int]]:
    """The two sides and their steps."""
    if len(runs) > 2:
        raise UsageError(f"channel_map_comparison takes two runs, or one; it was given {len(runs)}")
    if len(runs) == 2:
        later = step if other_step is None else other_step
        return runs, [step_of(runs[0], step), step_of(runs[1], later)]
    run = runs[0]
    last = step_of(run, other_step)
    first = int(run.steps[0]) if step is None else step_of(run, step)
    if first == last:
        raise UsageError(
            "channel_map_comparison needs two runs, or two steps of one; of the run of "
            f"{model_name(run.attrs)} there is only step {last} to draw: give a second run, or step and "
            "other_step"
        )
    return [run, run], [first, last]


def _maps(runs: list[Run], steps: list[int], site: str, stratum: str, pixels: int) -> xr.Dataset:
    """Each run on all its own layers, matched or not: a spike may be in any."""
    parts = []
    for run, step in zip(runs, steps, strict=True):
        rms = statistics(run, site, ("channel_rms",), "channel_map_comparison", step)["channel_rms"]
        rms = rms.sel(stratum=stratum, drop=True).transpose("layer", "channel")
        values = relative_rms(rms.values.astype(np.float64))
        starts = bin_starts(values.shape[1], pixels).astype(float)
        parts.append(
            xr.Dataset(
                {
                    "value": (("layer", "column"), max_pool(values, 1, pixels)),
                    "first_channel": (("column",), starts),
                    "width": values.shape[1],
                },
                coords={"layer": rms["layer"].values, "column": np.arange(len(starts))},
            )
        )
    return per_run(parts, ["first", "second"])


def _difference(data: xr.Dataset, widths: list[int], match: str, pixels: int) -> dict[str, Any]:
    # log10(a_j / b_j) by channel, or log10 of the ratio of the sorted profiles at one share of the width
    if match == "index":
        values = data["difference"].transpose("layer", "channel").values[:, : widths[0]].astype(float)
        pooled = _farthest(values, pixels)
        places = bin_centres(widths[0], pooled.shape[1])
    else:
        shares = data["width_share"].values
        # From a little before the hottest channel's own share, so that it has cells to be seen in.
        drawn = np.arange(len(shares)) >= np.searchsorted(shares, 1 / max(widths)) - 3
        pooled = data["sorted_difference"].transpose("layer", "width_share").values[:, drawn]
        places = np.log10(shares[drawn])
    return {
        "difference": (("difference_layer", "place"), pooled),
        "difference_layer": ("difference_layer", data["layer"].values),
        "place": ("place", places),
    }


def _farthest(values: Float[np.ndarray, "layer channel"], pixels: int) -> Float[np.ndarray, "layer column"]:
    """Of each bin the value farthest from 0, with its sign: spikes of either model survive."""
    highest, lowest = max_pool(values, 1, pixels), -max_pool(-values, 1, pixels)
    return np.where(highest >= -lowest, highest, lowest)


def _hot(data: xr.Dataset, site: str, hot: int) -> dict[str, Any]:
    """The hottest channels of each run; the table of the comparison has them hottest first."""
    hot_channels = np.full((2, hot), np.nan)
    for side in range(2):
        at_site = (data["hot_site"].values == site) & (data["hot_layers"].values[side] > 0)
        ratio = data["hot_ratio"].values[side][at_site]
        channels = data["hot_channel"].values[at_site][np.argsort(-ratio, kind="stable")][:hot]
        hot_channels[side, : len(channels)] = channels
    return {"hot_channel": (("run", "rank"), hot_channels)}


def _remarks(data: xr.Dataset, widths: list[int], match: str, pixels: int) -> list[str]:
    matching = (
        "Difference: log10 of the ratio, channels matched by index"
        if match == "index"
        else "Difference: log10 of the ratio, channels sorted by size and matched by their share of the width"
    )
    mean = float(data["profile_distance"].mean())
    remarks = [
        matching,
        f"Distance of sorted profiles (Wasserstein), mean over layers: {number(mean)} decades",
    ]
    if max(widths) > pixels:
        remarks.append(
            f"Columns are the maximum over neighbouring channels where there are more than {pixels}"
        )
    if bool((data["other_layer"] != data["layer"]).any()):
        remarks.append("Layers of the difference are the first model's, matched by relative depth")
    return remarks


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """Both maps on the same colours, and the difference under them."""
    canvas = backend.canvas(3, 1, width=style.widths[width], height=6.3, style=style)
    scale = ColourScale.over(dataset["value"].values, kind="log")
    colours: dict[str, Any] = {"scale": scale, "colour_map": style.magnitude_map}
    panels = [_draw_map(dataset.isel(run=row), canvas, row, colours) for row in range(2)]
    canvas.colour_bar(panels, label=dataset.attrs["quantity"], **colours)
    _draw_difference(dataset, canvas)
    return canvas


def _draw_map(part: xr.Dataset, canvas: Canvas, row: int, colours: dict[str, Any]) -> Panel:
    width = int(part["width"].item())
    columns = int(np.isfinite(part["first_channel"].values).sum())
    panel = canvas.panel(row, 0, title=str(part["run"].item()), y_label="layer", x_label="channel")
    centres = bin_centres(width, columns)
    values = part["value"].transpose("layer", "column").values[:, :columns]
    measured = np.isfinite(values).any(axis=1)
    layers = part["layer"].values[measured].astype(float)
    channel_texts = spans(width, columns)
    panel.heat_map(
        values[measured], centres, layers, quantity="channel_rms / median", x_texts=channel_texts, **colours
    )
    hot = sorted(int(channel) for channel in part["hot_channel"].values if np.isfinite(channel))
    panel.marks([float(channel) for channel in hot], [str(channel) for channel in hot])
    return panel


def _draw_difference(dataset: xr.Dataset, canvas: Canvas) -> None:
    by_index = dataset.attrs["match"] == "index"
    first, second = (str(name) for name in dataset["run"].values)
    panel = canvas.panel(
        2,
        0,
        title="Difference",
        subtitle=f"red: {first} is higher, blue: {second}",
        y_label="layer",
        x_label="channel" if by_index else "channels, hottest first (share of the width)",
    )
    values = dataset["difference"].values
    largest = float(np.max(np.abs(values), where=np.isfinite(values), initial=0.0)) or 1.0
    scale = ColourScale(-largest, largest)
    places = dataset["place"].values
    layers = dataset["difference_layer"].values.astype(float)
    panel.heat_map(
        values, places, layers, scale=scale, colour_map=DIFFERENCE_MAP, quantity="difference (decades)"
    )
    if not by_index:
        powers = [power for power in range(-5, 1) if power >= places[0] - 0.02]
        panel.ticks(
            "x", [float(power) for power in powers], [f"{10.0 ** (power + 2):g}%" for power in powers]
        )
    canvas.colour_bar([panel], scale=scale, colour_map=DIFFERENCE_MAP, label="log10 of the ratio\n(decades)")
