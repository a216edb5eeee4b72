"""When, where and by whom outliers were written, in a few sentences."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import xarray as xr

from osp_diag.schema import stratum_words
from osp_diag.wording import number

if TYPE_CHECKING:
    from osp_diag.analyses.emergence.history import Emergence

__all__ = ["text_of"]

_WIDTH = 100


def text_of(emergence: Emergence) -> str:
    """One paragraph a stratum (first token, other tokens), then what could not be answered."""
    strata = [str(name) for name in emergence.onsets["stratum"].values]
    paragraphs = [name for name in ("first", "rest") if name in strata] or strata
    attrs = emergence.onsets.attrs
    lines = [
        f"{attrs['model']}: {attrs['statistic']}, steps {attrs['first_probe']:,.0f} to "
        f"{attrs['last_probe']:,.0f}. An outlier is a kurtosis above {attrs['departure']:g} times the noise; "
        f"intervals hold {attrs['level']:.0%} of {attrs['draws']} bootstrap draws."
    ]
    lines += [f"On {stratum_words(name)}: {' '.join(_of_stratum(emergence, name))}" for name in paragraphs]
    lines += [f"Not answered: {note}." for note in emergence.notes]
    return "\n".join(
        textwrap.fill(line, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)
        for line in lines
    )


def _of_stratum(emergence: Emergence, stratum: str) -> Iterator[str]:
    first = emergence.first.sel(stratum=stratum)
    if not str(first["site"].item()):
        unknown = bool((emergence.onsets["state"].sel(stratum=stratum) == "unknown").any())
        yield "too few probes hold such tokens." if unknown else "no site leaves the noise."
        return
    yield _first_place(emergence, stratum)
    yield from _growth(emergence.onsets, stratum)
    yield from _writer(emergence, stratum)
    yield from _channels(emergence.channels, stratum)


def _first_place(emergence: Emergence, stratum: str) -> str:
    first = emergence.first.sel(stratum=stratum)
    site, layer = str(first["site"].item()), int(first["layer"])
    part = emergence.onsets.sel(stratum=stratum, site=site, layer=layer)
    name = f"{site} of layer {layer}"
    if str(part["state"].item()) == "from the start":
        sentence = f"{name} is above the noise from the first probe (step {float(part['onset']):,.0f}) on"
    else:
        sentence = f"{name} leaves the noise first, at step {_span(part, 'onset')}"
    rivals = [rival for rival in str(first["rivals"].item()).split(", ") if rival]
    if rivals:
        sentence += f"; {len(rivals)} other place{'s are' * (len(rivals) > 1) or ' is'} within its interval"
        sentence += f" ({', '.join(rivals[:3])}{', …' * (len(rivals) > 3)})"
    return sentence + "."


def _span(part: xr.Dataset, name: str) -> str:
    """Estimate and interval: 40 (20 to 60)."""
    value, low, high = (float(part[name + end]) for end in ("", "_low", "_high"))
    return f"{number(value)} ({number(low)} to {number(high)})"


def _growth(onsets: xr.Dataset, stratum: str) -> Iterator[str]:
    """The block output that ends highest above the noise: how fast it grew, and where it stands."""
    if "residual_post" not in onsets["site"].values:
        return
    part = onsets.sel(site="residual_post", stratum=stratum)
    departed = part["layer"].values[np.isfinite(part["onset"].values)]
    whole = int((part["state"] != "").sum())
    steps = part["onset"].sel(layer=departed)
    if not len(departed):
        yield "No block output departs."
        return
    earliest, latest = (f"{float(step):,.0f}" for step in (steps.min(), steps.max()))
    when = f"at step {earliest}" if earliest == latest else f"between steps {earliest} and {latest}"
    yield f"{len(departed)} of {whole} block outputs depart, {when}."
    timed = part.sel(layer=departed).dropna("layer", subset=["doubling_time"])
    if not timed.sizes["layer"]:
        yield "How fast they grow can't be told: too few probes lie between onset and plateau."
        return
    fastest = timed.isel(layer=int(timed["doubling_time"].values.argmin()))
    yield (
        f"The fastest, layer {int(fastest['layer'])}, doubles every {_span(fastest, 'doubling_time')} steps"
        + (
            f" until step {float(fastest['plateau_step']):,.0f}, then stays near {_span(fastest, 'plateau')}."
            if np.isfinite(float(fastest["plateau"]))
            else " and has reached no plateau."
        )
    )


def _writer(emergence: Emergence, stratum: str) -> Iterator[str]:
    """Who wrote the largest channels of the first block output to depart, at its onset."""
    if emergence.writers is None or "residual_post" not in emergence.onsets["site"].values:
        return
    onset = emergence.onsets["onset"].sel(site="residual_post", stratum=stratum).dropna("layer")
    if not onset.sizes["layer"]:
        return
    layer = int(onset["layer"].values[int(onset.values.argmin())])
    step = int(onset.min())
    at = emergence.writers.sel(step=step, layer=layer, stratum=stratum)
    writer, share = str(at["writer"].item()), float(at["attention_share"])
    energy = at["energy"]
    if not writer:
        return
    channels = f"its {emergence.writers.attrs['top']} largest channels"
    yield (
        f"In layer {layer}, the first block output to depart, "
        + {
            "attention": f"attention wrote {channels} ({share:.0%} of what the block added there).",
            "MLP": f"the MLP wrote {channels} ({1 - share:.0%} of what the block added there).",
            "both": f"attention and the MLP wrote {channels} ({share:.0%} and {1 - share:.0%}).",
            "earlier": f"{channels} came from before the block "
            f"({float(energy.sel(part='entering') / energy.sum('part')):.0%} of their energy).",
        }[writer]
    )


def _channels(channels: xr.Dataset | None, stratum: str) -> Iterator[str]:
    if channels is None:
        return
    part = channels.sel(stratum=stratum)
    born, died = (np.isfinite(part[name].transpose("layer", "channel").values) for name in ("birth", "death"))
    ever, alive = born.any(axis=0), (born & ~died).any(axis=0)
    if not ever.any():
        yield f"No channel is ever {channels.attrs['times']:g} times the median channel."
        return
    peak = np.where(alive, part["peak"].max("layer").values, -1.0)
    order = np.argsort(-peak, kind="stable")[: min(4, int(alive.sum()))]
    names = ", ".join(str(channel) for channel in part["channel"].values[order])
    late = part["top_overlap"].isel(step=slice(part.sizes["step"] // 2, None)).mean()
    count = int(ever.sum())
    yield (
        f"{count} channel{'s are' if count > 1 else ' is'} hot at some step and layer, {int(alive.sum())} at "
        f"the last probe{f' (hottest: {names})' if names else ''}. From one probe to the next the "
        f"{channels.attrs['top']} largest overlap by {float(late):.2f} in the second half of the run (by "
        f"chance {channels.attrs['chance']:.2f})."
    )
