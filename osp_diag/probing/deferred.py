"""The host's share of a probe, done by a thread while the caller's loop goes on."""

from __future__ import annotations

import os
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

__all__ = ["HostWork"]


class HostWork:
    """Work done one piece after the other: at once, or by one thread behind the caller.

    With the thread, what the work touches is touched by nobody else at the same time: whoever wants to look
    at it waits first (:meth:`wait`). What failed in the thread is raised by the caller's next call, once.
    Ctrl-C reaches the caller alone, so work that was handed over is done, and whole. Why a thread:
    docs/decisions.md, Capture.

    Parameters
    ----------
    deferred : whether there is a thread
    """

    def __init__(self, deferred: bool) -> None:
        self._process = os.getpid()
        self._errors: list[BaseException] = []
        self._thread: ThreadPoolExecutor | None = None
        if deferred:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="osp_diag.Probe")
            self._submitted(_nothing)  # starts it, so that Ctrl-C cannot come between a piece of work and it
            weakref.finalize(self, _warn_of, self._errors)

    def later(self, work: Callable[[], object]) -> None:
        """Do this after everything that came before; the caller need not wait."""
        self._raise()
        if self._submitted(work) is None:
            work()

    def wait(self) -> None:
        """Wait until everything is done."""
        self._finish()
        self._raise()

    def close(self, last: Callable[[], object] | None = None) -> None:
        """Do a last piece of work, also where others failed, and let the thread go."""
        # By the thread: if Ctrl-C ends the waiting, it still comes after all that was handed over.
        if last is not None and self._submitted(last) is None:
            last()
        self._finish()
        if self._thread is not None:
            self._thread.shutdown(wait=False)
            self._thread = None
        self._raise()

    def _submitted(self, work: Callable[[], object]) -> Future[None] | None:
        """Hand work to the thread; None where there is none (any more)."""
        if self._thread is None or os.getpid() != self._process:  # a forked child has no threads
            return None
        try:
            return self._thread.submit(self._behind, work)
        except RuntimeError:  # Python is ending, and has waited for its threads
            self._thread = None
            return None

    def _behind(self, work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            self._errors.append(error)

    def _finish(self) -> None:
        future = self._submitted(_nothing)
        if future is not None:
            future.result()

    def _raise(self) -> None:
        if not self._errors:
            return
        error, *further = self._errors
        self._errors.clear()
        for message in dict.fromkeys(map(str, further)):
            if message != str(error):
                error.add_note(f"After this: {message}")
        error.add_note("This happened in a thread, after the call that had begun it returned.")
        raise error


def _warn_of(errors: list[BaseException]) -> None:
    for error in errors:
        warnings.warn(
            f"a probe was not recorded whole: {error} (close the probe, to have this raised)",
            RuntimeWarning,
            stacklevel=1,
        )


def _nothing() -> None:
    """The work of a thread that is only to be started, or waited for."""
