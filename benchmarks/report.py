"""What a report costs: time and peak memory to open and report a long run, and their growth with its steps.

A made-up training of 24 layers of 2048 channels and 16 heads is written with the project's own writer (not
timed), then each report is made in a process of its own, which says how long it took and how much memory it
held at most. Run it with

    python benchmarks/report.py                             # 10, 100 and 1,000 steps; 10 GB of disk
    python benchmarks/report.py --steps 10 100 --runs 2     # two runs compared
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import xarray as xr

LAYERS, CHANNELS, HEADS, HEAD_CHANNELS, LOGIT_BINS = 24, 2048, 16, 128, 256
STRATA = ["all", "first", "delimiter", "rest"]
SITES = {
    "embedding": [0],
    "attention_contribution": list(range(LAYERS)),
    "residual_mid": list(range(LAYERS)),
    "mlp_contribution": list(range(LAYERS)),
    "residual_post": list(range(LAYERS)),
    "final_norm": [LAYERS - 1],
}


def site(layers: list[int], growth: float, rng: np.random.Generator) -> xr.Dataset:
    """Statistics of one site at one step; a few channels and all kurtoses grow."""
    by_stratum = ("layer", "stratum")
    shape = (len(layers), len(STRATA))
    rms = 1 + 0.1 * rng.standard_normal((*shape, CHANNELS))
    rms[..., [7, 300, 1999]] += 40 * growth
    kurtosis = 0.04 * np.exp(6 * growth + 0.1 * rng.standard_normal(shape))
    attributes = {"estimator": "osp_excess_kurtosis/1", "floor": 0.0416, "ceiling": float(CHANNELS - 3)}
    return xr.Dataset(
        {
            "osp_excess_kurtosis": (by_stratum, kurtosis, attributes),
            "fisher_kurtosis": (by_stratum, kurtosis, {"estimator": "fisher_kurtosis/1"}),
            "max_median_ratio": (by_stratum, 4 + 40 * growth + rng.random(shape)),
            "absolute_maximum": (by_stratum, 4 + 160 * growth + rng.random(shape)),
            "massive_activation_count": (by_stratum, np.zeros(shape)),
            "nonfinite_token_count": (by_stratum, np.zeros(shape)),
            "top_magnitude": ((*by_stratum, "rank"), np.repeat(4 + rng.random(shape)[..., None], 3, -1)),
            "median_magnitude": (("layer",), np.full(len(layers), 0.7)),
            "channel_rms": ((*by_stratum, "channel"), rms, {"estimator": "channel_moments/1"}),
            "channel_absolute_maximum": ((*by_stratum, "channel"), 4 * rms),
        },
        coords={"layer": layers, "stratum": STRATA, "channel": np.arange(CHANNELS), "rank": [1, 2, 3]},
    )


def attention(growth: float, rng: np.random.Generator) -> xr.Dataset:
    """Heads of which half become sinks."""
    head = ("layer", "head")
    shape = (LAYERS, HEADS)
    mass = np.clip(0.05 + 0.7 * growth * (np.arange(HEADS) % 2) + 0.05 * rng.random(shape), 0, 1)
    rate = np.clip(mass[..., None, None] * np.array([1.4, 1.2, 1.0, 0.4])[:, None], 0, 1)
    centres = np.sinh(np.linspace(-6, 6, LOGIT_BINS))
    wobble = rng.random((*shape, 2, 1))
    density = np.exp(-0.5 * (centres + 3) ** 2) / np.sqrt(2 * np.pi)
    quantile = np.array([-4.6, -3.0, -1.4]) + np.zeros((*shape, 2, 1))
    quantile[:, :, 0] += 6
    return xr.Dataset(
        {
            "sink_rate": ((*head, "epsilon", "sink_position"), rate, {"estimator": "sink_rate/1"}),
            "first_token_attention": ((*head, "stratum"), np.repeat(mass[..., None], 4, -1)),
            "max_logit": (head, 20 + rng.random(shape)),
            "logit_density": ((*head, "key_class", "logit_bin"), density * (1 + 0.01 * wobble)),
            "logit_quantile": ((*head, "key_class", "quantile"), quantile),
            "sink_cosine": (head, 0.3 + 0.3 * rng.random(shape)),
            "sink_key_norm": (head, 1 + rng.random(shape)),
            "other_key_norm": (head, 4 + rng.random(shape)),
            "sink_logit_contribution": (
                (*head, "head_channel"),
                rng.standard_normal((*shape, HEAD_CHANNELS)),
                {"estimator": "sink_logit_contribution/1"},
            ),
        },
        coords={
            "layer": np.arange(LAYERS),
            "head": np.arange(HEADS),
            "epsilon": [0.1, 0.2, 0.3, 0.8],
            "sink_position": [0],
            "stratum": STRATA,
            "key_class": ["sink", "other"],
            "logit_bin": centres,
            "quantile": [0.05, 0.5, 0.95],
        },
    )  # fmt: skip


def write(path: Path, steps: int, seed: int = 0) -> None:
    """A run of so many probed steps, one every 10."""
    from osp_diag.runs.writer import RunWriter

    attrs = {
        "model_name": f"made-up {LAYERS} × {CHANNELS}",
        "model_fingerprint": f"{seed}",
        "number_of_layers": LAYERS,
        "hidden_size": CHANNELS,
        "token_source": "made-up numbers",
        "token_fingerprint": "made-up",
        "protocol": "sequence",
        "bos": "no",
        "sequence_length": 2048,
        "tokens": 65536,
        "dtype": "bfloat16",
        "estimators": ["osp_excess_kurtosis/1", "fisher_kurtosis/1", "channel_moments/1", "sink_rate/1"],
    }
    rng = np.random.default_rng(seed)
    with RunWriter(path, attrs) as writer:
        for index in range(steps):
            growth = max(index / max(steps - 1, 1) - 0.3, 0.0)
            groups = {name: site(layers, growth, rng) for name, layers in SITES.items()}
            writer.append(10 * index, groups | {"attention": attention(growth, rng)})
            writer.append_series(10 * index, {"loss": 3 + 5 * float(np.exp(-index / 50))})


def measure(paths: list[Path], out: Path) -> dict[str, float]:
    """In a fresh process: seconds from opening to the written page, its size, and the peak of memory."""
    command = [sys.executable, __file__, "--one", str(out), *map(str, paths)]
    process = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    costs: dict[str, float] = json.loads(process.stdout.splitlines()[-1])
    return costs


def one(out: Path, paths: list[Path]) -> None:
    """What the fresh process does."""
    begin = time.perf_counter()
    from osp_diag.figures.report import write_report
    from osp_diag.runs.run import open_run

    imported = time.perf_counter()
    runs = [open_run(path) for path in paths]
    opened = time.perf_counter()
    write_report(runs, out)
    written = time.perf_counter()
    used = resource.getrusage(resource.RUSAGE_SELF)
    print(
        json.dumps(
            {
                "import": imported - begin,
                "open": opened - imported,
                "report": written - opened,
                "total": written - begin,
                "cpu": used.ru_utime + used.ru_stime,
                "peak_mib": used.ru_maxrss / 1024,
                "page_mb": out.stat().st_size / 1e6,
            }
        )
    )


def main() -> None:
    """Write the runs, make the reports, print the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 100, 1000])
    parser.add_argument("--runs", type=int, default=1, help="reported together")
    parser.add_argument("--rounds", type=int, default=3, help="the median of so many")
    parser.add_argument("--keep", type=Path, help="write the runs here, and take those that are there")
    parser.add_argument("--one", nargs="+", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        one(options.one[0], options.one[1:])
        return
    import torch
    from machine import machine

    print(
        f"{LAYERS} layers, {CHANNELS} channels, {HEADS} heads, {options.runs} run(s); "
        f"{machine(torch.device('cpu'))}"
    )
    print(
        "| steps | imports s | open s | report s | total s | CPU s | peak MiB | page MB |\n"
        "|---|---|---|---|---|---|---|---|"
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        for steps in options.steps:
            paths = [folder / f"{steps}-{seed}.zarr" for seed in range(options.runs)]
            for seed, path in enumerate(paths):
                if not path.exists():
                    write(path, steps, seed)
            rounds = [measure(paths, Path(scratch) / "report.html") for _ in range(options.rounds)]
            median = {key: float(np.median([costs[key] for costs in rounds])) for key in rounds[0]}
            numbers = (median[key] for key in ("import", "open", "report", "total", "cpu"))
            cells = [f"{steps:,}", *(f"{value:.2f}" for value in numbers)]
            cells += [f"{median['peak_mib']:.0f}", f"{median['page_mb']:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
