"""What messages call a run: the name of its model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

__all__ = ["model_name"]


def model_name(attributes: Mapping[Any, Any]) -> str:
    """The model's name as the attributes of a run record it, also in a run that is damaged or half written.

    Labels of runs that are shown together are another question: see
    :mod:`osp_diag.analyses.run_labels`.
    """
    return str(attributes.get("model_name", "unnamed model"))
