"""Doing what ``osp-diag control`` asks of a probe at work: between steps, on all ranks in the same one."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from osp_diag.errors import OspDiagError
from osp_diag.probing.agreement import Agreement
from osp_diag.probing.ranks import is_distributed, is_first_rank
from osp_diag.probing.schedule import Schedule
from osp_diag.runs.control import (
    ControlAnswer,
    ControlRequest,
    UnreadableRequestError,
    answer_path,
    request_path,
    take_request,
    write_answer,
)
from osp_diag.wording import listed

__all__ = ["BEGINNING", "LoopActions", "RunControl", "Switchable"]

BEGINNING = "changed while it ran: "
"""How the notes of a run begin that say what was switched at which step."""
LOOK_SECONDS = 0.25
"""A step may take a millisecond, and a look at a network disk as long."""
_MOST_COMPLAINTS = 10


class Switchable(Protocol):
    """What can be changed of a probe."""

    schedule: Schedule
    patterns: tuple[str, ...] | None

    def check_sites(self, patterns: tuple[str, ...] | None) -> None:
        """Raise :class:`SiteError` where :meth:`switch_sites` would have no meaning."""

    def switch_sites(self, patterns: tuple[str, ...] | None) -> None:
        """Measure other sites from the next probe on."""

    @property
    def notes(self) -> list[str]:
        """What is noted in the run."""

    def note(self, notes: Iterable[str]) -> None:
        """Keep what the reader of the numbers should know."""


@dataclass(frozen=True, kw_only=True)
class LoopActions:
    """What a loop does on request, each returning a sentence that says so; None: not here.

    Where it cannot, because of what is asked, an action raises :class:`OspDiagError`.
    """

    checkpoint: Callable[[], str] | None = None
    pin: Callable[[int], str] | None = None
    stop: Callable[[], str] | None = None


class RunControl:
    """Takes the requests to one run and does them.

    What was asked of an earlier process is not asked of this one: a request left there is removed, and a run
    that is resumed goes by its configuration, which a note then says.

    Parameters
    ----------
    probe : which writes the run
    run : its path
    first : the first step that this process makes; None: the one of the first look
    last : the last step of the loop, which a switched schedule probes too; None: not known
    """

    def __init__(
        self, probe: Switchable, run: Path, *, first: int | None = None, last: int | None = None
    ) -> None:
        self._probe, self._run, self._first, self._last = probe, run, first, last
        self._beginning = (probe.schedule, probe.patterns)
        self._paused: Schedule | None = None
        self._waiting: ControlRequest | None = None
        self._next_look = 0.0
        self._complaints = 0
        self._agreement = Agreement()
        self._clear()
        # A note about an earlier process must not be read as one about this.
        self._was_switched = any(note.startswith(BEGINNING) for note in probe.notes)

    # Noticing

    def takes_request(self, step: int) -> bool:
        """Whether this rank has taken a request, once for each; the first rank looks, a few times a second.

        Whoever has its own way to tell all ranks calls this, and then :meth:`obey` on all of them.
        """
        if self._was_switched:
            self._was_switched = False
            first = step if self._first is None else self._first
            self._note(first, "by the configuration again, since it was resumed")
        now = time.monotonic()
        if not is_first_rank() or self._waiting is not None or now < self._next_look:
            return False
        self._next_look = now + LOOK_SECONDS
        try:
            self._waiting = take_request(self._run)
        except UnreadableRequestError as error:
            self._refuse(step, str(error), error.id)
        return self._waiting is not None

    def between_steps(self, step: int, actions: LoopActions | None = None) -> None:
        """Do what is asked, from ``step`` on; called once a step, by every rank."""
        if self._agreement.reached(self.takes_request(step)):
            self.obey(step, actions)

    # Doing

    def obey(self, step: int, actions: LoopActions | None = None) -> None:
        """Do what was noticed, from ``step`` on; a collective."""
        actions = actions or LoopActions()
        request, self._waiting = self._of_first_rank(), None
        if request is None:
            return
        problem = self._problem(request, actions)
        if problem is not None:
            self._refuse(step, problem, request.id)
            return
        done, refused = self._switched(request, step), []
        for name, action in self._asked_of_loop(request, actions).items():
            try:
                done.append(action())
            except OspDiagError as error:
                refused.append(f"{name}: {error}")
        self._answer(ControlAnswer(step=step, done=tuple(done), refused=tuple(refused), id=request.id))

    def close(self) -> None:
        """Nobody takes requests any more."""
        self._clear(keep_answer=True)

    # Parts

    def _of_first_rank(self) -> ControlRequest | None:
        if not is_distributed():
            return self._waiting
        requests = [self._waiting]
        dist.broadcast_object_list(requests, src=0)
        return requests[0]

    def _problem(self, request: ControlRequest, actions: LoopActions) -> str | None:
        """Why a request cannot be done here; then nothing of it is."""
        for field in fields(LoopActions):
            wanted = getattr(request, field.name)
            if wanted is not None and wanted is not False and getattr(actions, field.name) is None:
                return f"{field.name}: this loop's checkpoints and end are not osp-diag's to decide"
        if request.probing == "on" and request.every is None and self._paused is None:
            return "probing is on already; every says how often"
        if request.probing == "off" and self._paused is not None:
            return "probing is off already"
        if request.sites is None:
            return None
        try:
            self._probe.check_sites(request.sites)
        except OspDiagError as error:
            return str(error)
        return None

    def _switched(self, request: ControlRequest, step: int) -> list[str]:
        """Change schedule and sites; says how."""
        probe, said = self._probe, []
        if request.probing == "reset":
            (probe.schedule, sites), self._paused = self._beginning, None
            probe.switch_sites(sites)
            said.append("the schedule and the sites of the configuration again")
        if request.probing == "off" and self._paused is None:
            self._paused, probe.schedule = probe.schedule, never
            said.append("no probes")
        if request.probing == "on" and self._paused is not None:
            probe.schedule, self._paused = self._paused, None
            said.append("probes again, by the schedule before")
        if request.every is not None:
            probe.schedule, self._paused = periodic(request.every, self._last), None
            said.append(f"probed every {request.every:,} steps")
        if request.sites is not None:
            probe.switch_sites(request.sites)
            said.append(f"measured at {listed(request.sites)} alone")
        if said:
            self._note(step, ", ".join(said))
        return said

    def _note(self, step: int, change: str) -> None:
        # With the time, since a resumed run may come to the same step, and a note is kept once.
        when = datetime.now(UTC).isoformat(timespec="seconds")
        self._probe.note([f"{BEGINNING}from step {step} on {change} ({when})"])

    @staticmethod
    def _asked_of_loop(request: ControlRequest, actions: LoopActions) -> dict[str, Callable[[], str]]:
        asked: dict[str, Callable[[], str]] = {}
        if request.checkpoint and actions.checkpoint is not None:
            asked["checkpoint"] = actions.checkpoint
        pin, step = actions.pin, request.pin
        if step is not None and pin is not None:
            asked["pin"] = lambda: pin(step)
        if request.stop and actions.stop is not None:
            asked["stop"] = actions.stop
        return asked

    def _refuse(self, step: int, problem: str, request: str) -> None:
        self._complaints += 1
        if self._complaints <= _MOST_COMPLAINTS:
            self._probe.note([f"a request before step {step} was refused: {problem}"])
        self._answer(ControlAnswer(step=step, refused=(problem,), id=request))

    def _answer(self, answer: ControlAnswer) -> None:
        if is_first_rank():
            write_answer(self._run, answer)

    def _clear(self, *, keep_answer: bool = False) -> None:
        if not is_first_rank():
            return
        for path in (request_path(self._run), *(() if keep_answer else (answer_path(self._run),))):
            try:
                path.unlink(missing_ok=True)
            except OSError:  # a folder is none of ours
                continue


def periodic(every: int, last: int | None) -> Schedule:
    """Every so many steps, and the last one."""
    return lambda step: step == last or step % every == 0


def never(step: int) -> bool:
    """The schedule of a probe that is switched off."""
    return False
