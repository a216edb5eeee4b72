"""The monitor in the training loop: judges what was recorded, and does what ``monitor.action`` says."""

from __future__ import annotations

import json
import threading
import time
import urllib.request
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import xarray as xr

from osp_diag.monitoring import Finding, Monitor, RunMonitor, blocks_of
from osp_diag.runs.run import Run
from osp_diag.trainer.config import MonitorConfig

__all__ = ["TrainingMonitor", "post"]

_TIMEOUT = 5.0
"""Seconds that a webhook may take."""

Hook = Callable[[Finding], Any]


def post(url: str, finding: Finding) -> str | None:
    """POST a finding as JSON. Returns what went wrong: training is worth more than its alerts."""
    body = json.dumps(finding.as_dict()).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"}, method="POST")
    try:
        with urllib.request.urlopen(request, timeout=_TIMEOUT):
            pass
    except Exception as error:
        # The rest of such an address is often a secret.
        return f"monitor.webhook at {urlsplit(url).hostname} failed at step {finding.step}: {error!r}"
    return None


class TrainingMonitor:
    """Judges the steps of a training as they are recorded; of all ranks on the first.

    Parameters
    ----------
    config : what to do with a finding
    hook : called with every finding, beside ``config.webhook``; one that raises is warned of and called again
    note : called once, with why the webhook failed first
    """

    def __init__(
        self, config: MonitorConfig, hook: Hook | None = None, note: Callable[[str], None] | None = None
    ) -> None:
        self.config, self.hook, self.note = config, hook, _warn if note is None else note
        self._monitor = Monitor()
        self._profiles: tuple[Mapping[str, xr.DataArray], Mapping[str, xr.DataArray]] = ({}, {})
        self._posts: list[threading.Thread] = []
        self._failures: list[str] = []
        self._has_noted = False
        self._new: list[Finding] = []

    @property
    def findings(self) -> list[Finding]:
        """All findings of this process, of the steps before a resumption too."""
        return self._monitor.findings

    @property
    def last_probe(self) -> int | None:
        """The last probe that was judged."""
        return self._monitor.last_probe

    def resume(self, run: Run) -> None:
        """What the run holds already is the history; its findings were told when they came."""
        monitor = RunMonitor(run)
        monitor.look()
        self._monitor = monitor.monitor

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """The scalars of a logged step."""
        self._add(self._monitor.add_scalars(step, values))

    def probe(self, step: int, groups: Mapping[str, xr.Dataset], declared: Sequence[str] = ()) -> None:
        """A probed step; its scalars came before."""
        profiles = {
            site: data["channel_rms"].sel(stratum="all")
            for site, data in groups.items()
            if "channel_rms" in data and "stratum" in data.coords and "layer" in data.coords
        }
        self._profiles = (self._profiles[1], profiles)
        self._add(self._monitor.add_probe(step, blocks_of(groups, declared), self._profiles_of))

    def take(self) -> list[Finding]:
        """The findings that nobody took yet."""
        self._note_failure()
        new, self._new = self._new, []
        return new

    def close(self) -> None:
        """Wait for the webhooks under way, no longer than one may take."""
        end = time.monotonic() + _TIMEOUT + 1
        for thread in self._posts:
            thread.join(max(0.0, end - time.monotonic()))
        self._posts = []
        self._note_failure()

    def _note_failure(self) -> None:
        """In the thread of the training, as a note is written into its run."""
        if self._failures and not self._has_noted:
            self._has_noted = True
            self.note(f"{self._failures[0]}; training goes on")

    def _post(self, url: str, finding: Finding) -> None:
        failure = post(url, finding)
        if failure is not None:
            self._failures.append(failure)

    def _profiles_of(self, site: str) -> tuple[dict[int, np.ndarray], dict[int, np.ndarray]]:
        before, now = (
            {int(layer): of[site].sel(layer=layer).values for layer in of[site]["layer"].values}
            if site in of
            else {}
            for of in self._profiles
        )
        return before, now

    def _add(self, findings: Sequence[Finding]) -> None:
        for finding in findings:
            if self.config.webhook is not None:
                thread = threading.Thread(target=self._post, args=(self.config.webhook, finding), daemon=True)
                thread.start()
                self._posts.append(thread)
            if self.hook is not None:
                try:
                    self.hook(finding)
                except Exception as error:
                    _warn(f"the monitor's hook failed at step {finding.step}: {error!r}; training goes on")
        self._posts = [thread for thread in self._posts if thread.is_alive()]
        self._new += findings


def _warn(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=2)
