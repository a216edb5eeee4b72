"""What it costs to judge a probe, beside the probe itself: of a recorded run, probe by probe.

    osp-diag train tiny --set steps=100 probe.every=10 --out tiny.zarr
    python benchmarks/monitor_cost.py tiny.zarr --layers 1 8      # and with 8 times as many layers

As the trainer does, it makes the judged numbers of every probe's Datasets and has all rules judge them, in
time of the processor; reading the store is not counted. What the probe took the run recorded, of its own
layers (``probe_seconds``).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
import xarray as xr
from machine import machine

from osp_diag.monitoring import Monitor, blocks_of
from osp_diag.runs.run import Run, open_run


def main() -> None:
    """Print a row for each number of layers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[1], help="times as many as the run has")
    options = parser.parse_args()
    run = open_run(options.run)
    seconds = run.series["probe_seconds"].dropna("step").values
    probe = 1e3 * float(np.median(seconds))
    print(f"{machine(torch.device('cpu'))}; a probe took {probe:.0f} ms (median of {len(seconds)})\n")
    print("| layers | numbers | judging a probe (ms) | of that the numbers | share of a probe |")
    print("|---|---|---|---|---|")
    for times in options.layers:
        count, reading, judging = _timed(run, times)
        total = reading + judging
        print(f"| × {times} | {count:,} | {total:.1f} | {reading:.1f} | {total / (probe * times):.1%} |")


def _timed(run: Run, times: int) -> tuple[int, float, float]:
    """How many numbers a probe has, and the medians in ms of making and of judging them."""
    monitor, reading, judging, count = Monitor(), [], [], 0
    for place, step in enumerate(run.steps.tolist()):
        groups = _groups(run, place, times)
        started = time.process_time()
        blocks = blocks_of(groups)
        made = time.process_time()
        monitor.add_probe(step, blocks)
        judging.append(1e3 * (time.process_time() - made))
        reading.append(1e3 * (made - started))
        count = sum(len(block.places) for block in blocks)
    return count, statistics.median(reading), statistics.median(judging)


def _groups(run: Run, place: int, times: int) -> Mapping[str, xr.Dataset]:
    """What the trainer has after a probe, with every layer so many times."""
    groups = {}
    for name in (*run.sites, *run.beside):
        data = run[name] if name in run.beside else run.at(name)
        now = data.isel(step=place, drop=True).load()
        if "layer" in now.dims and times > 1:
            now = xr.concat([now] * times, "layer", data_vars="minimal", coords="minimal", compat="override")
            now = now.assign_coords(layer=np.arange(now.sizes["layer"]))
        groups[name] = now
    return groups


if __name__ == "__main__":
    main()
