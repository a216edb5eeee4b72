"""Two models' channels compared: which are hot, how unevenly energy is spread, and where both differ.

For two runs, two checkpoints, or two steps of one run. Every number is made from ``channel_rms``, the RMS
of each channel over the tokens of a stratum, relative to the median channel of its layer, so that widths
and scales may differ (:mod:`osp_diag.analyses.channels.profiles`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.analyses.channels.comparison_data import (
    SiteProfiles,
    compared_site,
    hot_channel_table,
)
from osp_diag.analyses.channels.comparison_weights import compared_weights
from osp_diag.analyses.channels.significance import (
    GroupSums,
    group_sums,
    no_significance_reason,
    with_significance,
)
from osp_diag.analyses.in_notebook import in_notebook
from osp_diag.analyses.run_labels import labels_of, run_name
from osp_diag.errors import StoreError, UsageError
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

__all__ = ["ChannelComparison", "compare_channels", "matched_layers"]

_TOKENS = ("token_fingerprint", "token_source", "tokens", "tokenizer")


@dataclass(frozen=True)
class ChannelComparison:
    """What :func:`compare_channels` returns."""

    data: xr.Dataset
    """maps, differences, curves, distances and hot channels, each with its definition"""
    notes: tuple[str, ...]
    """what could not be compared and why, and what to keep in mind"""

    def text(self) -> str:
        """A table of the sites, the hot channels of the residual stream, and the notes."""
        from osp_diag.analyses.channels.comparison_text import text_of

        return text_of(self)

    def _repr_html_(self) -> str:
        return in_notebook(self.text())

    def netcdf(self) -> bytes:
        """``data`` as a netCDF file, with the notes among its attributes."""
        lines = {"models": "\n".join(self.data.attrs["models"]), "notes": "\n".join(self.notes)}
        # netCDF 3 has no dimension of length 0: without hot channels there is no table of them.
        empty = [dim for dim, size in self.data.sizes.items() if not size]
        data = self.data.drop_dims(empty).assign_attrs(lines)
        # Labels of runs are StringDType, which xarray does not write as netCDF.
        texts = {
            name: (array.dims, np.array(array.values.tolist(), dtype=str))
            for name, array in data.coords.items()
            if array.dtype.kind in "OT"
        }
        content: Any = data.assign_coords(texts).to_netcdf(engine="scipy")
        return bytes(content)

    def as_dict(self) -> dict[str, Any]:
        """The distances and hot channels as plain values that JSON knows; maps and curves are left out."""
        from osp_diag.analyses.channels.comparison_text import plain_values

        return plain_values(self)


def compare_channels(
    first: Run,
    second: Run,
    *,
    step: int | None = None,
    other_step: int | None = None,
    stratum: str = "all",
    sites: Sequence[str] | None = None,
) -> ChannelComparison:
    """The channels of two runs, or of two steps of one, site by site and layer by layer.

    Layers are matched by their number where both have the same ones, else by relative depth, going by the
    layers of the first run. Channels are matched by index (only where widths are equal) and by sorted
    profile (always).

    Parameters
    ----------
    first, second : open runs; the same one twice for two of its steps
    step : of the first run, and of the second where ``other_step`` is None; each one's last by default
    stratum : of which tokens: all, first, delimiter or rest
    sites : which; by default all that both runs measured by channel

    Returns
    -------
    ``data`` has the dimensions ``run`` (two), ``site``, ``layer`` (of the first run; ``other_layer`` is its
    match), ``channel``, ``k`` and ``width_share``; what a site lacks is NaN. Its attributes say models,
    steps and stratum.

    Raises
    ------
    UsageError : other protocols, or no such step, stratum or site
    StoreError : the runs have no site in common that was measured by channel
    """
    _check_protocols(first, second)
    steps = (step_of(first, step), step_of(second, step if other_step is None else other_step))
    # Site by site: both profiles, the pairs of layers, and significance where both hold sums by group.
    notes = [*_token_notes(first, second, stratum), *_basis_notes(first, second)]
    parts: list[xr.Dataset] = []
    resampled: dict[str, tuple[int, int, bool]] = {}
    for site in _shared_sites(first, second, sites, notes):
        profiles = [_profiles(run, site, at, stratum) for run, at in zip((first, second), steps, strict=True)]
        pairs = matched_layers(profiles[0].layers, profiles[1].layers, _depth(first), _depth(second))
        notes += _site_notes(site, profiles, pairs)
        if not pairs:
            continue
        part = compared_site(profiles[0], profiles[1], pairs)
        sums = [group_sums(run, site, at, stratum) for run, at in zip((first, second), steps, strict=True)]
        if sums[0] is not None and sums[1] is not None:
            paired = _same_tokens(first, second, sums[0], sums[1])
            part = with_significance(part, sums[0], sums[1], pairs, paired=paired)
            resampled[site] = (sums[0].groups, sums[1].groups, paired)
        parts.append(part)
    if not parts:
        raise StoreError(
            f"the runs of {run_name(first)} and {run_name(second)} have no layer in common at any site; "
            "probe both at the same layers"
        )
    labels = labels_of((first, second), steps)
    data = xr.concat(parts, "site", join="outer", data_vars="all", coords="minimal", combine_attrs="override")
    notes += _width_notes(data)
    weights, weight_notes = compared_weights(first, second, steps)
    data = data.merge(hot_channel_table(data)).merge(weights).assign_coords(run=labels)
    data.attrs = {
        "title": f"Channels of {labels[0]} and {labels[1]}, {stratum} tokens",
        "models": [run_name(first), run_name(second)],
        "steps": list(steps),
        "stratum": stratum,
        "significance": _significance(resampled, first, second),
    }
    return ChannelComparison(data, tuple(dict.fromkeys(notes + weight_notes)))


def _same_tokens(first: Run, second: Run, first_sums: GroupSums, second_sums: GroupSums) -> bool:
    """Whether group by group both runs were fed the same tokens."""
    keys = ("token_fingerprint", "sequence_length", "batch_size", "ranks")
    same = all(first.attrs.get(key) == second.attrs.get(key) for key in keys)
    alike = first_sums.count.shape[0] == second_sums.count.shape[0]
    # Fingerprints do not say how the tokens were cut into groups; batches and counts do.
    has_fingerprint = first.attrs.get("token_fingerprint") is not None
    return (
        has_fingerprint and same and alike and bool((first_sums.count[:, 0] == second_sums.count[:, 0]).all())
    )


def _significance(resampled: dict[str, tuple[int, int, bool]], first: Run, second: Run) -> str:
    """How significance was estimated, or why it was not."""
    if not resampled:
        return no_significance_reason([run_name(first), run_name(second)])
    a, b, paired = next(iter(resampled.values()))
    resampling = (
        f"over {a} groups of batches, resampled together: both were fed the same tokens"
        if paired
        else f"over {a} and {b} groups of batches, resampled apart: the runs were fed other tokens"
    )
    return (
        f"by bootstrap {resampling}; 95% intervals by Student's t, p-values adjusted by Benjamini-Hochberg "
        f"within a site; at {', '.join(resampled)}"
    )


def matched_layers(
    first: Sequence[int], second: Sequence[int], depth: int | None, other_depth: int | None
) -> list[tuple[int, int]]:
    """Pairs of layers: equal numbers in models of equal depth, else the nearest (layer + ½) / depth.

    Single layers (embedding, final norm) match whatever their number. ``depth`` is a model's number of
    layers; where it is None the layers that were measured count.
    """
    if len(first) == len(second) == 1:
        return [(first[0], second[0])]
    first_depth, second_depth = depth or max(first) + 1, other_depth or max(second) + 1
    if first_depth == second_depth:
        return [(layer, layer) for layer in first if layer in set(second)]
    # The middle of a layer, half a layer beyond its number: 0 is the model's input, 1 its output.
    second_places = {layer: (layer + 0.5) / second_depth for layer in second}

    def nearest(place: float) -> int:
        return min(second_places, key=lambda layer: abs(second_places[layer] - place))

    return [(layer, nearest((layer + 0.5) / first_depth)) for layer in first]


def _profiles(run: Run, site: str, step: int, stratum: str) -> SiteProfiles:
    rms = run.at(site)["channel_rms"].sel(step=step, drop=True)
    strata = [str(name) for name in rms["stratum"].values]
    if stratum not in strata:
        raise UsageError(f"the stratum is one of {', '.join(strata)}, not {stratum!r}")
    rms = rms.sel(stratum=stratum, drop=True).transpose("layer", "channel").load()
    return SiteProfiles(
        site, [int(layer) for layer in rms["layer"].values], rms.values.astype(np.float64), dict(rms.attrs)
    )


def _check_protocols(first: Run, second: Run) -> None:
    # Why runs of two protocols do not compare: docs/decisions.md, Runs.
    protocols = [str(run.attrs.get("protocol", "unknown")) for run in (first, second)]
    if protocols[0] != protocols[1]:
        raise UsageError(
            f"the runs of {run_name(first)} and {run_name(second)} were probed under different protocols, "
            f"{protocols[0]} and {protocols[1]}: their channels differ whatever the models; probe both under "
            "one protocol"
        )


def _token_notes(first: Run, second: Run, stratum: str) -> list[str]:
    """What differs in how the models were fed."""
    first_attrs, second_attrs = first.attrs, second.attrs
    notes = []
    differing = [key for key in _TOKENS if first_attrs.get(key) != second_attrs.get(key)]
    if differing:
        notes.append(
            f"the runs were fed different tokens ({', '.join(differing)} differ): differences are of models "
            "and of tokens together"
        )
    lengths = [run.attrs.get("sequence_length") for run in (first, second)]
    if lengths[0] != lengths[1] and stratum == "all":
        notes.append(
            f"sequences of {lengths[0]} and {lengths[1]} tokens: first tokens weigh differently in `all`; "
            "compare the stratum `rest`, too"
        )
    for key, words in (("bos", "BOS"), ("dtype", "dtype")):
        if first_attrs.get(key) != second_attrs.get(key):
            notes.append(
                f"{words} differs: {first_attrs.get(key, 'unknown')} and {second_attrs.get(key, 'unknown')}"
            )
    return notes


def _basis_notes(first: Run, second: Run) -> list[str]:
    prints = {run.attrs.get("model_fingerprint") for run in (first, second)}
    paths = {run.path.resolve() for run in (first, second) if run.path is not None}
    same_run = first is second or (len(paths) == 1 and None not in (first.path, second.path))
    if same_run or (len(prints) == 1 and None not in prints):
        return []
    # Why sorted profiles, and what chance gives beside matches by index: docs/decisions.md, Analyses.
    return [
        "bases of separately trained models are unrelated: that a channel number is hot in both means "
        "something only beyond what chance gives (expected_shared_hot_count); sorted profiles compare anyway"
    ]


def _shared_sites(first: Run, second: Run, requested: Sequence[str] | None, notes: list[str]) -> list[str]:
    """Sites that both runs measured by channel, in network order; why others are left out goes to notes."""
    measured = [[site for site in run.sites if "channel_rms" in run.at(site)] for run in (first, second)]
    for site in requested or ():
        for run, present in zip((first, second), measured, strict=True):
            if site not in present:
                reason = run.absent_sites.get(site)
                raise UsageError(
                    f"the run of {run_name(run)} has no channel_rms at {site!r}"
                    + (f" ({reason})" if reason else f"; it has {', '.join(present) or 'it nowhere'}")
                )
    for run, sites_of_run, sites_of_other in (
        (second, measured[1], measured[0]),
        (first, measured[0], measured[1]),
    ):
        for site in sites_of_other if not requested else ():
            if site not in sites_of_run:
                reason = run.absent_sites.get(site, "it was not probed with channel_moments")
                notes.append(
                    f"{site} is not compared: the run of {run_name(run)} does not hold it ({reason})"
                )
    shared = [site for site in measured[0] if site in measured[1] and (not requested or site in requested)]
    if not shared:
        raise StoreError(
            f"the runs of {run_name(first)} and {run_name(second)} have no site in common with channel_rms; "
            "probe both with the estimator channel_moments"
        )
    return shared


def _site_notes(site: str, profiles: Sequence[SiteProfiles], pairs: Sequence[tuple[int, int]]) -> list[str]:
    notes = []
    for profile in profiles:
        unusable = [
            layer for layer, row in zip(profile.layers, profile.relative, strict=True) if np.isnan(row).any()
        ]
        if unusable:
            notes.append(
                f"{site}, layers {', '.join(map(str, unusable))}: not compared; there are no such tokens, a "
                "channel is NaN or infinite, or the median channel is 0"
            )
    if len(profiles[0].layers) > 1 and any(layer != match for layer, match in pairs):
        notes.append("the models have different depths: layers are matched by relative depth (other_layer)")
        unmatched = len(profiles[1].layers) - len({match for _, match in pairs})
        if unmatched:
            notes.append(
                f"{unmatched} layers of the second model have no match and are left out; to see all of them, "
                "give the deeper model first"
            )
    elif len(pairs) < max(len(profile.layers) for profile in profiles):
        notes.append(f"{site}: only layers that both runs measured are compared")
    return notes


def _width_notes(data: xr.Dataset) -> list[str]:
    """Sites of unequal width, in one sentence."""
    pairs = {str(site): data["width"].sel(site=site).values.astype(int) for site in data["site"].values}
    widths = [f"{site} {pair[0]:,} and {pair[1]:,}" for site, pair in pairs.items() if pair[0] != pair[1]]
    if not widths:
        return []
    return [
        f"widths differ ({', '.join(widths)}): there, channels are compared by sorted profile only, on "
        "shares of the width"
    ]


def _depth(run: Run) -> int | None:
    depth = run.attrs.get("number_of_layers")
    return None if depth is None else int(depth)
