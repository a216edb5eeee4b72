"""What a training step costs: our Muon against AdamW and torch's Muon, MFU, optimizer memory, and the probe.

One model and one set of gradients; the optimizers take turns on them, so that the machine's load falls on
all alike. Times are medians over rounds. A step of so many tokens is forward and backward passes of the batch
that fits, repeated, and one update. Run it with

    python benchmarks/train_step.py                                # the shape that suits the machine
    python benchmarks/train_step.py --shape llama-1.4b --rounds 8 --out step.json

A probe's statistics are finished and written while a GPU goes on training. What training pays for a probe is
therefore timed as a probe with forward and backward passes after it, as many as outlast that work (those of
half a step), less the same passes alone; both in the same round. Beside it stands the probe alone, until it
is on disk, in which nothing overlaps. On a CPU nothing is put off, and one pass is enough.

The peer is transformers' own Llama of the same shape with fused AdamW, which most trainers are built around.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from machine import machine
from transformers import LlamaConfig, LlamaForCausalLM

from osp_diag.probing import Probe
from osp_diag.trainer.config import DataConfig, ModelConfig, OptimizerConfig, TrainConfig
from osp_diag.trainer.model import Llama
from osp_diag.trainer.optimizers import build_optimizer, route
from osp_diag.trainer.throughput import peak_flops

SHAPES: dict[str, dict[str, Any]] = {
    "llama-1.4b": {
        "model": {"vocabulary_size": 49_152, "hidden_size": 2048, "layers": 24, "heads": 16},
        "batch": (8, 2048),
        "low": True,
    },
    "small": {
        "model": {"vocabulary_size": 16_384, "hidden_size": 512, "layers": 8, "heads": 8},
        "batch": (64, 512),
        "low": True,
    },
    "tiny": {
        "model": {"vocabulary_size": 4096, "hidden_size": 128, "layers": 4, "heads": 4},
        "batch": (16, 128),
        "low": False,
    },
}
EVERY = 50
"""Steps between probes, for the amortised cost."""


@dataclass
class Timed:
    """Something done again and again, and how long it took."""

    name: str
    action: Callable[[], None]
    after: Callable[[], None] | None = None
    """What has to be over before the next is timed, off the clock."""
    seconds: list[float] = field(default_factory=list)

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)


class Bench:
    """One model with gradients, and a clock."""

    def __init__(self, shape: str, device: str, *, compiled: bool, micro: int | None) -> None:
        spec = SHAPES[shape]
        self.device = torch.device(device)
        self.low = spec["low"]
        batch, length = spec["batch"]
        model = ModelConfig(max_length=length, **spec["model"])
        self.config = TrainConfig(
            name="osp", model=model, data=DataConfig(sequence_length=length), batch_size=micro or batch
        )
        torch.manual_seed(0)
        self.model = Llama(model).to(self.device)
        self.ids = torch.randint(3, model.vocabulary_size, (micro or batch, length + 1), device=self.device)
        if compiled:
            self.model.compile_parts()
        self.forward_and_backward()

    @property
    def tokens(self) -> int:
        return self.ids[:, 1:].numel()

    def forward_and_backward(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.low):
            loss = self.model(self.ids[:, :-1], labels=self.ids[:, 1:]).loss
        loss.backward()

    def time(self, timed: Timed, *, keep: bool = True) -> None:
        self._synchronise()
        started = time.perf_counter()
        timed.action()
        self._synchronise()
        if keep:
            timed.seconds.append(time.perf_counter() - started)
        if timed.after is not None:
            timed.after()

    def _synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def our_optimizer(
    bench: Bench, name: Literal["muon", "adamw"]
) -> tuple[Callable[[], None], Callable[[], int]]:
    """A step of one of our optimizers on the benchmark's parameters, and its state's bytes."""
    # A rate at which nothing moves far.
    optimizer = OptimizerConfig(name=name, lr=1e-9)
    config = TrainConfig(model=bench.config.model, optimizer=optimizer)
    optimizers = build_optimizer(bench.model, config)
    optimizers.set_learning_rate(1.0)
    return optimizers.step, lambda: optimizers.state_bytes


def torch_muon(bench: Bench) -> tuple[Callable[[], None], Callable[[], int]]:
    """torch's own Muon on the same matrices, with fused AdamW on the rest."""
    routes = route(bench.model, TrainConfig(model=bench.config.model)).routes
    hidden = {entry.name for entry in routes if entry.optimizer == "muon"}
    parameters = dict(bench.model.named_parameters())
    muon = torch.optim.Muon(
        [parameters[name] for name in parameters if name in hidden and parameters[name].ndim == 2],
        lr=1e-9,
        adjust_lr_fn="match_rms_adamw",
    )
    others = [parameters[name] for name in parameters if name not in hidden or parameters[name].ndim != 2]
    adamw = torch.optim.AdamW(others, lr=1e-9, fused=True)

    def step() -> None:
        muon.step()
        adamw.step()

    return step, lambda: _bytes(muon.state_dict()) + _bytes(adamw.state_dict())


def _bytes(state: Any) -> int:
    if isinstance(state, torch.Tensor):
        return state.numel() * state.element_size() if state.ndim else 0
    if isinstance(state, dict):
        return sum(map(_bytes, state.values()))
    if isinstance(state, (list, tuple)):
        return sum(map(_bytes, state))
    return 0


def newton_schulz_flops(bench: Bench, steps: int = 5) -> float:
    """Operations of the orthogonalisation: per iteration XXᵀ, its square, and a product with X."""
    total = 0.0
    for name, parameter in bench.model.named_parameters():
        if parameter.ndim == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight")):
            m, n = sorted(parameter.shape)
            # A = XXᵀ takes 2m²n, A² 2m³, and (bA + cA²)X 2m²n, with X of shape (m, n), m ≤ n.
            total += steps * 2 * (2 * m**2 * n + m**3)
    return total


def peer(bench: Bench, *, compiled: bool) -> Timed:
    """One step of transformers' Llama with fused AdamW, the same shape and batch."""
    shape = bench.config.model
    config = LlamaConfig(
        vocab_size=shape.vocabulary_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.feed_forward_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.number_of_key_value_heads,
        max_position_embeddings=shape.max_length,
        tie_word_embeddings=False,
    )
    with torch.device(bench.device):
        model = LlamaForCausalLM(config)
    if compiled:
        for layer in model.model.layers:
            layer.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9, fused=True)

    def step() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.low):
            loss = model(bench.ids[:, :-1], labels=bench.ids[:, :-1], use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return Timed("transformers Llama + fused AdamW, one whole step", step)


def probed(bench: Bench, folder: Path, step_passes: int) -> dict[str, Timed]:
    """Every default estimator at every default site, on held-out tokens as many as a micro-batch."""
    probe = Probe(bench.model, out=folder / "run.zarr", keep_raw=False)
    passes = max(1, step_passes // 2) if probe.deferred else 1
    steps = iter(range(10**9))

    def measure() -> None:
        with torch.autocast(bench.device.type, torch.bfloat16, enabled=bench.low):
            probe.measure(next(steps), [{"input_ids": bench.ids[:, :-1]}])

    def train() -> None:
        for _ in range(passes):
            bench.forward_and_backward()

    def measure_and_train() -> None:
        measure()
        train()

    def measure_and_wait() -> None:
        measure()
        probe.flush()

    return {
        "passes": Timed(f"{passes} forward and backward passes", train),
        "probe_and_passes": Timed("probe, then as many passes", measure_and_train, after=probe.flush),
        "probe_alone": Timed("probe of one micro-batch alone, waited for", measure_and_wait),
    }


def measure(
    bench: Bench, rounds: int, *, compiled: bool, with_peer: bool, folder: Path, step_tokens: int
) -> dict[str, Any]:
    """Time everything, interleaved."""
    ours, our_bytes = our_optimizer(bench, "muon")
    adam, adam_bytes = our_optimizer(bench, "adamw")
    theirs, their_bytes = torch_muon(bench)
    timed = {
        "pass": Timed("forward and backward", bench.forward_and_backward),
        "muon": Timed("our Muon (OSP's routing)", ours),
        "torch_muon": Timed("torch.optim.Muon (the same routing)", theirs),
        "adam": Timed("AdamW, fused", adam),
        **probed(bench, folder, passes_of(bench.tokens, step_tokens)),
    }
    if with_peer:
        timed["peer"] = peer(bench, compiled=compiled)
    for entry in timed.values():
        bench.time(entry, keep=False)
        bench.time(entry, keep=False)
    for _ in range(rounds):
        for entry in timed.values():
            bench.time(entry)
    memory = {"muon": our_bytes(), "adam": adam_bytes(), "torch_muon": their_bytes()}
    # What training pays: the probe with passes behind it, less the same passes alone.
    paid = zip(timed["probe_and_passes"].seconds, timed["passes"].seconds, strict=True)
    timed["probe"] = Timed("probe of one micro-batch, as training pays for it", lambda: None)
    timed["probe"].seconds = [both - passes for both, passes in paid]
    return {
        "seconds": {name: entry.median for name, entry in timed.items()},
        "names": {name: entry.name for name, entry in timed.items()},
        "optimizer_bytes": memory,
        "newton_schulz_flops": newton_schulz_flops(bench),
        "flops_per_token": bench.model.flops_per_token(bench.config.data.sequence_length),
        "tokens": bench.tokens,
    }


def passes_of(tokens: int, step_tokens: int) -> int:
    """Forward and backward passes of a whole step."""
    return max(1, round(step_tokens / tokens))


def report(numbers: dict[str, Any], step_tokens: int, device: torch.device) -> None:
    """Print what the numbers say."""
    seconds, tokens = numbers["seconds"], numbers["tokens"]
    passes = passes_of(tokens, step_tokens)
    print("| what | ms |\n|---|---|")
    for name, value in seconds.items():
        print(f"| {numbers['names'][name]} | {value * 1e3:.2f} |")
    print()
    step = {name: passes * seconds["pass"] + seconds[name] for name in ("muon", "torch_muon", "adam")}
    step_size = passes * tokens
    for name, value in step.items():
        line = f"{numbers['names'][name]}: {step_size / value:,.0f} tokens/s at {step_size:,} tokens a step"
        line += f", {step['adam'] / value:.2%} of AdamW's"
        peak = peak_flops(device)
        if peak is not None:
            line += f", MFU {step_size * numbers['flops_per_token'] / value / peak:.1%}"
        print(line)
    floor = numbers["newton_schulz_flops"] / (step_size * numbers["flops_per_token"])
    print(f"Newton-Schulz is {floor:.2%} of a step's operations: the floor of what Muon costs")
    memory = numbers["optimizer_bytes"]
    print(
        f"optimizer state: Muon {memory['muon'] / 2**20:,.1f} MiB, AdamW {memory['adam'] / 2**20:,.1f} MiB, "
        f"{memory['muon'] / memory['adam'] - 1:+.1%}"
    )
    share, alone = (seconds[name] / (EVERY * step["muon"]) for name in ("probe", "probe_alone"))
    print(
        f"a probe of {tokens:,} tokens every {EVERY} steps: {share:.2%} of the time, waited for {alone:.2%}"
    )
    if "peer" in seconds:
        ours = seconds["pass"] + seconds["adam"]
        print(f"peer: {seconds['peer'] / ours:.2f} × our step with AdamW on the same batch")


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What is timed, where and how often: of whatever is timed beside a step."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="llama-1.4b" if cuda else "tiny")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--rounds", type=int, default=8 if cuda else 5)
    parser.add_argument("--micro-batch", type=int, help="sequences of a forward pass; default: the shape's")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda)
    parser.add_argument("--out", help="write the numbers as JSON")
    return parser


def main() -> None:
    """Time a step's parts, interleaved, and print what they come to."""
    parser = arguments(__doc__)
    parser.add_argument("--step-tokens", type=int, default=524_288, help="tokens of a whole step")
    parser.add_argument("--peer", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    bench = Bench(options.shape, options.device, compiled=options.compile, micro=options.micro_batch)
    with tempfile.TemporaryDirectory() as folder:
        numbers = measure(
            bench,
            options.rounds,
            compiled=options.compile,
            with_peer=options.peer,
            folder=Path(folder),
            step_tokens=options.step_tokens,
        )
    print(
        f"{machine(bench.device)}; {options.shape}, batch {tuple(bench.ids[:, 1:].shape)}; "
        f"median of {options.rounds}\n"
    )
    report(numbers, options.step_tokens, bench.device)
    if options.out:
        Path(options.out).write_text(
            json.dumps({"machine": machine(bench.device), "shape": options.shape} | numbers)
        )


if __name__ == "__main__":
    main()
