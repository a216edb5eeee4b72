"""What the records of a logged step cost, beside the step: the weight sketch, and the counts of its batch.

One model and random tokens; a step and each of the records take turns, so that the machine's load falls on
all alike. Times are medians over rounds. Run it with

    python benchmarks/weight_sketch.py                             # the shape that suits the machine
    python benchmarks/weight_sketch.py --shape llama-1.4b --rounds 8 --out sketch.json

The sketch is timed until the device has made it; in a training nothing waits for it. The batch is counted on
the host, which on a GPU is ahead of the device, so that its time is an upper bound.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from machine import machine
from train_step import Bench, Timed, arguments, our_optimizer, passes_of

from osp_diag.trainer.batch_statistics import BatchCounts
from osp_diag.trainer.config import DataConfig, TrainConfig
from osp_diag.trainer.data import Batch
from osp_diag.trainer.data.training_data import Dealing
from osp_diag.trainer.weight_sketch import WeightSketch, sketch_period


def measure(bench: Bench, rounds: int, step_tokens: int) -> dict[str, Any]:
    """Time everything, interleaved."""
    update, _ = our_optimizer(bench, "muon")
    sketch = WeightSketch(dict(bench.model.named_parameters()))
    passes = passes_of(bench.tokens, step_tokens)
    length = bench.config.data.sequence_length
    ids = torch.randint(3, bench.config.model.vocabulary_size, (passes * len(bench.ids), length + 1))
    batch = Batch(ids[:, :-1], ids[:, 1:])
    counts = BatchCounts(bench.config.model.vocabulary_size, Dealing(len(ids)))
    timed = {
        "pass": Timed("forward and backward", bench.forward_and_backward),
        "update": Timed("our Muon (OSP's routing)", update),
        "sketch": Timed("weight sketch", lambda: sketch.take()),
        "batch": Timed("counts of the batch of a step, on the host", lambda: counts.of(batch)),
    }
    for _ in range(2):
        for entry in timed.values():
            bench.time(entry, keep=False)
    for _ in range(rounds):
        for entry in timed.values():
            bench.time(entry)
    config = TrainConfig(
        model=bench.config.model,
        data=DataConfig(sequence_length=length),
        batch_size=passes * len(bench.ids),
    )
    return {
        "seconds": {name: entry.median for name, entry in timed.items()},
        "names": {name: entry.name for name, entry in timed.items()},
        "passes": passes,
        "step_tokens": passes * bench.tokens,
        "period": sketch_period(config, bench.model.parameter_count()),
    }


def report(numbers: dict[str, Any]) -> None:
    """Print what the numbers say."""
    seconds, period = numbers["seconds"], numbers["period"]
    print("| what | ms |\n|---|---|")
    for name, value in seconds.items():
        print(f"| {numbers['names'][name]} | {value * 1e3:.2f} |")
    step = numbers["passes"] * seconds["pass"] + seconds["update"]
    share = seconds["sketch"] / step
    print(
        f"\na step of {numbers['step_tokens']:,} tokens: {step * 1e3:.1f} ms; a sketch is {share:.3%} of it, "
        f"every {period} steps {share / period:.3%}; the counts of its batch are "
        f"{seconds['batch'] / step:.3%}"
    )


def main() -> None:
    """Time a step and its records, interleaved, and print what they come to."""
    parser = arguments(__doc__)
    parser.add_argument("--step-tokens", type=int, help="tokens of a whole step; default: one forward pass's")
    options = parser.parse_args()
    bench = Bench(options.shape, options.device, compiled=options.compile, micro=options.micro_batch)
    numbers = measure(bench, options.rounds, options.step_tokens or bench.tokens)
    print(
        f"{machine(bench.device)}; {options.shape}, batch {tuple(bench.ids[:, 1:].shape)}; "
        f"median of {options.rounds}\n"
    )
    report(numbers)
    if options.out:
        Path(options.out).write_text(
            json.dumps({"machine": machine(bench.device), "shape": options.shape} | numbers)
        )


if __name__ == "__main__":
    main()
