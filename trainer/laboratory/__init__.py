"""A training's checkpoints read and its steps made again, for a diagnosis: see ``osp_diag.laboratory``."""

from osp_diag.trainer.laboratory.foreign import ForeignLaboratory
from osp_diag.trainer.laboratory.laboratory import TrainingLaboratory
from osp_diag.trainer.laboratory.opening import laboratory
from osp_diag.trainer.laboratory.weight_changes import weight_changes

__all__ = ["ForeignLaboratory", "TrainingLaboratory", "laboratory", "weight_changes"]
