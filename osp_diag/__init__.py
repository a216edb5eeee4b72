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
    from osp_diag.checkpoints import open_checkpoint
    from osp_diag.probing import Probe, probe
    from osp_diag.runs.run import Run, open_run
    from osp_diag.seams.declared import attention_function

__version__ = "0.1.0"

__all__ = [
    "OspDiagError",
    "Probe",
    "Run",
    "__version__",
    "attention_function",
    "estimators",
    "open_checkpoint",
    "open_run",
    "probe",
]

_HOME_OF = {
    "Probe": "osp_diag.probing",
    "Run": "osp_diag.runs.run",
    "attention_function": "osp_diag.seams.declared",
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
