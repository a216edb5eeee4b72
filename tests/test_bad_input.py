"""Bad input to a probe: what is said, with which exit code, and that nothing already written is lost."""

from __future__ import annotations

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

import osp_diag
from osp_diag.cli.main import main
from osp_diag.errors import StoreError
from tests.tiny_checkpoints import LENGTH, byte_tokenizer, llama, save
from tests.warm_processes import Warm, command

QUICK = ["--tokens", "64", "--seq-len", "16"]


@pytest.fixture
def tiny(tmp_path) -> Path:
    return save(llama(), tmp_path / "tiny", byte_tokenizer())


def refused(capfd, words, message: str, code: int = 2) -> None:
    """The command stops with ``message`` (a pattern) and prints no result."""
    assert main([str(word) for word in words]) == code
    shown = capfd.readouterr()
    assert shown.out == ""
    assert re.search(message, shown.err), shown.err
    assert "unexpected" not in shown.err
    assert shown.err.startswith("osp-diag: ")


def weights(path: Path) -> Path:
    return path / "model.safetensors"


# The checkpoint


def test_a_wrong_path_names_what_is_near(tiny, capfd):
    message = r"there is no checkpoint at .*tinny: the path does not exist.*did you mean tiny\?"
    refused(capfd, ["probe", f"{tiny.parent}/tinny"], message)


def test_an_unsupported_file(tmp_path, capfd):
    (tmp_path / "model.onnx").write_bytes(b"\x08\x07")
    refused(
        capfd, ["probe", tmp_path / "model.onnx"], r"is not a checkpoint: its type '\.onnx' is not supported"
    )


def test_a_truncated_safetensors(tiny, capfd):
    data = weights(tiny).read_bytes()
    weights(tiny).write_bytes(data[: len(data) // 2])
    refused(capfd, ["probe", tiny], r"model\.safetensors is (truncated|damaged)|truncated")


def test_a_checkpoint_without_a_tokenizer(tmp_path, capfd):
    path = save(llama(), tmp_path / "bare")
    refused(capfd, ["probe", path], "the checkpoint has no tokenizer, so text cannot be made into tokens")


def test_weights_that_are_not_finite(tmp_path, capfd):
    model = llama()
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("inf")
    path = save(model, tmp_path / "diverged", byte_tokenizer())
    message = r"weights of diverged hold NaN or Inf: 1 values of 'model\.layers\.1\.mlp\.up_proj\.weight'"
    refused(capfd, ["probe", path, *QUICK], message)
    assert main(["probe", str(path), *QUICK, "--allow-nonfinite"]) == 1
    assert "NaN or Inf: " in capfd.readouterr().out


def test_a_model_without_blocks(tmp_path, capfd):
    words = ["probe", "tests.tiny_checkpoints:without_blocks", *QUICK, "--out", tmp_path / "run.zarr"]
    refused(capfd, words, r"blocks.*")
    assert not (tmp_path / "run.zarr").exists()


# The tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--seq-len", str(2 * LENGTH), "--tokens", "4096"],
            f"longer than the {LENGTH} that the model was made for",
        ),
        (["--tokens", "10", "--seq-len", "16"], r"tokens=10 is less than one sequence of seq_len=16"),
        (["--tokens", "0"], r"--tokens 0: give 1 or more"),
        (["--seq-len", "0"], r"--seq-len 0: give 1 or more"),
        (["--batch-size", "0"], r"--batch-size 0: give 1 or more"),
        (["--text", "empty.txt"], r"file empty\.txt is empty: there is no text to run the model on"),
        (
            ["--text", "short.txt", "--seq-len", "32"],
            r"file short\.txt has 5 tokens, fewer than one sequence of 32",
        ),
        (["--text", "shor.txt"], r"there is no text file shor\.txt; did you mean short\.txt\?"),
        (
            ["--text", "short.txt", "--dataset", "x"],
            r"ids and random_tokens are four sources; give one",
        ),
        (["--dataset", "./rows.jsonl"], r"there is no data set at \./rows\.jsonl"),
        (
            ["--protocol", "osp-published", "--bos", "yes"],
            r"puts one before a text; leave bos at auto",
        ),
        (["--device", "cuda:9"], r"device 'cuda:9' was asked for, but this PyTorch .* sees"),
        (["--device", "nonsense"], r"'nonsense' is not a device"),
        (
            ["--estimators", "osp_kurtosis"],
            r"no estimator is named 'osp_kurtosis'; did you mean .*osp_excess_kurt",
        ),
        (
            ["--sites", "residual_pots"],
            r"site 'residual_pots' is not in this model; did you mean residual_post",
        ),
        (["--name-site", "gate"], r"--name-site 'gate': write SITE=MODULE_PATTERN"),
        (
            ["--name-site", "gate=layers.*.gaet"],
            r"site 'gate': no module that ran matches 'layers\.\*\.gaet'",
        ),
        (["--blocks", "model.layer"], r"model\.layer'?"),
        (
            ["--out", "results"],
            r"a run is a folder ending in \.zarr; write results\.zarr in place of results",
        ),
        (["--out", "runz/a.zarr"], r"there is no directory runz; did you mean runs\?"),
        (
            ["--out", "no/where/a.zarr"],
            r"there is no directory no/where; make it first \(mkdir -p .*no/where\)",
        ),
        (["--out", "taken.zarr"], r"cannot write a run to taken\.zarr: a file is there"),
        (["--out", "mine.zarr"], r"holds 1 entries \(notes\.txt\) and is no run"),
    ],
)
def test_options_that_cannot_be_meant(tiny, tmp_path, monkeypatch, capfd, options, message):
    monkeypatch.chdir(tmp_path)
    Path("empty.txt").write_text(" \n")
    Path("short.txt").write_text("short")
    Path("runs").mkdir()
    Path("taken.zarr").write_text("")
    Path("mine.zarr").mkdir()
    Path("mine.zarr/notes.txt").write_text("mine")
    before = sorted(tmp_path.rglob("*"))
    refused(capfd, ["probe", "tiny", *options], message)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "options", [{"out": "a"}, {"batch_size": 0}, {"estimators": ["osp_kurtosis"]}, {"out": "no/a.zarr"}]
)
def test_the_function_refuses_before_it_opens_the_model(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def opened(*_, **__):
        raise AssertionError("the model was opened")

    monkeypatch.setattr("osp_diag.probing.checkpoint.open_checkpoint", opened)
    with pytest.raises(osp_diag.OspDiagError):
        osp_diag.probe("tiny", **options)


# Activations


def test_activations_that_are_not_finite_are_written_and_named(tmp_path, capfd):
    out = tmp_path / "run.zarr"
    assert main(["probe", "tests.tiny_checkpoints:diverging", *QUICK, "--out", str(out)]) == 1
    shown = capfd.readouterr()
    assert shown.err == ""
    said = " ".join(shown.out.split())
    assert re.search(
        r"NaN or Inf: \d+ tokens are not finite. It begins at \w+, layer 1, token 5, channel 3", said
    )
    block = osp_diag.open_run(out).at("residual_post")
    assert block["nonfinite_token_count"].sel(stratum="all").values.tolist() == [[0, 4]]
    assert main(["probe", "tests.tiny_checkpoints:diverging", *QUICK, "--json"]) == 1
    found = json.loads(capfd.readouterr().out)
    assert (found["nonfinite_layer"], found["nonfinite_token"], found["nonfinite_channel"]) == (1, 5, 3)


# The run


def test_an_existing_run_is_refused_and_then_replaced(tiny, tmp_path, capfd):
    out = tmp_path / "run.zarr"
    assert main(["probe", str(tiny), *QUICK, "--out", str(out), "--sites", "embedding"]) == 0
    capfd.readouterr()
    again = ["probe", tiny, *QUICK, "--out", out, "--sites", "final_norm"]
    refused(capfd, again, r"run\.zarr already holds a run; pass --overwrite to replace it, or another --out")
    assert osp_diag.open_run(out).sites == ["embedding"]
    refused(capfd, [*again[:-1], "nothing", "--overwrite"], "site 'nothing' is not in this model")
    assert osp_diag.open_run(out).sites == ["embedding"], "what is to be replaced stays until it can be"
    assert main([str(word) for word in (*again, "--overwrite")]) == 0
    assert osp_diag.open_run(out).sites == ["final_norm"]


def test_a_run_of_another_model_is_not_resumed(tmp_path):
    out, ids = tmp_path / "run.zarr", torch.arange(16)[None]
    with osp_diag.Probe(llama(), out=out, sites=["residual_post"]) as probe, probe.step(0):
        llama_output = probe.model(ids)
    assert llama_output is not None
    with pytest.raises(StoreError, match=r"(?s)number_of_layers: 2 → 3"):
        osp_diag.Probe(llama(layers=3), out=out, sites=["residual_post"], resume=True)
    with osp_diag.Probe(llama(), out=out, sites=["residual_post"], resume=True) as probe, probe.step(1):
        probe.model(ids)
    assert osp_diag.open_run(out).steps.tolist() == [0, 1]


def _looping(out: Path, resume: bool) -> None:
    model, ids = llama(), torch.arange(16)[None]
    with osp_diag.Probe(model, out=out, sites=["residual_post"], snapshot_tokens=4, resume=resume) as probe:
        for step in range(3 if resume else 0, 6):
            if step == 3 and not resume:
                os.kill(os.getpid(), signal.SIGKILL)
            with probe.step(step):
                model(ids)


@pytest.mark.slow
def test_a_killed_loop_is_resumed(tmp_path):
    out, errors = tmp_path / "run.zarr", tmp_path / "errors"
    assert Warm(_looping, (out, False)).wait(120) == -signal.SIGKILL
    assert osp_diag.open_run(out).steps.tolist() == [0, 1, 2]
    assert Warm(_looping, (out, True), stderr=errors).wait(120) == 0
    assert errors.read_text() == ""
    run = osp_diag.open_run(out)
    assert run.steps.tolist() == [0, 1, 2, 3, 4, 5]
    assert len(run.attrs["resumed"]) == 1


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_measured(tmp_path):
    out, passes = tmp_path / "run.zarr", tmp_path / "passes"
    words = [
        "probe",
        "tests.tiny_checkpoints:slow",
        "--tokens",
        "1600",
        "--seq-len",
        "16",
        "--batch-size",
        "2",
    ]
    shown, errors = tmp_path / "shown", tmp_path / "errors"
    environment = os.environ | {"PASSES": str(passes)}
    process = Warm(command, ([*words, "--out", str(out)],), stdout=shown, stderr=errors, env=environment)
    deadline = time.monotonic() + 120
    # The first passes find the sites.
    while not (passes.exists() and int(passes.read_text() or 0) > 8):
        assert process.poll() is None, errors.read_text()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    assert shown.read_text() == ""
    said = errors.read_text()
    found = re.fullmatch(r"osp-diag: interrupted; what (\d+) of 100 sequences gave is kept in (.*)\.\n", said)
    assert found, said
    assert found[2] == str(out)
    run, done = osp_diag.open_run(out), int(found[1])
    assert 8 <= done < 100
    assert run.attrs["sequences"] == done
    assert run.attrs["tokens"] == 16 * done
    assert run.attrs["interrupted"] == f"after {done} of 100 sequences"
    counts = {
        site: run.at(site)["token_count"].sel(stratum="all")
        for site in run.sites
        if site not in ("attention", "mlp_gate_weight", "mlp_down_weight")
    }
    assert {int(count) for site in counts.values() for count in site.values.ravel()} == {16 * done}


def _with_files_of(size: int, words: list[str]) -> int:
    import resource

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))
    return main(words)


@pytest.mark.slow
def test_a_full_disk(tiny, tmp_path):
    out, errors = tmp_path / "run.zarr", tmp_path / "errors"
    words = ["probe", str(tiny), *QUICK, "--single-protocol", "--out", str(out)]
    assert Warm(_with_files_of, (20_000, words), stderr=errors).wait(120) == 2
    said = errors.read_text()
    assert re.search(r"osp-diag: cannot write run .*run\.zarr: no space left .*Free space", said), said
    assert not out.exists(), "a folder without a step would be in the way of the next try"
