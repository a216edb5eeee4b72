"""Where the outliers and attention sinks of a language model are, under their published definitions.

The names below load what they need on first use, so that ``import osp_diag`` itself stays cheap:
neither torch nor JAX nor xarray is imported until something asks for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from osp_diag.errors import OspDiagError
from osp_diag.lazy import lazy_names
from osp_diag.version import __version__

if TYPE_CHECKING:
    from osp_diag import analyses, estimators, figures, trainer
    from osp_diag.checkpoints import open_checkpoint
    from osp_diag.interventions import Intervention, intervene
    from osp_diag.probing import MeasurementSettings, Probe, TokenSettings, probe, probe_series, probe_stacks
    from osp_diag.runs.control import control
    from osp_diag.runs.run import Run, open_run
    from osp_diag.seams.declared import attention_function

__all__ = [
    "Intervention",
    "MeasurementSettings",
    "OspDiagError",
    "Probe",
    "Run",
    "TokenSettings",
    "__version__",
    "analyses",
    "attention_function",
    "control",
    "estimators",
    "figures",
    "intervene",
    "open_checkpoint",
    "open_run",
    "probe",
    "probe_series",
    "probe_stacks",
    "trainer",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Intervention": "osp_diag.interventions",
        "MeasurementSettings": "osp_diag.probing",
        "Probe": "osp_diag.probing",
        "Run": "osp_diag.runs.run",
        "TokenSettings": "osp_diag.probing",
        "analyses": "osp_diag.analyses",
        "attention_function": "osp_diag.seams.declared",
        "control": "osp_diag.runs.control",
        "estimators": "osp_diag.estimators",
        "figures": "osp_diag.figures",
        "intervene": "osp_diag.interventions",
        "open_checkpoint": "osp_diag.checkpoints",
        "open_run": "osp_diag.runs.run",
        "probe": "osp_diag.probing",
        "probe_series": "osp_diag.probing",
        "probe_stacks": "osp_diag.probing",
        "trainer": "osp_diag.trainer",
    },
    beside=("OspDiagError", "__version__"),
)
