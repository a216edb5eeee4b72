"""The checkpoints of one training as one run over steps: which they are, what is refused, and going on."""

from __future__ import annotations

import json
import re
import shutil
import weakref
from pathlib import Path

import httpx
import huggingface_hub
import numpy as np
import pytest
import torch
import xarray as xr

import osp_diag
from osp_diag.analyses.emergence.history import onsets
from osp_diag.checkpoints.step_names import step_in_name
from osp_diag.cli.main import main
from osp_diag.errors import CheckpointError, OspDiagError, StoreError, UsageError
from osp_diag.probing import series
from tests.checkpoint_folders import edit_config
from tests.file_situations import situation
from tests.tiny_checkpoints import byte_tokenizer, gpt2, llama, save
from tests.training_loops import token_ids, transformers

TOKENS = {"tokens": 64, "seq_len": 16, "sites": ["embedding", "residual_post", "final_norm"]}
WORDS = ["--tokens", "64", "--seq-len", "16", "--sites", "embedding", "residual_post", "final_norm"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """What the Trainer of transformers leaves of six steps; nothing of the final model."""
    folder = tmp_path_factory.mktemp("trainings") / "my-model"
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "<s>"
    rows = [{"input_ids": ids.tolist(), "labels": ids.tolist()} for ids in token_ids(8)]
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=6,
        save_steps=2,
        logging_steps=1,
        learning_rate=0.01,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
    )
    model = llama().train()
    transformers.Trainer(model, arguments, train_dataset=rows, processing_class=tokenizer).train()
    return folder


@pytest.fixture(scope="module")
def whole(trained, tmp_path_factory) -> osp_diag.Run:
    out = tmp_path_factory.mktemp("runs") / "whole.zarr"
    return osp_diag.probe_series(trained, out=out, **TOKENS)


@pytest.fixture
def runs(trained, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(trained, tmp_path / "my-model"))


def assert_same_numbers(run: osp_diag.Run, expected: osp_diag.Run) -> None:
    assert run.steps.tolist() == expected.steps.tolist()
    for site in expected.sites:
        xr.testing.assert_equal(run.at(site).load(), expected.at(site).load())
    scalars = [one.series.drop_vars("probe_seconds").load() for one in (run, expected)]
    xr.testing.assert_equal(*scalars)


def poison(checkpoint: Path) -> None:
    """A weight that is NaN, which shows only when the checkpoint is opened."""
    model = transformers.LlamaForCausalLM.from_pretrained(checkpoint)
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    save(model, checkpoint)


# What is measured


@situation("a folder with `checkpoint-500`, `checkpoint-1000` … and no model of its own")
def test_every_step_is_what_its_checkpoint_gives_alone(trained, whole):
    assert whole.steps.tolist() == [2, 4, 6]
    for step in (2, 6):
        alone = osp_diag.probe(trained / f"checkpoint-{step}", token_groups=0, snapshot_tokens=0, **TOKENS)
        for site in alone.sites:
            found, expected = whole.at(site).sel(step=step), alone.at(site).sel(step=0)
            xr.testing.assert_equal(found.drop_vars("step").load(), expected.drop_vars("step"))
        assert whole.attrs["checkpoints"][str(step)] == {
            "source": str(trained / f"checkpoint-{step}"),
            "fingerprint": alone.attrs["model_fingerprint"],
        }
    assert whole.attrs["model_fingerprint"] == alone.attrs["model_fingerprint"]
    assert whole.attrs["token_fingerprint"] == alone.attrs["token_fingerprint"]
    assert (whole.attrs["model_name"], whole.attrs["model_source"]) == ("my-model", str(trained))


def test_what_the_trainer_logged_is_in_the_run_under_our_names(trained, whole):
    history = json.loads((trained / "checkpoint-6" / "trainer_state.json").read_text())["log_history"]
    logged = whole.series
    assert logged["step"].values.tolist() == [1, 2, 3, 4, 5, 6]
    for name, ours in (("loss", "loss"), ("grad_norm", "gradient_norm"), ("learning_rate", "learning_rate")):
        np.testing.assert_array_equal(logged[ours], [entry[name] for entry in history])
    assert np.isfinite(logged["probe_seconds"].sel(step=[2, 4, 6])).all()
    assert np.isnan(logged["probe_seconds"].sel(step=[1, 3, 5])).all()


def test_one_model_is_in_memory_at_a_time_and_progress_counts_checkpoints(trained, whole, monkeypatch):
    models: list[weakref.ref] = []
    labels, passes = [], []
    opened = series.open_checkpoint

    def counted(*arguments, **options):
        assert not any(model() is not None for model in models)
        checkpoint = opened(*arguments, **options)
        models.append(weakref.ref(checkpoint.model))
        return checkpoint

    class Bar:
        def __init__(self, label: str) -> None:
            labels.append(label)

        def __enter__(self):
            return lambda done, total: passes.append((done, total))

        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(series, "open_checkpoint", counted)
    sources = [trained / f"checkpoint-{step}" for step in (6, 2, 4)]  # in no order
    memory = osp_diag.probe_series(sources, progress=Bar, **TOKENS)
    assert labels == [f"step {2 * k}, checkpoint {k} of 3" for k in (1, 2, 3)]
    assert passes[-1] == (4, 4)
    assert memory.path is None
    assert_same_numbers(memory, whole)
    assert {key for key in whole.attrs if memory.attrs.get(key) != whole.attrs[key]} <= {"created"}


def test_an_outlier_emerges_where_it_was_planted(tmp_path, capsys):
    for step, factor in enumerate((1, 1, 1, 1, 4, 8, 16, 32)):
        model = llama()
        with torch.no_grad():
            model.model.embed_tokens.weight[:, 3] *= factor
        save(model, tmp_path / f"step{100 * step}", byte_tokenizer() if step == 0 else None)
    out = tmp_path / "run.zarr"
    tokenizer = str(tmp_path / "step0")
    words = ["--tokens", "32", "--seq-len", "16", "--sites", "residual_post", "--tokenizer", tokenizer]
    assert main(["probe", str(tmp_path), *words, "--out", str(out)]) == 0
    capsys.readouterr()
    at = onsets(osp_diag.open_run(out)).sel(site="residual_post", layer=0, stratum="all")
    assert at["state"] == "onset"
    assert 300 < at["onset"] <= 500


def test_watch_and_report_read_the_run(whole, capsys, tmp_path):
    assert main(["watch", str(whole.path), "--once", "--json"]) == 0
    standing = json.loads(capsys.readouterr().out)["runs"][0]
    assert (standing["last_step"], standing["probes"], standing["alerts"]) == (6, 3, [])
    assert standing["loss"] == float(whole.series["loss"][-1])
    assert main(["report", str(whole.path), "--out", str(tmp_path / "report.html")]) == 0
    assert "from 2 to 6" in (tmp_path / "report.html").read_text()


def test_the_command_compares_protocols_at_the_last_step(trained, tmp_path, capsys):
    sources = [str(trained / f"checkpoint-{step}") for step in (2, 4)]
    assert main(["probe", *sources, "--tokens", "32", "--seq-len", "16"]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert "my-model, 32 tokens" in shown.out
    assert "OSP kurtosis by protocol: " in shown.out
    assert "2 steps: 2, 4; the numbers above are of the last" in shown.out


def test_the_stacks_of_a_model_are_a_run_each(tmp_path):
    config = transformers.T5Config(
        vocab_size=260, d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    for step in (1, 2):
        torch.manual_seed(step)
        model = transformers.T5ForConditionalGeneration(config)
        save(model, tmp_path / f"step{step}", byte_tokenizer())
    words = ["--tokens", "32", "--seq-len", "16", "--sites", "residual_post", "--json"]
    assert main(["probe", str(tmp_path), *words, "--out", str(tmp_path / "run.zarr")]) == 0
    written = sorted(path.name for path in tmp_path.glob("*.zarr"))
    assert len(written) == 2
    for name in written:
        assert osp_diag.open_run(tmp_path / name).steps.tolist() == [1, 2]


# Which checkpoints, and of which steps


@pytest.mark.parametrize(
    ("name", "step"),
    [
        ("checkpoint-500", 500),
        ("step143000", 143000),
        ("global_step1000", 1000),
        ("step1000-tokens4B", 1000),
        ("stage1-step-40000", 40000),
        ("ckpt_012", 12),
        ("pythia-70m-step0", 0),
        ("iter_0001000", 1000),
        ("step-50K-105b", None),
        ("epoch-3", None),
        ("pythia-70m", None),
        ("tmp-checkpoint-7-step-8", None),
    ],
)
def test_the_step_that_a_name_tells(name, step):
    assert step_in_name(name) == step


def test_steps_may_be_said_and_come_from_the_trainers_state(runs):
    (runs / "checkpoint-2").rename(runs / "best")
    run = osp_diag.probe_series([runs / "best", runs / "checkpoint-4"], **TOKENS)
    assert run.steps.tolist() == [2, 4]
    said = osp_diag.probe_series([runs / "checkpoint-4", runs / "best"], steps=[7, 3], **TOKENS)
    assert said.steps.tolist() == [3, 7]


def nameless(runs: Path):
    (runs / "checkpoint-2").rename(runs / "first")
    (runs / "first" / "trainer_state.json").unlink()
    return {"sources": [runs / "first", runs / "checkpoint-4"]}


def twice(runs: Path):
    shutil.copytree(runs / "checkpoint-2", runs.parent / "other" / "checkpoint-2")
    return {"sources": [runs, runs.parent / "other"]}


def contradicting(runs: Path):
    (runs / "checkpoint-2").rename(runs / "checkpoint-3")
    return {"sources": runs}


def final_model(runs: Path):
    save(llama(), runs)
    return {"sources": runs}


def truncated(runs: Path):
    weights = runs / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    return {"sources": runs}


def other_width(runs: Path):
    edit_config(runs / "checkpoint-4", intermediate_size=32)
    return {"sources": runs}


def other_architecture(runs: Path):
    shutil.rmtree(runs / "checkpoint-4")
    save(gpt2(), runs / "checkpoint-4", byte_tokenizer())
    return {"sources": runs}


def other_tokenizer(runs: Path):
    path = runs / "checkpoint-6" / "tokenizer.json"
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["A"], vocabulary["B"] = vocabulary["B"], vocabulary["A"]
    path.write_text(json.dumps(content))
    return {"sources": runs}


def other_normaliser(runs: Path):
    path = runs / "checkpoint-6" / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"normalizer": {"type": "Lowercase"}}))
    return {"sources": runs}


def broken_state(runs: Path):
    (runs / "checkpoint-4" / "trainer_state.json").write_text(
        '{"global_step": 4, "log_history": [{"loss": 1}]}'
    )
    return {"sources": runs}


@pytest.mark.parametrize(
    ("situation", "error", "message"),
    [
        (nameless, UsageError, r"of which step is \S+/first\? .* no trainer_state.json .* with --steps"),
        (twice, UsageError, r"my-model/checkpoint-2 and \S+other/checkpoint-2 are both of step 2; leave one"),
        (
            contradicting,
            UsageError,
            r"checkpoint-3 is called step 3, and its trainer_state.json says global_step 2",
        ),
        (final_model, UsageError, r"is a model and holds 3 checkpoints too .*my-model/checkpoint-\* for"),
        (truncated, CheckpointError, r"checkpoint-4/model.safetensors is truncated"),
        (
            other_width,
            CheckpointError,
            r"checkpoint-4 is another model than \S+checkpoint-2: intermediate_size is 32",
        ),
        (
            other_architecture,
            CheckpointError,
            r"checkpoint-4 is another model than \S+checkpoint-2: architectures is \['GPT2LMHeadModel'\]",
        ),
        (
            other_tokenizer,
            CheckpointError,
            r"checkpoint-6 has another tokenizer than \S+-2: its token 'B' has the id \d+, in the",
        ),
        (
            other_normaliser,
            CheckpointError,
            r"checkpoint-6 has another tokenizer than .*: its normalizer differ",
        ),
        (
            broken_state,
            CheckpointError,
            r"checkpoint-4/trainer_state.json is damaged: an entry of log_history",
        ),
        (lambda runs: {"sources": []}, UsageError, "which checkpoints"),
        (lambda runs: {"sources": runs, "steps": [1, 2, 3]}, UsageError, "named one by one"),
        (
            lambda runs: {"sources": [runs / "checkpoint-2"], "steps": [1, 2]},
            UsageError,
            "1 checkpoint and 2 of",
        ),
        (lambda runs: {"sources": [runs / "checkpoint-2"], "steps": [-1]}, UsageError, "0 or more"),
        (
            lambda runs: {"sources": runs, "revisions": ["step0"]},
            UsageError,
            "revisions are of a hub repository",
        ),
        (lambda runs: {"sources": runs, "revision": "main"}, UsageError, "a series takes revisions"),
        (
            lambda runs: {"sources": runs, "resume": True},
            UsageError,
            r"resume \(--resume\) goes on .* say which",
        ),
        (lambda runs: {"sources": [llama()]}, UsageError, "not a LlamaForCausalLM; a model in hand"),
    ],
)
def test_what_is_no_series_is_refused_before_a_model_is_opened(situation, error, message, runs, monkeypatch):
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a model was opened")

    monkeypatch.setattr(series, "open_checkpoint", never)
    arguments = situation(runs)
    with pytest.raises(error, match=message):
        osp_diag.probe_series(**arguments, **TOKENS)


def test_another_way_of_padding_is_no_other_tokenizer(runs):
    path = runs / "checkpoint-4" / "tokenizer.json"
    truncation = {"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncation": truncation}))
    named = [runs / "checkpoint-2", runs / "checkpoint-4"]
    assert osp_diag.probe_series(named, **TOKENS).steps.tolist() == [2, 4]


def test_another_dtype_is_refused_with_what_differs_and_can_be_set_for_all(runs, tmp_path):
    save(
        transformers.LlamaForCausalLM.from_pretrained(runs / "checkpoint-4").bfloat16(), runs / "checkpoint-4"
    )
    with pytest.raises(
        CheckpointError, match=r"checkpoint-4 differs .*\n  dtype: \"float32\" → \"bfloat16\"\n"
    ):
        osp_diag.probe_series(runs, out=tmp_path / "run.zarr", **TOKENS)
    named = [runs / "checkpoint-2", runs / "checkpoint-4"]
    assert osp_diag.probe_series(named, dtype="float32", **TOKENS).attrs["dtype"] == "float32"


@situation("a folder of transformers' Trainer: the final model, with checkpoints inside")
def test_the_final_model_is_measured_alone_with_a_note_or_beside_its_checkpoints(runs, capsys):
    shutil.copytree(runs / "checkpoint-6", runs, dirs_exist_ok=True)
    state = json.loads((runs / "trainer_state.json").read_text()) | {"global_step": 8}
    (runs / "trainer_state.json").write_text(json.dumps(state))
    run = osp_diag.probe(runs, **TOKENS)
    assert run.steps.tolist() == [0]
    note = re.compile(
        r"holds 3 checkpoints too \(checkpoint-2, checkpoint-4, checkpoint-6\), .*my-model/checkpoint-\*`"
    )
    assert any(note.search(one) for one in run.notes)
    both = osp_diag.probe_series([runs, runs / "checkpoint-2"], **TOKENS)
    assert both.steps.tolist() == [2, 8]
    assert [one.startswith("first at step 8: ") for one in both.notes if note.search(one)] == [True]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--weights", "mlp.*"], "--weights is for one checkpoint"),
        (["--example", "a:b"], "--example is for one checkpoint"),
        (["--revision", "main"], "--revision is for one checkpoint"),
        (["--resume"], "--resume goes on with the run at --out; say which that is"),
    ],
)
def test_options_that_a_series_does_not_take(trained, words, message, capsys):
    assert main(["probe", str(trained), *words]) == 2
    assert message in capsys.readouterr().err


def test_no_checkpoint_at_all(capsys):
    assert main(["probe"]) == 2
    assert "which checkpoint?" in capsys.readouterr().err


# Going on


def test_a_damaged_checkpoint_is_named_and_what_was_measured_stays(
    runs, whole, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run.zarr"
    good = tmp_path / "good"
    shutil.copytree(runs / "checkpoint-4", good)
    poison(runs / "checkpoint-4")
    command = ["probe", str(runs), *WORDS, "--out", str(out)]
    assert main(command) == 2
    said = capsys.readouterr().err
    assert "the weights of checkpoint-4 hold NaN or Inf" in said
    assert (
        f"That was step 4 ({runs}/checkpoint-4, checkpoint 2 of 3). {out} holds 1 step up to 2; the same"
        in said
    )
    assert osp_diag.open_run(out).steps.tolist() == [2]

    shutil.rmtree(runs / "checkpoint-4")
    good.rename(runs / "checkpoint-4")
    measured = []
    passes = series.measure_passes
    monkeypatch.setattr(series, "measure_passes", lambda *a: (measured.append(a[-1]), passes(*a)))
    assert main([*command, "--resume", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["steps"], found["alerts"]) == (6, [2, 4, 6], [])
    assert measured == [4, 6]
    assert_same_numbers(osp_diag.open_run(out), whole)


def test_ctrl_c_keeps_whole_steps_alone(trained, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run.zarr"
    passes = series.measure_passes

    def interrupted(session, feeding, name, batches, step):
        if step == 4:
            feeding.progress = lambda done, total: (_ for _ in ()).throw(KeyboardInterrupt)
        passes(session, feeding, name, batches, step)

    monkeypatch.setattr(series, "measure_passes", interrupted)
    assert main(["probe", str(trained), *WORDS, "--out", str(out)]) == 130
    assert "holds 1 step up to 2; the same command with --resume" in capsys.readouterr().err
    assert osp_diag.open_run(out).steps.tolist() == [2]


def test_new_checkpoints_are_appended_although_old_ones_have_gone(runs, whole, tmp_path):
    out = tmp_path / "run.zarr"
    (runs / "checkpoint-6").rename(tmp_path / "later")
    begun = osp_diag.probe_series(runs, out=out, resume=True, **TOKENS)
    assert begun.steps.tolist() == [2, 4]
    (tmp_path / "later").rename(runs / "checkpoint-6")
    shutil.rmtree(runs / "checkpoint-2")
    shutil.rmtree(runs / "checkpoint-4")
    assert_same_numbers(osp_diag.probe_series(runs, out=out, resume=True, **TOKENS), whole)


def test_another_training_or_other_conditions_are_not_mixed_in(runs, tmp_path):
    out = tmp_path / "run.zarr"
    first = runs / "checkpoint-4"
    osp_diag.probe_series([first], out=out, **TOKENS)
    before = (out / "zarr.json").read_bytes()

    def refused(error: type[OspDiagError], message: str, *sources: Path, **changes) -> None:
        with pytest.raises(error, match=message):
            osp_diag.probe_series(sources, out=out, resume=True, **TOKENS | changes)

    refused(UsageError, r"checkpoint-2 of step 2 lies before step 4", runs / "checkpoint-2", first)
    refused(StoreError, r"tokens: 64 → 32", first, runs / "checkpoint-6", tokens=32)
    other = tmp_path / "another-model" / "checkpoint-4"
    shutil.copytree(runs / "checkpoint-6", other)
    (other / "trainer_state.json").unlink()
    refused(CheckpointError, r"is not the checkpoint whose step 4 is in .*: its weights are others", other)
    refused(
        StoreError,
        r'model_name: "my-model" → "another-model"',
        other.rename(other.with_name("step9")),
    )
    alone = tmp_path / "alone.zarr"
    osp_diag.probe(first, out=alone, **TOKENS)
    with pytest.raises(
        StoreError, match=r"alone.zarr cannot be resumed: it is no run of several checkpoints"
    ):
        osp_diag.probe_series(runs, out=alone, resume=True, **TOKENS)
    assert (out / "zarr.json").read_bytes() == before


# The hub


def test_revisions_of_a_hub_repository(trained, whole, monkeypatch, tmp_path):
    repository = tmp_path / "hub" / "models--org--model"
    (repository / "refs").mkdir(parents=True)
    for step in (2, 4, 6):
        commit = str(step) * 40
        shutil.copytree(trained / f"checkpoint-{step}", repository / "snapshots" / commit)
        (repository / "refs" / f"step{step}").write_text(commit)

    def unreachable(*_, **__):
        raise httpx.ConnectError("[Errno -2] Name or service not known")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    run = osp_diag.probe_series("org/model", revisions=["step6", "step2", "step4"], **TOKENS)
    assert run.steps.tolist() == [2, 4, 6]
    xr.testing.assert_equal(run.at("residual_post"), whole.at("residual_post").load())
    assert run.attrs["checkpoints"]["4"]["source"] == "org/model@step4"
    assert run.attrs["model_name"] == "org/model"
    with pytest.raises(
        CheckpointError,
        match=r"cannot be reached .*`hf download org/model --revision step8 --local-dir step8`",
    ):
        osp_diag.probe_series("org/model", revisions=["step2", "step8"], **TOKENS)
    with pytest.raises(UsageError, match="of which step is org/model@main"):
        osp_diag.probe_series("org/model", revisions=["main"], **TOKENS)
    one = osp_diag.open_checkpoint("org/model", revision="step4")
    assert (one.source, one.fingerprint) == ("org/model@step4", run.attrs["checkpoints"]["4"]["fingerprint"])
    with pytest.raises(UsageError, match="only a hub repository has revisions"):
        osp_diag.open_checkpoint(trained / "checkpoint-2", revision="main")


def test_revisions_that_the_hub_does_not_have(monkeypatch):
    class References:
        branches = ()
        tags = (type("Tag", (), {"name": "step0"}),)

    answer = httpx.Response(404, request=httpx.Request("GET", "https://huggingface.co"))

    def model_info(_, identifier, *, revision, timeout):
        if revision != "step0":
            raise huggingface_hub.errors.RevisionNotFoundError("no", response=answer)

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    monkeypatch.setattr(huggingface_hub.HfApi, "list_repo_refs", lambda *_: References)
    with pytest.raises(CheckpointError, match="org/model has no revision 'step10': no branch, tag or commit"):
        osp_diag.probe_series("org/model", revisions=["step0", "step10"], **TOKENS)
