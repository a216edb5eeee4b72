"""Making batches on another thread while the device computes."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from queue import Full, Queue
from types import TracebackType
from typing import Any

from osp_diag.trainer.data.batch import Batch
from osp_diag.trainer.data.training_data import TrainingData

__all__ = ["Prefetched"]

POLL_SECONDS = 0.1
"""How often a thread that waits looks whether it is to end."""


class Prefetched:
    """Training data whose next batches are made ahead of time.

    Its state is that of the last batch handed out: batches that were made and not taken are made again
    after a resumption. Everything else is that of the data.

    Parameters
    ----------
    data : which nobody else asks for batches meanwhile
    depth : batches made ahead
    pin_memory : copy them to pinned memory, from where a GPU takes them without holding up the host
    """

    def __init__(self, data: TrainingData, depth: int = 2, *, pin_memory: bool = False) -> None:
        self._data = data
        self._depth = max(1, depth)
        self._pin = pin_memory
        self._state = data.state_dict()
        self._thread: threading.Thread | None = None
        self._ending = threading.Event()
        self._queue: Queue[tuple[Batch, dict[str, Any]] | BaseException] = Queue(self._depth)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._data, name)

    def next_batch(self) -> Batch:
        """The next batch; an error in the making of it is raised here."""
        if self._thread is None:
            self._start()
        item = self._queue.get()
        if isinstance(item, BaseException):
            self.close()
            raise item
        batch, self._state = item
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The state after the last batch that was handed out."""
        return self._state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; what was made ahead is thrown away."""
        self.close()
        self._data.load_state_dict(state)
        self._state = self._data.state_dict()

    def close(self) -> None:
        """End the thread. The data go on from the last batch handed out if they are asked again."""
        if self._thread is None:
            return
        self._ending.set()
        self._thread.join()
        self._thread = None
        self._data.load_state_dict(self._state)

    def __enter__(self) -> Prefetched:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _start(self) -> None:
        self._ending.clear()
        self._queue = Queue(self._depth)
        # A daemon: a program that ends without close() does not wait for it.
        self._thread = threading.Thread(target=self._make, name="training-data", daemon=True)
        self._thread.start()

    def _make(self) -> None:
        while not self._ending.is_set():
            item: tuple[Batch, dict[str, Any]] | BaseException
            try:
                batch = self._data.next_batch()
                item = (batch.pin_memory() if self._pin else batch, self._data.state_dict())
            except BaseException as error:  # next_batch() raises it where the loop can answer
                item = error
            while not self._ending.is_set():
                try:
                    self._queue.put(item, timeout=POLL_SECONDS)
                    break
                except Full:
                    continue
            if isinstance(item, BaseException):
                return
