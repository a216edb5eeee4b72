"""``osp-diag watch``: a training run, or several, while they are written."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from osp_diag.errors import StoreError, UsageError

if TYPE_CHECKING:
    from osp_diag.cli.watch_alerts import AlertFile
    from osp_diag.monitoring import Severity
    from osp_diag.runs.following import FollowedRun
    from osp_diag.runs.run import Run

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
    against: Path | None = None,
    fail_on: Literal["bad", "watch"] = "bad",
    forecast: bool = False,
    json: bool = False,
) -> int:
    """Watch runs while they are written: kurtosis against its floor, sinks, loss, speed, and what to mind.

    Without --serve in this terminal, until Ctrl-C; with it on a page for a browser, on this machine alone.
    Runs are only read. One that does not exist yet is waited for; a trainer may die, resume or begin anew.
    Every recorded number is judged: jumps, steady growth, losses, limits and NaN.
    The exit code is 1 if a run holds NaN or Inf, steps that diverged, or a held-out loss that rose; see
    --fail-on.

    Args:
        runs: the runs, which `osp-diag train` or a probe in a training loop writes.
        once: show once and stop; a run that does not exist is then an error.
        every: seconds between two looks.
        serve: serve a page instead.
        host: of the page; any other than 127.0.0.1 lets other machines see it.
        port: of the page.
        out: write a line of JSON to this file (.jsonl) for every alert, when it is found: time, run, rule,
            severity, sentence, step, bracket, place and value; a file that is there is replaced. Not with
            --serve.
        against: a run that is known to be good, with probes at the same steps: also say where the others
            leave it. Not with --serve.
        fail_on: watch makes the exit code 1 of any alert, for CI.
        forecast: also say at which step steady growth would pass a limit if it went on so. An extrapolation,
            which raises no alert: on healthy trainings it was wrong. Not with --serve.
        json: print the numbers once as JSON and stop.

    Examples:
        osp-diag watch runs/osp.zarr
        osp-diag watch adam.zarr osp.zarr --serve
        osp-diag watch osp.zarr --once --json
        osp-diag watch adam.zarr osp.zarr --out alerts.jsonl
        osp-diag watch new.zarr --against good.zarr --once --fail-on watch
    """
    from osp_diag.cli.watch_alerts import AlertFile
    from osp_diag.runs.following import FollowedRun
    from osp_diag.runs.run import open_run

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
    if serve and against is not None:
        raise UsageError("watch: --serve compares with no reference; leave --against out")
    if serve and forecast:
        raise UsageError("watch: --serve shows no forecasts; leave --forecast out")
    followed = [FollowedRun(path) for path in dict.fromkeys(runs)]
    for one in followed:
        _check(one, must_exist=once or json)
    if serve:
        from osp_diag.figures.live import serve_page

        return serve_page(followed, host=host, port=port, every=every)
    alerts = None if out is None else AlertFile(out)
    reference = None if against is None else open_run(against)
    if json:
        return _as_json(followed, alerts, reference, fail_on, forecast=forecast)
    from osp_diag.cli.watch_terminal import show

    return show(
        followed,
        every=None if once else every,
        alerts=alerts,
        against=reference,
        fail_on=fail_on,
        forecast=forecast,
    )


def _as_json(
    followed: list[FollowedRun],
    alerts: AlertFile | None,
    against: Run | None,
    fail_on: Severity,
    *,
    forecast: bool,
) -> int:
    from osp_diag.analyses.live import standing

    standings = [standing(one, against, forecast=forecast) for one in followed]
    if alerts is not None:
        alerts.add(standings)
    print(json_format.dumps({"runs": [one.as_dict() for one in standings]}, indent=2))
    return int(any(one.is_at_least(fail_on) for one in standings))


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
