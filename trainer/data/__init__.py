"""Training data: where tokens come from, and how they become batches.

:func:`open_data` opens every source that :class:`osp_diag.trainer.config.DataConfig` names.
"""

from __future__ import annotations

from osp_diag.trainer.data.batch import Batch
from osp_diag.trainer.data.mixture import OSP_TOKENIZER, osp_mixture
from osp_diag.trainer.data.opening import open_data
from osp_diag.trainer.data.prefetching import Prefetched
from osp_diag.trainer.data.training_data import TrainingData

__all__ = ["OSP_TOKENIZER", "Batch", "Prefetched", "TrainingData", "open_data", "osp_mixture"]
