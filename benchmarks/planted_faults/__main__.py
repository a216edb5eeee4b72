"""Plant faults into trainings and score what monitor and diagnosis say of them.

    python -m benchmarks.planted_faults list
    python -m benchmarks.planted_faults train --out planted --workers 16 --seeds 0 1 2
    python -m benchmarks.planted_faults score --out planted --workers 16

What is trained already is not trained again. Scoring asks monitor and diagnosis anew, of the faults and seeds
that are named, and writes scores.json and scores.md of all that was ever scored into ``--out``.
"""

from __future__ import annotations

import argparse
import json
import sys
from functools import partial
from pathlib import Path

from benchmarks.planted_faults.faults import FAULTS
from benchmarks.planted_faults.page import page, read_scores
from benchmarks.planted_faults.scoring import score_one
from benchmarks.planted_faults.training import PRESETS, Setting, jobs_of, train_all, work_through


def main() -> int:
    """Read the command line and do it."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.planted_faults",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("verb", choices=("list", "train", "score"))
    parser.add_argument("--out", type=Path, default=Path("planted"), help="folder of runs and results")
    parser.add_argument("--faults", nargs="+", metavar="NAME", default=list(FAULTS), help="all by default")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--preset", choices=PRESETS, default="tiny")
    parser.add_argument("--workers", type=int, default=1, help="processes, of one thread each")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--onset", type=int, default=50, help="the last step before a fault in the middle")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--every", type=int, default=10, help="steps between probes and checkpoints")
    parser.add_argument("--monitor-alone", action="store_true", help="score without asking the diagnosis")
    parser.add_argument("--verify", type=int, default=0, help="steps for which the diagnosis tries a remedy")
    parser.add_argument(
        "--blind",
        type=int,
        default=0,
        metavar="STEPS",
        help="ask the seventh question by itself, of faults from the start, with trainings of so many steps",
    )
    parser.add_argument(
        "--discard", action="store_true", help="delete the checkpoints of a fault once it is scored"
    )
    options = parser.parse_args()
    if unknown := [name for name in options.faults if name not in FAULTS]:
        parser.error(f"no such fault: {', '.join(unknown)}; `list` shows all")
    if not 0 < options.onset < options.steps or options.onset % options.every:
        parser.error("--onset is a multiple of --every, above 0 and below --steps")
    if options.verb == "list":
        _list(options.faults)
        return 0
    setting = Setting(
        options.out.absolute(), options.preset, options.onset, options.steps, options.every, options.device
    )
    jobs = jobs_of(setting, options.faults, options.seeds)
    if options.verb == "train":
        return int(bool(train_all(jobs, options.workers, _progress)))
    if untrained := [job for job in jobs if not job.is_done()]:
        _progress(f"{len(untrained)} of these are not trained under this setting, and not scored")
    work = partial(
        score_one,
        diagnosed=not options.monitor_alone,
        verify=options.verify,
        experiment=options.blind,
        discard=options.discard,
    )
    failed = work_through([job for job in jobs if job not in untrained], work, options.workers, _progress)
    scores = read_scores(options.out)
    (options.out / "scores.json").write_text(json.dumps(scores, indent=1), encoding="utf-8")
    (options.out / "scores.md").write_text(page(scores), encoding="utf-8")
    _progress(f"{options.out / 'scores.md'}: {len(scores)} trainings")
    return int(bool(failed or untrained))


def _progress(line: str) -> None:
    print(line, flush=True)


def _list(names: list[str]) -> None:
    for name in names:
        fault = FAULTS[name]
        how = "declared" if fault.is_declared else "silent" if fault.causes else ""
        rule = "development" if fault.is_development else "held out"
        causes = "; ".join(cause.text for cause in fault.causes)
        print(f"{name:38} {fault.begins:8} {fault.family:18} {how:9} {rule:12} {causes}")


if __name__ == "__main__":
    sys.exit(main())
