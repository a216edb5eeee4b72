"""One model used by several threads: what observes it acts in the thread that put it there, and nowhere else.

Hooks, and the name under which transformers looks attention up, are seen by every thread that runs the model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch

from osp_diag.errors import CaptureError

__all__ = ["Claim", "of_this_thread"]

_claims: dict[int, tuple[int, int]] = {}
"""id of what is observed → (the thread that observes it, how many observers of that thread do)"""
_claiming = threading.Lock()


def of_this_thread(hook: Callable[..., Any]) -> Callable[..., Any]:
    """The hook, which does nothing when another thread than the present one runs it, nor in compiled code.

    It takes any arguments: of a hook that is put on a module or taken off it while another thread runs it,
    torch may not know there whether keyword arguments are to be passed.
    """
    owner = threading.get_ident()

    def heard(*arguments: Any) -> Any:
        if torch.compiler.is_compiling() or threading.get_ident() != owner:
            return None
        return hook(*arguments)

    return heard


class Claim:
    """That the present thread observes these objects, until it is released.

    Raises
    ------
    CaptureError : another thread observes one of them
    """

    def __init__(self, objects: Iterable[object]) -> None:
        self._objects = list(objects)  # which also keeps their ids theirs
        self.owner = threading.get_ident()
        with _claiming:
            alive = {thread.ident for thread in threading.enumerate()}
            for item in self._objects:
                holder, _ = _claims.get(id(item), (self.owner, 0))
                if holder != self.owner and holder in alive:
                    self._objects = []
                    raise CaptureError(
                        f"this {type(item).__name__} is being probed in another thread, and is observed by "
                        "one at a time: wait until its step ends there, or give each thread a model of its "
                        "own"
                    )
            for item in self._objects:
                holder, count = _claims.get(id(item), (self.owner, 0))
                _claims[id(item)] = (self.owner, count + 1 if holder == self.owner else 1)

    def release(self) -> None:
        """Others may observe them now. Releasing twice does nothing."""
        with _claiming:
            for item in self._objects:
                holder, count = _claims.pop(id(item), (self.owner, 0))
                if holder != self.owner or count > 1:
                    _claims[id(item)] = (holder, count - (holder == self.owner))
            self._objects = []

    @property
    def is_held_here(self) -> bool:
        """Whether the present thread is the one that made it."""
        return threading.get_ident() == self.owner
