"""``osp-diag train`` and ``osp-diag export``, as a user types them."""

import json
import sys
from pathlib import Path
from subprocess import STDOUT
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from osp_diag import figures
from osp_diag.cli import train_ablation
from osp_diag.cli.main import main
from osp_diag.runs.run import open_run
from osp_diag.trainer import ablation
from osp_diag.trainer.config_values import as_dictionary
from tests.training_runs import minute
from tests.warm_processes import Warm, command


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """A configuration on disk."""
    path = tmp_path_factory.mktemp("config") / "minute.json"
    path.write_text(json.dumps(as_dictionary(minute(steps=2, checkpoint__every=0))))
    return path


@pytest.fixture(scope="module")
def trained(described, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "run.zarr"
    assert main(["train", "--config", str(described), "--out", str(out)]) == 0
    return out


def test_show_prints_every_key_and_where_parameters_go(capsys):
    assert main(["train", "tiny", "--recipe", "adam", "--set", "optimizer.lr=1e-3", "--show"]) == 0
    printed = capsys.readouterr().out
    assert "optimizer.lr = 0.001" in printed
    assert "model.layers.*.self_attn.q_proj.weight" in printed
    assert "muon" not in printed.partition("parameter  ")[2]


def test_a_run_says_what_came_of_it(described, tmp_path, capsys):
    out = tmp_path / "run.zarr"
    words = ["train", "--config", str(described), "--set", "steps=1", "probe.every=1"]
    assert main([*words, "--out", str(out), "--json"]) == 0
    printed = capsys.readouterr()
    found = json.loads(printed.out)
    assert found["run"] == str(out)
    assert found["loss"] == pytest.approx(8.3, abs=0.3)
    assert {"held_out_loss", "tokens_per_second", "osp_excess_kurtosis"} <= found.keys()
    assert 0 < found["share_of_time_probing"] < 1
    assert "model.embed_tokens.weight" in printed.err
    assert list(open_run(out).steps) == [0, 1]


def test_an_export_loads_in_plain_transformers(trained, tmp_path, capsys):
    assert main(["export", str(trained), "--out", str(tmp_path / "model")]) == 0
    assert str(tmp_path / "model") in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    logits = model(**tokenizer("An exported model reads text.", return_tensors="pt")).logits
    assert logits.shape[-1] == 4096
    assert (tmp_path / "model" / "README.md").read_text().count("minute")


def test_a_run_without_checkpoints_cannot_be_exported(tmp_path, capsys):
    assert main(["export", str(tmp_path / "run.zarr"), "--out", str(tmp_path / "model")]) == 2
    message = capsys.readouterr().err
    assert "there is no checkpoint of" in message
    assert "run.checkpoints" in message


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train"], "say what to train: a preset"),
        (["train", "tinny"], "there is no preset 'tinny'; did you mean tiny?"),
        (["train", "tiny", "--set", "optimizer.lrr=1"], "did you mean optimizer.lr"),
        (["train", "tiny", "--seeds", "1"], "--seeds and --at-a-time belong to --ablation"),
        (["train", "tiny", "--ablation", "paper", "--recipe", "adam"], "--ablation trains every recipe"),
        (["train", "tiny", "--ablation", "paper", "--at-a-time", "0"], "--at-a-time 0: give 1 or more"),
        (["train", "tiny", "--out", "run"], "a run is a folder ending in .zarr"),
        (["train", "tiny", "--set", "model.vocabulary_size=100"], "model.vocabulary_size"),
        (["train", "tiny", "--set", "optimizer.route=model.embed_tokens*:muon"], "model.embed_tokens.weight"),
        (["train", "tiny", "--log", "mlflow"], "mlflow"),
    ],
)
def test_misuse_is_refused_in_words(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.rglob("step-*"))


@pytest.fixture
def warm(monkeypatch):
    """Trainings run in forks; those of the demo are started as they always are."""

    def popen(words, *, env, stdout, stderr, stdin):
        assert words[:3] == [sys.executable, "-m", "osp_diag"]
        assert stderr == STDOUT
        log = Path(stdout.name)
        return Warm(command, (words[3:],), stdout=log, stderr=log, env=env)

    monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(Popen=popen, STDOUT=STDOUT, DEVNULL=None))


@pytest.mark.slow
@pytest.mark.usefixtures("warm")
def test_the_ablation_trains_six_recipes_and_compares_them(described, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(train_ablation.held_out_tokens, "__defaults__", (2048,))
    out = tmp_path / "ablation"
    words = ["train", "--config", str(described), "--ablation", "paper", "--out", str(out)]
    assert main(words) == 0
    printed = capsys.readouterr()
    recipes = ("Adam", "Muon-only", "Muon + SSNorm", "Muon + EmbProj", "OSP")
    assert all(recipe in printed.out for recipe in recipes)
    assert "| OSP |" in (out / "table.md").read_text()
    assert (out / "kurtosis_dynamics.png").read_bytes().startswith(b"\x89PNG")
    assert printed.err.count("finished after") == 6
    runs = [out / f"{name}.zarr" for name in ("osp", "adam")]
    drawn = figures.draw("ablation_table", runs, backend="none")
    assert drawn["run"].values.tolist() == ["Adam", "OSP"]
    assert drawn["column"].values.tolist() == ["OSP kurtosis", "perplexity W16A16", "perplexity W4A4"]
    assert np.isfinite(drawn["value"]).all()
    words_of_quantize = ["--run", str(runs[0]), "--held-out", "--widths", "W2A16", "--tokens", "64"]
    assert main(["quantize", str(out / "models" / "osp"), *words_of_quantize]) == 0
    assert "tokens (held-out tokens of the training, sequences of 32)" in capsys.readouterr().out
    assert main(words) == 2
    assert "is not empty; give --resume to go on" in capsys.readouterr().err
    assert main([*words, "--resume"]) == 0
    assert "started" not in capsys.readouterr().err
