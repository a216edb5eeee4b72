"""``osp-diag watch``: a training run, or several, while they are written."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from osp_diag.errors import StoreError, UsageError

if TYPE_CHECKING:
    from osp_diag.cli.watch_alerts import AlertFile
    from osp_diag.runs.following import FollowedRun

VERB = "watch"
HELP = "watch training runs while they are written, here or in a browser"

Runs = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN...")]


def run(
    runs: Runs,
    /,
    *,
    once: bool = False,
    every: float = 2.0,
    serve: bool = False,
    host: str = "127.0.0.1",
    port: int = 8050,
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Watch runs while they are written: kurtosis against its floor, sinks, loss, speed, and what to mind.

    Without --serve in this terminal, until Ctrl-C; with it on a page for a browser, on this machine alone.
    Runs are only read. One that does not exist yet is waited for; a trainer may die, resume or begin anew.
    The exit code is 1 if a run holds NaN or Inf, or steps that diverged.

    Args:
        runs: the runs, which `osp-diag train` or a probe in a training loop writes.
        once: show once and stop; a run that does not exist is then an error.
        every: seconds between two looks.
        serve: serve a page instead.
        host: of the page; any other than 127.0.0.1 lets other machines see it.
        port: of the page.
        out: write a line of JSON to this file (.jsonl) for every alert, when it is found: time, run, rule,
            severity, text, step and value; a file that is there is replaced. Not with --serve.
        json: print the numbers once as JSON and stop.

    Examples:
        osp-diag watch runs/osp.zarr
        osp-diag watch adam.zarr osp.zarr --serve
        osp-diag watch osp.zarr --once --json
        osp-diag watch adam.zarr osp.zarr --out alerts.jsonl
    """
    from osp_diag.cli.watch_alerts import AlertFile
    from osp_diag.runs.following import FollowedRun

    if not runs:
        raise UsageError("watch: which run? Give the path that `osp-diag train --out` was given")
    if not 0.1 <= every <= 3600:
        raise UsageError(f"watch: --every is a number of seconds from 0.1 to 3600, not {every:g}")
    if serve and (once or json):
        raise UsageError("watch: --serve shows a page; leave --once and --json out")
    if serve and out is not None:
        raise UsageError(
            "watch: --serve writes no file; leave --out out, or run `osp-diag watch` with --out beside it"
        )
    followed = [FollowedRun(path) for path in dict.fromkeys(runs)]
    for one in followed:
        _check(one, must_exist=once or json)
    if serve:
        from osp_diag.figures.live import serve_page

        return serve_page(followed, host=host, port=port, every=every)
    alerts = None if out is None else AlertFile(out)
    if json:
        return _as_json(followed, alerts)
    from osp_diag.cli.watch_terminal import show

    return show(followed, every=None if once else every, alerts=alerts)


def _as_json(followed: list[FollowedRun], alerts: AlertFile | None) -> int:
    from osp_diag.analyses.live import standing

    standings = [standing(one) for one in followed]
    if alerts is not None:
        alerts.add(standings)
    print(json_format.dumps({"runs": [one.as_dict() for one in standings]}, indent=2))
    return int(any(one.bad for one in standings))


def _check(run: FollowedRun, *, must_exist: bool) -> None:
    """Refuse what is no run; what does not exist yet may become one, if there is a folder for it."""
    run.refresh()
    if run.state == "unreadable":
        raise StoreError(run.problem)
    if run.state in ("absent", "empty") and must_exist:
        lack = "no run" if run.state == "absent" else "no step yet in the run"
        raise StoreError(
            f"{lack} at {run.path}; check the path, or leave --once and --json out to wait for it"
        )
    if run.state == "absent" and not run.path.absolute().parent.is_dir():
        raise UsageError(
            f"no run at {run.path}, and no folder {run.path.parent} in which one could begin; check the path"
        )
