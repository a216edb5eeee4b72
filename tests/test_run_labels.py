"""What runs are called: the same in figures, on pages, in texts and in the terminal."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from osp_diag import figures
from osp_diag.analyses.channels.comparison import compare_channels
from osp_diag.analyses.run_labels import labels_of, run_name
from osp_diag.cli.main import main
from osp_diag.figures.live._layout import labels_of as live_labels
from osp_diag.figures.report import build_report
from tests.growing_runs import grown_run
from tests.recipe_runs import RECIPES, training_run
from tests.report_runs import trainings
from tests.synthetic_runs import synthetic_run, with_attrs


def run(path=None, **attrs):
    return SimpleNamespace(attrs=attrs, path=path)


def trained(recipe, path=None, seed=0, **attrs):
    return run(path, config={**RECIPES[recipe], "seed": seed}, model_name="adam", **attrs)


def test_a_training_is_called_by_its_recipe_and_others_by_their_model():
    assert run_name(trained("Muon + SSNorm")) == "Muon + SSNorm"
    assert run_name(run(model_name="llama", config={"steps": 9})) == "llama"
    assert run_name(run("runs/mine.zarr", model_name="")) == "mine"
    assert run_name(run()) == "unnamed model"
    assert run_name(run(model_name="odd", config="no table")) == "odd"
    assert labels_of([trained("OSP"), run(model_name="llama"), trained("Adam")]) == ["OSP", "llama", "Adam"]


@pytest.mark.parametrize(
    ("runs", "labels"),
    [
        ([trained("OSP", seed=0), trained("OSP", seed=1)], ["OSP, seed 0", "OSP, seed 1"]),
        (
            [trained("OSP", "a/low.zarr"), trained("OSP", "a/high.zarr"), trained("Adam", "a/b.zarr")],
            ["OSP (low)", "OSP (high)", "Adam"],
        ),
        ([trained("OSP", "/c/a/x.zarr"), trained("OSP", "/c/b/x.zarr")], ["OSP (a/x)", "OSP (b/x)"]),
        ([run(model_name="m", protocol="one"), run(model_name="m", protocol="two")], ["m, one", "m, two"]),
        ([run("x.zarr", model_name="m"), run("x.zarr", model_name="m")], ["m, step 1", "m, step 2"]),
    ],
)
def test_what_shares_a_name_is_told_apart_by_what_differs(runs, labels):
    assert labels_of(runs, list(range(1, len(runs) + 1))) == labels


def test_a_view_on_this_machine_gives_whole_paths():
    followed = [trained("OSP", "/c/a/x.zarr"), trained("OSP", "/c/b/x.zarr")]
    assert labels_of(followed) == ["OSP (/c/a/x.zarr)", "OSP (/c/b/x.zarr)"]


def test_runs_alike_in_everything_are_numbered():
    assert labels_of([trained("OSP", "x.zarr"), trained("OSP", "x.zarr")], [3, 3]) == [
        "OSP, run 1",
        "OSP, run 2",
    ]


@pytest.mark.parametrize(
    "name",
    ["concentration_curves", "channel_map_comparison", "depth_profile", "kurtosis_dynamics", "sink_map"],
)
def test_figures_call_trainings_as_the_report_does(name):
    runs = trainings()
    prepared = figures.draw(name, runs, backend="none")
    assert prepared["run"].values.tolist() == ["Adam", "OSP"] == list(build_report(runs).labels)
    assert "Adam (llama) / OSP (llama): sequence protocol" in prepared.attrs["caption"]


def test_a_caption_does_not_say_one_name_twice():
    named = with_attrs(training_run("Muon + SSNorm", [0.2, 0.3]), model_name="muon_ssnorm")
    assert (
        ". Muon + SSNorm: sequence protocol"
        in figures.draw("sink_map", named, backend="none").attrs["caption"]
    )
    plain = figures.draw("sink_map", synthetic_run(), backend="none").attrs["caption"]
    assert ". made-up-60M: sequence protocol" in plain


def test_texts_call_them_so_too():
    adam, osp = trainings()
    assert "Adam" in compare_channels(adam, osp).text().splitlines()[0]


def test_the_live_page_and_the_terminal_do_likewise(tmp_path, capsys):
    config = {**RECIPES["OSP"], "seed": 0, "steps": 1000}
    paths = [grown_run(tmp_path / f"{name}.zarr", config=config) for name in ("low", "high")]
    assert main(["watch", *map(str, paths), "--once"]) == 0
    said = capsys.readouterr().out
    assert " OSP (low) " in said
    assert " OSP (high) " in said
    assert live_labels([run(path, config=config) for path in paths]) == ["OSP (low)", "OSP (high)"]
