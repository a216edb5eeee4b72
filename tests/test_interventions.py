"""Interventions against the same changes made by hand, and a model that is the same afterwards."""

from __future__ import annotations

import copy
import threading

import numpy as np
import pytest
import torch

import osp_diag
from osp_diag.errors import CaptureError, SiteError, UsageError
from osp_diag.interventions import Intervention, intervened, with_means
from osp_diag.interventions.operations import random_rotation
from osp_diag.sites import find_sites
from osp_diag.trainer.config import ModelConfig
from osp_diag.trainer.model.llama import Llama
from tests.tiny_checkpoints import gpt2, llama

IDS = torch.from_numpy(np.random.default_rng(0).integers(1, 200, (3, 12)))


@pytest.fixture(scope="module")
def model():
    model = llama(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)  # so that attention is not uniform
    return model


@pytest.fixture(scope="module")
def sites(model):
    return find_sites(model)


def logits(model, **arguments):
    with torch.no_grad():
        return model(IDS, use_cache=False, **arguments).logits


def under(model, sites, *interventions):
    with torch.no_grad(), intervened(model, sites, interventions):
        return model(IDS, use_cache=False).logits


def by_hand(model, change):
    """Logits of the decoder written out again: ``change(site, layer, x)`` is put in each site's place."""
    body = model.model
    with torch.no_grad():
        x = change("embedding", 0, body.embed_tokens(IDS))
        by = body.rotary_emb(x, torch.arange(IDS.shape[1])[None])
        for layer, block in enumerate(body.layers):
            y = change("attention_input", layer, block.input_layernorm(x))
            added = block.self_attn(y, position_embeddings=by, attention_mask=None)[0]
            x = change("residual_mid", layer, x + change("attention_contribution", layer, added))
            y = change("mlp_input", layer, block.post_attention_layernorm(x))
            hidden = block.mlp.act_fn(block.mlp.gate_proj(y)) * block.mlp.up_proj(y)
            added = block.mlp.down_proj(change("mlp_hidden", layer, hidden))
            x = change("residual_post", layer, x + change("mlp_contribution", layer, added))
        return model.lm_head(change("final_norm", 2, body.norm(x)))


@pytest.mark.parametrize(
    "site",
    [
        "embedding",
        "attention_input",
        "attention_contribution",
        "residual_mid",
        "mlp_input",
        "mlp_hidden",
        "mlp_contribution",
        "residual_post",
        "final_norm",
    ],
)
def test_a_channel_of_a_site_is_changed_for_all_that_follows(model, sites, site):
    layer = {"embedding": 0, "final_norm": 2}.get(site, 1)

    def change(place, number, x):
        if (place, number) == (site, layer):
            x = x.clone()
            x[:, 1:, [2, 5]] *= -3
        return x

    positions = tuple(range(1, 12))
    one = Intervention(
        operation="scale", site=site, layers=(layer,), channels=(2, 5), tokens=positions, value=-3.0
    )
    expected = by_hand(model, change)
    assert not torch.allclose(expected, logits(model), rtol=1e-3)
    torch.testing.assert_close(under(model, sites, one), expected)


@pytest.mark.parametrize("kind", ["sdpa", "eager"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_a_masked_key_is_what_a_mask_of_the_model_itself_does(make, kind):
    model = make()
    model.set_attn_implementation(kind)
    sites = find_sites(model)
    mask = torch.ones(12, 12, dtype=torch.bool).tril()
    mask[1:, 0] = False  # the first query has nothing else to attend to
    minimum = torch.zeros(1, 1, 12, 12).masked_fill(~mask, torch.finfo(torch.float32).min)
    changed = under(model, sites, Intervention(operation="mask_key", tokens="first"))
    torch.testing.assert_close(changed, logits(model, attention_mask=minimum))
    assert type(model.config._attn_implementation_internal) is str


@pytest.mark.parametrize("attention", ["softmax", "softmax_off_by_one"])
def test_keys_of_our_own_model_are_masked_too(attention):
    torch.manual_seed(0)
    model = Llama(ModelConfig(layers=1, hidden_size=64, heads=2, vocabulary_size=200, attention=attention))
    one = Intervention(operation="mask_key", tokens=(0, 1), heads=(1,))
    with torch.no_grad(), intervened(model, find_sites(model), [one]):
        before, ids = model(IDS).logits, IDS.clone()
        ids[:, 0] = 7  # seen by the first head alone …
        assert not torch.equal(model(ids).logits[:, 2:], before[:, 2:])
    both = Intervention(operation="mask_key", tokens=(0, 1))
    with torch.no_grad(), intervened(model, find_sites(model), [both]):
        before = model(IDS).logits
        torch.testing.assert_close(model(ids).logits[:, 2:], before[:, 2:])  # … and by none


def test_heads_of_values_are_changed_before_and_at_the_call(model, sites):
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].self_attn.v_proj.weight[3] = 0
        other.model.layers[1].self_attn.q_proj.weight[8:] = 0
    value = Intervention(operation="zero", site="value", layers=(1,), channels=(3,), heads=(0,))
    query = Intervention(operation="zero", site="query_pre_rope", layers=(1,), heads=(1,))
    torch.testing.assert_close(under(model, sites, value, query), logits(other))


def test_the_mean_is_that_of_the_tokens_that_are_meant(model, sites):
    with torch.no_grad():
        states = model(IDS, output_hidden_states=True).hidden_states[2]
    mean = states[:, 0, 4].double().mean()
    one = Intervention(operation="mean", site="residual_post", layers=(1,), channels=(4,), tokens="first")
    [measured] = with_means(model, sites, [one], [{"input_ids": IDS}])
    assert measured.value[1].item() == pytest.approx(float(mean), rel=1e-6)

    def change(place, number, x):
        if (place, number) == ("residual_post", 1):
            x = x.clone()
            x[:, 0, 4] = mean.float()
        return x

    torch.testing.assert_close(under(model, sites, measured), by_hand(model, change))
    with pytest.raises(UsageError, match="measure them first, with"):
        under(model, sites, one)


def test_a_rotation_keeps_norms_and_is_of_each_layer_alone():
    first, second = random_rotation(16, 0), random_rotation(16, 1)
    torch.testing.assert_close(first @ first.T, torch.eye(16, dtype=torch.float64))
    assert not torch.allclose(first, second)


def test_weights_are_changed_by_row_and_restored_to_the_bit(model, sites):
    down = model.model.layers[1].mlp.down_proj.weight
    gain = model.model.layers[0].input_layernorm.weight
    with torch.no_grad():
        gain[3] = 9
        before = {name: value.clone() for name, value in model.state_dict().items()}
    norms = down.detach().norm(dim=1)
    changes = [
        Intervention(operation="scale_rows", site="mlp_down_weight", layers=(1,), channels=(2,), value=10.0),
        Intervention(operation="replace_gain", site="model.layers.0.input_layernorm.weight"),
        Intervention(operation="clip_rows", site="*.o_proj.weight", layers=(2,)),
    ]

    def look_and_fail() -> None:
        torch.testing.assert_close(down[2].norm(), 10 * norms[2])
        expected = before["model.layers.0.input_layernorm.weight"].square().mean().sqrt()
        torch.testing.assert_close(gain, expected.expand(16))
        rows = model.model.layers[2].self_attn.o_proj.weight.detach().norm(dim=1)
        assert float(rows.max()) == pytest.approx(float(rows.median()), rel=1e-5)
        assert torch.equal(model.state_dict()["lm_head.weight"], before["lm_head.weight"])
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError), intervened(model, sites, changes):
        look_and_fail()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_gains_that_are_nan_are_refused(model, sites):
    name = "model.layers.0.input_layernorm.weight"
    gain, one = model.get_parameter(name), Intervention(operation="replace_gain", site=name, value=1.0)
    before = gain.detach().clone()
    with torch.no_grad():
        gain[3] = float("nan")
        with pytest.raises(UsageError, match=f"{name} has NaN or Inf, so that its gains are not known"):
            under(model, sites, one)
        gain.copy_(before)


def test_afterwards_the_model_is_what_it_was(model, sites):
    before, hooks = logits(model), sum(len(m._forward_hooks) for m in model.modules())
    bad = Intervention(operation="zero", site="value", channels=(99,))
    fine = Intervention(operation="mask_key", tokens="first")
    with pytest.raises(UsageError, match="value of layer 0 has channels 0 to 7, not 99"):
        under(model, sites, fine, bad)
    assert torch.equal(logits(model), before)
    assert sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()) == hooks
    assert type(model.config._attn_implementation_internal) is str


def test_a_probe_within_sees_what_is_changed(model, sites):
    clip = Intervention(operation="clip", site="residual_post", layers=(1,), value=0.01)
    mask = Intervention(operation="mask_key", tokens="first")
    with intervened(model, sites, [clip, mask]):
        run = osp_diag.probe(model, ids=IDS.numpy(), sites=["residual_post", "attention"])
    largest = run["token_peak"].sel(site="residual_post", stratum="all", layer=1)
    assert float(largest.max()) <= 0.01 * (1 + 1e-6)
    assert float(run["first_token_attention"].sel(stratum="rest").max()) == 0
    assert type(model.config._attn_implementation_internal) is str


def test_other_threads_run_the_untouched_model(model, sites):
    before, seen = logits(model), []
    changes = [
        Intervention(operation="zero", site="residual_post", layers=(0,)),
        Intervention(operation="mask_key", tokens="first"),
    ]
    with intervened(model, sites, changes):
        other = threading.Thread(target=lambda: seen.append(logits(model)))
        other.start()
        other.join()
    assert torch.equal(seen[0], before)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"site": "residual_pots"}, SiteError, "did you mean residual_post"),
        ({"site": "residual_post", "layers": (7,)}, SiteError, "residual_post has layers 0 to 2, not 7"),
        ({"site": "residual_post", "channels": (16,)}, UsageError, "has channels 0 to 15, not 16"),
        ({"site": "attention"}, SiteError, "holds statistics alone and cannot be changed"),
        ({"site": "mlp_down_weight"}, SiteError, "is a weight; scale or clip its rows"),
        ({"operation": "clip_rows", "site": "*.down.weight"}, UsageError, "no parameter of the model"),
        ({"operation": "replace_gain", "site": "lm_head.weight"}, UsageError, "holds no gains of a norm"),
        (
            {"operation": "mask_key", "tokens": "first", "layers": (3,)},
            SiteError,
            "attention has layers 0 to 2",
        ),
    ],
)
def test_what_the_model_does_not_have_is_refused_before_it_runs(model, sites, change, error, message):
    one = Intervention(**{"operation": "zero", **change})
    with pytest.raises(error, match=message), intervened(model, sites, [one]):
        pytest.fail("the block ran")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"operation": "zeor", "site": "x"}, "did you mean zero"),
        ({"operation": "clip", "site": "x"}, "clip needs a value"),
        ({"operation": "clip", "site": "x", "value": -1.0}, "a value above 0"),
        ({"operation": "zero", "site": "x", "tokens": "last"}, "are no stratum; there are all, first"),
        ({"operation": "mask_key"}, "with all keys masked nothing is left"),
        ({"operation": "scale_rows", "site": "w", "value": 2.0, "tokens": "first"}, "rows and columns"),
    ],
)
def test_an_operation_takes_what_it_needs_and_no_more(change, message):
    with pytest.raises(UsageError, match=message):
        Intervention(**change)


def test_gradients_and_caches_are_refused(model, sites):
    one = Intervention(operation="zero", site="residual_post", layers=(0,))
    with intervened(model, sites, [one]):
        with pytest.raises(CaptureError, match="without gradients"):
            model(IDS)
        with torch.no_grad(), pytest.raises(CaptureError, match="goes on with a cache"):
            model.generate(IDS, max_new_tokens=3, pad_token_id=0)


@pytest.mark.parametrize(
    "change",
    [
        {"operation": "zero", "site": "residual_post", "layers": (1,), "channels": (3,), "tokens": "first"},
        {"operation": "scale", "site": "residual_mid", "value": 0.5},
        {"operation": "clip", "site": "attention_input", "value": 0.3, "tokens": (2, 3)},
        {"operation": "rotate", "site": "mlp_contribution", "layers": (2,)},
        {"operation": "mask_key", "tokens": "first"},
        {"operation": "zero", "site": "value", "heads": (0,), "tokens": (0,)},
        {"operation": "scale", "site": "key_post_rope", "value": 2.0},
        {"operation": "clip_rows", "site": "*.down_proj.weight"},
    ],
    ids=lambda change: f"{change['operation']} {change.get('site', '')}",
)
def test_nnsight_gives_the_same_numbers(change):
    from osp_diag.interventions.nnsight_engine import NnsightEngine

    model = llama(3)
    sites, one = find_sites(model), Intervention(**change)
    before = {module: dict(vars(module)) for module in model.modules()}
    engine = NnsightEngine(model, sites, ())
    try:
        with torch.no_grad(), engine.running([one]) as forward:
            other = forward(input_ids=IDS, use_cache=False).logits
    finally:
        engine.close()
    assert torch.equal(other, under(model, sites, one))
    assert all(vars(module) == before[module] for module in model.modules())
