"""That nobody takes a figure of one step for one that follows the page's slider."""

from __future__ import annotations

import pytest

from osp_diag import figures
from osp_diag.figures.report import write_report
from osp_diag.figures.report.pictures import draw_figures
from tests.browser import visit
from tests.recipe_runs import training_run
from tests.report_runs import GROWING, trainings
from tests.synthetic_diagnoses import made_up_diagnosis
from tests.synthetic_runs import synthetic_run

LAST = "Of the last probed step (50), wherever the step slider stands. "
OVER_STEPS = (
    "diagnosis_timeline", "first_jumps", "kurtosis_dynamics", "outlier_timeline", "remedy_curve",
    "replay_agreement", "sink_emergence",
)  # fmt: skip


def captions(runs, labels):
    """Figure → its captions, of all variants."""
    trainings = {place: made_up_diagnosis(run) for place, run in enumerate(runs) if len(run.steps) > 2}
    drawn = draw_figures(runs, labels, trainings)
    return {
        figure.name: [variant["caption"] for variant in figure.variants.values() if isinstance(variant, dict)]
        for figure in drawn
        if figure.variants
    }


def test_captions_begin_with_the_step_that_is_shown():
    found = captions(trainings(), ["Adam", "OSP"])
    assert set(OVER_STEPS) <= set(found)
    assert {"depth_profile", "concentration_curves", "channel_map_comparison"} <= set(found)
    for name, said in found.items():
        for caption in said:
            assert caption.startswith(LAST) == (name not in OVER_STEPS), name


def test_runs_of_different_length_are_told_apart():
    runs = [training_run("Adam", GROWING), training_run("OSP", [0.2] * 4)]
    both, adam, osp = (
        captions(part, ["x"] * len(part))["depth_profile"][-1] for part in (runs, runs[:1], runs[1:])
    )
    assert both.startswith("Of the last probed step of each run (50, 30), wherever")
    assert adam.startswith("Of the last probed step (50), wherever")
    assert osp.startswith("Of the last probed step (30), wherever")


def test_where_there_is_one_step_nothing_is_said_of_a_slider():
    found = captions([synthetic_run(steps=(0,))], ["made-up"])
    assert found
    assert not any("slider" in caption for said in found.values() for caption in said)


@pytest.mark.parametrize("name", ["activation_surface", "attention_map", "qk_magnitude"])
def test_raw_activations_are_those_of_the_first_probe(name):
    run = synthetic_run(steps=(3, 9))
    assert "; step 3;" in figures.draw(name, run, backend="none").attrs["caption"]
    (caption,) = captions([run], ["made-up"])[name]
    assert caption.startswith("Of the first probed step (3), wherever the step slider stands. ")


@pytest.mark.slow
def test_a_reader_who_moves_the_slider_reads_it(tmp_path):
    write_report(trainings(), tmp_path / "report.html")
    with visit(tmp_path / "report.html", offline=True) as visited:
        visited.page.focus("#step")
        visited.page.keyboard.press("Home")
        assert visited.page.locator("#step-shown").text_content() == "0"
        caption = visited.page.locator('figure[data-name="depth_profile"] figcaption')
        assert caption.text_content().startswith(LAST)
        visited.page.locator("[name=run]").nth(1).check(force=True)
        assert caption.text_content().startswith(LAST)
