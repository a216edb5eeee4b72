"""A comparison of channels for a terminal, and as plain values."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from osp_diag.analyses.channels.profiles import HOT
from osp_diag.analyses.channels.significance import LEVEL
from osp_diag.wording import number

if TYPE_CHECKING:
    from osp_diag.analyses.channels.comparison import ChannelComparison

__all__ = ["plain_values", "text_of"]

_WIDTH = 110
_MOST_NAMES = 6
"""Channels that a line names."""
_MOST_ENTRIES = 20
"""Hot channels of a site and kind that JSON lists."""
_STREAM = ("residual_post", "residual_mid", "residual_pre", "embedding")
_DISTANCES = ("profile_distance", "peak_distance", "concentration_distance", "hot_distance")
_SIGNIFICANCE_SITES = ("residual_post", "embedding", "final_norm")
_STATISTICS = {"top_share": "energy in the largest channel", "osp_excess_kurtosis": "OSP kurtosis"}
_SIGNIFICANCE_NUMBERS = (
    *(f"{name}_difference{suffix}" for name in _STATISTICS for suffix in ("", "_margin", "_q")),
    "different_channels",
)
"""By layer, first minus second."""


def text_of(comparison: ChannelComparison) -> str:
    """The table of sites, the hot channels of the residual stream, weights, notes."""
    data = comparison.data
    first, second = (str(name) for name in data["run"].values)
    steps = data.attrs["steps"]
    head = (
        f"Channels of {first} (A, step {steps[0]:,}) and {second} (B, step {steps[1]:,}), "
        f"{data.attrs['stratum']} tokens"
    )
    notes = [*comparison.notes, f"significance {data.attrs['significance']}"]
    lines = [
        *map(_filled, (head, "", *_verdict(data), "")),
        *_table(data),
        "",
        *map(
            _filled,
            (
                *_hot_lines(data),
                *_significance_lines(data),
                *_weight_lines(data),
                "",
                *(f"Note: {note}." for note in notes),
            ),
        ),
    ]
    return "\n".join(lines)


def _filled(line: str) -> str:
    return textwrap.fill(line, _WIDTH, subsequent_indent="  ", break_long_words=False)


def _verdict(data: xr.Dataset) -> Iterator[str]:
    """Where the two differ most."""
    distance = data["profile_distance"]
    if not bool(distance.notnull().any()):
        yield "No layer could be compared; the notes say why."
        return
    if float(distance.max()) == 0.0:
        # Where widths differ there is no difference by index, and NaN keeps this from being said.
        by_index = abs(data["difference"]).max("channel").where(distance.notnull())
        same = bool((by_index == 0).sum() == distance.notnull().sum())
        yield f"The {'channels' if same else 'sorted profiles'} are equal everywhere."
        return
    for name, subject in (("profile_distance", "sorted profiles"), ("peak_distance", "hottest channels")):
        site, layer = _largest(data[name])
        layer_data = data.sel(site=site, layer=layer)
        peaks = [number(float(value)) for value in layer_data["relative_rms"].max("channel").values]
        yield (
            f"The {subject} differ most at {site}, layer {layer}: by {number(float(layer_data[name]))} "
            f"decades; the hottest channel is {peaks[0]} (A) and {peaks[1]} (B) times the median channel"
        )


def _largest(values: xr.DataArray) -> tuple[str, int]:
    place = values.argmax(...)
    largest = values.isel(place)
    return str(largest["site"].item()), int(largest["layer"].item())


def _table(data: xr.Dataset) -> list[str]:
    """One line a site, and what its columns are."""
    heads = ("site", "peak A", "B", "energy A", "B", "hot A", "B", "shared", "chance", "profiles", "peaks",
             "curves")  # fmt: skip
    rows: list[tuple[str, ...]] = [heads]
    for site in data["site"].values:
        part = data.sel(site=site)
        peak = part["relative_rms"].max(("layer", "channel")).values
        share = part["energy_share"].sel(k=1).max("layer").values
        hot = part["hot_count"].sum("layer", min_count=1).values
        shared, chance = (
            part[name].sum("layer", min_count=1).item()
            for name in ("shared_hot_count", "expected_shared_hot_count")
        )
        distances = [part[name].mean("layer").item() for name in _DISTANCES[:3]]
        cells = [*map(_cell, peak), *(f"{value:.1%}" for value in share), *map(_count, hot), _count(shared)]
        rows.append((str(site), *cells, _cell(chance), *(_cell(value, 3) for value in distances)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(heads))]
    lines = [
        "  ".join(
            [row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]
        )
        for row in rows
    ]
    return [
        *lines,
        "Largest over layers: peak (largest channel over the median one), energy in the largest channel.",
        f"Summed over layers: hot channels ({HOT:g} medians or more), those shared by index, and what chance",
        "gives. Mean over layers: distances of sorted profiles and of peaks (decades), of concentration",
        "curves (share of energy).",
    ]


def _cell(value: float, digits: int = 0) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.{digits}f}" if digits else number(value)


def _count(value: float) -> str:
    return f"{int(value):,}" if math.isfinite(value) else "-"


def _hot_lines(data: xr.Dataset) -> Iterator[str]:
    """Hot channels of the residual stream: by index, and by height."""
    site = next((name for name in _STREAM if name in data["site"].values), None)
    if site is None:
        return
    kinds = [
        f"{kind.replace('first', 'A').replace('second', 'B')}: {_entry_names(entries)}"
        for kind, entries in _by_kind(data, site).items()
        if entries
    ]
    yield f"Hot channels of {site}, in any layer: {'; '.join(kinds) or 'none in either'}"
    distance = float(data["hot_distance"].sel(site=site).mean("layer"))
    if kinds and math.isfinite(distance):
        yield (
            f"  matched by height instead of index: the k-th hottest differ by {number(distance)} decades "
            "(mean over ranks and layers)"
        )


def _by_kind(data: xr.Dataset, site: str) -> dict[str, list[dict[str, Any]]]:
    """Entries of the table of hot channels by kind, hottest first."""
    entries: dict[str, list[dict[str, Any]]] = {"shared": [], "only first": [], "only second": []}
    kind, channel = data["hot_kind"].values, data["hot_channel"].values
    ratio, layers = data["hot_ratio"].values, data["hot_layers"].values
    for index in np.flatnonzero(data["hot_site"].values == site):
        entries[str(kind[index])].append(
            {
                "channel": int(channel[index]),
                "ratio": [_json(value) for value in ratio[:, index]],
                "layers": [_json(value) for value in layers[:, index]],
            }
        )
    return entries


def _entry_names(entries: list[dict[str, Any]]) -> str:
    return _channel_names(np.array([entry["channel"] for entry in entries]))


def _significance_lines(data: xr.Dataset) -> Iterator[str]:
    """Both statistics with their intervals where they differ most, and how many channels differ by index."""
    if "top_share" not in data:
        return
    sites = [site for site in _SIGNIFICANCE_SITES if site in data["site"].values]
    site = next(
        (candidate for candidate in sites if bool(data["top_share"].sel(site=candidate).notnull().any())),
        None,
    )
    if site is None:
        return
    part = data.sel(site=site)
    for name, words in _STATISTICS.items():
        difference, q = part[f"{name}_difference"], part[f"{name}_difference_q"]
        finite = difference.notnull()
        if not bool(finite.any()):
            continue
        layer = difference["layer"].values[int(np.nanargmax(np.abs(difference.values)))]
        layer_data = part.sel(layer=layer)
        a, b = (
            f"{_statistic_text(name, value)} \u00b1 {_statistic_text(name, margin)}"
            for value, margin in zip(
                layer_data[name].values, layer_data[f"{name}_margin"].values, strict=True
            )
        )
        yield (
            f"Significance, {words} at {site}: {a} (A) and {b} (B) in layer {int(layer)}, where they differ "
            f"most; different in {int((q < LEVEL).sum())} of {int(finite.sum())} layers"
        )
    if "different_channels" in data and bool(part["different_channels"].notnull().any()):
        counts = part["different_channels"]
        channels = int(part["width"].values[0]) * int(counts.notnull().sum())
        yield (
            f"  by index, {int(counts.sum()):,} of {channels:,} channels (all layers of {site}) differ at a "
            f"false discovery rate of {LEVEL:.0%}"
        )


def _statistic_text(name: str, value: float) -> str:
    if not math.isfinite(value):
        return "-"
    return f"{value:.1%}" if name == "top_share" else number(float(value))


def _weight_lines(data: xr.Dataset) -> Iterator[str]:
    """The largest of each kind of weight, for both."""
    for name, words in (
        ("norm_gain_max_median_ratio", "Norm gains of blocks, largest over median"),
        ("outside_norm_gain_max_median_ratio", "Final norm's gains, largest over median"),
        ("embedding_row_norm_max_median_ratio", "Rows of embedding and head, largest norm over median"),
        ("down_projection_row_ratio", "Rows of down projections, max |W| over the columns' mean |W|"),
    ):
        if name in data:
            values = data[name]
            a, b = values.max([dim for dim in values.dims if dim != "run"]).values
            yield f"{words}: {_cell(float(a))} (A), {_cell(float(b))} (B)"
    if "residual_post" in data["site"].values:
        if "down_projection_row_ratio" in data:
            yield from _rows_behind(data)
        if "projection_row_ratio" in data:
            yield from _writers_behind(data)
        if "channel_gain_ratio" in data:
            yield from _gains_behind(data)
        if "channel_embedding_ratio" in data:
            yield from _embedding_behind(data)


def _hot(data: xr.Dataset, run: int, covered: np.ndarray) -> np.ndarray:
    """The hot channels of a run's residual stream, as far as they are ``covered``."""
    of_run = (data["hot_site"].values == "residual_post") & (data["hot_layers"].values[run] > 0)
    hot = data["hot_channel"].values[of_run]
    return hot[np.isin(hot, covered)]


def _gains_behind(data: xr.Dataset) -> Iterator[str]:
    """The norms' smallest and largest gain of a hot channel: norms suppress as well as amplify."""
    for run, letter in enumerate("AB"):
        ratio = data["channel_gain_ratio"].isel(run=run)
        hot = _hot(data, run, ratio["weight_channel"].values)
        flat = ratio.sel(weight_channel=hot).stack(place=ratio.dims).dropna("place")
        if not flat.size:
            continue
        ends = []
        for place in (flat[int(np.argmin(flat.values))], flat[int(np.argmax(flat.values))]):
            norm, layer, channel = (
                place[name].item() for name in ("gain_norm", "gain_layer", "weight_channel")
            )
            location = norm if layer < 0 else f"{norm}, layer {layer}"
            ends.append(f"{_cell(float(place))} ({location}, channel {channel})")
        yield (
            f"Norm gains at {letter}'s hot channels ({_channel_names(hot)}): {ends[0]} to {ends[1]} times "
            "that of the median channel"
        )


def _embedding_behind(data: xr.Dataset) -> Iterator[str]:
    for run, letter in enumerate("AB"):
        ratio = data["channel_embedding_ratio"].isel(run=run)
        hot = _hot(data, run, ratio["weight_channel"].values)
        behind = ratio.sel(weight_channel=hot)
        if hot.size and bool(behind.notnull().any()):
            place = int(np.nanargmax(behind.values))
            token = data["channel_embedding_token"].isel(run=run).sel(weight_channel=hot[place])
            yield (
                f"Embedding at {letter}'s hot channels ({_channel_names(hot)}): largest entry up to "
                f"{_cell(float(behind[place]))} times that of the median channel (channel {hot[place]}, "
                f"token {int(token)})"
            )


def _rows_behind(data: xr.Dataset) -> Iterator[str]:
    """Whether the down projections write the hot channels of the residual stream with unusual rows."""
    ratio = data["down_projection_row_ratio"].max("weight_layer")
    for run, letter in enumerate("AB"):
        rows = ratio.isel(run=run)
        hot = _hot(data, run, rows["output_channel"].values)
        if hot.size:
            yield (
                f"  of {letter}'s hot channels of residual_post ({_channel_names(hot)}): largest "
                f"{_cell(float(rows.sel(output_channel=hot).max()))}, median of all rows "
                f"{_cell(float(rows.median()))}"
            )


def _writers_behind(data: xr.Dataset) -> Iterator[str]:
    """The rows of each projection that write the hot channels of the residual stream."""
    for run, letter in enumerate("AB"):
        for name in data["projection"].values:
            rows = data["projection_row_ratio"].isel(run=run).sel(projection=name).max("projection_layer")
            hot = _hot(data, run, rows["output_channel"].values)
            behind = rows.sel(output_channel=hot)
            if hot.size and bool(behind.notnull().any()):
                channel = int(behind["output_channel"].values[int(np.nanargmax(behind.values))])
                # 1 is the largest row; NaN compares as not larger.
                rank = int((rows > behind.max()).sum()) + 1
                yield (
                    f"Rows of {name} that write {letter}'s hot channels ({_channel_names(hot)}): max |W| up "
                    f"to {_cell(float(behind.max()))} times that of the median row (channel {channel}, the "
                    f"{_ordinal(rank)} largest of {int(rows.notnull().sum()):,} rows)"
                )


def _ordinal(rank: int) -> str:
    ending = "th" if rank % 100 in (11, 12, 13) else {1: "st", 2: "nd", 3: "rd"}.get(rank % 10, "th")
    return f"{rank}{ending}"


def _channel_names(channels: np.ndarray) -> str:
    more = len(channels) - _MOST_NAMES
    return ", ".join(map(str, channels[:_MOST_NAMES])) + (f" and {more} more" if more > 0 else "")


def plain_values(comparison: ChannelComparison) -> dict[str, Any]:
    """Distances by site and layer, hot channels, notes; NaN becomes None."""
    data = comparison.data
    sites = {}
    for site in data["site"].values:
        part = data.sel(site=site)
        rows = []
        for layer in part["layer"].values[part["other_layer"].notnull().values]:
            layer_data = part.sel(layer=layer)
            rows.append(
                {"layer": int(layer), "other_layer": int(layer_data["other_layer"])}
                | {name: _json(float(layer_data[name])) for name in (*_DISTANCES, "hot_jaccard")}
                | {
                    name: _json(float(layer_data[name]))
                    for name in ("shared_hot_count", "expected_shared_hot_count")
                }
                | {
                    name: _json(float(layer_data[name]))
                    for name in _SIGNIFICANCE_NUMBERS
                    if name in layer_data
                }
                | {"hot_count": [_json(value) for value in layer_data["hot_count"].values]}
                | {
                    "peak_to_median": [
                        _json(value) for value in layer_data["relative_rms"].max("channel").values
                    ]
                }
            )
        kinds = _by_kind(data, str(site))
        sites[str(site)] = {
            "widths": [int(width) for width in part["width"].values],
            "layers": rows,
            "hot_channels": {kind: entries[:_MOST_ENTRIES] for kind, entries in kinds.items()},
            "hot_channels_in_all": {kind: len(entries) for kind, entries in kinds.items()},
        }
    return {
        **{key: data.attrs[key] for key in ("title", "models", "steps", "stratum", "significance")},
        "sites": sites,
        "notes": list(comparison.notes),
    }


def _json(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
