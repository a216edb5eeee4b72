"""What to call the runs of trainings: the paper's names of the recipes, else the models."""

from __future__ import annotations

from typing import Any

from analyses.recipes import config_of, recipe_labels
from figures._runs import labels_of
from osp_diag.errors import StoreError

__all__ = ["recipes_or_models"]


def recipes_or_models(runs: list[Any], steps: list[int]) -> list[str]:
    """One label a run, told apart; the models' names if any run does not say its recipe."""
    try:
        labels = recipe_labels({str(index): config_of(run) for index, run in enumerate(runs)})
    except StoreError:
        return labels_of(runs, steps)
    return [labels[str(index)] for index in range(len(runs))]
