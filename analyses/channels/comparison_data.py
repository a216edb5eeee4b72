"""The numbers of a comparison of channels, as labelled arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float

from osp_diag.analyses.channels.profiles import (
    HOT,
    SMALLEST,
    concentration_curve,
    concentration_distance,
    decades,
    hot_distance,
    is_hot,
    peak_distance,
    profile_distance,
    relative_rms,
    top_profile,
)

__all__ = ["SHARES", "SiteProfiles", "compared_site", "hot_channel_table"]

SHARES = np.logspace(-5, 0, 101)
"""Shares of the width at which sorted profiles are sampled: densely where few channels are hot."""

ONLY_FIRST, ONLY_SECOND, SHARED = "only first", "only second", "shared"
_LOGARITHM = f"relative RMS not below {SMALLEST:g}"

_DEFINITIONS: dict[str, tuple[str, str]] = {
    "relative_rms": ("1", "s_j / median_k s_k: RMS of a channel over the lower median channel of its layer"),
    "width": ("channels", "number of channels of the site"),
    "difference": (
        "decades",
        f"log10 of relative_rms, first minus second, of the channel with the same index ({_LOGARITHM})",
    ),
    "sorted_difference": (
        "decades",
        "log10 of relative_rms, first minus second, of the ⌈u·d⌉-th largest channel, u = width_share",
    ),
    "energy_share": ("1", "concentration curve: share of Σ_j s_j² in the k largest channels"),
    "profile_distance": (
        "decades",
        f"Wasserstein-1 between the sets of log10 relative_rms: ∫ |Q_A(u) − Q_B(u)| du ({_LOGARITHM})",
    ),
    "peak_distance": ("decades", "|log10 of the largest relative_rms, first minus second|"),
    "concentration_distance": (
        "1",
        "max over u of |C_A(u) − C_B(u)|, C(u) the share of energy in the largest u·d channels",
    ),
    "hot_distance": (
        "decades",
        "mean |log10 r_A(k) − log10 r_B(k)| of the k-th largest relative_rms, over ranks hot in either",
    ),
    "hot_count": ("channels", f"channels with relative_rms of at least {HOT:g}"),
    "shared_hot_count": ("channels", "channels that are hot in both, by index; NaN where widths differ"),
    "expected_shared_hot_count": (
        "channels",
        "what chance gives: hot_count of the first times that of the second, over the width",
    ),
    "hot_jaccard": ("1", "shared hot channels over hot in either; NaN where neither has any"),
}


@dataclass(frozen=True)
class SiteProfiles:
    """RMS of the channels of one site of one model, (layer, channel)."""

    site: str
    layers: list[int]
    rms: Float[np.ndarray, "layer channel"]
    attrs: dict[str, Any]

    @cached_property
    def relative(self) -> Float[np.ndarray, "layer channel"]:
        return relative_rms(self.rms)

    @cached_property
    def curve(self) -> Float[np.ndarray, "layer count"]:
        return concentration_curve(self.rms)

    def at(self, layers: Sequence[int]) -> SiteProfiles:
        """These layers, in this order; the same one may come several times."""
        places = [self.layers.index(layer) for layer in layers]
        return SiteProfiles(self.site, list(layers), self.rms[places], self.attrs)


def compared_site(first: SiteProfiles, second: SiteProfiles, pairs: Sequence[tuple[int, int]]) -> xr.Dataset:
    """Maps, differences, curves and distances of one site, for matched layers."""
    layers, matched = [layer for layer, _ in pairs], [match for _, match in pairs]
    first, second = first.at(layers), second.at(matched)
    arrays = _maps(first, second) | _distances(first, second) | _hot(first, second)
    variables = {
        name: (dims, values, {"units": _DEFINITIONS[name][0], "definition": _DEFINITIONS[name][1]})
        for name, (dims, values) in arrays.items()
    }
    coords = {
        "layer": layers,
        "channel": np.arange(arrays["relative_rms"][1].shape[-1]),
        "k": 2 ** np.arange(arrays["energy_share"][1].shape[-1]),
        "other_layer": (("layer",), np.asarray(matched, dtype=float)),
        "width_share": ("width_share", SHARES, {"definition": "share u of the channels, the hottest first"}),
    }
    dataset = xr.Dataset(variables, coords=coords).reset_coords("other_layer")
    dataset["relative_rms"].attrs["estimator"] = first.attrs.get("estimator", "channel_moments/1")
    dataset["k"].attrs = {"definition": "so many channels, the largest of the layer", "units": "channels"}
    dataset["other_layer"].attrs = {"definition": "the layer of the second run that this one is matched with"}
    return dataset.expand_dims(site=[first.site])


def _maps(first: SiteProfiles, second: SiteProfiles) -> dict[str, Any]:
    widths = [side.rms.shape[1] for side in (first, second)]
    widest, same = max(widths), widths[0] == widths[1]
    padded = [
        np.pad(side.relative, ((0, 0), (0, widest - width)), constant_values=np.nan)
        for side, width in zip((first, second), widths, strict=True)
    ]
    by_index = decades(padded[0]) - decades(padded[1]) if same else np.full(padded[0].shape, np.nan)
    tops = [decades(top_profile(side.relative, SHARES)) for side in (first, second)]
    counts = 2 ** np.arange(widest.bit_length())
    curves = [
        np.stack(
            [
                side.curve[:, k] if k < side.curve.shape[1] else np.full(len(side.layers), np.nan)
                for k in counts
            ],
            axis=-1,
        )
        for side in (first, second)
    ]
    # One channel count for both runs, the smaller padded with NaN; curves at k = 1, 2, 4 … up to the width.
    # Single precision: maps of every site of a large model are the bulk of the file.
    return {
        "relative_rms": (("run", "layer", "channel"), np.stack(padded).astype(np.float32)),
        "difference": (("layer", "channel"), by_index.astype(np.float32)),
        "sorted_difference": (("layer", "width_share"), tops[0] - tops[1]),
        "energy_share": (("run", "layer", "k"), np.stack(curves)),
        "width": (("run",), np.asarray(widths, dtype=float)),
    }


def _distances(first: SiteProfiles, second: SiteProfiles) -> dict[str, Any]:
    # Why four distances and not one: docs/decisions.md, Analyses.
    profiles = list(zip(first.relative, second.relative, strict=True))
    curves = zip(first.curve, second.curve, strict=True)
    return {
        "profile_distance": (("layer",), np.array([profile_distance(*pair) for pair in profiles])),
        "peak_distance": (("layer",), np.array([peak_distance(*pair) for pair in profiles])),
        "hot_distance": (("layer",), np.array([hot_distance(*pair) for pair in profiles])),
        "concentration_distance": (
            ("layer",),
            np.array([concentration_distance(*pair) for pair in curves]),
        ),
    }


def _hot(first: SiteProfiles, second: SiteProfiles) -> dict[str, Any]:
    """How many channels are hot, and how many in both."""
    hot = [is_hot(side.relative) for side in (first, second)]
    counts = np.stack([side.sum(axis=-1) for side in hot]).astype(float)
    unknown = np.stack([np.isnan(side.relative).any(axis=-1) for side in (first, second)])
    counts[unknown] = np.nan
    nothing = np.full(counts.shape[1], np.nan)
    shared, expected, jaccard = nothing, nothing, nothing
    if hot[0].shape == hot[1].shape:
        shared = np.where(unknown.any(axis=0), np.nan, (hot[0] & hot[1]).sum(axis=-1))
        # Two random sets of a and b channels out of d share a·b/d on average.
        expected = counts[0] * counts[1] / hot[0].shape[-1]
        # Jaccard: |A ∩ B| / |A ∪ B|, with |A ∪ B| = |A| + |B| − |A ∩ B|.
        either = counts.sum(axis=0) - shared
        jaccard = np.divide(shared, either, out=nothing.copy(), where=either > 0)
    return {
        "hot_count": (("run", "layer"), counts),
        "shared_hot_count": (("layer",), shared),
        "expected_shared_hot_count": (("layer",), expected),
        "hot_jaccard": (("layer",), jaccard),
    }


def hot_channel_table(data: xr.Dataset) -> xr.Dataset:
    """Every channel that is hot in some layer of either run: one entry a site and channel, hottest first.

    ``hot_site`` and ``hot_channel`` name it, ``hot_ratio`` (run) is its largest relative RMS over layers,
    ``hot_layers`` (run) the number of layers in which it is hot. ``hot_kind`` says whether it is hot in both
    runs, by index, or in one; where widths differ, channels with one index are entries of their own.
    """
    columns: dict[str, list[Any]] = {name: [] for name in ("site", "channel", "kind", "ratio", "layers")}
    for site in data["site"].values:
        part = data.sel(site=site)
        relative = part["relative_rms"].transpose("run", "layer", "channel").values.astype(float)
        # Over layers: the largest ratio of each channel (0 where nothing is), and in how many it is hot.
        highest = np.nanmax(np.where(np.isnan(relative), 0.0, relative), axis=1)
        layers = is_hot(relative).sum(axis=1)
        for kind, members in _kinds(
            layers > 0, same_width=bool(part["width"][0] == part["width"][1])
        ).items():
            for channel in np.flatnonzero(members):
                # Of unequal widths, an index is a channel of one run only, and says nothing of the other.
                only_run = {ONLY_FIRST: 0, ONLY_SECOND: 1}.get(kind)
                absent_run = (
                    None if only_run is None or part["width"][0] == part["width"][1] else 1 - only_run
                )
                ratio, count = highest[:, channel].copy(), layers[:, channel].astype(float)
                if absent_run is not None:
                    ratio[absent_run] = count[absent_run] = np.nan
                values = (str(site), int(channel), kind, ratio, count)
                for name, value in zip(columns, values, strict=True):
                    columns[name].append(value)
    return _hot_table(columns)


def _kinds(hot: np.ndarray, *, same_width: bool) -> dict[str, np.ndarray]:
    """Which channels are of which kind, from ``hot`` (run, channel)."""
    if not same_width:
        return {ONLY_FIRST: hot[0], ONLY_SECOND: hot[1]}
    return {SHARED: hot[0] & hot[1], ONLY_FIRST: hot[0] & ~hot[1], ONLY_SECOND: hot[1] & ~hot[0]}


def _hot_table(columns: dict[str, list[Any]]) -> xr.Dataset:
    count = len(columns["site"])
    ratio = np.array(columns["ratio"], dtype=float).reshape(count, 2)
    layers = np.array(columns["layers"], dtype=float).reshape(count, 2)
    order = np.argsort(-np.nanmax(ratio, axis=1), kind="stable") if count else np.empty(0, int)
    names = {name: np.array(columns[name], dtype=str)[order] for name in ("site", "kind")}
    return xr.Dataset(
        {
            "hot_site": ("hot", names["site"]),
            "hot_channel": ("hot", np.array(columns["channel"], dtype=np.int64)[order]),
            "hot_kind": ("hot", names["kind"], {"definition": "hot in both runs by index, or in one"}),
            "hot_ratio": (
                ("run", "hot"),
                ratio[order].T,
                {"units": "1", "definition": "largest relative_rms of the channel over layers"},
            ),
            "hot_layers": (
                ("run", "hot"),
                layers[order].T,
                {"units": "layers", "definition": f"layers with relative_rms of at least {HOT:g}"},
            ),
        }
    )
