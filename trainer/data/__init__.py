"""Training data: where tokens come from, and how they become batches.

:func:`open_data` opens every source that :class:`trainer.config.DataConfig` names.
"""

from __future__ import annotations

from trainer.data.batch import Batch
from trainer.data.mixture import OSP_TOKENIZER, osp_mixture
from trainer.data.opening import open_data
from trainer.data.prefetching import Prefetched
from trainer.data.training_data import TrainingData

__all__ = ["OSP_TOKENIZER", "Batch", "Prefetched", "TrainingData", "open_data", "osp_mixture"]
