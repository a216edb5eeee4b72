"""OSP pre-training: models, optimizers and data that grow outliers, or don't.

May import the library; never ``osp_diag.analyses`` or ``osp_diag.figures``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from osp_diag.lazy import lazy_names

if TYPE_CHECKING:
    from osp_diag.trainer.callbacks.transformers import OutlierProbeCallback
    from osp_diag.trainer.config import TrainConfig
    from osp_diag.trainer.config_values import with_changes
    from osp_diag.trainer.exporting import export_run
    from osp_diag.trainer.loop import train
    from osp_diag.trainer.optimizers.build import build_optimizer
    from osp_diag.trainer.optimizers.muon import Muon
    from osp_diag.trainer.presets import preset, with_recipe

if __name__ != "osp_diag.trainer":
    raise ImportError(
        f"{__file__} is osp_diag's own folder, seen because Python was started beside it; write "
        "osp_diag.trainer for ours, or start Python elsewhere for the package that is called trainer"
    )

__all__ = [
    "Muon",
    "OutlierProbeCallback",
    "TrainConfig",
    "build_optimizer",
    "export_run",
    "preset",
    "train",
    "with_changes",
    "with_recipe",
]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Muon": "osp_diag.trainer.optimizers.muon",
        "OutlierProbeCallback": "osp_diag.trainer.callbacks.transformers",
        "TrainConfig": "osp_diag.trainer.config",
        "build_optimizer": "osp_diag.trainer.optimizers.build",
        "export_run": "osp_diag.trainer.exporting",
        "preset": "osp_diag.trainer.presets",
        "train": "osp_diag.trainer.loop",
        "with_changes": "osp_diag.trainer.config_values",
        "with_recipe": "osp_diag.trainer.presets",
    },
)
