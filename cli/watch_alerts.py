"""What ``osp-diag watch --out`` writes: alerts, a line of JSON each."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from osp_diag.errors import UsageError

if TYPE_CHECKING:
    from osp_diag.analyses.live import Standing

__all__ = ["AlertFile"]


class AlertFile:
    """A file that gets a line when an alert is first raised; one that stands at every look gets no other.

    Raises
    ------
    UsageError : the name does not end in .jsonl, or the file cannot be written
    """

    def __init__(self, path: Path) -> None:
        if path.suffix != ".jsonl":
            raise UsageError(f"watch: --out {path}: alerts are lines of JSON; let the name end in .jsonl")
        if not path.parent.is_dir():
            raise UsageError(f"watch: --out {path}: the folder {path.parent} does not exist; make it first")
        self.path = path
        self._keys: set[tuple[str, str, int, int]] = set()
        self._write("w", "")

    def add(self, standings: Sequence[Standing]) -> None:
        """Write the alerts that were not there at the last look: time, run, and the alert's own fields."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        lines, keys = [], set()
        for one in standings:
            alike: Counter[tuple[str, int]] = Counter()
            for alert in one.alerts:
                # Alerts of one rule and step are told apart by their order.
                key = (one.path, alert.rule, alert.step, alike[alert.rule, alert.step])
                alike[alert.rule, alert.step] += 1
                keys.add(key)
                if key not in self._keys:
                    lines.append(json.dumps({"time": now, "run": one.path} | alert.as_dict()) + "\n")
        self._keys = keys
        if lines:
            self._write("a", "".join(lines))

    def _write(self, mode: str, text: str) -> None:
        try:
            with self.path.open(mode, encoding="utf-8") as file:
                file.write(text)
        except OSError as problem:
            raise UsageError(
                f"watch: cannot write {self.path}: {problem.strerror or problem}; write elsewhere or make "
                "room"
            ) from problem
