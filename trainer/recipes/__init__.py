"""Training recipes: what to change in a preset to train it in another way. A file here is a recipe.

It is called by the file's name and offers two things, beside a docstring whose first line is its help:

* ``ROW``: its row in Table 2 of the OSP paper, which is its place in ``--ablation paper``; None for others
* ``changes(config)``: the dotted keys of the configuration that it sets, and their values
"""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from osp_diag.errors import UsageError
from osp_diag.trainer.config import TrainConfig
from osp_diag.wording import did_you_mean

__all__ = ["Recipe", "recipe", "recipes"]


@dataclass(frozen=True)
class Recipe:
    """One way to train."""

    name: str
    row: int | None
    """in Table 2 of Park et al. 2025 (https://arxiv.org/abs/2506.19697), from 1 on"""
    help: str
    changes: Callable[[TrainConfig], Mapping[str, Any]]


@cache
def recipes() -> dict[str, Recipe]:
    """The recipes by name: the rows of Table 2 in their order, then others by name."""
    modules = {
        module.name: importlib.import_module(f"{__name__}.{module.name}")
        for module in pkgutil.iter_modules(__path__)
    }
    entries = [
        Recipe(name, module.ROW, (inspect.getdoc(module) or "").partition("\n")[0], module.changes)
        for name, module in modules.items()
    ]
    order = sorted(entries, key=lambda recipe: (recipe.row is None, recipe.row or 0, recipe.name))
    return {recipe.name: recipe for recipe in order}


def recipe(name: str) -> Recipe:
    """The recipe of that name.

    Raises
    ------
    UsageError : there is none; the message names what was meant, or all
    """
    if name not in recipes():
        raise UsageError(f"there is no recipe {name!r}; {did_you_mean(name, recipes())}")
    return recipes()[name]
