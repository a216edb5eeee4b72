"""Asking of a run that is being written: a request and its answer, two small files beside the run.

The file ``name.control.json`` beside ``name.zarr`` holds one request, an object with any of ``every``,
``sites``, ``probing``, ``checkpoint``, ``pin`` and ``stop`` (:class:`ControlRequest`). Whoever writes the run
takes the file away between two steps, does what it asks, and says so in ``name.control-answer.json``. Why
files: docs/decisions.md, Training.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
import uuid
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from osp_diag.errors import StoreError, UsageError
from osp_diag.json_text import parse_object
from osp_diag.plain_files import read_plain
from osp_diag.runs.format import replace_file
from osp_diag.runs.lock import writer_state
from osp_diag.wording import did_you_mean

__all__ = [
    "ControlAnswer",
    "ControlRequest",
    "Probing",
    "UnreadableRequestError",
    "answer_path",
    "control",
    "request_path",
    "take_request",
    "write_answer",
]

Probing = Literal["on", "off", "reset"]
"""Go on with the schedule, pause it, or go back to the schedule and sites that the run began with."""

_MOST_BYTES = 64 * 1024
_MOST_STEP = 2**53
_MOST_SITES = 256
_MOST_NAME = 200
_LOOK_SECONDS = 0.05


@dataclass(frozen=True, kw_only=True)
class ControlRequest:
    """What is asked of whoever writes a run.

    Attributes
    ----------
    every : from now on probe every so many steps, and the last one; also switches probing on
    sites : from now on measure these, names or patterns, and no others
    probing : see :data:`Probing`
    checkpoint : save the state now
    pin : keep the newest checkpoint at or before this step for good
    stop : save the state and end
    id : by which the answer is known

    Raises
    ------
    ValueError : a value has another type or is out of range, two contradict one another, or none is there
    """

    every: int | None = None
    sites: tuple[str, ...] | None = None
    probing: Probing | None = None
    checkpoint: bool = False
    pin: int | None = None
    stop: bool = False
    id: str = ""

    def __post_init__(self) -> None:
        _check_step("every", self.every, 1)
        _check_step("pin", self.pin, 0)
        if self.sites is not None:
            _check_sites(self.sites)
        if self.probing is not None and self.probing not in get_args(Probing):
            raise ValueError(f"probing is {_short(self.probing)}; give one of {', '.join(get_args(Probing))}")
        for name in ("checkpoint", "stop"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {_short(getattr(self, name))}; give true or false")
        if not isinstance(self.id, str) or len(self.id) > _MOST_NAME or not self.id.isprintable():
            raise ValueError(f"id is {_short(self.id)}; give a short text")
        if self.probing == "off" and self.every is not None:
            raise ValueError("every switches probing on: leave it or probing=off out")
        if self.probing == "reset" and (self.every is not None or self.sites is not None):
            raise ValueError("reset goes back to the schedule and sites of the beginning: leave others out")
        asked = (self.every, self.sites, self.probing, self.pin)
        if all(value is None for value in asked) and not (self.checkpoint or self.stop):
            raise ValueError("nothing is asked: give every, sites, probing, checkpoint, pin or stop")

    @classmethod
    def parsed(cls, text: bytes) -> ControlRequest:
        """From JSON; raises :class:`ValueError` as the class itself, and for what is no such object."""
        values = parse_object(text)
        names = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in names:
                raise ValueError(f"there is no {_short(name)}; {did_you_mean(name, names)}")
        if isinstance(values.get("sites"), list):
            values["sites"] = tuple(values["sites"])
        return cls(**values)

    def as_json(self) -> bytes:
        """What :meth:`parsed` reads: the values that say something."""
        values = dataclasses.asdict(self).items()
        # By identity, since step 0 equals False.
        said = {name: value for name, value in values if value is not None and value is not False}
        return json.dumps(said).encode()


class UnreadableRequestError(ValueError):
    """A request that is none; ``id`` is what it says of itself, or empty."""

    def __init__(self, problem: str, id: str = "") -> None:
        super().__init__(problem)
        self.id = id


@dataclass(frozen=True, kw_only=True)
class ControlAnswer:
    """What became of a request.

    Attributes
    ----------
    step : from this step on it holds
    done : what was done, a sentence each
    refused : what was not, and why; a request that is not understood, or not possible here, is refused whole
    id : of the request
    """

    step: int
    done: tuple[str, ...] = ()
    refused: tuple[str, ...] = ()
    id: str = ""


def request_path(run: str | os.PathLike[str]) -> Path:
    """Where requests to the writer of ``run`` are put."""
    return _beside(run, ".control.json")


def answer_path(run: str | os.PathLike[str]) -> Path:
    """Where its answers are."""
    return _beside(run, ".control-answer.json")


def _beside(run: str | os.PathLike[str], suffix: str) -> Path:
    # The run may be named by a link, and by another name than that by which it is written.
    path = Path(os.path.realpath(run))
    return path.with_name(path.name.removesuffix(".zarr") + suffix)


# Who asks


def control(
    run: str | os.PathLike[str],
    *,
    every: int | None = None,
    sites: Sequence[str] | None = None,
    probing: Probing | None = None,
    checkpoint: bool = False,
    pin: int | None = None,
    stop: bool = False,
    wait: float = 60.0,
) -> ControlAnswer:
    """Change what a running training or probe measures, or have it save, pin or stop, without a restart.

    It holds from the next step on, until the process ends: resumed, a run goes by its configuration again.

    Parameters
    ----------
    run : the run, which another process or thread writes
    every, sites, probing, checkpoint, pin, stop : see :class:`ControlRequest`
    wait : seconds until the request is withdrawn, unless it was taken

    Raises
    ------
    UsageError : nothing is asked, or what cannot be meant
    StoreError : nobody writes the run, or who does has not answered in time
    """
    if isinstance(sites, str):
        raise UsageError(f"sites={sites!r} is one text; give a list of names or patterns")
    try:
        request = ControlRequest(
            every=every,
            sites=None if sites is None else tuple(sites),
            probing=probing,
            checkpoint=checkpoint,
            pin=pin,
            stop=stop,
            id=uuid.uuid4().hex,
        )
    except ValueError as error:
        raise UsageError(f"control: {error}") from error
    path = Path(run)
    if not path.is_dir():
        raise StoreError(f"no run at {path}; check the path")
    _require_writer(path)
    try:
        replace_file(request_path(path), request.as_json())
    except OSError as error:
        raise StoreError(f"{request_path(path)} cannot be written: {error.strerror}") from error
    return _answered(path, request, wait)


def _require_writer(run: Path) -> None:
    if writer_state(run) in ("closed", "died"):
        raise StoreError(
            f"nobody writes {run}, so there is nobody to ask; what is to hold when it is resumed is given to "
            "`osp-diag train --resume` or to the probe"
        )


def _answered(run: Path, request: ControlRequest, wait: float) -> ControlAnswer:
    end = time.monotonic() + wait
    while True:
        # The state first: an answer that comes before the writer ends is then not missed.
        state = writer_state(run)
        answer = _read_answer(run)
        if answer is not None and answer.id == request.id:
            answer_path(run).unlink(missing_ok=True)
            return answer
        if state in ("closed", "died"):
            _withdraw(run, request)
            raise StoreError(f"whoever wrote {run} ended before taking the request, which is withdrawn")
        if time.monotonic() >= end:
            break
        time.sleep(_LOOK_SECONDS)
    if _withdraw(run, request):
        raise StoreError(
            f"the request was not taken within {wait:g} s and is withdrawn: a step of {run} takes longer "
            "(give more seconds to wait), or what writes it takes no requests"
        )
    raise StoreError(
        f"the request was taken from {run}, but not answered within {wait:g} s: it holds from one of the "
        "next steps on, which the notes of the run will name"
    )


def _withdraw(run: Path, request: ControlRequest) -> bool:
    """Remove the request if it is still there; whether it was."""
    path = request_path(run)
    try:
        if read_plain(path, _MOST_BYTES) != request.as_json():
            return True  # another request has taken its place
        path.unlink()
    except OSError:
        return False
    return True


def _read_answer(run: Path) -> ControlAnswer | None:
    try:
        values = parse_object(read_plain(answer_path(run), _MOST_BYTES))
        lists = (values["done"], values["refused"])
        if not all(isinstance(text, str) for texts in lists for text in texts):
            return None
        done, refused = map(tuple, lists)
        return ControlAnswer(step=int(values["step"]), done=done, refused=refused, id=str(values["id"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


# Who is asked


def take_request(run: str | os.PathLike[str]) -> ControlRequest | None:
    """Take the request that waits, so that it is done once; None where there is none.

    Raises
    ------
    UnreadableRequestError : it is no request, or a link; it is taken away all the same
    """
    path = request_path(run)
    taken = path.with_name(path.name + ".taken")
    try:
        # A newer request may come at any time: what is read must be what is removed.
        os.replace(path, taken)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise UnreadableRequestError(f"it cannot be taken: {error.strerror}") from error
    text = b""
    try:
        text = read_plain(taken, _MOST_BYTES)
        return ControlRequest.parsed(text)
    except OSError as error:
        raise UnreadableRequestError(f"it {error.strerror}") from error
    except ValueError as error:
        raise UnreadableRequestError(str(error), _id_of(text)) from error
    finally:
        with suppress(OSError):  # a folder stays
            taken.unlink()


def write_answer(run: str | os.PathLike[str], answer: ControlAnswer) -> None:
    """Say what became of a request; what the disk refuses to take is left out, for training goes on."""
    text = json.dumps(dataclasses.asdict(answer)).encode()
    try:
        replace_file(answer_path(run), text)
    except OSError:
        return


def _id_of(text: bytes) -> str:
    """By which the answer to a request is known that is not understood."""
    try:
        name = parse_object(text).get("id")
    except ValueError:
        return ""
    return name if isinstance(name, str) and len(name) <= _MOST_NAME else ""


def _check_step(name: str, value: Any, least: int) -> None:
    if value is None:
        return
    if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= _MOST_STEP:
        raise ValueError(f"{name} is {_short(value)}; give a whole number from {least} on")


def _check_sites(sites: Any) -> None:
    if not isinstance(sites, tuple) or not sites or len(sites) > _MOST_SITES:
        raise ValueError(f"sites is {_short(sites)}; give a list of names or patterns, at most {_MOST_SITES}")
    for site in sites:
        if not isinstance(site, str) or not site or len(site) > _MOST_NAME or not site.isprintable():
            raise ValueError(f"sites holds {_short(site)}; give names or patterns of sites")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
