"""Scalars of a step on their way from the device to the run, without making the device wait."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from osp_diag.probing.host import copy_under_way

__all__ = ["Clock", "Scalars"]


class Clock:
    """When something was reached, on the device's own time line.

    On CUDA this is an event in the stream, read once the device has passed it; elsewhere the host's clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event(enable_timing=True)
            self._event.record()
        else:
            self._seconds = time.perf_counter()

    def wait(self) -> None:
        """Wait until the device has got here."""
        if self._event is not None:
            self._event.synchronize()

    def seconds_since(self, earlier: Clock) -> float:
        """Seconds between the two; both have to be passed."""
        if self._event is not None and earlier._event is not None:
            return earlier._event.elapsed_time(self._event) / 1000
        return self._seconds - earlier._seconds


@dataclass
class _Pending:
    step: int
    names: tuple[str, ...]
    values: Tensor
    host: dict[str, float]
    start: Clock
    end: Clock


class Scalars:
    """A queue of steps whose numbers are being copied to the host.

    Reading a loss with ``.item()`` stops the host until the device has caught up, and then the device until
    the host has launched the next kernels. Here the copy is put in the stream and read some steps later.

    Parameters
    ----------
    device : where the numbers are made
    lag : numbers are read so many steps after they were sent, on every rank alike: ranks that learnt of a
        bad step at different moments would wait for one another for ever. None: 2 on CUDA, else 0
    """

    def __init__(self, device: torch.device, lag: int | None = None) -> None:
        self._device = device
        self._lag = lag if lag is not None else 2 if device.type == "cuda" else 0
        self._queue: deque[_Pending] = deque()

    def add(self, step: int, numbers: Mapping[str, Tensor], host: Mapping[str, float], start: Clock) -> None:
        """Send a step's device scalars on their way; ``host`` holds what the host knows already."""
        stacked = torch.stack([value.detach().to(torch.float64).reshape(()) for value in numbers.values()])
        values = copy_under_way(stacked)
        self._queue.append(_Pending(step, tuple(numbers), values, dict(host), start, Clock(self._device)))

    def arrived(self, *, wait: bool = False) -> Iterator[tuple[int, dict[str, float]]]:
        """The steps that are due to be read, oldest first, with ``step_seconds`` beside their numbers.

        ``wait`` reads all that were sent.
        """
        while len(self._queue) > (0 if wait else self._lag):
            oldest = self._queue.popleft()
            oldest.end.wait()
            numbers = dict(zip(oldest.names, oldest.values.tolist(), strict=True))
            yield (
                oldest.step,
                {**oldest.host, **numbers, "step_seconds": oldest.end.seconds_since(oldest.start)},
            )
