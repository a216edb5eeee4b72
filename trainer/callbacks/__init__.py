"""The probes in other people's training loops.

:class:`OutlierProbeCallback` is for the Trainer of transformers; that of Lightning has
:class:`osp_diag.trainer.callbacks.lightning.OutlierProbe`, which needs the extra ``lightning``.
"""

from osp_diag.trainer.callbacks.transformers import OutlierProbeCallback

__all__ = ["OutlierProbeCallback"]
