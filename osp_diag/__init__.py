"""Where the outliers and attention sinks of a language model are, under their published definitions.

The names below load what they need on first use, so that ``import osp_diag`` itself stays cheap:
neither torch nor JAX nor xarray is imported until something asks for it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from osp_diag.errors import OspDiagError

if TYPE_CHECKING:
    from osp_diag import estimators
    from osp_diag.capture.declared import attention_function
    from osp_diag.checkpoints import open_checkpoint
    from osp_diag.probing import MeasurementSettings, Probe, TokenSettings, probe
    from osp_diag.runs.run import Run, open_run

__version__ = "0.1.0"

__all__ = [
    "MeasurementSettings",
    "OspDiagError",
    "Probe",
    "Run",
    "TokenSettings",
    "__version__",
    "attention_function",
    "estimators",
    "open_checkpoint",
    "open_run",
    "probe",
]

_HOME_OF = {
    "MeasurementSettings": "osp_diag.probing",
    "Probe": "osp_diag.probing",
    "Run": "osp_diag.runs.run",
    "TokenSettings": "osp_diag.probing",
    "attention_function": "osp_diag.capture.declared",
    "estimators": "osp_diag.estimators",
    "open_checkpoint": "osp_diag.checkpoints",
    "open_run": "osp_diag.runs.run",
    "probe": "osp_diag.probing",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(_HOME_OF[name])
    value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
