"""One checkpoint, by function and by command: what is written, what is said, and under which options."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import osp_diag
from osp_diag.cli.main import main
from osp_diag.errors import EstimatorError, StoreError
from osp_diag.estimators import get_estimator
from osp_diag.probing import relabel
from tests.tiny_checkpoints import BYTES, LENGTH, bert, byte_tokenizer, gpt2, llama, save

QUICK = ["--tokens", "128", "--seq-len", "16"]
WRITTEN = {"tokens": 128, "seq_len": 16}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    return save(llama(), tmp_path_factory.mktemp("checkpoints") / "tiny-llama", byte_tokenizer())


@pytest.fixture(scope="module")
def written(tiny, tmp_path_factory) -> osp_diag.Run:
    return osp_diag.probe(tiny, out=tmp_path_factory.mktemp("runs") / "run.zarr", **WRITTEN)


def said(capfd, *words: str | Path, code: int = 0) -> str:
    """What the command prints; nothing may go to stderr of one that does what it is asked."""
    assert main([str(word) for word in words]) == code
    shown = capfd.readouterr()
    assert shown.err == ""
    return shown.out


# What is written


def test_a_run_in_memory_equals_the_written_one(tiny, written):
    memory = osp_diag.probe(tiny, **WRITTEN)
    assert memory.path is None
    assert memory.sites == written.sites
    for site in written.sites:
        xr.testing.assert_equal(memory.at(site), written.at(site))
        xr.testing.assert_equal(memory.raw(site), written.raw(site))
        assert all(memory.at(site)[name].attrs == v.attrs for name, v in written.at(site).items())
    xr.testing.assert_equal(memory.snapshot("residual_post"), written.snapshot("residual_post"))
    assert list(memory.series) == list(written.series) == ["probe_seconds"]
    differing = {key for key in written.attrs if memory.attrs.get(key) != written.attrs[key]}
    assert differing <= {"created"}
    assert set(memory.attrs) == set(written.attrs)


def test_all_that_determines_a_number_is_recorded(tiny, written):
    attrs = written.attrs
    assert attrs["model_name"] == "tiny-llama"
    assert attrs["model_source"] == str(tiny)
    assert attrs["architecture"] == "LlamaForCausalLM"
    assert attrs["model_fingerprint"] == osp_diag.open_checkpoint(tiny).fingerprint
    assert (attrs["number_of_layers"], attrs["hidden_size"], attrs["blocks"]) == (2, 16, "model.layers")
    assert re.fullmatch("[0-9a-f]{32}", attrs["tokenizer_fingerprint"])
    assert re.fullmatch("[0-9a-f]{32}", attrs["token_fingerprint"])
    assert attrs["token_source"] == "built-in English text"
    assert (attrs["protocol"], attrs["bos"], attrs["bos_ids"]) == ("sequence", "no", [])
    assert (attrs["sequence_length"], attrs["tokens"], attrs["sequences"]) == (16, 128, 8)
    assert (attrs["batch_size"], attrs["ranks"]) == (1, 1)  # 8 sequences in 8 token groups
    assert (attrs["dtype"], attrs["device"], attrs["compiled"]) == ("float32", "cpu", False)
    assert attrs["attention_implementation"] == "sdpa"
    assert attrs["float32_matmul_precision"] == torch.get_float32_matmul_precision()
    assert re.fullmatch(r"\d+ ids, [0-9a-f]{16}", attrs["delimiter_ids"])
    assert {"osp-diag", "python", "torch", "transformers", "numpy"} <= set(attrs["versions"])
    assert {"osp_excess_kurtosis/1", "sink_rate/1", "head_channel_norm/1"} <= set(attrs["estimators"])
    assert attrs["estimator_parameters"]["massive_activations/1"] == {"absolute": 100.0, "relative": 1000.0}
    assert set(attrs["estimator_parameters"]) <= set(attrs["estimators"])
    assert set(attrs["sites"]) == set(written.sites)
    assert any("attention seen through" in note for note in attrs["notes"])
    assert re.match(r"\d{4}-\d\d-\d\dT", attrs["created"])
    used = {v.attrs["estimator"] for site in written.sites for v in written.at(site).values()}
    assert used == set(attrs["estimators"])


def test_another_tokenizer_has_another_fingerprint(tiny, written):
    other = osp_diag.probe(tiny, tokenizer=byte_tokenizer(puts_bos=True), **WRITTEN)
    assert other.attrs["tokenizer_fingerprint"] != written.attrs["tokenizer_fingerprint"]
    assert (other.attrs["bos"], other.attrs["bos_ids"]) == ("yes", [BYTES])


def test_bos_can_be_asked_for_and_left_out(tiny):
    opening = osp_diag.probe(tiny, bos="yes", sites=["embedding"], **WRITTEN)
    assert opening.attrs["bos_ids"] == [BYTES]
    without = osp_diag.probe(
        tiny, bos="no", sites=["embedding"], tokenizer=byte_tokenizer(puts_bos=True), **WRITTEN
    )
    assert without.attrs["bos_ids"] == []


def test_the_numbers_are_those_of_the_models_own_hidden_states(tiny, written):
    checkpoint = osp_diag.open_checkpoint(tiny)
    from osp_diag.tokens import make_batches

    ids = torch.as_tensor(make_batches(checkpoint.tokenizer, **WRITTEN).tokens)
    with torch.no_grad():
        states = checkpoint.model(ids, output_hidden_states=True).hidden_states
    x = states[1].double().numpy()
    centred = x - x.mean(-1, keepdims=True)
    variance = (centred**2).sum(-1) / (x.shape[-1] - 1)
    expected = np.maximum(0, (x**4).mean(-1) / variance**2 - 3)
    found = written.at("residual_post").sel(step=0, layer=0)
    np.testing.assert_allclose(found["osp_excess_kurtosis"].sel(stratum="all"), expected.mean(), rtol=1e-5)
    np.testing.assert_allclose(
        found["osp_excess_kurtosis"].sel(stratum="first"), expected[:, 0].mean(), rtol=1e-5
    )
    assert found["token_count"].sel(stratum="all") == 128


def test_statistics_can_be_computed_anew_from_the_raw_sums(written):
    for site in written.sites:
        again = relabel(written, site)
        assert set(again) == set(written.at(site))
        xr.testing.assert_equal(again[list(written.at(site))], written.at(site))
    looser = relabel(written, "residual_post", ["osp_excess_kurtosis"])
    assert "pooled_kurtosis" not in looser
    with pytest.raises(
        EstimatorError, match=r"sink_rate/1 cannot be computed at 'residual_post' .* observes"
    ):
        relabel(written, "residual_post", ["sink_rate"])
    other = get_estimator("sink_rate")
    few = osp_diag.probe(llama(), tokenizer=byte_tokenizer(), estimators=["max_logit"], **WRITTEN)
    message = (
        r"sink_rate/1 cannot be computed at 'attention' from this run: it needs the sums sink_rate\.above"
    )
    with pytest.raises(EstimatorError, match=message):
        relabel(few, "attention", [other])
    with pytest.raises(StoreError, match="raw sums"):
        relabel(osp_diag.probe(llama(), tokenizer=byte_tokenizer(), keep_raw=False, **WRITTEN), "embedding")


def test_a_module_in_hand_is_left_as_it_was(written):
    model = llama().train()
    model.model.layers[0].eval()
    modes = [module.training for module in model.modules()]
    run = osp_diag.probe(model, tokenizer=byte_tokenizer(), **WRITTEN)
    assert [module.training for module in model.modules()] == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    xr.testing.assert_equal(run.at("residual_post"), written.at("residual_post"))
    assert run.attrs["model_fingerprint"] == written.attrs["model_fingerprint"]


def test_a_module_whose_argument_has_another_name():
    class Own(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = llama()

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.inner(tokens).logits

    run = osp_diag.probe(Own().eval(), tokenizer=byte_tokenizer(), **WRITTEN)
    assert run.attrs["blocks"] == "inner.model.layers"
    assert "attention" in run.sites


@pytest.mark.parametrize("make", [bert, gpt2])
def test_other_families(make, tmp_path, capfd):
    path = save(make(), tmp_path / make.__name__, byte_tokenizer())
    assert "OSP kurtosis by protocol" in said(capfd, "probe", path, *QUICK, "--out", tmp_path / "run.zarr")
    run = osp_diag.open_run(tmp_path / "run.zarr")
    assert run.attrs["architecture"] == type(make()).__name__
    assert np.isfinite(run["osp_excess_kurtosis"].sel(stratum="all")).any("layer").all()
    assert {"attention", "residual_post", "mlp_hidden"} <= set(run.sites)


# The command


def test_the_command_writes_a_run_and_prints_the_summary_alone(tiny, tmp_path, capfd):
    out = tmp_path / "run.zarr"
    shown = said(capfd, "probe", tiny, *QUICK, "--out", out)
    assert shown.startswith("tiny-llama, 128 tokens in sequences of 16 (built-in English text)")
    assert "Verdict: " in shown
    assert "OSP kurtosis by protocol: " in shown
    assert shown.endswith(f"run: {out}   (osp-diag figure depth_profile {out} --out depth.png)\n")
    run = osp_diag.open_run(out)
    assert run.steps.tolist() == [0]
    assert run.snapshot("residual_post")["activation"].sizes == {"layer": 2, "token": 16, "channel": 16}
    assert run.attrs["command"]


def test_json_is_json(tiny, capfd):
    found = json.loads(said(capfd, "probe", tiny, *QUICK, "--json"))
    assert found["tokens"] == 128
    assert found["osp_kurtosis"] is not None
    assert found["nonfinite_tokens"] == 0
    assert found["protocols"]["sequence"] == pytest.approx(found["osp_kurtosis"])


def test_the_published_protocol(tiny, tmp_path, capfd):
    out = tmp_path / "published.zarr"
    shown = said(capfd, "probe", tiny, *QUICK, "--protocol", "osp-published", "--out", out)
    assert "protocol osp-published" in shown.replace("\n  ", " ")
    run = osp_diag.open_run(out)
    assert (run.attrs["protocol"], run.attrs["sequence_length"], run.attrs["sequences"]) == (
        "osp-published",
        1,
        128,
    )
    assert run.at("residual_post")["token_count"].sel(stratum="first", layer=0).item() == 128
    assert "attention" not in run.sites
    assert "OSP kurtosis by protocol" not in said(capfd, "probe", tiny, *QUICK, "--single-protocol")


def test_sites_and_estimators_can_be_chosen(tiny, tmp_path, capfd):
    out = tmp_path / "few.zarr"
    chosen = ["--sites", "residual_*", "linear_input:mlp.down_proj", "--estimators", "osp_excess_kurtosis"]
    said(capfd, "probe", tiny, *QUICK, *chosen, "--out", out)
    run = osp_diag.open_run(out)
    assert run.sites == ["residual_pre", "residual_mid", "residual_post", "linear_input:mlp.down_proj"]
    assert run.estimators == ["osp_excess_kurtosis/1"]
    said(capfd, "probe", tiny, *QUICK, "--out", out, "--overwrite", "--without-raw", "--sites", "embedding")
    replaced = osp_diag.open_run(out)
    assert replaced.sites == ["embedding"]
    with pytest.raises(StoreError, match="raw sums"):
        replaced.raw("embedding")


def test_a_site_and_the_blocks_can_be_named(tiny, tmp_path, capfd):
    out = tmp_path / "named.zarr"
    named = ["--name-site", "gate=model.layers.*.mlp.gate_proj:output", "--blocks", "model.layers"]
    said(capfd, "probe", tiny, *QUICK, *named, "--out", out)
    assert osp_diag.open_run(out).at("gate").sizes["channel"] == 24


def test_the_sites_can_be_listed_without_probing(tiny, tmp_path, capfd):
    shown = said(capfd, "probe", tiny, "--list-sites", "--out", tmp_path / "no.zarr")
    assert shown.startswith("2 blocks at 'model.layers', residual stream of width 16\n")
    assert re.search(r"  mlp_hidden +layers 0–1 +\(2\)  input of model\.layers\.0\.mlp\.down_proj", shown)
    assert not (tmp_path / "no.zarr").exists()


def test_text_files_data_sets_and_bos(tiny, tmp_path, capfd):
    text = tmp_path / "mine.txt"
    text.write_text("A sentence, and another one. " * 20)
    said(capfd, "probe", tiny, *QUICK, "--text", text, "--bos", "yes", "--out", tmp_path / "text.zarr")
    attrs = osp_diag.open_run(tmp_path / "text.zarr").attrs
    assert (attrs["token_source"], attrs["bos"]) == ("file mine.txt", "yes")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join(json.dumps({"text": "Rows of text, one by one. " * 8}) for _ in range(4)))
    said(capfd, "probe", tiny, *QUICK, "--dataset", rows, "--bos", "no", "--out", tmp_path / "rows.zarr")
    attrs = osp_diag.open_run(tmp_path / "rows.zarr").attrs
    assert attrs["token_source"] == "dataset rows.jsonl, split train, column text"
    assert attrs["bos"] == "no"


def test_a_loader_function_dtype_and_batch_size(tmp_path, capfd):
    out = tmp_path / "loader.zarr"
    options = ["--dtype", "bfloat16", "--batch-size", "3", "--compile", "no", "--out", out]
    said(capfd, "probe", "tests.test_probe_verb:loader", *QUICK, *options)
    attrs = osp_diag.open_run(out).attrs
    assert (attrs["model_name"], attrs["dtype"]) == ("tests.test_probe_verb:loader", "bfloat16")
    assert attrs["batch_size"] == 3


def loader():
    return llama(), byte_tokenizer()


def test_the_batch_size_does_not_change_the_numbers(tiny, written):
    other = osp_diag.probe(tiny, batch_size=3, **WRITTEN)
    for site in written.sites:
        xr.testing.assert_allclose(other.at(site), written.at(site), rtol=1e-5, atol=1e-6)


def test_sequences_may_be_as_long_as_the_model_takes(tiny):
    run = osp_diag.probe(tiny, tokens=2 * LENGTH, sites=["embedding"])
    assert run.attrs["sequence_length"] == LENGTH


# A probe in a loop


def test_a_probe_keeps_scalars_and_snapshots_in_memory_and_on_disk(tmp_path):
    model, ids = llama(), torch.arange(16)[None]
    runs = []
    for out in (None, tmp_path / "loop.zarr"):
        with osp_diag.Probe(
            model, every=[0, 3], out=out, snapshot_tokens=4, sites=["residual_post"]
        ) as probe:
            for step in range(5):
                with probe.step(step):
                    loss = model(ids, labels=ids).loss
                probe.append_series(step, {"loss": loss.item()})
        runs.append(probe.run if out is None else osp_diag.open_run(out))
    memory, disk = runs
    assert memory.steps.tolist() == disk.steps.tolist() == [0, 3]
    xr.testing.assert_equal(memory.at("residual_post"), disk.at("residual_post"))
    xr.testing.assert_equal(memory.snapshot("residual_post"), disk.snapshot("residual_post"))
    xr.testing.assert_equal(memory.series["loss"], disk.series["loss"])
    assert disk.series["loss"].sizes["step"] == 5
    assert np.isfinite(disk.series["probe_seconds"].sel(step=[0, 3])).all()
    assert np.isnan(disk.series["probe_seconds"].sel(step=1))


def test_schedules():
    from osp_diag.errors import UsageError
    from osp_diag.probing import dense_early
    from osp_diag.probing.schedule import schedule_of

    def due(schedule):
        return [step for step in range(25) if schedule_of(schedule)(step)]

    assert due(10) == [0, 10, 20]
    assert due([3, 7]) == [3, 7]
    assert due(lambda step: step == 4) == [4]
    assert due(dense_early(every=10, dense_until=4, dense_every=2)) == [0, 2, 4, 10, 20]
    for wrong in (lambda: schedule_of(0), lambda: dense_early(every=0, dense_until=3)):
        with pytest.raises(UsageError, match="every=0"):
            wrong()
