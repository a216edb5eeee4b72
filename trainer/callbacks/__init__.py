"""The probes in other people's training loops.

:class:`OutlierProbeCallback` is for the Trainer of transformers; that of Lightning has
:class:`trainer.callbacks.lightning.OutlierProbe`, which needs the extra ``lightning``.
"""

from trainer.callbacks.transformers import OutlierProbeCallback

__all__ = ["OutlierProbeCallback"]
