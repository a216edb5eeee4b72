"""Changing a model while it runs, to see what a number depends on, and undoing it afterwards.

The names load what they need on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from osp_diag.lazy import lazy_names

if TYPE_CHECKING:
    from osp_diag.interventions.applying import intervened
    from osp_diag.interventions.effects import Effects
    from osp_diag.interventions.intervention import Intervention
    from osp_diag.interventions.means import with_means
    from osp_diag.interventions.measuring import intervene

__all__ = ["Effects", "Intervention", "intervene", "intervened", "with_means"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Effects": "osp_diag.interventions.effects",
        "Intervention": "osp_diag.interventions.intervention",
        "intervene": "osp_diag.interventions.measuring",
        "intervened": "osp_diag.interventions.applying",
        "with_means": "osp_diag.interventions.means",
    },
)
