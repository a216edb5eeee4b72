"""What ``osp-diag train`` shows while it works, and its outcome in a few numbers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from osp_diag.runs.headline import headline
from osp_diag.terminal import printable, unfiltered

if TYPE_CHECKING:
    from osp_diag.runs.run import Run

__all__ = ["numbers_at_end", "outcome", "shown_progress", "shown_steps"]

Told = Callable[[int, int, Mapping[str, float]], None]


@contextmanager
def shown_progress() -> Iterator[tuple[Told | None, Callable[[str], None]]]:
    """A bar with loss and throughput where standard error is a terminal; and how to announce things."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    from osp_diag.probing.ranks import is_first_rank

    console = Console(file=unfiltered(sys.stderr))

    def announce(text: str) -> None:
        print(text, file=sys.stderr)

    if not console.is_terminal or not is_first_rank():
        yield None, announce
        return
    columns = (
        TextColumn("training"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[numbers]}", markup=False),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("training", total=None, numbers="")

        def told(done: int, total: int, values: Mapping[str, float]) -> None:
            numbers = f"loss {values['loss']:.3f}  {values['tokens_per_second']:,.0f} tokens/s"
            bar.update(task, completed=done, total=total, numbers=numbers)

        yield told, lambda text: bar.console.print(printable(text), markup=False, highlight=False)


@contextmanager
def shown_steps() -> Iterator[Callable[[str, int, int], None] | None]:
    """A bar of (what, steps done, steps in all) where standard error is a terminal; None elsewhere."""
    from rich.console import Console
    from rich.progress import Progress as Bar

    console = Console(file=unfiltered(sys.stderr))
    if not console.is_terminal:
        yield None
        return
    with Bar(console=console, transient=True) as bar:
        task = bar.add_task("", total=None)
        yield lambda what, done, total: bar.update(
            task, description=printable(what), completed=done, total=total
        )


def outcome(run: Run) -> dict[str, Any]:
    """:func:`numbers_at_end`, and what the monitor says: as JSON."""
    from osp_diag.monitoring import judge

    return numbers_at_end(run) | {"findings": [finding.as_dict() for finding in judge(run)]}


def numbers_at_end(run: Run) -> dict[str, float]:
    """The last loss, the held-out one, and the headline statistics of the last probed step."""
    series = run.series
    found: dict[str, float] = {}
    for name in ("loss", "held_out_loss", "tokens_per_second"):
        if name in series:
            values = np.asarray(series[name], dtype=float)
            values = values[np.isfinite(values)]
            if len(values):
                found[name] = float(values[-1] if name != "tokens_per_second" else np.median(values))
    if {"probe_seconds", "step_seconds"} <= set(series.data_vars):
        probing = float(series["probe_seconds"].sum())
        # Steps between two that were recorded took as long as these.
        training = float(series["step_seconds"].mean()) * int(series["step"].max())
        found["share_of_time_probing"] = probing / (probing + training)
    numbers = ("osp_excess_kurtosis", "absolute_maximum")
    return found | {name: value for name, value in headline(run).items() if name in numbers}
