"""A diagnosis in a file, and what its figures draw of it: the made-up one of tests/synthetic_diagnoses.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from osp_diag import figures
from osp_diag.analyses.diagnosis.diagnose import diagnose
from osp_diag.analyses.diagnosis.identity import is_of
from osp_diag.analyses.diagnosis.saved import read_diagnosis, save_diagnosis
from osp_diag.cli.main import main
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures._registry import figure_module
from osp_diag.figures.backend import none
from osp_diag.figures.report.build import build_report
from osp_diag.figures.styles import load_style
from osp_diag.runs.run import Run
from tests.recipe_runs import training_run
from tests.report_runs import GROWING
from tests.synthetic_diagnoses import PARAMETERS, made_up_diagnosis


@pytest.fixture(scope="module")
def run() -> Run:
    return training_run("OSP", GROWING)


@pytest.fixture(scope="module")
def file(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("saved") / "made-up.json"
    save_diagnosis(made_up_diagnosis(run), path)
    return path


def test_it_comes_back_as_it_was(run: Run, file: Path) -> None:
    made, back = made_up_diagnosis(run), read_diagnosis(file)
    assert back == made
    assert str(back) == str(made)
    assert back.jumps is not None
    assert back.jumps.identical(made.jumps)  # type: ignore[arg-type]
    assert back.replay is not None
    assert made.replay is not None
    assert back.replay.steps.identical(made.replay.steps)
    assert back.replay.parameters.identical(made.replay.parameters)  # type: ignore[union-attr, arg-type]
    assert json.loads(file.read_text())["jumps"]["data_vars"]["step"]["values"][0] == "nan"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[1]", "it is a list and not an object"),
        ({"findings": 3}, "findings of the diagnosis cannot be '3'"),
        ({"bracket": [1]}, r"bracket of the diagnosis cannot be '\[1\]'"),
        ({"extra": 1}, "the diagnosis has no 'extra'"),
        ({"jumps": {"coords": {}}}, "data_vars of jumps of the diagnosis cannot be 'None'"),
    ],
)
def test_what_is_no_diagnosis_is_refused(file: Path, tmp_path: Path, change: object, message: str) -> None:
    other = tmp_path / "other.json"
    values = json.loads(file.read_text())
    other.write_text(change if isinstance(change, str) else json.dumps(values | change))  # type: ignore[operator]
    with pytest.raises(UsageError, match=rf"other.json is no diagnosis: {message}; give the file that"):
        read_diagnosis(other)


def test_it_is_drawn_beside_no_other_run(run: Run, file: Path) -> None:
    other = training_run("OSP", [0.3] * 6)
    with pytest.raises(UsageError, match=r"made-up\.json is of made-up up to step 50, and of no run that is"):
        figures.draw("diagnosis_timeline", other, backend="none", diagnoses=str(file))
    grown = training_run("OSP", [*GROWING, 9.5])
    assert is_of(read_diagnosis(file), grown)
    assert not is_of(made_up_diagnosis(grown), training_run("OSP", GROWING))


def test_jumps_are_in_network_order_with_the_first_one_named(run: Run, file: Path) -> None:
    data = figures.draw("first_jumps", run, backend="none", diagnoses=str(file))
    assert data["site"].squeeze("run").values.tolist()[:2] == ["embedding", "attention"]
    np.testing.assert_array_equal(data["step"].squeeze("run"), [np.nan, 20, 20, np.nan, 30])
    said = data.attrs["caption"]
    assert "first at step 20 value_norm of attention, layer 0, with 1 places after it; later 1" in said


def test_parameters_that_agree_and_rules_that_fit(run: Run, file: Path) -> None:
    data = figures.draw("replay_agreement", run, backend="none", diagnoses=str(file)).squeeze("run")
    assert data["replayed_step"] == 11
    assert data["kind"].values.tolist() == ["embed_tokens", "q_proj", "down_proj", "lm_head"]
    np.testing.assert_array_equal(data["layer"], [-1, 0, 1])
    np.testing.assert_array_equal(data["is_same"].sel(kind="embed_tokens"), [1, np.nan, np.nan])
    np.testing.assert_array_equal(data["step_factor"].sel(kind="q_proj"), [np.nan, 10, np.nan])
    assert (
        f"2 of {len(PARAMETERS)} parameters are the same to the bit, and the rule fits 2 of the others"
        in (data.attrs["caption"])
    )
    module = figure_module("replay_agreement")
    prepared = module.prepare([run], diagnoses=str(file))
    drawn: none.Canvas = module.draw(prepared, none, style=load_style("paper"), width="two-column")
    assert len(drawn.panels) == 3


def test_a_remedy_is_drawn_beside_what_happened(run: Run, file: Path) -> None:
    data = figures.draw("remedy_curve", run, backend="none", diagnoses=str(file)).squeeze("run")
    np.testing.assert_array_equal(data["fork_kurtosis"].squeeze("remedy"), [0.2, 0.21, 0.2])
    np.testing.assert_array_equal(data["fork_step"].squeeze("remedy"), [10, 15, 20])
    assert data["remedy_label"].item() == "(1)"
    assert "(1) learning rate × 10, from step 10: verified" in data.attrs["caption"]


@pytest.mark.parametrize(("name", "option"), [("replay_agreement", "--replay"), ("remedy_curve", "--verify")])
def test_what_the_records_alone_do_not_say_is_asked_for(run: Run, name: str, option: str) -> None:
    with pytest.raises(
        StoreError, match=rf"save one with `osp-diag diagnose RUN {option} 30 --out NAME.json`"
    ):
        figures.draw(name, run, diagnoses=[replace(made_up_diagnosis(run), replay=None, findings=())])


def test_the_report_has_the_saved_diagnosis_and_its_pictures(run: Run, file: Path) -> None:
    adam = training_run("Adam", GROWING)
    html = build_report([run, adam], diagnoses=str(file)).html
    section = html.partition('<section id="diagnosis">')[2].partition("</section>")[0]
    assert "learning rate × 10 [proved, between steps 49 and 50]" in section
    assert "Verified: it is lower" in section
    assert "AdamW moves the hidden matrices" in section  # of the other one, by its records
    for name in ("diagnosis_timeline", "first_jumps", "replay_agreement", "remedy_curve"):
        assert f'data-name="{name}"' in section
    assert "osp-diag report RUN --diagnosis NAME.json" in section


def test_the_file_is_refused_before_any_work(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["diagnose", str(tmp_path / "none.zarr"), "--out", str(tmp_path / "no" / "d.json")]) == 2
    assert "does not exist; give a file in a folder that is there" in capsys.readouterr().err


def test_the_records_alone_say_so(run: Run) -> None:
    trained = Run.in_memory([(0, {})], {}, {"routing": [], "model_name": "m"}, {"loss": {0: 1.0}})
    assert any("judged from the records alone" in text for text in diagnose(trained).not_recorded)
