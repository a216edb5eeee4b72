"""What to call runs that are shown together: one rule for figures, pages, texts and the terminal."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from osp_diag.analyses.recipes import config_of, recipe_of
from osp_diag.errors import StoreError

if TYPE_CHECKING:
    from osp_diag.runs.following import FollowedRun
    from osp_diag.runs.run import Run

__all__ = ["labels_of", "run_name"]


def run_name(run: Run | FollowedRun) -> str:
    """The recipe of a training by its published name; else the model's name, or that of the run's folder.

    Of a model of several stacks, which it is of.
    """
    try:
        return recipe_of(config_of(run))
    except StoreError:
        stack = run.attrs.get("stack")
        return str(run.attrs.get("model_name") or (_file(run) or "unnamed model")) + (
            f", {stack}" if stack else ""
        )


def labels_of(runs: Sequence[Run | FollowedRun], steps: Sequence[int] | None = None) -> list[str]:
    """:func:`run_name` of each run; to those that share one, the first of these that differs is added.

    The seeds of trainings of one recipe; the protocols; the names of the runs' folders, with those of the
    folders around them where they are the same; the steps; numbers from 1.

    Parameters
    ----------
    runs : open ones, or ones that are followed
    steps : which step of each is shown; None for runs that are followed, whose labels have whole paths: their
        view stays on this machine, where figures are sent to others
    """
    labels = [run_name(run) for run in runs]
    files = Counter((label, _file(run)) for label, run in zip(labels, runs, strict=True))

    def file(place: int) -> str:
        run, name = runs[place], _file(runs[place])
        if name and run.path is not None and files[run_name(run), name] > 1:
            name = str(run.path) if steps is None else f"{Path(run.path).absolute().parent.name}/{name}"
        return f" ({name})" if name else ""

    def seed(place: int) -> str:
        config = runs[place].attrs.get("config")
        return f", seed {config['seed']}" if isinstance(config, dict) and "seed" in config else ""

    # Why recipes, and no paths in figures: docs/decisions.md, Figures.
    distinctions: list[Callable[[int], str]] = [
        seed,
        lambda place: f", {runs[place].attrs.get('protocol', '?')}",
        file,
        lambda place: "" if steps is None else f", step {steps[place]}",
        lambda place: f", run {place + 1}",
    ]
    for detail in distinctions:
        labels = _disambiguated(labels, detail)
    return labels


def _disambiguated(labels: Sequence[str], detail: Callable[[int], str]) -> list[str]:
    """The labels, with the detail where some share a label and differ in it."""
    places = defaultdict(list)
    for place, label in enumerate(labels):
        places[label].append(place)
    longer = list(labels)
    for label, group in places.items():
        details = [detail(place) for place in group]
        if len(set(details)) > 1:
            for place, suffix in zip(group, details, strict=True):
                longer[place] = label + suffix
    return longer


def _file(run: Run | FollowedRun) -> str:
    """The name of a run's folder (or file, if packed) without .zarr; empty for one in memory."""
    return "" if run.path is None else Path(run.path).name.removesuffix(".zip").removesuffix(".zarr")
