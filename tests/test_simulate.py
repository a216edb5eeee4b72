"""Simulated quantization against an oracle in float64 NumPy; what is quantized, and that it is undone."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import nn
from torch.nn.utils import parametrize
from transformers.models.llama.modeling_llama import LlamaForCausalLM, apply_rotary_pos_emb

from osp_diag.errors import CheckpointError, UsageError
from osp_diag.quantizing.conventions import OSP, PLAIN, Convention
from osp_diag.quantizing.grid import Grid
from osp_diag.quantizing.linears import ROLES, block_linears
from osp_diag.quantizing.setting import Setting
from osp_diag.quantizing.simulate import quantized
from tests.tiny_checkpoints import bert, gpt2, llama

BITS = (2, 3, 4, 8)
IDS = torch.arange(40).reshape(2, 20)
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def symmetric(w: np.ndarray, bits: int) -> np.ndarray:
    """Every row on the grid s · {−2ᵇ⁻¹ … 2ᵇ⁻¹ − 1}, s = max|w| / ((2ᵇ − 1)/2)."""
    half = 2 ** (bits - 1)
    out = np.zeros_like(w)
    for i, row in enumerate(w):
        scale = np.abs(row).max() / ((2**bits - 1) / 2)
        if scale > 0:
            out[i] = scale * np.clip(np.rint(row / scale), -half, half - 1)
    return out


def asymmetric(x: np.ndarray, bits: int) -> np.ndarray:
    """Every row on a grid of 2ᵇ points that spans its minimum, its maximum and 0, and has 0 exactly."""
    half = 2 ** (bits - 1)
    out = np.zeros_like(x)
    for i, row in enumerate(x):
        low, high = min(row.min(), 0.0), max(row.max(), 0.0)
        scale = (high - low) / (2**bits - 1)
        if scale > 0:
            zero = np.rint(np.clip(-half - low / scale, -half, half - 1))
            out[i] = scale * (np.clip(np.rint(row / scale + zero), -half, half - 1) - zero)
    return out


class Attention(nn.Module):
    """Stands where a block wants a second part, and does nothing."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Linear(width, width, bias=False)
        self.attention = Attention()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.first(x)


class OneLinear(nn.Module):
    """An embedding and one block of one Linear: the Linear's input is the embedding's row of each token."""

    def __init__(self, rows: np.ndarray, weight: np.ndarray, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        self.rows = len(rows)
        padded = np.concatenate(
            [rows, np.zeros((16, rows.shape[1]))]
        )  # ids for the pass that finds the blocks
        self.embedding = nn.Embedding.from_pretrained(torch.tensor(padded, dtype=dtype))
        self.blocks = nn.ModuleList([Block(rows.shape[1])])
        self.blocks[0].first.weight = nn.Parameter(torch.tensor(weight, dtype=dtype))
        self.to(dtype)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.blocks[0](self.embedding(input_ids))


def of_all_rows(model: OneLinear) -> np.ndarray:
    with torch.no_grad():
        return model(torch.arange(model.rows)[None])[0].double().numpy()


moderate = st.floats(-1e3, 1e3, width=32).map(lambda x: 0.0 if abs(x) < 1e-6 else x)
matrices = arrays.arrays(np.float64, (5, 6), elements=moderate)


@settings(max_examples=30)
@given(rows=matrices, bits=st.sampled_from(BITS))
def test_activations_are_the_oracles(rows, bits):
    model = OneLinear(rows, np.eye(6))
    with quantized(model, Setting(16, bits)):
        np.testing.assert_allclose(of_all_rows(model), asymmetric(rows, bits), rtol=1e-12, atol=1e-12)


@settings(max_examples=30)
@given(weight=arrays.arrays(np.float64, (6, 6), elements=moderate), bits=st.sampled_from(BITS))
def test_weights_are_the_oracles(weight, bits):
    model = OneLinear(np.eye(6), weight)
    with quantized(model, Setting(bits, 16)):
        np.testing.assert_allclose(of_all_rows(model).T, symmetric(weight, bits), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_both_together_in_the_dtypes_of_models(dtype):
    rng = np.random.default_rng(0)
    rows = torch.tensor(rng.standard_normal((50, 64)), dtype=dtype).double().numpy()
    weight = torch.tensor(rng.standard_normal((64, 64)), dtype=dtype).double().numpy()
    # The largest |w| of a row is at 7.5 steps, which is clipped, or at −7.5, a tie that the last bit decides.
    weight *= np.sign(weight.max(1) + weight.min(1))[:, None]
    model = OneLinear(rows, weight, dtype)
    with quantized(model, Setting()):
        found = of_all_rows(model)
    expected = asymmetric(rows, 4) @ symmetric(weight, 4).T
    scale = np.abs(expected).max()
    off = np.abs(found - expected) > scale * (1e-5 if dtype == torch.float32 else 1e-2)
    assert off.mean() < (1e-9 if dtype == torch.float32 else 0.01)  # coarse numbers meet more ties
    assert np.abs(expected - rows @ weight.T).max() > 0.1 * scale


def test_the_ends_of_the_grids():
    zero, constant, negative = np.zeros(6), np.full(6, 3.0), np.full(6, -2.0)
    spike = np.array([1e30, 1.0, -1.0, 0.0, 0.5, 2.0])
    rows = np.stack([zero, constant, negative, spike, np.arange(6) - 15.0, np.arange(6.0)])
    model = OneLinear(rows, np.eye(6), torch.float32)
    with quantized(model, Setting(16, 4)):
        found = of_all_rows(model)
    np.testing.assert_array_equal(found[0], zero)
    np.testing.assert_allclose(found[1:3], [constant, negative], rtol=1e-6)
    # One spike takes the whole grid: everything else in the token becomes 0.
    np.testing.assert_allclose(found[3], [1e30, 0, 0, 0, 0, 0], rtol=1e-6)
    np.testing.assert_allclose(found[4], np.arange(6) - 15.0, rtol=1e-6)  # step 1, from −15 to 0
    weights = OneLinear(np.eye(6), rows, torch.float32)
    with quantized(weights, Setting(4, 16)):
        found = of_all_rows(weights).T
    np.testing.assert_array_equal(found[0], zero)
    # Symmetric about 0 with 16 points: the positive end is at 7/7.5 of the maximum, the negative at 8/7.5.
    np.testing.assert_allclose(found[1], constant * 7 / 7.5, rtol=1e-6)
    tie = (np.abs(found[2] / negative - 7 / 7.5) < 1e-6) | (np.abs(found[2] / negative - 8 / 7.5) < 1e-6)
    assert tie.all()
    np.testing.assert_allclose(found[3], [1e30 * 7 / 7.5, 0, 0, 0, 0, 0], rtol=1e-6)


def test_tokens_have_grids_of_their_own_however_they_are_batched():
    """A Linear that receives (token, channel), as experts do, rounds as one that gets (1, token, channel)."""
    rows = np.random.default_rng(1).standard_normal((4, 8)) * np.array([[1.0], [100.0], [0.01], [5.0]])
    model = OneLinear(rows, np.eye(8))
    linear = model.blocks[0].first
    with quantized(model, Setting(16, 4)), torch.no_grad():
        flat = linear(torch.tensor(rows))
        deep = linear(torch.tensor(rows)[None, :, None])
        named = linear(input=torch.tensor(rows))
        assert linear(torch.zeros(0, 8, dtype=torch.float64)).shape == (0, 8)
    np.testing.assert_allclose(flat, asymmetric(rows, 4), rtol=1e-12)
    assert torch.equal(flat, deep[0, :, 0])
    assert torch.equal(flat, named)


# -- a whole model ---------------------------------------------------------------------------------------


@pytest.fixture
def model():
    return llama()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_every_linear_of_the_blocks_is_quantized_and_nothing_else(model):
    received: dict[str, list[torch.Tensor]] = {}

    def keep(name):
        return lambda module, inputs, output: received.setdefault(name, []).append(inputs[0].detach())

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    hooks = [m.register_forward_hook(keep(n)) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    with quantized(model, Setting(3, 3)) as simulation:
        names = simulation.linears
        logits(model)
        during = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for hook in hooks:
        hook.remove()
    assert set(names) == {
        f"model.layers.{layer}.{part}"
        for layer in (0, 1)
        for part in (f"{'self_attn' if name in LINEARS[:4] else 'mlp'}.{name}" for name in LINEARS)
    }
    for name, weight in during.items():
        path = name.removesuffix(".weight")
        if path not in names:
            assert torch.equal(weight, before[name]), name
            continue
        scale = before[name].abs().amax(1, keepdim=True) / 3.5
        steps = weight / scale
        assert (steps - steps.round()).abs().max() < 1e-5, name
        assert set(steps.round().unique().tolist()) <= set(range(-4, 4)), name
        assert (steps - before[name] / scale).abs().max() < 0.50001, name
    for path, values in received.items():
        kinds = max(len(np.unique(row.numpy())) for row in values[-1].reshape(-1, values[-1].shape[-1]))
        assert (kinds <= 8) == (path in names), path


def test_the_model_is_as_it_was_afterwards(model):
    parameters, before = dict(model.named_parameters()), logits(model)
    with quantized(model, Setting()):
        assert not torch.equal(logits(model), before)
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.equal(logits(model), before)
    with pytest.raises(KeyError, match="stopped"), quantized(model, Setting()):
        raise KeyError("stopped")
    assert torch.equal(logits(model), before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_16_bits_are_the_model_bit_for_bit(model):
    before = logits(model)
    with quantized(model, Setting(16, 16)):
        assert torch.equal(logits(model), before)
    with quantized(model, Setting(4, 16)):
        weights_only = logits(model)
    with quantized(model, Setting(16, 4)):
        activations_only = logits(model)
    assert not torch.equal(weights_only, before)
    assert not torch.equal(activations_only, before)


def test_more_bits_are_closer(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.ndim > 1 else 1.0)
    before = logits(model)
    errors = []
    for bits in (2, 4, 6, 8):
        with quantized(model, Setting(bits, bits)):
            errors.append(float((logits(model) - before).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.1 * errors[0]


def test_a_parameter_that_others_hold_keeps_its_numbers_there():
    model = OneLinear(np.eye(6), np.diag(np.linspace(0.1, 1, 6)) + 0.03)
    model.other = nn.Linear(6, 6, bias=False).double()
    model.other.weight = model.blocks[0].first.weight
    before = model.other.weight.detach().clone()
    with quantized(model, Setting()):
        assert torch.equal(model.other.weight, before)
        assert not torch.equal(model.blocks[0].first.weight, before)
    assert model.other.weight is model.blocks[0].first.weight


def test_shared_blocks_are_rounded_once():
    weight = np.random.default_rng(0).standard_normal((6, 6))
    model = OneLinear(np.eye(6), weight)
    model.blocks.append(model.blocks[0])
    with quantized(model, Setting(3, 16)) as simulation:
        names = simulation.linears
        assert names == ("blocks.0.first",)
        found = model.blocks[0].first.weight.detach().numpy()
        np.testing.assert_allclose(found, symmetric(weight, 3), rtol=1e-12)


def test_models_that_are_not_causal_work_too():
    with quantized(bert(), Setting()) as simulation:
        names = simulation.linears
        assert any(name.endswith("attention.self.query") for name in names)
        assert not any("decoder" in name or "predictions" in name for name in names)


# -- keys and values -------------------------------------------------------------------------------------


def by_hand(model: nn.Module, bits: int, convention: Convention) -> torch.Tensor:
    """The logits of a Llama whose attention is written out, with keys and values rounded."""
    config, base = model.config, model.model
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    width = config.hidden_size // heads
    hidden = base.embed_tokens(IDS)
    cos, sin = base.rotary_emb(hidden, torch.arange(IDS.shape[1])[None])
    mix = torch.tensor(scipy.linalg.hadamard(width) / width**0.5, dtype=torch.float32)
    future = torch.ones(IDS.shape[1], IDS.shape[1], dtype=torch.bool).triu(1)
    for layer in base.layers:
        x = layer.input_layernorm(hidden)
        part = layer.self_attn
        shape = (*IDS.shape, -1, width)
        query, key, value = (
            p(x).view(shape).transpose(1, 2) for p in (part.q_proj, part.k_proj, part.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        if convention.rotates_keys:
            query, key = query @ mix, key @ mix
        key = torch.tensor(rows_of(asymmetric, key, bits))
        free = not convention.values(bits).zero_in_range
        value = torch.tensor(rows_of(spanning if free else asymmetric, value, bits))
        key, value = (x.repeat_interleave(heads // groups, 1) for x in (key, value))
        scores = (query @ key.transpose(-1, -2) / width**0.5).masked_fill(future, -torch.inf)
        mixed = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
        hidden = hidden + part.o_proj(mixed)
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))
    return model.lm_head(base.norm(hidden))


def rows_of(oracle, x: torch.Tensor, bits: int) -> np.ndarray:
    return oracle(x.double().numpy().reshape(-1, x.shape[-1]), bits).reshape(x.shape).astype(np.float32)


def spanning(x: np.ndarray, bits: int) -> np.ndarray:
    """As ``asymmetric``, of rows whose range need not hold 0."""
    low, step = x.min(-1, keepdims=True), np.ptp(x, -1, keepdims=True) / (2**bits - 1)
    zero = np.rint(-low / step)
    return step * (np.clip(np.rint(x / step) + zero, 0, 2**bits - 1) - zero)


@pytest.mark.parametrize(("attention", "convention"), [("eager", PLAIN), ("sdpa", OSP)])
def test_keys_and_values_are_rounded_in_a_plain_pass(model, attention, convention):
    """Two query heads share one key head; nothing is generated and there is no cache."""
    model.set_attn_implementation(attention)
    before = logits(model)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.weight += 0.1  # so that some values lie on one side of 0
        expected = by_hand(model, 3, convention)
    with quantized(model, Setting(16, 16, 3), convention=convention.name):
        found = logits(model)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)
    assert (found - logits(model)).abs().max() > 1e-3
    assert before.shape == found.shape


def test_rotated_keys_that_are_not_rounded_leave_the_logits(model, monkeypatch):
    monkeypatch.setattr(Grid, "rounded", lambda self, values, scales=None: values)
    before = logits(model)
    with quantized(model, Setting(16, 16, 4), convention="osp"):
        torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-4)


def test_heads_without_a_hadamard_matrix_are_rotated_in_blocks():
    config = llama().config
    config.head_dim = 6
    model = LlamaForCausalLM(config).eval()
    with quantized(model, Setting(16, 16, 4), convention="osp") as simulation:
        assert simulation.notes == ()
        logits(model)
    assert simulation.notes == ("queries and keys are rotated by a block Hadamard 2 of 6",)


def test_a_cache_changes_nothing(model):
    with torch.no_grad(), quantized(model, Setting(16, 16, 4), convention="osp"):
        whole = model(IDS).logits[:, -1]
        first = model(IDS[:, :-1], use_cache=True)
        last = model(IDS[:, -1:], past_key_values=first.past_key_values).logits[:, -1]
    torch.testing.assert_close(last, whole, atol=1e-6, rtol=1e-4)


def test_parts_are_rounded_alone(model):
    before = logits(model)
    linears = block_linears(model)
    assert [(linear.roles[0], linear.layer) for linear in linears[:7]] == [(role, 0) for role in ROLES]
    with quantized(model, Setting(4, 4, 4), only={("down", 1)}) as simulation:
        assert simulation.linears == ("model.layers.1.mlp.down_proj",)
        assert not torch.equal(logits(model), before)
    with quantized(model, Setting(4, 4, 4), only={("keys", 0)}) as simulation:
        assert simulation.linears == ()
        keys = logits(model)
    with quantized(model, Setting(4, 4, 4), only={("keys", 0), ("values", 0)}):
        both = logits(model)
    assert len({before.sum().item(), keys.sum().item(), both.sum().item()}) == 3
    with pytest.raises(
        UsageError, match=r"there is no down in layer 7; parts are \(role, layer\), with .*keys"
    ):
        quantized(model, Setting(), only={("down", 7)}).__enter__()


class ByHand(nn.Module):
    """A block whose attention multiplies queries and keys itself."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        query, key, value = (part(x)[:, None] for part in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2)
        future = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
        return x + (scores.masked_fill(future, -torch.inf).softmax(-1) @ value)[:, 0]


def test_keys_out_of_reach_are_refused():
    with pytest.raises(
        UsageError, match="keys and values of OneLinear cannot be rounded: no attention was seen"
    ):
        quantized(OneLinear(np.eye(6), np.eye(6)), Setting(16, 16, 4)).__enter__()
    model = nn.Sequential(nn.Embedding(50, 8), nn.Sequential(ByHand(), ByHand()), nn.Linear(8, 50))
    with (
        pytest.raises(
            UsageError, match=r"attention \(layer 0\) multiplies queries and keys by hand, out of reach"
        ),
        quantized(model, Setting(16, 16, 4)),
    ):
        model(IDS)


# -- what is refused -------------------------------------------------------------------------------------


def test_weights_that_cannot_be_rounded(model):
    with pytest.raises(
        CheckpointError, match=r"transformer\.h\.0\.attn\.c_attn is a Conv1D, not an nn\.Linear"
    ):
        quantized(gpt2(), Setting()).__enter__()
    projection = model.model.layers[1].mlp.down_proj
    parametrize.register_parametrization(projection, "weight", Attention())
    with pytest.raises(
        CheckpointError, match=r"layers\.1\.mlp\.down_proj cannot be rounded: its weight is comp"
    ):
        quantized(model, Setting()).__enter__()


def test_methods_and_their_calibration_are_asked_for(model):
    with pytest.raises(UsageError, match=r"no method 'quarrot' of quantization; did you mean quarot"):
        quantized(model, Setting(), method="quarrot").__enter__()
    with pytest.raises(UsageError, match="gptq looks at activations on a text: give `calibration`"):
        quantized(model, Setting(), method="gptq").__enter__()
