"""How ``osp-diag watch`` draws runs in a terminal, and as plain text where there is none."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.text import Text

from osp_diag.terminal import one_line, unfiltered
from osp_diag.wording import number

if TYPE_CHECKING:
    import xarray as xr

    from osp_diag.analyses.live import Standing
    from osp_diag.cli.watch_alerts import AlertFile
    from osp_diag.monitoring import Severity
    from osp_diag.runs.following import FollowedRun
    from osp_diag.runs.run import Run

__all__ = ["show", "standing_as_text"]

BARS, DIGITS = "▁▂▃▄▅▆▇█", "12345678"
LOW, HIGH = (70, 130, 180), (217, 120, 30)
"""Steel blue and orange: readable on black, on white, and to the colour-blind; the height says the same."""
LEAST_TOP = 10.0
"""The highest bar is at least so many times the floor, so that noise does not look like a mountain."""
_FEWEST_ROWS, _OTHER_ROWS = 4, 13
_LABEL, _VALUE = 14, 9
_WIDEST = 4
"""characters a step, while there are few"""


def show(
    runs: Sequence[FollowedRun],
    *,
    every: float | None,
    alerts: AlertFile | None = None,
    against: Run | None = None,
    fail_on: Severity = "bad",
    forecast: bool = False,
) -> int:
    """Show the runs, once if ``every`` is None, else until interrupted; returns the exit code.

    On a terminal the picture is renewed in place; elsewhere it is printed again when something changed.
    Alerts also go into ``alerts`` as they are found. ``against`` is a run that is known to be good; the code
    is 1 from alerts of the severity ``fail_on`` on. ``forecast`` also shows where steady growth would lead.
    """
    from osp_diag.analyses.live import standing
    from osp_diag.analyses.run_labels import labels_of

    def standings_now() -> list[Standing]:
        standings = [standing(run, against, forecast=forecast) for run in runs]
        if alerts is not None:
            alerts.add(standings)
        return standings

    def picture(standings: Sequence[Standing]) -> RenderableType:
        return _picture(standings, labels_of(runs), console)

    console = Console(file=unfiltered(sys.stdout), highlight=False)
    standings = standings_now()
    if every is None:
        console.print(picture(standings))
        return _code(standings, fail_on)
    try:
        if console.is_terminal:
            # The last picture stays in the terminal, below what was there before.
            with Live(console=console, screen=True, auto_refresh=False) as live:
                while True:
                    standings = standings_now()
                    live.update(picture(standings), refresh=True)
                    time.sleep(every)
                    _look(runs)
        console.print(picture(standings))
        while True:
            time.sleep(every)
            if _look(runs):
                standings = standings_now()
                console.print(picture(standings))
    except KeyboardInterrupt:  # how one stops watching
        if console.is_terminal:
            console.print(picture(standings))
    return _code(standings, fail_on)


def _look(runs: Sequence[FollowedRun]) -> bool:
    """Whether anything is different since the last look."""
    before = [run.version for run in runs]
    return [run.refresh().version for run in runs] != before


def _code(standings: Sequence[Standing], fail_on: Severity) -> int:
    return int(any(one.is_at_least(fail_on) for one in standings))


def _picture(standings: Sequence[Standing], labels: Sequence[str], console: Console) -> RenderableType:
    ratios = [over_floor(one.kurtosis) for one in standings if one.kurtosis is not None]
    tops = [ratio[np.isfinite(ratio)].max(initial=LEAST_TOP) for ratio in ratios]
    height = console.height // max(1, len(standings)) - _OTHER_ROWS if console.is_terminal else 96
    parts = []
    for one, label in zip(standings, labels, strict=True):
        text = standing_as_text(
            one,
            width=console.width - 4,
            rows=max(_FEWEST_ROWS, 2 * height // 3),
            top=float(max(tops, default=LEAST_TOP)),
            bars=BARS if console.encoding.lower().startswith("utf") else DIGITS,
        )
        parts.append(Panel(text, title=Text(one_line(label), style="bold"), title_align="left"))
    return Group(*parts)


def over_floor(kurtosis: xr.DataArray) -> np.ndarray:
    """Kurtosis as a multiple of its floor (hidden_state, step)."""
    return np.asarray(kurtosis.values / kurtosis["floor"].values[:, None])


def standing_as_text(one: Standing, *, width: int, rows: int, top: float, bars: str = BARS) -> Text:
    """One run: facts, a row of bars for each hidden state, the sinks, alerts, and forecasts last.

    Parameters
    ----------
    width : in characters
    rows : for hidden states, and again at most half as many for sinks; layers share a row where they are more
    top : multiple of the floor that the highest bar stands for
    bars : eight characters, low to high
    """
    lines = [Text(line) for line in _facts(one)]
    if one.problem:
        lines.append(Text(one_line(one.problem), style="bold red"))
    if one.kurtosis is not None and one.kurtosis.sizes["step"]:
        lines += [Text(), *_kurtosis_rows(one.kurtosis, width, rows, top, bars)]
    if one.sinks is not None and one.sinks.sizes["step"]:
        lines += [Text(), *_sink_rows(one.sinks, width, max(1, rows // 2), bars)]
    for alert in one.alerts:
        mark, style = ("!! ", "bold red") if alert.severity == "bad" else ("!  ", "bold")
        lines += [Text(mark + one_line(alert.sentence), style=style)]
    if one.forecasts is not None:
        sentences = [one_line(forecast.sentence) for forecast in one.forecasts]
        lines += [Text(f"forecast: {sentence}", style="dim") for sentence in sentences or ["none"]]
    return Text("\n").join(lines)


def _facts(one: Standing) -> list[str]:
    of = f" of {one.planned_steps:,}" if one.planned_steps is not None else ""
    step = f"step {one.last_step:,}{of}, " if one.last_step is not None else ""
    lines = [f"{one_line(one.path)}" + (f" ({one_line(one.description)})" if one.description else "")]
    lines.append(step + one.life)
    scalars = one.scalars
    if "loss" in scalars:
        held_out = f" (held out {scalars['held_out_loss']:.4g})" if "held_out_loss" in scalars else ""
        lines.append(
            f"loss {scalars['loss']:.4g}{held_out}" + _named(scalars, "learning_rate", "gradient_norm")
        )
    speed = []
    if "tokens_per_second" in scalars:
        speed.append(f"{scalars['tokens_per_second']:,.0f} tokens/s")
    if "model_flops_utilisation" in scalars:
        speed.append(f"MFU {scalars['model_flops_utilisation']:.1%}")
    if one.probing is not None:
        speed.append(f"probing takes {one.probing:.1%} of the time")
    return lines + ([", ".join(speed)] if speed else [])


def _named(scalars: dict[str, float], *names: str) -> str:
    return "".join(f", {name.replace('_', ' ')} {scalars[name]:.3g}" for name in names if name in scalars)


def _kurtosis_rows(kurtosis: xr.DataArray, width: int, rows: int, top: float, bars: str) -> list[Text]:
    ratio = over_floor(kurtosis)
    floors = sorted({float(floor) for floor in kurtosis["floor"].values})
    floor = number(floors[0]) if len(floors) == 1 else f"{number(floors[0])} to {number(floors[-1])}"
    steps = kurtosis["step"].values
    head = f"OSP kurtosis over its floor ({floor}), {bars[0]} 1\u00d7 to {bars[-1]} {number(top)}\u00d7"
    head += f", steps {steps[0]:,} to {steps[-1]:,}"
    # log(κ / floor) / log(top): 0 at the floor, 1 at the highest bar
    with np.errstate(divide="ignore", invalid="ignore"):
        share = np.log(ratio) / np.log(top)
    labels = [str(name) for name in kurtosis["hidden_state"].values]
    values = [f"{number(row[-1])}\u00d7" for row in ratio]
    return [Text(head, style="dim"), *_bar_rows(labels, share, values, width, rows, bars)]


def _sink_rows(sinks: xr.DataArray, width: int, rows: int, bars: str) -> list[Text]:
    epsilon = f"{sinks.attrs['epsilon']:g}"
    head = f"sink rate: heads that give the first token over {epsilon} of their attention"
    labels = [f"layer {layer}" for layer in sinks["layer"].values]
    rates = sinks.values
    values = [f"{row[-1]:.0%}" if np.isfinite(row[-1]) else "none" for row in rates]
    return [Text(head, style="dim"), *_bar_rows(labels, rates, values, width, rows, bars)]


def _bar_rows(
    labels: Sequence[str], share: np.ndarray, values: Sequence[str], width: int, rows: int, bars: str
) -> list[Text]:
    """A row of bars a label. Layers may share a row, and steps a bar, of which the largest is shown."""
    from osp_diag.figures._decimate import bin_starts, max_pool

    layers = [place for place, label in enumerate(labels) if label.startswith("layer")]
    others = [place for place in range(len(labels)) if place not in layers]
    binned = [layers[start] for start in bin_starts(len(layers), max(1, rows - len(others)))]
    starts = sorted(binned + others)
    room = max(8, width - _LABEL - _VALUE)
    pooled = max_pool(np.fmax.reduceat(share, starts, axis=0), 1, room)
    pooled = np.repeat(pooled, min(_WIDEST, room // pooled.shape[1]), axis=1)
    lines = []
    for row, (first, after) in enumerate(pairwise([*starts, len(labels)])):
        name = (
            labels[first] if after - first == 1 else f"layers {labels[first][6:]} to {labels[after - 1][6:]}"
        )
        line = Text(f"{name:<{_LABEL}}"[:_LABEL])
        for place in pooled[row]:
            line.append(*_bar(float(place), bars))
        highest = first + int(np.nanargmax(np.nan_to_num(share[first:after, -1], nan=-np.inf)))
        line.append(f" {values[highest]:>{_VALUE - 1}}")
        lines.append(line)
    return lines


def _bar(share: float, bars: str) -> tuple[str, str]:
    """The character and colour of a value from 0 to 1; a dot where there is none."""
    if np.isnan(share):
        return "\u00b7" if bars == BARS else ".", "dim"
    share = float(np.clip(share, 0.0, 1.0))
    red, green, blue = (round(low + share * (high - low)) for low, high in zip(LOW, HIGH, strict=True))
    return bars[round(share * (len(bars) - 1))], f"rgb({red},{green},{blue})"
