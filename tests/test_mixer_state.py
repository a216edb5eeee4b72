"""The state of recurrent mixers after the last token, against recurrences by hand in float64."""

from __future__ import annotations

import threading
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

import osp_diag
from osp_diag.checkpoints import open_checkpoint
from osp_diag.errors import EstimatorError
from osp_diag.estimators import Suite
from osp_diag.estimators.mixer_state import MixerStateNorm, StateObservation
from osp_diag.probing.checkpoint import probe_checkpoint
from osp_diag.sites import find_sites
from osp_diag.tokens import make_batches

SMALL: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SUITE = Suite([MixerStateNorm()])
IDS = torch.arange(3, 27).reshape(2, 12)


def expected_of(state: np.ndarray) -> dict[str, Any]:
    """Of (sequence, head, …) in float64."""
    rows = state.astype(np.float64).reshape(*state.shape[:2], -1)
    heads, whole = np.linalg.norm(rows, axis=-1), np.linalg.norm(rows.reshape(len(rows), -1), axis=-1)
    return {
        "mixer_state_norm": whole.mean(),
        "mixer_state_norm_max": whole.max(),
        "mixer_state_rms": np.sqrt((rows**2).mean()),
        "mixer_state_head_norm": heads.mean(0),
        "mixer_state_head_norm_max": heads.max(0),
        "mixer_state_sequences": len(rows),
    }


def agrees(measured: Any, state: np.ndarray, tolerance: float = 1e-5) -> None:
    for name, value in expected_of(state).items():
        np.testing.assert_allclose(np.asarray(measured[name]), value, rtol=tolerance, err_msg=name)


@pytest.mark.parametrize("to", [np.asarray, torch.as_tensor, jnp.asarray], ids=["numpy", "torch", "jax"])
def test_against_float64_on_every_backend_and_halves_against_the_whole(to: Any) -> None:
    state = np.random.default_rng(0).standard_normal((6, 3, 4, 5)).astype(np.float32)
    state[3] *= 1e18  # whose squares float32 cannot hold
    state[5, 1, 2, 3] = np.nan
    whole = np.array([1, 1, 0, 1, 1, 1], np.float32)
    sums = None
    for part in (slice(0, 3), slice(3, 6)):
        observation = StateObservation(to(state[part]), to(whole[part]))
        sums = SUITE.init(observation.layout, observation.state) if sums is None else sums
        sums = SUITE.update(sums, observation)
    outputs = SUITE.finalise({name: np.asarray(v) for name, v in sums.items()}, observation.layout)
    measured = {name: output.values for name, output in outputs.items()}
    agrees(measured, state[[0, 1, 3, 4]])
    assert (measured["mixer_state_padded_sequences"], measured["mixer_state_nonfinite_sequences"]) == (1, 1)


def test_states_that_are_none_are_refused() -> None:
    with pytest.raises(EstimatorError, match=r"states must be \(batch, …\), none of them 0.* got \(2,\)"):
        StateObservation(np.zeros(2), np.ones(2))


# -- recurrences by hand -----------------------------------------------------------------------------------


def array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().double().numpy()


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(0, x)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def convolved(x: np.ndarray, conv: nn.Conv1d) -> np.ndarray:
    """silu(causal depthwise convolution) of (sequence, token, channel)."""
    weight, size = array(conv.weight)[:, 0], conv.kernel_size[0]
    padded = np.pad(x, ((0, 0), (size - 1, 0), (0, 0)))
    taps = sum(padded[:, k : k + x.shape[1]] * weight[:, k] for k in range(size))
    return silu(taps + (0 if conv.bias is None else array(conv.bias)))


def mamba_state(mixer: Any, x: np.ndarray) -> np.ndarray:
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t x_t of Mamba, (sequence, 1, channel, state)."""
    inner, rank, size = mixer.intermediate_size, mixer.time_step_rank, mixer.ssm_state_size
    u = convolved((x @ array(mixer.in_proj.weight).T)[..., :inner], mixer.conv1d)
    selected = u @ array(mixer.x_proj.weight).T
    step = softplus(selected[..., :rank] @ array(mixer.dt_proj.weight).T + array(mixer.dt_proj.bias))
    decay, h = -np.exp(array(mixer.A_log)), np.zeros((len(x), inner, size))
    for t in range(x.shape[1]):
        driven = (step[:, t] * u[:, t])[..., None] * selected[:, t, None, rank : rank + size]
        h = np.exp(step[:, t, :, None] * decay) * h + driven
    return h[:, None]


def mamba2_state(mixer: Any, x: np.ndarray) -> np.ndarray:
    """H_t = exp(Δ_t A) H_{t−1} + Δ_t x_t B_tᵀ of each head of Mamba-2, one group for all heads."""
    inner, heads, size = mixer.intermediate_size, mixer.num_heads, mixer.ssm_state_size
    projected = x @ array(mixer.in_proj.weight).T
    mixed = convolved(projected[..., inner : 2 * inner + 2 * size], mixer.conv1d)
    step = softplus(projected[..., -heads:] + array(mixer.dt_bias))
    u = mixed[..., :inner].reshape(*x.shape[:2], heads, -1)
    h = np.zeros((len(x), heads, u.shape[-1], size))
    for t in range(x.shape[1]):
        decay = np.exp(step[:, t] * -np.exp(array(mixer.A_log)))[..., None, None]
        driven = (step[:, t, :, None] * u[:, t])[..., None] * mixed[:, t, None, None, inner : inner + size]
        h = decay * h + driven
    return h


def mamba() -> nn.Module:
    return transformers.MambaForCausalLM(transformers.MambaConfig(**SMALL, state_size=4))


def mamba2() -> nn.Module:
    sizes = {"state_size": 8, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}
    return transformers.Mamba2ForCausalLM(transformers.Mamba2Config(**SMALL, **sizes))


BY_HAND = [(mamba, mamba_state), (mamba2, mamba2_state)]


def inputs_of(model: Any, ids: Tensor) -> list[np.ndarray]:
    """What the mixers of the layers receive."""
    inputs: list[np.ndarray] = []
    handles = [
        layer.mixer.register_forward_pre_hook(lambda _, args: inputs.append(array(args[0])))
        for layer in model.backbone.layers
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return inputs


def built(build: Any) -> Any:
    torch.manual_seed(0)
    return build().eval()


def measured(model: nn.Module, *calls: dict[str, Any], **options: Any) -> Any:
    probe = osp_diag.Probe(model, sites=["mixer_*"], **options)
    with probe.step(0), torch.no_grad():
        for call in calls:
            model(**call)
    return probe.run


def at_layer(run: Any, layer: int) -> Any:
    return run.at("mixer_state").isel(step=0).sel(layer=layer)


@pytest.mark.parametrize(("build", "recurrence"), BY_HAND, ids=["mamba", "mamba2"])
def test_the_state_is_that_of_the_recurrence(build: Any, recurrence: Any) -> None:
    model = built(build)
    run = measured(model, {"input_ids": IDS, "use_cache": True})
    for layer, x in enumerate(inputs_of(model, IDS)):
        state = recurrence(model.backbone.layers[layer].mixer, x)
        agrees(at_layer(run, layer), state, 1e-4)


def test_tokens_made_one_by_one_leave_the_state_of_the_whole_sequence() -> None:
    model = built(mamba)
    cache = transformers.DynamicCache(config=model.config)
    calls = [
        {"input_ids": part, "cache_params": cache, "use_cache": True} for part in IDS.split([9, 1, 1, 1], 1)
    ]
    run = measured(model, *calls)
    for layer, x in enumerate(inputs_of(model, IDS)):
        agrees(at_layer(run, layer), mamba_state(model.backbone.layers[layer].mixer, x), 1e-4)
    whole = measured(model, {"input_ids": IDS, "use_cache": False})
    left, right = (r.at("mixer_input")["osp_excess_kurtosis"] for r in (run, whole))
    np.testing.assert_allclose(left, right, rtol=1e-4)


def test_sequences_with_padding_are_left_out_and_counted() -> None:
    model = built(mamba)
    mask = torch.ones_like(IDS)
    mask[1, -3:] = 0
    run = measured(model, {"input_ids": IDS, "attention_mask": mask, "use_cache": True})
    statistics = at_layer(run, 0)
    agrees(statistics, mamba_state(model.backbone.layers[0].mixer, inputs_of(model, IDS)[0])[:1], 1e-4)
    assert float(statistics["mixer_state_padded_sequences"]) == 1
    assert any("1 sequence with padding" in note for note in run.notes)


def test_without_a_cache_it_is_absent_and_says_how_to_call_the_model() -> None:
    run = measured(built(mamba), {"input_ids": IDS, "use_cache": False})
    assert "mixer_state" not in run.sites
    assert "call it with use_cache=True" in run.absent_sites["mixer_state"]


def test_a_probe_runs_with_a_cache_where_no_bit_of_the_output_depends_on_it() -> None:
    model = built(mamba)
    batches = make_batches(ids=IDS.numpy())
    run = probe_checkpoint(open_checkpoint(model), batches, sites=["mixer_*"])
    agrees(at_layer(run, 0), mamba_state(model.backbone.layers[0].mixer, inputs_of(model, IDS)[0]), 1e-4)


def test_passes_of_another_thread_with_a_cache_do_not_change_where_states_are_seen() -> None:
    model = built(mamba)
    this_thread = threading.get_ident()

    def beside(*_: object) -> None:
        if threading.get_ident() == this_thread:
            thread = threading.Thread(target=lambda: model(IDS, use_cache=True))
            thread.start()
            thread.join()

    handle = model.register_forward_hook(beside)
    assert find_sites(model).states_with_cache
    handle.remove()


def test_nothing_else_depends_on_the_cache_of_a_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48, "mamba_d_state": 4}
    period = {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1}
    config = transformers.JambaConfig(**SMALL, **sizes, **period)
    checkpoint = open_checkpoint(built(lambda: transformers.JambaForCausalLM(config)))
    with_cache = probe_checkpoint(checkpoint, make_batches(ids=IDS.numpy()))
    monkeypatch.setattr("osp_diag.probing.feeding.Feeding.ask_for_cache", lambda _: None)
    without = probe_checkpoint(checkpoint, make_batches(ids=IDS.numpy()))
    assert set(with_cache.sites) - set(without.sites) == {"mixer_state"}
    assert all(with_cache.at(site).equals(without.at(site)) for site in without.sites)
    assert with_cache.notes == without.notes


def test_generation_is_not_disturbed_and_the_state_is_that_of_its_last_pass() -> None:
    model = built(mamba)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected = model.generate(IDS, **options)
    probe = osp_diag.Probe(model, sites=["mixer_*"])
    with probe.step(0):
        assert torch.equal(model.generate(IDS, **options), expected)
    # The last token that is made is not run.
    state = mamba_state(model.backbone.layers[0].mixer, inputs_of(model, expected[:, :-1])[0])
    agrees(at_layer(probe.run, 0), state, 1e-4)


# -- other ways in which a state is seen -------------------------------------------------------------------


class Returning(nn.Module):
    """Linear attention by hand, which gives its state beside its output: S = Σ_t k_t v_tᵀ."""

    def __init__(self) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(16, 48), nn.Linear(16, 16)
        self.extra = 0

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        query, key, value = self.inward(x).chunk(3, -1)
        states = (key[..., None] * value[..., None, :]).cumsum(1)
        output = self.outward((query[..., None, :] @ states).squeeze(-2))
        return (output, *[states[:, -1]] * (1 + self.extra))


class Convolving(Returning):
    """Gives the last values of a convolution over three tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.ones(16, 1, 3))

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        padded = functional.pad(x.mT, (2, 0))
        mixed = functional.conv1d(padded, self.kernel, groups=16).mT
        return self.outward(mixed * self.inward(x)[..., :16].sigmoid()), padded[..., -2:]


class Block(nn.Module):
    def __init__(self, mixer: nn.Module) -> None:
        super().__init__()
        self.mixer, self.norm = mixer, nn.LayerNorm(16)
        self.mlp = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))[0]
        return x + self.mlp(x)


class HandWritten(nn.Module):
    def __init__(self, *mixers: nn.Module) -> None:
        super().__init__()
        self.embedding, self.blocks = nn.Embedding(40, 16), nn.ModuleList(map(Block, mixers))

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return x


def test_a_mixer_that_returns_its_state_and_a_recurrent_network() -> None:
    model = built(lambda: HandWritten(Returning(), Returning()))
    run = measured(model, {"ids": IDS})
    x = array(model.blocks[0].norm(model.embedding(IDS)))
    inward = model.blocks[0].mixer.inward
    key, value = np.split(x @ array(inward.weight).T + array(inward.bias), 3, -1)[1:]
    state = np.einsum("btk,btv->bkv", key, value)
    agrees(at_layer(run, 0), state[:, None], 1e-4)
    network = built(lambda: HandWritten(nn.GRU(16, 16, batch_first=True), nn.GRU(16, 16, batch_first=True)))
    last = array(network.blocks[0].mixer(network.blocks[0].norm(network.embedding(IDS)))[0][:, -1])
    agrees(at_layer(measured(network, {"ids": IDS}), 0), last[:, None], 1e-4)


def test_what_cannot_be_told_to_be_the_state_is_refused() -> None:
    several = HandWritten(Returning(), Returning())
    for block in several.blocks:
        block.mixer.extra = 1  # type: ignore[union-attr]
    assert find_sites(several).absent["mixer_state"].startswith("its mixer keeps 2 tensors")
    convolving = find_sites(HandWritten(Convolving(), Convolving()))
    assert "memory of its convolution" in convolving.absent["mixer_state"]
    both = [nn.GRU(16, 8, batch_first=True, bidirectional=True) for _ in range(2)]
    assert "both directions" in find_sites(HandWritten(*both)).absent["mixer_state"]
