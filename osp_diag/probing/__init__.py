"""Probing: a checkpoint in one call (:func:`probe`), or a model inside anyone's loop (:class:`Probe`).

The names load what they need on first use, so that the options can be read without torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osp_diag.probing.checkpoint import probe
    from osp_diag.probing.labelling import relabel
    from osp_diag.probing.schedule import dense_early
    from osp_diag.probing.session import Probe
    from osp_diag.probing.settings import MeasurementSettings, TokenSettings

__all__ = ["MeasurementSettings", "Probe", "TokenSettings", "dense_early", "probe", "relabel"]

_HOME_OF = {
    "MeasurementSettings": "settings",
    "Probe": "session",
    "TokenSettings": "settings",
    "dense_early": "schedule",
    "probe": "checkpoint",
    "relabel": "labelling",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME_OF[name]}"), name)
    globals()[name] = value
    return value
