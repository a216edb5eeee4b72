"""The rules of the monitor. A file here is a rule, called by the file's name.

It offers a class ``Rule``, a :class:`~osp_diag.monitoring.rule.RunningRule` whose fields are its thresholds,
and says in the first line of its docstring what it finds.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from osp_diag.monitoring.rule import RunningRule

__all__ = ["rule_classes"]


@cache
def rule_classes() -> dict[str, type[RunningRule]]:
    """The rules by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    return {name: importlib.import_module(f"{__name__}.{name}").Rule for name in names}
