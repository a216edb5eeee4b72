"""Whose error it is: one that a user's model or function raised is no defect of osp-diag."""

from __future__ import annotations

import sysconfig
import traceback
from pathlib import Path

__all__ = ["foreign_origin"]

_OURS = Path(__file__).resolve().parent
_INSTALLED = tuple(
    {str(Path(sysconfig.get_path(name)).resolve()) for name in ("stdlib", "purelib", "platlib")}
)
_MODULE_CALL = ("_call_impl", "_wrapped_call_impl")
"""Functions by which torch calls a module's forward."""
_PASSED_THROUGH = "__torch_function__"
"""Of our function modes, through which every operation of a model passes."""
_VERB_CALL = ("main.py", "_run")
"""Where the command line calls a verb, which may be of another package."""


def foreign_origin(error: BaseException) -> str:
    """Where a user's code raised, as ``FILE:LINE, in FUNCTION``; empty if the error is osp-diag's own.

    It is the user's if, below the last frame of ours, torch called a module's ``forward``, or there is a
    frame of a file that is not installed. The innermost such frame is named, or the innermost that is not
    torch's.
    """
    frames = traceback.extract_tb(error.__traceback__)
    places = [Path(frame.filename).resolve() for frame in frames]
    ours = [
        index
        for index, place in enumerate(places)
        if _is_ours(place) and frames[index].name != _PASSED_THROUGH
    ]
    if not ours or (places[ours[-1]].name, frames[ours[-1]].name) == _VERB_CALL:
        return ""
    if frames[ours[-1]].name == "forward":  # of a module of ours
        return ""
    below = list(zip(frames, places, strict=True))[ours[-1] + 1 :]
    below = [(frame, place) for frame, place in below if not _is_ours(place)]
    own = [(frame, place) for frame, place in below if not str(place).startswith(_INSTALLED)]
    called = any(frame.name in _MODULE_CALL and place.name == "module.py" for frame, place in below)
    if not own and not called:
        return ""
    outside_torch = [(frame, place) for frame, place in below if "torch" not in place.parts]
    named, place = (own or outside_torch or below)[-1]
    return f"{place}:{named.lineno}, in {named.name}"


def _is_ours(place: Path) -> bool:
    """Of the library, or of the folders beside it that are imported through it."""
    if place.is_relative_to(_OURS):
        return True
    beside = (link.resolve() for link in _OURS.iterdir() if link.is_symlink())
    return any(place.is_relative_to(folder) for folder in beside)
