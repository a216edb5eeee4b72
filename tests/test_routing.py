"""Mixtures of experts: the router's entropy, the load of the experts, and what they give, against float64."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from transformers import Llama4ForCausalLM, Llama4TextConfig

import osp_diag
from osp_diag.errors import EstimatorError
from osp_diag.estimators import Suite
from osp_diag.estimators._arrays import namespace_of
from osp_diag.estimators.routing import ExpertLoad, ExpertOutputMaximum, RouterEntropy, RoutingObservation
from tests.estimators.test_weight_outliers import oracle as weight_oracle
from tests.families import FAMILIES
from tests.site_reference import built, odd_model

SUITE = Suite([RouterEntropy(), ExpertLoad(), ExpertOutputMaximum()])
namespace_of(torch.zeros(1))


def expected_of(logits: np.ndarray, choice: np.ndarray, peaks: np.ndarray | None) -> dict[str, np.ndarray]:
    """In float64 over (token, expert)."""
    weight = np.exp(logits.astype(np.float64) - logits.max(-1, keepdims=True))
    probability = weight / weight.sum(-1, keepdims=True)
    load = choice.astype(np.float64).mean(0)
    found = {
        "router_entropy": stats.entropy(probability, axis=-1).mean(),
        "router_mean_entropy": stats.entropy(probability.mean(0)),
        "expert_load": load,
        "expert_load_variation": load.std() / load.mean(),
        "expert_load_max": load.max() / load.mean(),
    }
    if peaks is not None:
        found["expert_output_maximum"] = np.where(choice > 0, peaks, -np.inf).max(0)
    return found


@pytest.mark.parametrize("to", [np.asarray, torch.as_tensor, jnp.asarray], ids=["numpy", "torch", "jax"])
def test_against_float64_on_every_backend(to: Any) -> None:
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((2, 7, 5)) + 60).astype(np.float32)
    choice = (rng.random((2, 7, 5)) < 0.4).astype(np.float32)
    peaks = np.where(choice > 0, rng.random((2, 7, 5)), -np.inf).astype(np.float32)
    strata = np.zeros((4, 2, 7), np.float32)
    strata[0], strata[1, :, 0], strata[3, :, 1:] = 1, 1, 1
    strata[:, 1, 5:] = 0
    state = None
    # Logits and choice come at different moments.
    for part in ({"logits": logits}, {"choice": choice, "peaks": peaks}):
        arrays = {name: to(values) for name, values in part.items()}
        observation = RoutingObservation(to(strata), 5, **arrays)
        if state is None:
            state = SUITE.init(observation.layout, observation.strata)
        state = SUITE.update(state, observation)
    found = {k: np.asarray(v.values) for k, v in SUITE.finalise(state, observation.layout).items()}
    for stratum in (0, 1, 3):
        kept = strata[stratum] > 0
        expected = expected_of(logits[kept], choice[kept], peaks[kept])
        expected["expert_output_maximum"][np.isinf(expected["expert_output_maximum"])] = np.nan
        assert found.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(found[name][stratum], value, rtol=1e-5, err_msg=name)
    assert np.isnan(found["router_entropy"][2])  # no delimiter


def test_the_ends_of_the_scale() -> None:
    strata = np.stack([np.ones((1, 4)), np.zeros((1, 4)), np.zeros((1, 4)), np.ones((1, 4))])
    sure = np.where(np.eye(4), 1e4, 0.0)[None]
    observation = RoutingObservation(strata, 4, logits=sure, choice=np.eye(4)[None])
    outputs = SUITE.finalise(SUITE.measure(observation), observation.layout)
    assert outputs["router_entropy"].values[0] == 0
    assert outputs["router_mean_entropy"].values[0] == pytest.approx(np.log(4))
    assert outputs["router_entropy"].ceiling == pytest.approx(np.log(4))
    assert outputs["expert_load_variation"].values[0] == 0
    assert outputs["expert_load_max"].values[0] == 1
    with pytest.raises(EstimatorError, match=r"choice have shape \(1, 4, 3\), expected .*: \(1, 4, 4\)"):
        RoutingObservation(strata, 4, choice=np.ones((1, 4, 3)))


def at_layer(probe: osp_diag.Probe, layer: int) -> dict[str, np.ndarray]:
    found = probe.run.at("router").isel(step=0).sel(layer=layer, stratum="all")
    return {str(name): value.values for name, value in found.data_vars.items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, err_msg=name)


def output_peaks(name: str, experts: Any, hidden: Tensor) -> np.ndarray:
    """(token, expert) of max |y|, every expert on every token, in float64."""
    peaks = []
    for expert in range(experts.gate_up_proj.shape[0]):
        weight, down = experts.gate_up_proj[expert].double(), experts.down_proj[expert].double()
        if name == "gpt_oss":
            both = hidden @ weight + experts.gate_up_proj_bias[expert].double()
            gate, up = both[:, ::2].clamp(max=7.0), both[:, 1::2].clamp(-7.0, 7.0)
            y = (up + 1) * gate * torch.sigmoid(1.702 * gate) @ down + experts.down_proj_bias[expert].double()
        else:
            gate, up = (hidden @ weight.T).chunk(2, -1)
            y = gate * torch.sigmoid(gate) * up @ down.T
        peaks.append(y.abs().amax(-1))
    return torch.stack(peaks, -1).detach().numpy()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_experts_stacked_in_one_parameter(name: str, implementation: str) -> None:
    model, batch = FAMILIES[name].build(), FAMILIES[name].inputs()
    model.set_experts_implementation(implementation)
    probe = osp_diag.Probe(model, sites=["router"])
    seen: dict[int, tuple[Tensor, ...]] = {}
    for layer, path in probe.site_map.expert_layers.items():
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, layer=layer: seen.setdefault(layer, args)
        )
    with probe.step(0), torch.no_grad():
        model(**batch)
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).flatten() > 0
    assert set(probe.run.at("router")["layer"].values) == set(seen)
    for layer, (hidden, index, *_) in seen.items():
        path = probe.site_map.expert_layers[layer]
        router = model.get_submodule(path.rpartition(".")[0] + (".router" if name == "gpt_oss" else ".gate"))
        logits = hidden.double() @ router.weight.double().T + getattr(router, "bias", torch.zeros(1)).double()
        choice = torch.zeros(logits.shape).scatter(1, index, 1.0)
        peaks = output_peaks(name, model.get_submodule(path), hidden.double())
        arrays = [x[mask].detach().numpy() for x in (logits, choice)]
        assert_same(at_layer(probe, layer), expected_of(*arrays, peaks[mask.numpy()]))


class Mixture(nn.Module):
    """Experts that are modules; the best two of four, none of the tokens to the last."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(16, 4)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(4)
        )
        self.router.bias.data[3] = -50.0

    def forward(self, x: Tensor) -> Tensor:
        flat, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
        weights, best = self.router(flat).softmax(-1).topk(2, -1)
        for number, expert in enumerate(self.experts):
            rows, slot = (best == number).nonzero().unbind(-1)
            if len(rows):
                out[rows] += weights[rows, slot, None] * expert(flat[rows])
        return out.view_as(x)


def test_experts_that_are_modules_with_their_weights() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = odd_model()
        for block in model.orchard:
            block.plum = Mixture()
    probe = osp_diag.Probe(model, sites=["router", "mlp_down_weight", "mlp_hidden"])
    assert not probe.absent
    inputs: list[Tensor] = []
    for block in model.orchard:
        block.plum.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    with probe.step(0), torch.no_grad():
        model(torch.arange(20).reshape(2, 10))
    for layer, (block, x) in enumerate(zip(model.orchard, inputs, strict=True)):
        flat, mixture = x.flatten(0, 1).double(), block.plum
        logits = flat @ mixture.router.weight.double().T + mixture.router.bias.double()
        choice = torch.zeros(logits.shape).scatter(1, logits.topk(2, -1).indices, 1.0)
        peaks = torch.stack([e.double()(flat).abs().amax(-1) for e in mixture.experts], -1)
        found = at_layer(probe, layer)
        expected = expected_of(*(a.detach().numpy() for a in (logits, choice, peaks)))
        expected["expert_output_maximum"][3] = np.nan
        assert_same(found, expected)
        assert found["expert_load"][3] == 0
        # All experts' matrices, the one that no token reached too.
        weights = np.stack([e[2].weight.detach().numpy() for e in mixture.experts]).astype(np.float32)
        at = probe.run.at("mlp_down_weight").sel(step=0, layer=layer)
        for name, value in weight_oracle(weights).items():
            np.testing.assert_allclose(at[name].values, value, rtol=2e-6, err_msg=name)
        kurtosis = max(stats.kurtosis(w.astype(np.float64), axis=None) for w in weights)
        assert at["weight_excess_kurtosis"].item() == pytest.approx(kurtosis, rel=1e-5)


def test_a_router_that_hands_over_its_choice_beside_a_shared_expert() -> None:
    """Llama 4 runs every expert on every token, of which those that it did not choose are scaled to 0."""
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=32, intermediate_size=24, intermediate_size_mlp=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, num_local_experts=4, num_experts_per_tok=2,
        interleave_moe_layer_step=1, pad_token_id=None,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Llama4ForCausalLM(config).eval()
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
    probe = osp_diag.Probe(model, sites=["router"])
    seen: list[tuple[Tensor, Tensor]] = []
    for block in model.model.layers:
        block.feed_forward.router.register_forward_hook(lambda module, args, result: seen.append(result))
    with probe.step(0), torch.no_grad():
        model(torch.arange(22).reshape(2, 11))
    for layer, (scores, logits) in enumerate(seen):
        choice = torch.zeros_like(scores).scatter(1, logits.topk(2, -1).indices, 1.0)
        assert torch.equal(choice, (scores > 0).float())
        assert_same(at_layer(probe, layer), expected_of(logits.numpy(), choice.numpy(), None))
        assert np.isnan(at_layer(probe, layer)["expert_output_maximum"]).all()
    assert any(note.startswith("what each expert gives is not measured") for note in probe.run.attrs["notes"])


def test_nothing_is_said_of_routers_where_there_are_no_experts() -> None:
    probe = osp_diag.Probe(built("llama"))
    assert "router" not in probe.absent
    assert "router" not in probe.site_map.sites


def test_a_summary_says_it_where_there_are_experts() -> None:
    model, batch = FAMILIES["mixtral"].build(), FAMILIES["mixtral"].inputs()
    probe = osp_diag.Probe(model)
    with probe.step(0), torch.no_grad():
        model(**batch)
    summary = probe.run.summary()
    router = probe.run.at("router").isel(step=0).sel(stratum="all")
    assert summary.experts == 4
    assert summary.router_entropy == pytest.approx(router["router_entropy"].mean().item())
    assert summary.expert_load_max == pytest.approx(router["expert_load_max"].max().item())
    layer, expert = summary.expert_load_max_layer, summary.expert_load_max_expert
    assert router["expert_load"].sel(layer=layer).values.argmax() == expert
    assert f"(layer {layer}, expert {expert}); 0 get no token" in " ".join(summary.text().split())
    assert summary.as_dict()["idle_experts"] == 0
