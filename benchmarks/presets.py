"""A preset's first steps and probe as shipped: what compiling takes, how fast it then is, what it fills.

Only what names a corpus and a cluster is changed: the built-in text, a batch of few sequences, and, where one
process is to hold what several would share, `parallel.mode=ddp`. On several GPUs start it with torchrun.

    python benchmarks/presets.py 3b
    torchrun --nproc-per-node 2 benchmarks/presets.py 7b --sequences 32
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

import torch
from machine import machine

from osp_diag.runs.headline import headline
from osp_diag.trainer.config import TrainConfig
from osp_diag.trainer.config_values import with_changes
from osp_diag.trainer.loop import train
from osp_diag.trainer.presets import PRESETS, preset


def config_of(name: str, steps: int, sequences: int, *, compiled: bool) -> TrainConfig:
    """The preset on text that is there, for few steps."""
    shipped = preset(name)
    changes = {
        "compile": shipped.compile and compiled,
        "steps": steps,
        "batch_size": sequences,
        "log_every": 1,
        "data.source": "builtin",
        "data.mixture": {},
        "data.tokenizer": None,
        "data.validation_fraction": 0.2,  # of a short text, for two probed sequences
        "probe.dense_until": 0,
        "probe.every": steps,
        "probe.tokens": 4 * shipped.data.sequence_length,
        "checkpoint.every": 0,
    }
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        changes["parallel.mode"] = "ddp"
    return with_changes(shipped, changes)


def measured(config: TrainConfig, folder: Path) -> dict[str, object]:
    """Train, and tell when each step was done."""
    begun, done = time.perf_counter(), []

    def progress(step: int, last: int, values: Mapping[str, float]) -> None:
        done.append(time.perf_counter() - begun)

    run = train(config, folder / "run.zarr", progress=progress)
    if not done:  # progress is the first rank's
        return {}
    series = run.series
    seconds = [float(value) for value in series["step_seconds"].dropna("step")]
    return {
        "preset": config.name,
        "parallel": config.parallel.mode,
        "compiled": config.compile,
        "ranks": run.attrs["ranks"],
        "tokens_per_step": config.tokens_per_step,
        "seconds_until_first_step": done[0],
        "step_seconds": seconds,
        "model_flops_utilisation": [float(v) for v in series.get("model_flops_utilisation", [])],
        "loss": [float(value) for value in series["loss"].dropna("step")],
        "headline": headline(run),
        "peak_memory_gib": torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else None,
        "machine": machine(torch.device("cuda" if torch.cuda.is_available() else "cpu")),
    }


def main() -> None:
    """Read the command line, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--sequences", type=int, default=16, help="a step")
    parser.add_argument("--uncompiled", action="store_true", help="to see what compiling takes and gives")
    words = parser.parse_args()
    # Of several ranks the first writes the run, and all read it.
    port = os.environ.get("MASTER_PORT", str(os.getpid()))
    folder = Path(tempfile.gettempdir()) / f"osp-diag-presets-{port}"
    folder.mkdir(exist_ok=True)
    config = config_of(words.preset, words.steps, words.sequences, compiled=not words.uncompiled)
    numbers = measured(config, folder)
    if numbers:
        print(json.dumps(numbers, indent=2))
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
