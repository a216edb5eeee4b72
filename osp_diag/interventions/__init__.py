"""Changing a model while it runs, to see what a number depends on, and undoing it afterwards.

The names load what they need on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from osp_diag.lazy import lazy_names

if TYPE_CHECKING:
    from osp_diag.interventions.applying import intervened
    from osp_diag.interventions.intervention import Intervention
    from osp_diag.interventions.means import with_means

__all__ = ["Intervention", "intervened", "with_means"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Intervention": "osp_diag.interventions.intervention",
        "intervened": "osp_diag.interventions.applying",
        "with_means": "osp_diag.interventions.means",
    },
)
