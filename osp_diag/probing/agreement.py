"""Ranks agree on something that one of them has noticed, in the same step, without waiting for each other."""

from __future__ import annotations

from collections import deque

import torch
import torch.distributed as dist

from osp_diag.probing.host import copy_under_way
from osp_diag.probing.ranks import communication_device, is_distributed

__all__ = ["Agreement"]

LAG = 2
"""An answer is read so many calls after it was asked for: by then it is there."""


class Agreement:
    """Asked once a step by every rank, says to all of them alike whether any rank has noticed something.

    With one process at once; with several ``LAG`` calls later, when the sum over ranks has long arrived: the
    collective runs beside the steps in between, on a GPU in its stream.
    """

    def __init__(self) -> None:
        self._sent: deque[tuple[torch.Tensor, dist.Work | torch.cuda.Event | None]] = deque()

    def reached(self, noticed: bool) -> bool:
        """Whether some rank had noticed it, as of this call (one process) or of the one ``LAG`` calls ago."""
        if not is_distributed():
            return noticed
        count = torch.full((), float(noticed), device=communication_device())
        work = dist.all_reduce(count, async_op=True)
        if count.is_cuda:
            work.wait()  # the stream does, the host does not
            on_host = copy_under_way(count)
            event = torch.cuda.Event()
            event.record()
            self._sent.append((on_host, event))
        else:
            self._sent.append((count, work))
        if len(self._sent) <= LAG:
            return False
        oldest, done = self._sent.popleft()
        if isinstance(done, torch.cuda.Event):
            done.synchronize()
        elif done is not None:
            done.wait()
        return bool(oldest > 0)
