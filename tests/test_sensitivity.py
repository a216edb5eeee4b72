"""Where few bits hurt, on a tiny Llama with a planted channel: errors by layer, parts, channels, advice."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pytest
import torch
import xarray as xr
from transformers import LlamaForCausalLM

from osp_diag import open_run
from osp_diag.errors import StoreError, UsageError
from osp_diag.quantizing.advice import Advice, advise
from osp_diag.quantizing.divergence import ReferencePredictions
from osp_diag.quantizing.layer_errors import layer_errors
from osp_diag.quantizing.linears import block_linears
from osp_diag.quantizing.measurements import measurement_of, run_writer, store_measurements
from osp_diag.quantizing.perplexity import predictions
from osp_diag.quantizing.sensitivity import sensitivity
from osp_diag.quantizing.setting import Setting
from osp_diag.quantizing.simulate import quantized
from osp_diag.quantizing.spared_channels import hottest_channels, spared_channels
from osp_diag.schema import SENSITIVITY
from tests.run_fixtures import write_run
from tests.tiny_checkpoints import llama

CHANNEL = 5
FEW = Setting(4, 4, 4)
IDS = torch.randint(0, 250, (4, 24), generator=torch.Generator().manual_seed(1))
CALIBRATION = torch.randint(0, 250, (3, 24), generator=torch.Generator().manual_seed(2))


def planted(*norms: tuple[int, str]) -> LlamaForCausalLM:
    """A Llama whose (layer, norm) make one channel 60 times as large, which the Linears behind take back."""
    model = llama()
    with torch.no_grad():
        for linear in block_linears(model):
            linear.module.weight *= 5
        for layer, norm in norms:
            block = model.model.layers[layer]
            part, names = (
                (block.mlp, ("gate_proj", "up_proj"))
                if norm == "post_attention_layernorm"
                else (block.self_attn, ("q_proj", "k_proj", "v_proj"))
            )
            getattr(block, norm).weight[CHANNEL] *= 60
            for name in names:
                getattr(part, name).weight[:, CHANNEL] /= 60
    return model


@pytest.fixture(scope="module")
def hot() -> LlamaForCausalLM:
    """Planted at the input of the second layer's MLP."""
    return planted((1, "post_attention_layernorm"))


@pytest.fixture(scope="module")
def parts(hot: LlamaForCausalLM) -> xr.Dataset:
    return sensitivity(hot, IDS, FEW, batch_size=4)


def hidden_states(model: LlamaForCausalLM) -> list[torch.Tensor]:
    """The output of each block, in float64."""
    states = []
    hooks = [
        block.register_forward_hook(lambda module, inputs, state: states.append(state.double()))
        for block in model.model.layers
    ]
    with torch.no_grad():
        model(IDS)
    for hook in hooks:
        hook.remove()
    return states


def effect(
    model: LlamaForCausalLM, setting: Setting, only: Collection[tuple[str, int]]
) -> tuple[float, float]:
    """(damage, divergence) by whole passes."""
    with ReferencePredictions() as reference:
        full = predictions(model, IDS, reference=reference)
        with quantized(model, setting, only=only):
            rounded = predictions(model, IDS, reference=reference)
    count = len(IDS) * full.tokens
    return (rounded.surprise - full.surprise).sum() / count, rounded.divergence.sum() / count


# -- errors by layer -------------------------------------------------------------------------------------


def test_the_error_of_a_layer_is_the_sum_of_its_parts_and_that_of_the_hidden_states(hot):
    errors = layer_errors(hot, IDS, FEW, batch_size=3)
    total = errors["local_error"] + errors["accumulated_error"] + errors["interaction"]
    np.testing.assert_allclose(errors["relative_error"], total, rtol=1e-12)
    assert errors["accumulated_error"][0] == 0
    before = hidden_states(hot)
    with quantized(hot, FEW):
        after = hidden_states(hot)
    for layer, (full, rounded) in enumerate(zip(before, after, strict=True)):
        ratios = (rounded - full).square().sum(-1) / full.square().sum(-1)
        np.testing.assert_allclose(errors["relative_error"][layer], ratios.mean(), rtol=1e-4)
        np.testing.assert_allclose(errors["error_by_position"][layer], ratios.mean(0), rtol=1e-4)
        by_channel = (rounded - full).square().sum((0, 1))
        shares = by_channel / by_channel.sum()
        np.testing.assert_allclose(errors["error_by_channel"][layer], shares, rtol=1e-3)
    gain = float(errors["accumulated_error"][1] / errors["relative_error"][0])
    assert errors["gain"][1] == pytest.approx(gain)
    with pytest.raises(UsageError, match="quarot-rtn rotates the residual stream, so its channels are not"):
        layer_errors(hot, IDS, FEW, method="quarot-rtn")


# -- one part at a time ----------------------------------------------------------------------------------


def test_the_planted_part_and_layer_hurt_most(parts):
    inputs = parts["divergence"].sel(part=[p for p in parts["part"].values if p.startswith("inputs:")])
    worst = inputs.isel(inputs.argmax(...))
    assert (worst["part"], worst["layer"]) == ("inputs:mlp_input", 1)
    assert worst > 10 * inputs.sel(part="inputs:mlp_input", layer=0)


@pytest.mark.parametrize(
    ("part", "layer", "roles", "setting"),
    [
        ("inputs:mlp_input", 1, ("gate", "up"), Setting(16, 4, 16)),
        ("weights:down", 0, ("down",), Setting(4, 16, 16)),
        ("keys", 1, ("keys",), Setting(16, 16, 4)),
        ("values", None, ("values",), Setting(16, 16, 4)),
    ],
)
def test_a_part_is_what_whole_passes_give(hot, parts, part, layer, roles, setting):
    layers = range(2) if layer is None else (layer,)
    damage, divergence = effect(hot, setting, {(role, at) for role in roles for at in layers})
    row = parts.sel(part=part)
    names = ("damage_all_layers", "divergence_all_layers") if layer is None else ("damage", "divergence")
    of_layer = row if layer is None else row.sel(layer=layer)
    assert float(of_layer[names[0]]) == pytest.approx(damage, rel=1e-3, abs=1e-6)
    assert float(of_layer[names[1]]) == pytest.approx(divergence, rel=1e-3, abs=1e-8)


def test_what_rounds_nothing_has_no_sensitivity(hot):
    with pytest.raises(UsageError, match="16-16-16 rounds nothing, so there is no sensitivity to it"):
        sensitivity(hot, IDS, Setting(16, 16, 16))
    alone = sensitivity(hot, IDS, Setting(4, 16, 16), by_layer=False, batch_size=4)
    assert set(map(str, alone["part"].values)) == {
        f"weights:{role}" for role in ("query", "key", "value", "attention_output", "gate", "up", "down")
    }
    assert np.isnan(alone["divergence"]).all()
    assert np.isfinite(alone["divergence_all_layers"]).all()


# -- channels that stay ----------------------------------------------------------------------------------


def test_with_every_channel_spared_nothing_is_lost_and_with_the_hottest_much_less(hot):
    curve = spared_channels(
        hot, IDS, Setting(4, 4, 16), calibration=CALIBRATION, counts=(0, 1, 24), batch_size=4
    )
    assert curve["share"].values[[0, 2]].tolist() == [0, 1]
    assert curve["divergence"].sel(channels=24) == pytest.approx(0, abs=1e-12)
    assert curve["divergence"].sel(channels=1) < 0.5 * curve["divergence"].sel(channels=0)
    ranked = hottest_channels(hot, block_linears(hot), CALIBRATION)
    assert ranked["model.layers.1.mlp.gate_proj"][0] == CHANNEL
    with pytest.raises(UsageError, match=r"counts=\(-1,\): give numbers of channels, 0 or more"):
        spared_channels(hot, IDS, FEW, calibration=CALIBRATION, counts=(-1,))


# -- in the run ------------------------------------------------------------------------------------------


def test_a_run_keeps_what_was_measured_last_and_loses_nothing_else(tmp_path, parts):
    path = write_run(tmp_path / "run.zarr")
    kurtosis = open_run(path)["osp_excess_kurtosis"].load()
    with pytest.raises(StoreError, match=r"run of tiny holds no sensitivity to few bits; .*osp-diag advise"):
        measurement_of(open_run(path), SENSITIVITY)
    store_measurements(path, {SENSITIVITY: parts.assign_attrs(notes=["of all parts"])})
    xr.testing.assert_allclose(measurement_of(open_run(path), SENSITIVITY), parts)
    fewer = parts.isel(part=slice(3)).drop_vars("damage")
    store_measurements(path, {SENSITIVITY: fewer})
    held = measurement_of(open_run(path), SENSITIVITY)
    xr.testing.assert_allclose(held, fewer)
    assert "damage" not in held
    assert "notes" not in held.attrs
    assert held["divergence"].attrs["units"] == "nat"
    xr.testing.assert_identical(open_run(path)["osp_excess_kurtosis"].load(), kurtosis)
    with (
        pytest.raises(StoreError, match=r"'residual_post' of .* grows with the steps; it cannot be replaced"),
        run_writer(path) as writer,
    ):
        writer.replace_group("residual_post", fewer)


# -- advice ----------------------------------------------------------------------------------------------


def advice(model: LlamaForCausalLM, setting: Setting | str, budget: float) -> Advice:
    chosen = Setting.read(setting) if isinstance(setting, str) else setting
    return advise(model, IDS, chosen, calibration=CALIBRATION, budget=budget, batch_size=4)


def test_the_hot_channel_is_advised_and_saves_what_was_measured():
    norms = ("input_layernorm", "post_attention_layernorm")
    model = planted(*((layer, norm) for layer in range(2) for norm in norms))
    setting = Setting(4, 4, 16)
    found = advice(model, setting, 0.06)
    best = found.best
    assert best is not None
    assert best.name == "the hottest channel of every Linear's input"
    assert best.channels["model.layers.0.self_attn.q_proj"].tolist() == [CHANNEL]
    assert all(trial.share <= 0.06 for trial in found.trials)
    with ReferencePredictions() as reference:
        predictions(model, IDS, reference=reference)
        with quantized(model, setting, full_precision_channels=best.channels):
            after = predictions(model, IDS, reference=reference)
    assert best.divergence == pytest.approx(after.divergence.sum() / found.tokens, rel=1e-6)
    assert best.saved == pytest.approx(found.divergence - best.divergence, rel=1e-6)
    assert best.saved_low > 0


def test_nothing_helps_where_nothing_that_fits_saves_much():
    found = advice(llama(), Setting(8, 8, 16), 0.03)
    assert [trial.name for trial in found.trials] == ["RTN + FFN Hadamard for all"]
    assert found.best is None


def test_bad_budgets_and_settings_are_refused(hot):
    with pytest.raises(UsageError, match="budget=2: give the share of the weights that may stay in 16 bits"):
        advice(hot, FEW, 2)
    with pytest.raises(UsageError, match="16-16-16 rounds nothing, so there is nothing to advise"):
        advice(hot, Setting(16, 16, 16), 0.1)
