"""The progress bar of verbs at few bits: rows or stages, and within one its layers and sequences."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from osp_diag.probing.ranks import is_first_rank
from osp_diag.terminal import printable, unfiltered

if TYPE_CHECKING:
    from osp_diag.quantizing.cases import Progress

__all__ = ["sweep_progress"]


@contextmanager
def sweep_progress(name: str, unit: str = "rows") -> Iterator[Callable[[Progress], None] | None]:
    """Two bars on standard error while it is a terminal; None otherwise.

    Parameters
    ----------
    name : of the model
    unit : what the cases are called
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console(file=unfiltered(sys.stderr))
    if not console.is_terminal or not is_first_rank():
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[unit]}", markup=False),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        rows = bars.add_task(printable(f"quantizing {name}"), total=None, unit=unit)
        part = bars.add_task("", total=None, unit="")

        def show(now: Progress) -> None:
            bars.update(rows, completed=now.cases_done, total=now.cases)
            total = now.part_total or None
            bars.update(part, description=now.case, completed=now.part_done, total=total, unit=now.part)

        yield show
