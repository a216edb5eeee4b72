"""What a probe costs: one forward pass with probes of several levels, against the bare pass and other ways.

All variants run interleaved in one process on the same batch, so that the machine's load falls on all alike;
times are medians over rounds, memory is the extra peak over the bare pass. Run it with

    python benchmarks/probe_overhead.py                      # the shape that suits the machine
    python benchmarks/probe_overhead.py --shape llama-1.4b --rounds 8 --out overhead.json
    python benchmarks/probe_overhead.py --gradients          # a training's passes, with gradients and without
    python benchmarks/probe_overhead.py --check              # only compare the kernels with the definitions

nnsight and TransformerLens, its release 4 or later, are compared too where they are installed:

    pip install -c constraints.txt nnsight transformer-lens
"""

from __future__ import annotations

import argparse
import copy
import importlib.util
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from machine import machine
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from osp_diag.estimators import default_estimators
from osp_diag.estimators.activation import ActivationObservation
from osp_diag.estimators.base import Suite
from osp_diag.probing import Probe

Forward = Callable[[], None]

SHAPES = {
    # OSP's own model and batch
    "llama-1.4b": {
        "config": {
            "hidden_size": 2048,
            "intermediate_size": 5504,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 49152,
            "max_position_embeddings": 2048,
        },
        "batch": (8, 2048),
        "dtype": torch.bfloat16,
    },
    # SmolLM2-135M
    "smollm2-135m": {
        "config": {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "max_position_embeddings": 2048,
        },
        "batch": (2, 512),
        "dtype": torch.float32,
    },
}


@dataclass
class Variant:
    """One way to run a forward pass, and what was measured of it."""

    name: str
    forward: Forward
    seconds: list[float] = field(default_factory=list)
    first: float = 0.0
    """seconds of the first pass, compilation included"""
    peak: float = 0.0


class Bench:
    """The model, the batch, and the clock."""

    def __init__(self, shape: str, device: str) -> None:
        spec = SHAPES[shape]
        self.device = torch.device(device)
        torch.manual_seed(0)
        with torch.device(self.device):
            self.model = LlamaModel(LlamaConfig(**spec["config"])).to(spec["dtype"]).eval()
        batch, tokens = spec["batch"]
        self.ids = torch.randint(3, 49000, (batch, tokens), device=self.device)

    def bare(self) -> None:
        self.model(input_ids=self.ids, use_cache=False)

    def synchronise(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def time(self, variant: Variant, *, keep: bool) -> None:
        self.synchronise()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        started = time.perf_counter()
        with torch.no_grad():
            variant.forward()
        self.synchronise()
        elapsed = time.perf_counter() - started
        variant.first = variant.first or elapsed
        if keep:
            variant.seconds.append(elapsed)
        if self.device.type == "cuda":
            variant.peak = (torch.cuda.max_memory_allocated() - before) / 2**30


PROJECTED = ("attention_input", "attention_output", "mlp_input", "mlp_hidden")
RESIDUAL = ("attention_input", "mlp_input", "residual_post")
SINKS = (
    "sink_rate",
    "first_token_attention",
    "first_token_dominance",
    "key_mass",
    "key_mass_share",
    "extra_sink_mass",
    "max_logit",
)


def one_reading() -> list[str]:
    """Estimators that need no third reading: every kurtosis, exact max/median, channel sums."""
    estimators = default_estimators(observes="activation", site="attention_input")
    return [
        estimator.name
        for estimator in estimators
        if not any(measurement.reads_elements for measurement in estimator.measurements)
    ]


def levels() -> dict[str, dict[str, Sequence[str]] | None]:
    """What is probed, as estimators by site; None for every default estimator at every default site."""
    residual: dict[str, Sequence[str]] = dict.fromkeys(RESIDUAL, one_reading())
    heads: dict[str, Sequence[str]] = dict.fromkeys(
        ("query_post_rope", "key_post_rope"), ("head_channel_norm", "massive_values")
    )
    sinks: dict[str, Sequence[str]] = {"attention": SINKS}
    lens: dict[str, Sequence[str]] = dict.fromkeys(PROJECTED, ("block_lens",))
    return {
        "A: residual stream and norm outputs (3 sites a layer), exact median": residual,
        "B: sinks, exact mass of every key, maximum logit": sinks,
        "C: queries and keys by channel": heads,
        "A + B + C": {**residual, **sinks, **heads},
        "the block lens at the inputs of projections (4 sites a layer)": lens,
        "every default estimator at every default site": None,
    }


def probed(bench: Bench, estimators: dict[str, Sequence[str]] | None, *, compiled: bool) -> Forward:
    """A forward pass with the probe attached: the device's share, which is what slows the step."""
    sites = None if estimators is None else list(estimators)
    probe = Probe(bench.model, sites=sites, estimators=estimators, compile=compiled, keep_raw=False)

    def forward() -> None:
        with probe.collect():
            bench.bare()

    return forward


def gradient_variants(bench: Bench, *, compiled: bool) -> list[Variant]:
    """Forward and backward passes: bare, with the probe of level A attached, and with its gradients too."""

    def passes() -> None:
        with torch.enable_grad():
            out = bench.model(input_ids=bench.ids, use_cache=False).last_hidden_state
            out.float().square().mean().backward()
        bench.model.zero_grad(set_to_none=True)

    estimators: dict[str, Sequence[str]] = dict.fromkeys(RESIDUAL, one_reading())

    def probed_passes(*, gradients: bool) -> Forward:
        options: dict[str, Any] = {"sites": list(estimators), "estimators": estimators, "keep_raw": False}
        probe = Probe(bench.model, compile=compiled, gradients=gradients, **options)

        def forward() -> None:
            with probe.collect():
                passes()

        return forward

    return [
        Variant("bare forward and backward", passes),
        Variant("probe A of the forward pass", probed_passes(gradients=False)),
        Variant("probe A, and gradients at the same sites", probed_passes(gradients=True)),
    ]


def hidden_states(bench: Bench) -> Forward:
    """``output_hidden_states``, then the OSP formula tensor by tensor with ``.item()``, as its script."""

    def forward() -> None:
        out = bench.model(input_ids=bench.ids, use_cache=False, output_hidden_states=True)
        for state in out.hidden_states:
            x = state.float()
            # mean(x⁴) / var(x)² − 3, no less than 0, of each token; then the mean over tokens
            scale = x.var(-1).clamp_min(1e-12)
            ((x**4).mean(-1) / scale**2 - 3).clamp_min(0).mean().item()

    return forward


def square_attention(bench: Bench) -> Forward:
    """First-token attention from a T×T softmax of every layer, one sequence at a time to fit."""
    config = bench.model.config

    def hook(module: Any, args: Any, kwargs: Any, output: Any) -> None:
        hidden = kwargs.get("hidden_states", args[0] if args else None)
        batch, tokens, _ = hidden.shape
        shape = (batch, tokens, -1, module.head_dim)
        query = module.q_proj(hidden).view(shape).transpose(1, 2)
        key = module.k_proj(hidden).view(shape).transpose(1, 2)
        key = key.repeat_interleave(config.num_attention_heads // config.num_key_value_heads, 1)
        causal = torch.ones(tokens, tokens, dtype=torch.bool, device=hidden.device).triu(1)
        for row in range(batch):
            # softmax(q·kᵀ / √d) under the causal mask, and its sums over queries
            logits = (query[row] @ key[row].transpose(-1, -2)).float() * module.scaling
            logits.masked_fill(causal, float("-inf")).softmax(-1).sum(-2)

    def forward() -> None:
        handles = [
            layer.self_attn.register_forward_hook(hook, with_kwargs=True) for layer in bench.model.layers
        ]
        try:
            bench.bare()
        finally:
            for handle in handles:
                handle.remove()

    return forward


def nnsight_trace(bench: Bench) -> Forward:
    """An nnsight trace that saves every block's output and computes nothing."""
    import nnsight

    model = nnsight.NNsight(bench.model)

    def forward() -> None:
        with model.trace(input_ids=bench.ids, use_cache=False):
            saved = nnsight.save([])
            for layer in model.layers:
                saved.append(layer.output)  # a comprehension inside a trace fails

    return forward


def transformer_lens_cache(bench: Bench) -> Forward:
    """A TransformerLens bridge around a copy of the model that caches every activation and computes nothing.

    No logits but the last token's, since the bare pass has none. On a GPU one sequence at a time, to fit: the
    cache holds T×T scores and patterns of every layer.
    """
    from transformer_lens.model_bridge.sources import build_bridge_from_module

    config = copy.deepcopy(bench.model.config)  # the bridge changes the model it is given
    with bench.device:
        whole = LlamaForCausalLM(config).to(bench.model.dtype).eval()
    whole.model.load_state_dict(bench.model.state_dict())
    bridge = build_bridge_from_module(whole, "LlamaForCausalLM", hf_config=config)
    batches = bench.ids.split(1 if bench.device.type == "cuda" else len(bench.ids))

    def forward() -> None:
        for ids in batches:
            bridge.run_with_cache(ids, use_cache=False, logits_to_keep=1)

    return forward


@contextmanager
def building(name: str, skipped: dict[str, str]) -> Iterator[None]:
    """Leave a variant out, and say why, when it cannot run on this machine."""
    try:
        yield
    except Exception as error:  # a failure is a result too
        skipped[name] = f"{type(error).__name__}: {error}".splitlines()[0]


def check(device: torch.device) -> None:
    """Compare the kernels with the generic definitions on this device; raises AssertionError."""
    from osp_diag.capture.attention_measuring import mask_of, measure_attention
    from osp_diag.capture.fused import FusedObservation, part_of_tokens, site_statistics
    from osp_diag.seams.attention import AttentionCall

    generator = torch.Generator(device).manual_seed(0)
    strata = torch.zeros(4, 2, 512, device=device)
    strata[0] = 1
    strata[0, 1, :7] = 0
    strata[1, 0, 0] = strata[1, 1, 7] = 1
    strata[2, :, 16::9] = 1
    strata[3] = strata[0] - strata[1] - strata[2]
    for dtype, bits in ((torch.bfloat16, 15), (torch.float16, 18), (torch.float32, 31)):
        for channels in (576, 2048, 5504):
            x = torch.randn(2, 512, channels, device=device, generator=generator).to(dtype)
            x[:, 7, 3] = 25_800
            x[1, 9, 2] = float("nan")
            row_and_channel_statistics = site_statistics(x, part_of_tokens(strata), bits)
            fused = FusedObservation(x, strata, row_and_channel_statistics, significant_bits=bits)
            generic = ActivationObservation(x, strata)
            assert torch.equal(fused.median, generic.median)
            for pair in zip(
                (*fused.moments, *fused.channels), (*generic.moments, *generic.channels), strict=True
            ):
                torch.testing.assert_close(*pair, rtol=1e-4, atol=1e-4)
    suite = Suite(default_estimators(observes="attention", site="attention"))
    for dtype in (torch.bfloat16, torch.float32):
        shapes = ((2, 8, 512, 64), (2, 2, 512, 64), (2, 2, 512, 64))
        query, key, value = (torch.randn(s, device=device, generator=generator).to(dtype) for s in shapes)
        for options in (
            {"causal": True},
            {"causal": True, "window": 100},
            {"causal": True, "softcap": 20.0},
            {},
        ):
            call = AttentionCall(
                query=query, key=key, value=value, scale=0.125, seam="attention interface", **options
            )
            mask = mask_of(call, strata[0])
            _, fast = measure_attention(suite, call, strata, mask=mask, compiled=True)
            _, slow = measure_attention(suite, call, strata, mask=mask, compiled=False)
            for name, expected in slow.items():
                if "histogram" not in name and "distribution" not in name:
                    torch.testing.assert_close(
                        fast[name].double(), expected.double(), rtol=1e-3, atol=1e-3, equal_nan=True
                    )
    print("the kernels agree with the generic definitions")


def variants_of(bench: Bench, *, compiled: bool, all_levels: bool) -> tuple[list[Variant], dict[str, str]]:
    """What is timed, the bare pass first; and what is left out, with the reason."""
    variants = [Variant("bare forward", bench.bare)]
    skipped: dict[str, str] = {}
    for label, estimators in levels().items():
        if all_levels or estimators is not None:
            how = "compiled" if compiled else "eager"
            variants.append(Variant(f"probe {label}, {how}", probed(bench, estimators, compiled=compiled)))
    variants.append(Variant("output_hidden_states + OSP kurtosis with .item()", hidden_states(bench)))
    variants.append(Variant("T×T softmax per layer", square_attention(bench)))
    peers = {
        "nnsight": ("nnsight trace saving block outputs", nnsight_trace),
        "transformer_lens": ("TransformerLens run_with_cache", transformer_lens_cache),
    }
    for package, (label, build) in peers.items():
        if importlib.util.find_spec(package) is None:
            skipped[label] = f"{package} is not installed"
            continue
        with building(label, skipped):
            variants.append(Variant(label, build(bench)))
    return variants, skipped


def main() -> None:
    """Time every variant, interleaved, and print a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    cuda = torch.cuda.is_available()
    parser.add_argument("--shape", choices=SHAPES, default="llama-1.4b" if cuda else "smollm2-135m")
    parser.add_argument("--device", default="cuda" if cuda else "cpu")
    parser.add_argument("--rounds", type=int, default=8 if cuda else 5)
    parser.add_argument("--compiled", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--all-levels", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--out", help="write the numbers as JSON")
    parser.add_argument(
        "--check", action="store_true", help="compare the kernels with the definitions and stop"
    )
    parser.add_argument("--gradients", action="store_true", help="time forward and backward passes instead")
    options = parser.parse_args()
    if options.check:
        check(torch.device(options.device))
        return

    bench = Bench(options.shape, options.device)
    if options.gradients:
        variants, skipped = gradient_variants(bench, compiled=options.compiled), dict[str, str]()
    else:
        variants, skipped = variants_of(bench, compiled=options.compiled, all_levels=options.all_levels)
    for variant in list(variants):
        with building(variant.name, skipped):
            bench.time(variant, keep=False)
            bench.time(variant, keep=False)
            continue
        variants.remove(variant)
    for _ in range(options.rounds):
        for variant in variants:
            bench.time(variant, keep=True)

    bare = statistics.median(variants[0].seconds)
    title = f"{options.shape}, batch {tuple(bench.ids.shape)}, {bench.model.dtype}"
    print(f"{machine(bench.device)}; {title}; median of {options.rounds}\n")
    print("| what is attached | ms | × bare | extra peak GiB | first pass s |\n|---|---|---|---|---|")
    rows = []
    for variant in variants:
        seconds = statistics.median(variant.seconds)
        extra = variant.peak - variants[0].peak
        row = {"name": variant.name, "seconds": seconds, "ratio": seconds / bare, "extra_peak_gib": extra}
        rows.append(row | {"first_seconds": variant.first})
        peak = f"{extra:+.2f}" if bench.device.type == "cuda" else "–"
        print(
            f"| {variant.name} | {seconds * 1e3:.1f} | {seconds / bare:.3f} | {peak} | {variant.first:.1f} |"
        )
    for name, why in skipped.items():
        print(f"left out: {name} ({why})")
    if options.out:
        with open(options.out, "w") as file:
            json.dump(
                {"machine": machine(bench.device), "shape": title, "rows": rows, "left_out": skipped}, file
            )


if __name__ == "__main__":
    main()
