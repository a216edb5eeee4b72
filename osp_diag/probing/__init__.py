"""Probing: a checkpoint in one call (:func:`probe`), those of a training (:func:`probe_series`), or a model
inside anyone's loop (:class:`Probe`).

The names load what they need on first use, so that the options can be read without torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from osp_diag.lazy import lazy_names

if TYPE_CHECKING:
    from osp_diag.probing.checkpoint import probe, probe_stacks
    from osp_diag.probing.labelling import relabel
    from osp_diag.probing.schedule import dense_early
    from osp_diag.probing.series import probe_series
    from osp_diag.probing.session import Probe
    from osp_diag.probing.settings import MeasurementSettings, TokenSettings

__all__ = [
    "MeasurementSettings",
    "Probe",
    "TokenSettings",
    "dense_early",
    "probe",
    "probe_series",
    "probe_stacks",
    "relabel",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "MeasurementSettings": "osp_diag.probing.settings",
        "Probe": "osp_diag.probing.session",
        "TokenSettings": "osp_diag.probing.settings",
        "dense_early": "osp_diag.probing.schedule",
        "probe": "osp_diag.probing.checkpoint",
        "probe_series": "osp_diag.probing.series",
        "probe_stacks": "osp_diag.probing.checkpoint",
        "relabel": "osp_diag.probing.labelling",
    },
)
