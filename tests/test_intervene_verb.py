"""What interventions do, with intervals: against numbers by hand, and as the verb tells it."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import xarray as xr

import osp_diag
from osp_diag.cli.main import main
from osp_diag.errors import UsageError
from osp_diag.interventions.notation import read_intervention
from osp_diag.resampling import draws, interval, ratio
from tests.tiny_checkpoints import bert, byte_tokenizer, llama, save

IDS = np.random.default_rng(0).integers(1, 200, (6, 10))
LESS = {
    "ids": IDS,
    "resamples": 20,
    "sites": ["residual_post", "attention"],
    "estimators": ["osp_excess_kurtosis", "token_peak", "sink_rate"],
}
ZERO, MASK = "zero residual_post:1:3@first", "mask-key first"


@pytest.fixture(scope="module")
def model():
    return llama()


@pytest.fixture(scope="module")
def effects(model):
    return osp_diag.intervene(model, [ZERO, MASK], **LESS)


def test_loss_and_divergence_are_those_of_the_changed_logits(model, effects):
    ids = torch.as_tensor(IDS)

    def change(module, args, output):
        output = output.clone()
        output[:, 0, 3] = 0
        return output

    with torch.no_grad():
        p = model(ids).logits.double().log_softmax(-1)
        handle = model.model.layers[1].register_forward_hook(change)
        q = model(ids).logits.double().log_softmax(-1)
        handle.remove()
    loss = [-x[:, :-1].gather(2, ids[:, 1:, None]).mean().item() for x in (p, q)]
    tree = effects.tree
    assert float(tree["loss"]) == pytest.approx(loss[0], abs=1e-6)
    assert float(tree["loss_change"][0]) == pytest.approx(loss[1] - loss[0], abs=1e-6)
    expected = (p.exp() * (p - q)).sum(-1)
    assert float(tree["kl"][0]) == pytest.approx(expected.mean().item(), rel=1e-3)
    assert effects.interventions == [ZERO, MASK]
    # The interval of a mean over sequences, by the same draws.
    of_sequence = expected.sum(1).numpy()
    of_draw = draws(6, 20, 0) @ of_sequence / (6 * 10)
    np.testing.assert_allclose(tree["kl_interval"][0], np.quantile(of_draw[1:], [0.025, 0.975]), rtol=1e-3)


def test_a_statistic_changes_by_what_two_probes_differ(model, effects):
    from osp_diag.interventions import Intervention, intervened
    from osp_diag.sites import find_sites

    options = {name: LESS[name] for name in ("ids", "sites", "estimators")}
    before = osp_diag.probe(model, **options).at("residual_post")["osp_excess_kurtosis"].isel(step=0)
    one = Intervention(operation="zero", site="residual_post", layers=(1,), channels=(3,), tokens="first")
    with intervened(model, find_sites(model), [one]):
        after = osp_diag.probe(model, **options).at("residual_post")["osp_excess_kurtosis"].isel(step=0)
    site = effects.tree["residual_post"]
    np.testing.assert_allclose(site["osp_excess_kurtosis"], before, rtol=1e-6)
    change = site["osp_excess_kurtosis_change"].sel(intervention=ZERO)
    np.testing.assert_allclose(change, after - before, atol=1e-6)
    assert change.attrs["units"] == "1"
    assert change.attrs["definition"]
    mean = effects.tree["change"].sel(intervention=ZERO, statistic="residual_post/osp_excess_kurtosis@first")
    assert float(mean) == pytest.approx(float(change.sel(stratum="first").mean()), abs=1e-9)
    low, high = site["osp_excess_kurtosis_change_interval"].sel(intervention=ZERO, layer=1, stratum="first")
    assert low <= float(change.sel(layer=1, stratum="first")) <= high


def test_both_engines_give_the_same_numbers(model, effects):
    other = osp_diag.intervene(model, [ZERO, MASK], engine="nnsight", **LESS)
    for group in ("/", "/residual_post", "/attention"):
        xr.testing.assert_equal(other.tree[group].to_dataset(), effects.tree[group].to_dataset())


def test_nnsight_says_what_its_probe_reads_too_early(model):
    clip = osp_diag.Intervention(operation="clip", site="residual_mid", layers=(1,), value=0.01)
    options = LESS | {"sites": ["residual_mid", "residual_post"], "together": True}
    hooks, other = (
        osp_diag.intervene(model, [clip], engine=name, **options) for name in ("hooks", "nnsight")
    )
    for effects in (hooks, other):
        assert effects.interventions == ["clip residual_mid:1=0.01", "all together"]
    peak = [e.tree["residual_mid"]["token_peak_change"].isel(intervention=0) for e in (hooks, other)]
    assert np.isfinite(peak[0].sel(layer=1, stratum="all"))
    assert np.isnan(peak[1].sel(layer=1, stratum="all"))
    np.testing.assert_array_equal(peak[0].sel(layer=0), peak[1].sel(layer=0))
    assert "nnsight changes residual_mid of layer 1 after the probe has read it" in str(other)
    xr.testing.assert_equal(
        hooks.tree["residual_post"].to_dataset(), other.tree["residual_post"].to_dataset()
    )


def test_draws_begin_with_the_data_itself():
    taken = draws(5, 100, 1)
    assert taken.shape == (101, 5)
    assert (taken[0] == 1).all()
    assert (taken.sum(1) == 5).all()
    np.testing.assert_array_equal(ratio(np.arange(5.0), np.full(5, 2.0), taken)[0], 1.0)
    assert np.isnan(interval(np.ones((1, 3)))).all()


@pytest.mark.parametrize(
    ("operation", "text"),
    [
        ("zero", "residual_post:11:507@first"),
        ("clip", "residual_post:*:3,4@rest=20"),
        ("mask_key", "first:0,1,2:3"),
        ("mean", "linear_input:mlp.up_proj:1"),
        ("scale_rows", "mlp_down_weight:1:2=10"),
        ("zero", "value:*:h0.2@0,1"),
        ("clip_rows", "model.*.weight"),
    ],
)
def test_notation_is_read_as_it_is_written(operation, text):
    assert str(read_intervention(operation, text)) == f"{operation.replace('_', '-')} {text}"


@pytest.mark.parametrize(
    ("operation", "text", "message"),
    [
        ("zero", "residual_post:1:2:3", "write SITE[:LAYERS[:CHANNELS]][@TOKENS], numbers as"),
        ("clip", "residual_post=big", "'big' after = is no number"),
        ("zero", "residual_post:x", "'x' is no number"),
        ("zero", "residual_post@", "after @ stand the tokens"),
        ("zeros", "residual_post", "operation 'zeros' is unknown; did you mean zero"),
        ("mask-key", "first=3", "it has tokens, layers and heads"),
    ],
)
def test_what_is_not_written_so_is_shown_the_form(operation, text, message):
    with pytest.raises(UsageError) as error:
        read_intervention(operation, text)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("source", "interventions", "options", "message"),
    [
        (llama, [], {}, "no intervention is named"),
        (llama, [ZERO, ZERO], {}, "is named twice"),
        (llama, [ZERO], {"resamples": -1}, "a bootstrap takes 0 draws"),
        (llama, [ZERO], {"engine": "magic"}, "there are hooks and nnsight"),
        (llama, [ZERO], {"protocol": "osp-published"}, "a loss is of real sequences"),
        (bert, ["zero residual_post:1"], {}, "an intervention is judged by next-token predictions"),
    ],
)
def test_what_cannot_be_meant_is_refused(source, interventions, options, message):
    with pytest.raises(UsageError, match=message):
        osp_diag.intervene(source(), interventions, **{**LESS, **options})


def test_the_verb_prints_a_table_or_json_and_writes_a_file(tmp_path, capsys):
    save(llama(), tmp_path / "model", byte_tokenizer())
    command = ["intervene", str(tmp_path / "model"), "--tokens", "96", "--seq-len", "16", "--resamples", "10"]
    command += ["--zero", "residual_post:1:3@first", "--mask-key", "first", "--sites", "residual_post"]
    assert main([*command, "--out", str(tmp_path / "effects.nc")]) == 0
    text = capsys.readouterr().out
    assert "zero residual_post:1:3@first\n  loss " in text
    assert "mask-key first" in text
    assert "Note: intervals from 6 sequences are too narrow: take 10 or more" in text
    table = xr.load_dataset(tmp_path / "effects.nc")
    assert table["change"].dims == ("intervention", "statistic")
    assert main([*command, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["intervention"] for row in rows] == ["mask-key first", "zero residual_post:1:3@first"][::-1]
    assert rows[0]["loss_change"]["low"] <= rows[0]["loss_change"]["change"] <= rows[0]["loss_change"]["high"]
    assert main([*command[:2], "--zero", "residual_pots:1"]) == 2
    assert "did you mean residual_post" in capsys.readouterr().err
    assert main(command[:2]) == 2
    assert "name an intervention, such as --zero" in capsys.readouterr().err
