"""Results at few bits: the sweep, the group of a run that holds them, and the verb that fills it."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import xarray as xr

from osp_diag import open_run
from osp_diag.analyses.few_bits import comparable_results, perplexity_at
from osp_diag.cli.main import main
from osp_diag.errors import StoreError, UsageError
from osp_diag.quantizing.bit_width_sweep import WIDTHS, bit_width_sweep, bit_widths
from osp_diag.quantizing.perplexity import perplexity
from osp_diag.quantizing.results import QuantizedResult, notation, results_dataset, results_of, store_results
from osp_diag.quantizing.round_to_nearest import round_to_nearest
from tests.run_fixtures import write_run
from tests.tiny_checkpoints import BYTES, byte_tokenizer, llama, save

TOKENS = np.random.default_rng(0).integers(0, BYTES, (4, 24))


def result(weight: int, activation: int, loss: float, fingerprint: str = "f", **more) -> QuantizedResult:
    return QuantizedResult(
        weight_bits=weight,
        activation_bits=activation,
        negative_log_likelihood=loss,
        tokens=92,
        sequence_length=24,
        token_source=f"text {fingerprint}",
        token_fingerprint=fingerprint,
        **more,
    )


# -- the sweep -------------------------------------------------------------------------------------------


def test_a_sweep_is_the_perplexity_under_each_setting():
    model = llama()
    told = []
    found = bit_width_sweep(
        model, TOKENS, [(16, 16), (4, 4), (2, 16), (4, 4)], progress=lambda *now: told.append(now)
    )
    assert found.sizes == {"setting": 3}
    assert told == [(1, 3), (2, 3), (3, 3)]
    assert found["weight_bits"].values.tolist() == [16, 4, 2]
    assert found["activation_bits"].values.tolist() == [16, 4, 16]
    for index, (weight, activation) in enumerate([(16, 16), (4, 4), (2, 16)]):
        with round_to_nearest(model, weight, activation):
            expected = perplexity(model, TOKENS)
        assert found["perplexity"].values[index] == expected.perplexity
        assert found["tokens"].values[index] == expected.tokens == 4 * 23
    assert len(set(found["token_fingerprint"].values)) == 1
    assert found["perplexity"].attrs["definition"] == "exp of negative_log_likelihood"


def test_the_default_sweep_is_that_of_the_papers_figure():
    assert {w for w, a in WIDTHS if a == 16} == {16, 8, 6, 5, 4, 3}
    assert {a for w, a in WIDTHS if w == 16} == {16, 8, 6, 5, 4}
    assert (4, 4) in WIDTHS


def test_what_cannot_be_swept_is_refused_before_any_work():
    model = llama()
    model.register_forward_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(UsageError, match=r"weight_bits=9: give 2 to 8, or 16 for none"):
        bit_width_sweep(model, TOKENS, [(16, 16), (9, 16)])
    with pytest.raises(UsageError, match=r"needs at least one setting"):
        bit_width_sweep(model, TOKENS, [])


def test_settings_are_written_as_papers_do():
    assert (bit_widths("W4A16"), bit_widths("w16a8")) == ((4, 16), (16, 8))
    assert (notation(4, 4), notation(4, 8, 4)) == ("W4A4", "W4A8KV4")
    with pytest.raises(UsageError, match=r"'4-4' is no setting; write W4A4"):
        bit_widths("4-4")


# -- the group of a run ----------------------------------------------------------------------------------


def test_a_run_keeps_its_results_and_loses_nothing_else(tmp_path):
    path = write_run(tmp_path / "run.zarr")
    before = open_run(path)
    loss = before.series["loss"].load()
    kurtosis = before["osp_excess_kurtosis"].load()
    store_results(path, results_dataset([result(16, 16, 2.0), result(4, 4, 3.0)]))
    store_results(path, results_dataset([result(4, 4, 2.5), result(8, 8, 2.1), result(4, 4, 9.0, "g")]))
    run = open_run(path)
    found = results_of(run)
    rows = list(
        zip(
            found["weight_bits"].values,
            found["token_fingerprint"].values,
            found["perplexity"].values,
            strict=True,
        )
    )
    assert [(int(bits), str(tokens)) for bits, tokens, _ in rows] == [(16, "f"), (4, "f"), (8, "f"), (4, "g")]
    np.testing.assert_allclose([value for *_, value in rows], np.exp([2.0, 2.5, 2.1, 9.0]))
    assert "quantization" not in run.sites
    assert run.steps.tolist() == before.steps.tolist()
    xr.testing.assert_identical(run.series["loss"].load(), loss)
    xr.testing.assert_identical(run["osp_excess_kurtosis"].load(), kurtosis)
    assert run.attrs["created"] == before.attrs["created"]
    assert len(run.attrs["resumed"]) == 2


def test_results_of_earlier_weights_make_way_for_new_ones(tmp_path):
    path = write_run(tmp_path / "run.zarr")
    old = [result(16, 16, 2.0, model_fingerprint="a"), result(8, 8, 2.1, model_fingerprint="a")]
    store_results(path, results_dataset(old))
    store_results(path, results_dataset([result(16, 16, 1.5, model_fingerprint="b")]))
    found = results_of(open_run(path))
    assert found["model_fingerprint"].values.tolist() == ["b"]
    assert found["negative_log_likelihood"].values.tolist() == [1.5]


def test_a_run_without_results_says_how_to_get_them(tmp_path):
    with pytest.raises(StoreError, match=r"run of tiny holds no results at few bits; .*osp-diag quantize"):
        results_of(open_run(write_run(tmp_path / "run.zarr")))


def test_a_perplexity_too_large_for_a_float_is_infinite():
    assert results_dataset([result(4, 4, 1e4)])["perplexity"].item() == math.inf


def holding(tmp_path, name: str, *results: QuantizedResult):
    path = write_run(tmp_path / f"{name}.zarr", model_name=name)
    store_results(path, results_dataset(results))
    return open_run(path)


def test_runs_are_compared_on_the_tokens_that_they_share(tmp_path):
    first = holding(tmp_path, "a", result(16, 16, 2.0), result(16, 16, 1.0, "g"), result(4, 4, 1.5, "g"))
    second = holding(tmp_path, "b", result(16, 16, 3.0, "g"), result(4, 4, 9.0, "h"))
    one, other = comparable_results([first, second])
    assert perplexity_at(one, 16, 16) == pytest.approx(math.e)
    assert perplexity_at(one, 4, 4) == pytest.approx(math.exp(1.5))
    assert perplexity_at(other, 16, 16) == pytest.approx(math.exp(3))
    assert math.isnan(perplexity_at(other, 4, 4))
    with pytest.raises(StoreError, match=r"are on different tokens \(text f / text h\); measure with"):
        comparable_results([holding(tmp_path, "c", result(4, 4, 1.0)), second])
    with pytest.raises(StoreError, match=r"run of a holds no results of the scheme 'gptq'; it has round-to"):
        comparable_results([first], "gptq")


# -- the verb --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_verb_adds_to_the_run_of_its_checkpoint(tmp_path, capsys):
    model = save(llama(), tmp_path / "model", byte_tokenizer())
    text = tmp_path / "text.txt"
    text.write_text("a bird sang of days that went. " * 20)
    run, out = tmp_path / "run.zarr", tmp_path / "table.nc"
    options = ["--text", str(text), "--tokens", "128", "--seq-len", "32"]
    assert main(["probe", str(model), "--out", str(run), "--single-protocol", *options]) == 0
    capsys.readouterr()
    words = ["quantize", str(model), "--run", str(run), "--widths", "W16A16", "W4A4", *options]
    assert main([*words, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "perplexity of 124 tokens" in said
    assert "W4A4" in said
    assert "× W16A16" in said
    assert results_of(open_run(run))["weight_bits"].values.tolist() == [16, 4]
    assert xr.open_dataset(out)["activation_bits"].values.tolist() == [16, 4]
    assert main([*words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["weight_bits"] for row in rows] == [16, 4]
    assert results_of(open_run(run)).sizes["setting"] == 2
    torch.manual_seed(5)
    other = llama()
    torch.nn.init.normal_(other.lm_head.weight)
    words[1] = str(save(other, tmp_path / "other", byte_tokenizer()))
    assert main(words) == 2
    assert "whose weights are not those of other; give the run that was probed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--widths", "W4"], "'W4' is no setting; write W4A4"),
        (["--widths", "W4A12"], "activation_bits=12: give 2 to 8, or 16 for none"),
        (["--tokens", "1"], "--tokens 1: give 2 or more"),
        (["--out", "table.csv"], "--out table.csv: give a file ending in .nc"),
        (["--run", "nowhere.zarr"], "no run at nowhere.zarr"),
        (["--held-out"], "--held-out takes the tokens of --run's training: give --run, and no --text"),
    ],
)
def test_the_verb_refuses_before_it_opens_a_model(words, message, capsys):
    assert main(["quantize", "no/such/model", *words]) == 2
    assert message in capsys.readouterr().err


def test_only_a_training_holds_tokens_out(tmp_path, capsys):
    run = write_run(tmp_path / "run.zarr")
    assert main(["quantize", "no/such/model", "--run", str(run), "--held-out"]) == 2
    assert "run.zarr was not written by `osp-diag train`; give --text or --dataset" in capsys.readouterr().err


def test_a_training_run_takes_only_a_model_of_its_size(tmp_path, capsys):
    model = save(llama(), tmp_path / "model", byte_tokenizer())
    from osp_diag.runs.writer import RunWriter
    from tests.run_fixtures import ATTRIBUTES, groups

    attributes = {name: value for name, value in ATTRIBUTES.items() if name != "model_fingerprint"}
    with RunWriter(tmp_path / "run.zarr", attributes) as writer:
        writer.append(0, groups(0))
    assert main(["quantize", str(model), "--run", str(tmp_path / "run.zarr")]) == 2
    assert (
        "a model with number of layers 3, and model has 2; give what `osp-diag export"
        in capsys.readouterr().err
    )
