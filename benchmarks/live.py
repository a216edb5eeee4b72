"""What it costs to watch a run as it grows: one look at 100, 1,000 and 10,000 probed steps.

    python benchmarks/live.py

A synthetic run of 24 layers and 16 heads, probed at 15 sites at every step, is written in a temporary
folder. One look: a step has come; read it, draw the page's pictures, and make the JSON that a browser is
sent. Medians of ``--rounds`` looks, each after one more step, in CPU time: what else runs on the machine
does not count.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xarray as xr

from osp_diag.analyses.live import standing
from osp_diag.figures.live._data import Choice
from osp_diag.figures.live._page import pictures
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.writer import RunWriter

# Made-up runs grow as those of the tests do, which are in a clone, as this script is, and not installed.
sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.machine import machine
from tests.growing_runs import ATTRIBUTES, activation, groups, scalars

LAYERS, HEADS = 24, 16
SITES = (
    "residual_mid", "attention_input", "attention_output", "attention_contribution", "query_pre_rope",
    "key_pre_rope", "query_post_rope", "key_post_rope", "value", "mlp_input", "mlp_hidden",
    "mlp_contribution",
)  # fmt: skip


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[100, 1_000, 10_000])
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args()
    print(f"{LAYERS} layers, {HEADS} heads, {len(SITES) + 3} sites; {machine(torch.device('cpu'))}\n")
    print("| probed steps | first look, ms | after one more step, ms | × | nothing new, ms | sent, kB |")
    print("|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        path, first = Path(folder) / "run.zarr", None
        with RunWriter(path, ATTRIBUTES, block=200) as writer:
            written = 0
            for count in options.steps:
                _grow(writer, range(written, count))
                written = count + options.rounds
                costs = _measure(path, writer, count, options.rounds)
                first = first or costs["step"]
                times = f"{costs['open']:.0f} | {costs['step']:.1f} | {costs['step'] / first:.2f}"
                rest = f"{costs['idle']:.1f} | {costs['bytes'] / 1000:.0f}"
                print(f"| {count:,} | {times} | {rest} |", flush=True)


def _measure(path: Path, writer: RunWriter, count: int, rounds: int) -> dict[str, float]:
    run = FollowedRun(path)
    opened = _timed(lambda: _look(run))
    steps, idle, size = [], [], 0
    for step in range(count, count + rounds):
        _grow(writer, [step])
        begun = time.process_time()
        size = _look(run)
        steps.append(time.process_time() - begun)
        idle.append(_timed(lambda: (run.refresh(), standing(run))))
    return {
        "open": 1000 * opened,
        "step": 1000 * statistics.median(steps),
        "idle": 1000 * statistics.median(idle),
        "bytes": size,
    }


def _look(run: FollowedRun) -> int:
    """What the server does when a browser asks; returns how many bytes it sends."""
    run.refresh()
    facts = standing(run).as_dict()
    return len(json.dumps([facts, pictures([run], Choice((0,)))]))


def _timed(work: Callable[[], Any]) -> float:
    begun = time.process_time()
    work()
    return time.process_time() - begun


def _grow(writer: RunWriter, steps: Any) -> None:
    rng = np.random.default_rng(len(writer.steps))
    for step in steps:
        over = np.exp(0.1 * rng.standard_normal(LAYERS)) * np.linspace(1, 1 + step / 50, LAYERS)
        probed: dict[str, xr.Dataset] = groups(over, heads=HEADS, sink=rng.random())
        probed |= {site: activation(over) for site in SITES}
        writer.append(step, probed)
        writer.append_series(step, scalars(step) | {"probe_seconds": 0.1, "held_out_loss": 3.0})
    writer.flush()


if __name__ == "__main__":
    main()
