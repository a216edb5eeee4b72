"""The tables of a page: columns, and rows of plain values that a reader can sort and take away."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.analyses.channels.profiles import HOT, is_hot, relative_rms
from osp_diag.analyses.emergence.history import Emergence
from osp_diag.figures.report.explorer import SITES
from osp_diag.figures.report.heads import EVIDENCE, WORDS, Heads
from osp_diag.runs.run import Run
from osp_diag.schema import ordinary_stratum
from osp_diag.wording import number

__all__ = ["Table", "channel_table", "head_table", "layer_table"]

MOST_ROWS = 400


@dataclass
class Table:
    """A table of several runs."""

    name: str
    """of the file that a reader saves"""
    title: str
    columns: list[tuple[str, str]]
    """heading and what it means"""
    rows: list[tuple[int, list[Any]]] = field(default_factory=list)
    """the run's place and the cells: text, numbers, None"""
    note: str = ""

    def shortened(self) -> Table:
        """At most so many rows, and a note of what was left out."""
        if len(self.rows) > MOST_ROWS:
            self.note = f"The first {MOST_ROWS} of {len(self.rows):,} rows; the run itself has all."
            self.rows = self.rows[:MOST_ROWS]
        return self


def cell_text(value: Any) -> str:
    """A cell for the eye."""
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return ""
    return number(value) if isinstance(value, float) else str(value)


_BY_LAYER = (
    ("OSP kurtosis, all", "osp_excess_kurtosis", "all"),
    ("first token", "osp_excess_kurtosis", "first"),
    ("other tokens", "osp_excess_kurtosis", "rest"),
    ("max / median", "max_median_ratio", "all"),
    ("largest |x|", "absolute_maximum", "all"),
    ("massive, a sequence", "massive_activation_count", "all"),
)


def layer_table(runs: Sequence[Run], labels: Sequence[str]) -> Table:
    """A row for each run, site and layer, at the last step."""
    columns = [("run", ""), ("site", "where"), ("layer", "from 0")]
    columns += [(heading, f"{name}, {stratum} tokens") for heading, name, stratum in _BY_LAYER]
    columns.append(("hottest channel", "of largest RMS on other tokens"))
    columns.append(("times the median", "its RMS over that of the median channel"))
    table = Table("layers", "Sites and layers at the last step", columns)
    for place, run in enumerate(runs):
        for site in (name for name in SITES if name in run.sites):
            at = run.at(site).isel(step=-1)
            parts = [_by_layer(at, name, stratum) for _, name, stratum in _BY_LAYER]
            channel, ratio = _hottest(at)
            for row, layer in enumerate(at["layer"].values):
                cells = [labels[place], site, int(layer), *(part[row] for part in parts)]
                table.rows.append((place, [*cells, channel[row], ratio[row]]))
    return table.shortened()


def _by_layer(at: xr.Dataset, name: str, stratum: str) -> list[float | None]:
    count = at.sizes["layer"]
    if name not in at or set(at[name].dims) != {"layer", "stratum"}:
        return [None] * count
    if stratum == "rest":
        stratum = ordinary_stratum(map(str, at["stratum"].values))
    if stratum not in at["stratum"].values:
        return [None] * count
    return [_plain(value) for value in at[name].sel(stratum=stratum).values]


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None


def _hottest(at: xr.Dataset) -> tuple[list[int | None], list[float | None]]:
    count = at.sizes["layer"]
    if "channel_rms" not in at:
        return [None] * count, [None] * count
    rms = at["channel_rms"]
    rms = rms.sel(stratum=ordinary_stratum(map(str, rms["stratum"].values)))
    values = rms.transpose("layer", "channel").values.astype(np.float64)
    channels: list[int | None] = []
    ratios: list[float | None] = []
    for row in relative_rms(values):
        measured = not np.isnan(row).any()
        channels.append(int(rms["channel"].values[row.argmax()]) if measured else None)
        ratios.append(float(row.max()) if measured else None)
    return channels, ratios


def channel_table(
    runs: Sequence[Run], labels: Sequence[str], emergences: Sequence[Emergence | None]
) -> Table:
    """Hot channels of block outputs: where, how hot, and in a training run since when.

    ``emergences`` has an entry for each run; None where its emergence could not be traced.
    """
    columns = [
        ("run", ""),
        ("channel", f"of residual_post, with an RMS of at least {HOT:g} times the median channel's"),
        ("stratum", "of which tokens"),
        ("layers", "in how many layers it is hot"),
        ("hottest in layer", ""),
        ("times the median", "its RMS over that of the median channel, there"),
        ("hot since step", "first probed step at which it is hot anywhere"),
    ]
    table = Table("channels", "Hot channels at the last step", columns)
    for place, run in enumerate(runs):
        if "residual_post" not in run.sites or "channel_rms" not in run.at("residual_post"):
            continue
        rms = run.at("residual_post")["channel_rms"].isel(step=-1)
        rows = []
        for stratum in _strata_with_outliers(map(str, rms["stratum"].values)):
            values = rms.sel(stratum=stratum).transpose("layer", "channel").values.astype(np.float64)
            # Over the median channel of the layer, as everywhere that channels are compared.
            ratio = np.nan_to_num(relative_rms(values))
            hot = is_hot(ratio)
            for channel in np.flatnonzero(hot.any(axis=0)):
                layer = int(ratio[:, channel].argmax())
                cells = [
                    labels[place],
                    int(rms["channel"].values[channel]),
                    stratum,
                    int(hot[:, channel].sum()),
                    int(rms["layer"].values[layer]),
                    float(ratio[layer, channel]),
                    _birth(emergences[place], stratum, int(channel)),
                ]
                rows.append((place, cells))
        table.rows += sorted(rows, key=lambda row: -row[1][5])
    return table.shortened()


def _strata_with_outliers(strata: Iterable[str]) -> list[str]:
    """All but ``all`` and delimiters."""
    return [name for name in strata if name not in ("all", "delimiter")]


def _birth(emergence: Emergence | None, stratum: str, channel: int) -> int | None:
    if emergence is None or emergence.channels is None or stratum not in emergence.channels["stratum"].values:
        return None
    birth = emergence.channels["birth"].sel(stratum=stratum).transpose("layer", "channel").values[:, channel]
    return int(np.nanmin(birth)) if np.isfinite(birth).any() else None


def head_table(heads: Sequence[Heads], labels: Sequence[str], definitions: dict[str, str]) -> Table:
    """A row for each head, strongest sinks first."""
    names = (*WORDS, *EVIDENCE)
    columns = [("run", ""), ("layer", ""), ("head", "")]
    columns += [(name.replace("_", " "), definitions[name]) for name in names]
    table = Table("heads", "Heads at the last step", columns)
    for place, of_run in enumerate(heads):
        for row in of_run.rows:
            cells = [labels[place], row["layer"], row["head"], *(row.get(name) for name in names)]
            table.rows.append((place, cells))
    return table.shortened()
