"""What the tests of both callbacks share: a tiny Llama, its data, and how two runs are compared."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import xarray as xr
from torch import nn

import osp_diag
from osp_diag.quiet import quietly
from tests.tiny_checkpoints import LENGTH, VOCABULARY

with quietly():
    import transformers

POSITIONS = 12
WATCHED = {
    "sites": ("embedding", "residual_post", "final_norm", "mlp_hidden", "attention"),
    "estimators": (
        "osp_excess_kurtosis",
        "max_median_ratio",
        "token_scale",
        "sink_rate",
        "first_token_attention",
    ),
}


def dropping_llama() -> transformers.LlamaForCausalLM:
    """A Llama that drops attention at random: whoever else draws random numbers changes its training."""
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
            attention_dropout=0.2,
        )
    )


def token_ids(sequences: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (sequences, POSITIONS), generator=generator)


def held_out() -> torch.Tensor:
    return token_ids(4, seed=2)


def measured(model: nn.Module, ids: torch.Tensor) -> osp_diag.Run:
    """What the probe alone finds, with nobody's loop."""
    probe = osp_diag.Probe(model, keep_raw=False, **WATCHED)
    probe.measure(0, [{"input_ids": ids}])
    return probe.run


def assert_step(run: osp_diag.Run, step: int, expected: osp_diag.Run, *, rtol: float = 1e-6) -> None:
    """The statistics of one step are those of a run of one step."""
    assert run.sites == expected.sites
    for site in run.sites:
        left = run.at(site).sel(step=step, drop=True).load()
        right = expected.at(site).isel(step=0, drop=True).load()
        xr.testing.assert_allclose(left, right, rtol=rtol, atol=rtol)


def assert_same_runs(left: osp_diag.Run, right: osp_diag.Run, *, exact: bool = True) -> None:
    """The same steps, statistics and series, but for the seconds."""
    assert left.steps.tolist() == right.steps.tolist()
    assert left.sites == right.sites
    compare = xr.testing.assert_equal if exact else xr.testing.assert_allclose
    tolerance = {} if exact else {"rtol": 2e-5, "atol": 1e-5}
    for site in left.sites:
        compare(left.at(site).load(), right.at(site).load(), **tolerance)
    compare(scalars(left), scalars(right), **tolerance)


def scalars(run: osp_diag.Run) -> xr.Dataset:
    clocks = ("probe_seconds", "probe_background_seconds")
    return run.series.drop_vars(clocks, errors="ignore").load()


def assert_untouched(model: nn.Module) -> None:
    """No hook is left on any module."""
    for name, module in model.named_modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks):
            assert not hooks, name


def assert_equal_weights(left: nn.Module, right: nn.Module) -> None:
    for (name, a), b in zip(left.state_dict().items(), right.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


class Kept:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.told: dict[int, dict[str, float]] = {}
        self.closed = False

    def log(self, step, values) -> None:
        self.told.setdefault(step, {}).update(values)

    def close(self) -> None:
        self.closed = True


def largest(run: osp_diag.Run, site: str, statistic: str, step: int) -> float:
    return float(np.nanmax(run.at(site)[statistic].sel(step=step, stratum="all")))


def logged_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
