"""Results at few bits: the sweep, the group of a run that holds them, and the verb that fills it."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from osp_diag import open_run
from osp_diag.analyses.few_bits import comparable_results, perplexity_at, results_by
from osp_diag.cli import quantize
from osp_diag.cli.main import main
from osp_diag.cli.quantize_text import as_text
from osp_diag.errors import CheckpointError, StoreError, UsageError
from osp_diag.probing.settings import TokenSettings
from osp_diag.quantizing import sweep as module
from osp_diag.quantizing.calibration import Calibration, calibration_of
from osp_diag.quantizing.cases import Case, Progress, cases_of
from osp_diag.quantizing.perplexity import perplexity
from osp_diag.quantizing.results import (
    QuantizedResult,
    ResultsWriter,
    results_dataset,
    results_of,
    store_results,
)
from osp_diag.quantizing.setting import Setting
from osp_diag.quantizing.simulate import quantized
from osp_diag.quantizing.sweep import sweep
from osp_diag.quantizing.tables import TABLES
from osp_diag.runs.writer import RunWriter
from tests.run_fixtures import write_run
from tests.tiny_checkpoints import BYTES, byte_tokenizer, gpt2, llama, save

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


CASES = cases_of([Setting(16, 16), Setting(4, 4, 4)], ["rtn", "quarot-rtn"], "osp", seeds=[0, 1])


@pytest.fixture(scope="module")
def swept() -> tuple[xr.Dataset, list[QuantizedResult], list[Progress]]:
    rows: list[QuantizedResult] = []
    seen: list[Progress] = []
    found = sweep(llama(), TOKENS, CASES, on_result=rows.append, progress=seen.append, model_fingerprint="m")
    return found, rows, seen


def test_a_sweep_is_the_perplexity_in_each_case(swept):
    found, rows, seen = swept
    assert [str(case) for case in CASES] == [
        "16-16-16 RTN", "4-4-4 RTN", "4-4-4 QuaRot, RTN, seed 0", "4-4-4 QuaRot, RTN, seed 1"
    ]  # fmt: skip
    assert found.sizes == {"setting": 4}
    model = llama()
    with torch.no_grad():
        before = model(torch.tensor(TOKENS)).logits[:, :-1].double().log_softmax(-1).numpy()
    for row, case in zip(rows, CASES, strict=True):
        ways = {"method": case.method, "convention": case.convention, "seed": case.seed}
        with quantized(model, case.setting, **ways), torch.no_grad():
            expected = perplexity(model, TOKENS)
            after = model(torch.tensor(TOKENS)).logits[:, :-1].double().log_softmax(-1).numpy()
        assert row.negative_log_likelihood == pytest.approx(expected.negative_log_likelihood, rel=1e-9)
        divergence = (np.exp(before) * (before - after)).sum(-1).mean()
        assert row.divergence == pytest.approx(divergence, rel=1e-6, abs=1e-12)
        assert (
            row.negative_log_likelihood_low < row.negative_log_likelihood < row.negative_log_likelihood_high
        )
        assert row.tokens == row.divergence_tokens == 4 * 23
    assert found["token_fingerprint"].values[0] == found["token_fingerprint"].values[1] != ""
    assert found["perplexity_low"].attrs["units"] == "1"
    assert len({float(value) for value in found["perplexity"]}) == 4
    assert (seen[0].case, seen[0].cases_done, seen[0].cases) == ("16-16-16 RTN", 0, 4)
    assert {now.part for now in seen} >= {"sequences"}


def test_what_is_there_is_not_measured_again(swept, monkeypatch):
    found, rows, _ = swept
    again: list[QuantizedResult] = []
    options = {"on_result": again.append, "model_fingerprint": "m"}
    taken = sweep(llama(), TOKENS, CASES, measured=rows, **options)
    xr.testing.assert_identical(taken, found)
    assert again == []
    sweep(llama(), TOKENS, CASES, measured=[row for row in rows if row.seed != 1], **options)
    assert again == [rows[3]]
    foreign = [replace(row, model_fingerprint="other") for row in rows]
    sweep(llama(), TOKENS, CASES[:2], measured=foreign, **options)
    assert len(again) == 3
    monkeypatch.setattr("osp_diag.quantizing.sweep.refuse_what_sees_ahead", lambda *_: 1 / 0)
    sweep(llama(), TOKENS, CASES, measured=rows, **options)  # and no pass is run


def test_divergence_is_of_the_sequences_that_the_disk_holds(monkeypatch):
    monkeypatch.setattr("osp_diag.quantizing.divergence._MOST_BYTES", 2 * 23 * 260 * 4 + 5)
    found = sweep(llama(), TOKENS, [Case(Setting(4, 4))])
    assert found["divergence_tokens"].values.tolist() == [46, 46]
    whole = sweep(llama(), TOKENS[:2], [Case(Setting(4, 4))])
    np.testing.assert_allclose(found["divergence"], whole["divergence"], rtol=1e-9)
    monkeypatch.setattr("osp_diag.quantizing.divergence._MOST_BYTES", 0)
    assert np.isnan(sweep(llama(), TOKENS, [Case(Setting(4, 4))])["divergence"]).all()


def test_a_sweep_refuses_before_any_work(monkeypatch):
    monkeypatch.setattr("osp_diag.quantizing.sweep.predictions", lambda *_, **__: 1 / 0)
    with pytest.raises(UsageError, match=r"needs at least one case"):
        sweep(llama(), TOKENS, [])
    with pytest.raises(UsageError, match=r"needs at least one setting, method and seed"):
        cases_of([])
    gptq = [Case(Setting(4, 4), "gptq")]
    with pytest.raises(
        UsageError, match=r"^gptq looks at activations on a text: give a calibration, of other"
    ):
        sweep(llama(), TOKENS, gptq)
    with pytest.raises(UsageError, match=r"^100% of the calibration text is in the text that is evaluated"):
        sweep(llama(), TOKENS, gptq, calibration=Calibration(TOKENS[1:, :20]))
    with pytest.raises(CheckpointError, match=r"gpt|Conv1D"):
        sweep(gpt2(), TOKENS, [Case(Setting(4, 4), "quarot-rtn")])


def test_calibration_knows_what_it_shares_with_the_evaluated_tokens():
    other = np.random.default_rng(1).integers(0, BYTES, (10, 24))
    assert Calibration(other).note(TOKENS) == ""
    mixed = Calibration(np.concatenate([other[:9], TOKENS[:1]]), "a text")
    assert mixed.note(TOKENS).startswith("10% of the calibration text is in the text that is evaluated")
    assert mixed.description == "10 × 24 tokens of a text"
    with pytest.raises(UsageError, match=r"too short: 48 tokens \(a text, behind those that are evaluated\)"):
        calibration_of(np.concatenate([TOKENS, other[:2]]), "a text", TOKENS)


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


def test_rows_of_an_earlier_version_are_read_and_stay(tmp_path):
    path = write_run(tmp_path / "run.zarr")
    earlier = ["weight_bits", "activation_bits", "key_value_bits", "scheme", "negative_log_likelihood"]
    earlier += ["perplexity", "tokens", "sequence_length", "token_source", "token_fingerprint"]
    old = results_dataset([result(16, 16, 2.0), result(4, 4, 3.0)])[[*earlier, "model_fingerprint"]]
    with RunWriter(path, open_run(path).attrs, resume=True) as writer:
        writer.write_static("quantization", old)
    assert results_of(open_run(path))["method"].values.tolist() == ["rtn", "rtn"]
    store_results(path, results_dataset([result(4, 4, 2.5, method="quarot", convention="osp", seed=1)]))
    found = results_of(open_run(path))
    assert found["scheme"].values.tolist() == ["round-to-nearest"] * 2 + ["quarot, osp"]
    for way, loss in ((("rtn", "plain"), 3.0), (("quarot", "osp"), 2.5)):
        assert perplexity_at(results_by(found, *way), 4, 4) == pytest.approx(np.exp(loss))


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
    with pytest.raises(
        StoreError, match=r"run of a holds no results of gptq in the convention plain; it has rtn"
    ):
        comparable_results([first], "gptq")


# -- the verb --------------------------------------------------------------------------------------------


def test_the_verb_adds_to_the_run_of_its_checkpoint(tmp_path, capsys):
    model = save(llama(), tmp_path / "model", byte_tokenizer())
    text = tmp_path / "text.txt"
    text.write_text("a bird sang of days that went. " * 20)
    run, out = tmp_path / "run.zarr", tmp_path / "table.nc"
    options = ["--text", str(text), "--tokens", "128", "--seq-len", "32"]
    probing = ["--sites", "residual_post", "--estimators", "token_peak", "--out", str(run)]
    assert main(["probe", str(model), "--single-protocol", *probing, *options]) == 0
    capsys.readouterr()
    words = ["quantize", str(model), "--run", str(run), "--widths", "W16A16", "4-4-16", *options]
    assert main([*words, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "perplexity of 124 tokens" in said
    assert "95% interval  × 16-16-16  KL to 16-16-16" in said
    assert re.search(r"4-4-16 +RTN +[\d.]+ +[\d.]+ to [\d.]+ +[\d.]+ +\S+ nat", said)
    assert results_of(open_run(run))["weight_bits"].values.tolist() == [16, 4]
    assert xr.open_dataset(out)["activation_bits"].values.tolist() == [16, 4]
    assert main([*words, "--bits", "4-4-16", "4-4-4", "--method", "rtn", "ffn-hadamard"]) == 0
    assert f"stored in {run}, 2 of them before" in capsys.readouterr().out
    assert main([*words, "--json", "--again"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["weight_bits"] for row in rows] == [16, 4]
    assert results_of(open_run(run)).sizes["setting"] == 5
    torch.manual_seed(5)
    other = llama()
    torch.nn.init.normal_(other.lm_head.weight)
    words[1] = str(save(other, tmp_path / "other", byte_tokenizer()))
    assert main(words) == 2
    assert "whose weights are not those of other; give the run that was probed" in capsys.readouterr().err


def test_table_4_of_a_whole_model(tmp_path, capsys):
    model = save(llama(), tmp_path / "model", byte_tokenizer())
    text = tmp_path / "text.txt"
    text.write_text("".join(map(chr, np.random.default_rng(0).integers(97, 123, 400))))
    options = ["--text", str(text), "--tokens", "32", "--seq-len", "16", "--calibration-tokens", "32"]
    assert main(["quantize", str(model), "--table", "4", *options]) == 0
    said = capsys.readouterr().out
    for row in ("RTN", r"\+ FFN Hadamard", r"\+ GPTQ", "QuaRot", "SpinQuant"):
        assert re.search(rf"(?m)^  {row} +2\d\d", said), row
    assert len(re.findall("(QuaRot|SpinQuant), seed 0 ", said)) == 2
    assert "calibrated on 2 × 16 tokens of file text.txt, behind those that are evaluated" in said
    assert "SpinQuant: rotations learned in" in said


def test_an_interrupted_sweep_goes_on(tmp_path, capsys, monkeypatch):
    path = write_run(tmp_path / "run.zarr")
    with ResultsWriter(path) as writer:
        writer.add(result(16, 16, 2.0))
        writer.add(result(4, 4, 3.0))
        assert results_of(open_run(path))["weight_bits"].values.tolist() == [16, 4]
    model = save(llama(), tmp_path / "model", byte_tokenizer())
    measure = module.predictions

    def once(*args: object, **options: object) -> object:
        monkeypatch.setattr(module, "predictions", stopped)
        return measure(*args, **options)

    def stopped(*args: object, **options: object) -> object:
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "predictions", once)
    with pytest.raises(KeyboardInterrupt):
        quantize.run(str(model), bits=("4-4-4",), token_settings=TokenSettings(tokens=64, seq_len=32))
    assert "16-16-16" in capsys.readouterr().out, "what was measured is shown"
    monkeypatch.setattr(module, "predictions", full_memory)
    with pytest.raises(
        UsageError, match=r"ran out of memory: take fewer sequences a pass \(--batch-size 1\)"
    ):
        quantize.run(str(model), bits=("4-4-4",), token_settings=TokenSettings(tokens=64, seq_len=32))


def full_memory(*args: object, **options: object) -> object:
    raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")


def test_tables_are_printed_as_the_papers():
    ways = {"key_value_bits": 4, "method": "quarot", "convention": "osp"}
    losses = enumerate((2.0, 4.0, 3.0))
    rows = [result(16, 16, 1.0), *(result(4, 4, loss, seed=seed, **ways) for seed, loss in losses)]
    said = as_text(results_dataset(rows), "m", ["a note"], TABLES[4]).splitlines()
    assert said[0] == "m: perplexity of 92 tokens (text f, sequences of 24), convention osp"
    assert [line.split() for line in said[2:8]] == [
        ["method", "4-4-4"],
        ["RTN", "–"],
        ["+", "FFN", "Hadamard", "–"],
        ["+", "GPTQ", "–"],
        ["QuaRot", "20.1", "(7.39", "to", "54.6)"],
        ["SpinQuant", "–"],
    ]
    assert "QuaRot, median of 3 seeds" in said[-3]
    assert said[-3].endswith("seeds 7.39 to 54.6")
    assert said[-2] == "Note: a note"
    assert said[-1] == "Note: 4 sequences alone: intervals by resampling them are too narrow"
    two = as_text(results_dataset([*rows[:1], replace(rows[1], method="ffn-hadamard")]), "m", (), TABLES[2])
    assert [line.split() for line in two.splitlines()[3:5]] == [
        ["–", "2.72", "–", "–", "–", "–"],
        ["yes", "2.72", "–", "–", "–", "7.39"],
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--bits", "W4"], "'W4' is no setting; write 4-4-16"),
        (["--bits", "W4A12"], "activation_bits=12: give 2 to 8, or 16 for none"),
        (["--method", "rnt"], "no method 'rnt' of quantization; did you mean rtn?"),
        (["--table", "3"], "--table 3: give 2 or 4, the tables of the OSP paper"),
        (["--table", "2", "--bits", "4-4-4"], "--table 2 says which bits and methods"),
        (["--calibration", "text.txt"], "--calibration is for methods that look at activations: gptq"),
        (["--again"], "--again measures what --run holds already: give --run"),
        (["--calibration-tokens", "0"], "--calibration-tokens 0: give 1 or more"),
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
    from tests.run_fixtures import ATTRIBUTES, groups

    attributes = {name: value for name, value in ATTRIBUTES.items() if name != "model_fingerprint"}
    with RunWriter(tmp_path / "run.zarr", attributes) as writer:
        writer.append(0, groups(0))
    assert main(["quantize", str(model), "--run", str(tmp_path / "run.zarr")]) == 2
    assert (
        "a model with number of layers 3, and model has 2; give what `osp-diag export"
        in capsys.readouterr().err
    )
