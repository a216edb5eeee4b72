"""The report as a file: what it says first, that nothing in a run becomes markup, and how large it is."""

from __future__ import annotations

import base64
import json
import re
from html import unescape

import numpy as np
import pytest

from osp_diag.cli.report import run as report_verb
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures.report import build_report, write_report
from osp_diag.figures.report.comparison import alike
from osp_diag.figures.report.encoding import compacted, factored, packed, packed_log, script_json
from osp_diag.figures.report.explorer import explorer_data
from osp_diag.figures.report.pictures import draw_figures, report_figures
from tests.report_runs import HOSTILE_NAME, checkpoint, hostile_checkpoint, spiked, trainings
from tests.synthetic_runs import OUTLIER_FREE, Plan, synthetic_run, with_attrs, without, write_run
from tests.training_runs import minute


def unpacked(array) -> np.ndarray:
    kinds = {"f4": "<f4", "u2": "<u2", "log": "<u2"}
    values = np.frombuffer(base64.b64decode(array["data"]), kinds[array["kind"]]).reshape(array["shape"])
    if array["kind"] != "log":
        return values
    decoded = array["low"] * (array["high"] / array["low"]) ** (values / 65534)
    return np.where(values == 65535, np.nan, decoded)


def page_data(html: str):
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, re.DOTALL)
    return json.loads(found[1])


def before_plotly(html: str) -> str:
    """The page without its scripts, which are long."""
    return html[: html.index("plotly.js v")]


@pytest.fixture
def without_figures(monkeypatch):
    """For what has nothing to do with them, and sooner done."""
    from osp_diag.figures.report import pictures

    monkeypatch.setattr(pictures, "names", list)


@pytest.fixture(scope="module")
def one():
    return build_report(checkpoint())


@pytest.fixture(scope="module")
def three():
    return build_report([checkpoint(), *trainings()])


# -- what it says ----------------------------------------------------------------------------------------


def test_the_verdict_comes_before_everything_else(one):
    text = re.sub(r"<[^>]+>", " ", one.html[one.html.index("<main>") :])
    verdict, rest = text.index("Massive activations on the first token"), text.index("By layer, channel")
    assert verdict < rest
    assert "Gaussian floor" in text[verdict:rest]
    assert one.verdicts[0].state == "raised"


def test_it_needs_no_network_and_holds_plotly_once(one):
    assert one.html.count("plotly.js v") == 1
    head = before_plotly(one.html)
    loading = re.findall(r"<(?:link|script|img|iframe)[^>]*(?:href|src)=[^>]*>", head)
    assert loading == ['<link rel="icon" href="data:,">']
    assert "default-src 'none'" in head


def test_nothing_is_said_of_an_outlier_free_model_but_that(tmp_path, without_figures):
    report = write_report(synthetic_run(OUTLIER_FREE), tmp_path / "r.html")
    assert report.verdicts[0].headline == "outlier-free"
    assert "Outlier-free." in (tmp_path / "r.html").read_text()


def test_definitions_of_the_estimators_of_the_run_are_on_the_page(one):
    assert 'id="definition-osp_excess_kurtosis/1"' in one.html
    assert "Park et al. 2025" in one.html


def test_an_estimator_that_is_not_installed_is_named_as_such(without_figures):
    html = build_report(with_attrs(checkpoint(), estimators=["their_kurtosis/7"])).html
    assert "their_kurtosis/7: an estimator, or a version of one, that is not installed here" in html


def test_what_cannot_be_drawn_is_named_with_the_reason():
    report = build_report(without(checkpoint(), ["attention", "residual_post/top_magnitude"]))
    reasons = "\n".join(report.left_out)
    assert "depth_profile: made-up-60M: depth_profile needs top_magnitude at 'residual_post'" in reasons
    assert "kurtosis_dynamics: made-up-60M: it needs 2 probed steps, and there is one" in reasons
    said = unescape(before_plotly(report.html))
    assert "sink_implementation looks at attention" in said
    assert all(reason in said for reason in report.left_out)


# -- several runs ----------------------------------------------------------------------------------------


def test_runs_of_one_shape_are_compared_and_the_others_are_not(three):
    assert len(set(three.labels)) == 3
    said = before_plotly(three.html)
    assert "a factor of" in said
    assert f"Not compared: {three.labels[0]} with the others" in said


def test_alike_are_models_of_one_width_and_depth_or_else_all():
    first, second = trainings()
    other = checkpoint()
    assert alike([other, first, second]) == [[1, 2]]
    assert alike([other, first]) == [[0, 1]]
    assert alike([other]) == []


def test_a_refusal_to_compare_is_told_with_its_reason(without_figures):
    runs = [checkpoint(), checkpoint(protocol="osp-published")]
    html = before_plotly(build_report(runs).html)
    assert "<strong>Not compared:</strong> the runs of made-up-60M and made-up-60M were probed under" in html


def test_models_alike_are_drawn_side_by_side_and_each_alone(three):
    figures = page_data(three.html)["figures"]
    kinds = {tuple(sorted(variants)) for variants in figures}
    assert kinds == {("0", "all"), ("1", "2", "all"), ("all",)}  # the last is of the pair
    for variants in figures:
        for variant in variants.values():
            assert variant in list(variants) or set(variant) == {"data", "layout", "caption"}


def test_every_figure_is_on_the_page_or_shown_by_the_linked_charts():
    from osp_diag.figures import names

    drawn = [figure.name for figure in draw_figures([checkpoint(), checkpoint()], ["a", "b"], {})]
    assert drawn == list(report_figures())
    linked = {"channel_map", "sink_map", "sink_implementation", "stratum_comparison"}
    assert set(drawn) | linked == set(names())
    assert linked.isdisjoint(drawn)


def test_the_page_goes_from_the_training_to_what_quantization_costs():
    headings = [placement.heading for placement in report_figures().values() if placement.heading]
    assert headings == [
        "How loss and kurtosis went in training",
        "When training went wrong",
        "What jumped first along the network",
        "Whether the step, made again, is the recorded one",
        "What the remedy does, beside what happened",
        "When outliers appeared, layer by layer",
        "What the activations of the hottest layer look like",
        "Where magnitudes grow",
        "How few channels hold the energy",
        "How the channels of two models differ",
        "When heads became sinks",
        "Where the strongest sink looks",
        "Queries and keys of the strongest sink",
        "Attention logits of the sink key and of others",
        "What other definitions of kurtosis say",
        "The weights that write the outliers",
        "What quantization costs",
        "Where few bits hurt",
        "How the error of few bits grows",
        "What the models can still do at few bits",
        "What block formats lose",
    ]


def test_a_figure_that_says_nothing_of_the_report_comes_last_under_its_title(monkeypatch, new_figure):
    from osp_diag.figures.report import pictures

    new_figure("a_new_one", "from osp_diag.figures.concentration_curves import draw, prepare\n")
    chosen = ["a_new_one", "concentration_curves", "depth_profile", "sink_map"]
    monkeypatch.setattr(pictures, "names", lambda: chosen)
    drawings = draw_figures([checkpoint()], ["a"], {})
    assert [drawing.name for drawing in drawings] == ["depth_profile", "concentration_curves", "a_new_one"]
    assert drawings[2].heading.startswith("Share of the energy")


# -- untrusted text --------------------------------------------------------------------------------------


def test_hostile_names_are_text_everywhere():
    html = build_report([hostile_checkpoint()]).html
    outside = before_plotly(html)
    assert "<script>hurt" not in html
    assert "<img" not in outside
    assert "&lt;script&gt;hurt" in outside
    assert "{{ 7 * 7 }}" in outside
    assert html.count("</script>") == html.count("<script")
    assert page_data(html)["runs"][0]["label"] == HOSTILE_NAME

    figures = page_data(html)["figures"]  # plotly reads some markup, too
    assert "<img" not in json.dumps([{**variant, "caption": ""} for one in figures for variant in [one["0"]]])


def test_json_in_a_script_cannot_end_it():
    text = str(script_json({"</script>": "<!-- \u2028 & -->"}))
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"</script>": "<!-- \u2028 & -->"}


# -- numbers on their way into the page ------------------------------------------------------------------


def test_packed_arrays_come_back():
    values = np.array([[1.5, np.nan], [26_106.0, -0.25]])
    np.testing.assert_allclose(unpacked(packed(values)), values, rtol=1e-6)
    np.testing.assert_array_equal(unpacked(packed(np.array([0, 2047]))), [0, 2047])
    wide = np.array([1e-3, 1.0, 15_000.0, np.nan])
    np.testing.assert_allclose(unpacked(packed_log(wide)), wide, rtol=3e-4)


def test_numbers_of_figures_are_rounded_and_nan_is_none():
    values = [np.float64(1.23456789), float("nan"), 1_234_567.0]
    assert compacted({"z": values, "n": np.int64(7)}) == {"z": [1.2346, None, 1_234_567], "n": 7}


def test_texts_of_cells_are_kept_by_row_and_column():
    texts = [[f"layer {row}<br>step {column}" for column in range(3)] for row in range(2)]
    assert factored(texts) == {"rows": ["layer 0", "layer 1"], "columns": ["step 0", "step 1", "step 2"]}
    texts[1][2] = "else"
    assert factored(texts) is texts
    assert factored("one for all") == "one for all"


def test_the_channel_of_a_pooled_cell_is_the_hot_one():
    run = synthetic_run(Plan(channels=300, massive_channels=(211, 12), everyday_channel=77))
    channels = explorer_data([run], ["a"])[0]["channels"]
    ratio, which = unpacked(channels["ratio"]), unpacked(channels["channel"])
    assert ratio.shape == which.shape == (1, 2, 6, 96)
    assert which[0, 0, -1, ratio[0, 0, -1].argmax()] == 211
    rms = run.at("residual_post")["channel_rms"].values[0, 5, 0]
    assert ratio[0, 0, -1].max() == pytest.approx(rms.max() / np.median(rms), rel=1e-3)


def test_a_spike_between_two_steps_of_the_slider_survives(monkeypatch):
    from osp_diag.figures.report import explorer

    run = synthetic_run(Plan(layers=5, tokens=4, sequences=1, steps=tuple(range(60))))
    run = spiked(run, step=31, layer=1, value=55.0)
    monkeypatch.setattr(explorer, "BUDGET", 1)
    monkeypatch.setattr(explorer, "COURSE", 10)
    data = explorer_data([run], ["a"])[0]
    assert 31 in data["steps"]
    assert len(data["steps"]) <= explorer.FEWEST_STEPS + 1
    assert data["step_count"] == 60
    course = unpacked(data["course"]["statistics"]["osp_excess_kurtosis"])
    assert course.shape == (2, 5, 10)
    assert course.max() == 55.0


@pytest.mark.slow
def test_24_layers_and_100_steps_stay_under_10_megabytes():
    plan = Plan(layers=24, channels=128, heads=16, sequences=1, tokens=4, steps=tuple(range(100)))
    report = build_report(synthetic_run(plan))
    assert 5e6 < len(report.html.encode()) < 10e6


@pytest.mark.slow
def test_two_real_trainings_on_one_page(tmp_path):
    from osp_diag.trainer.loop import train
    from osp_diag.trainer.presets import with_recipe

    runs = []
    for recipe in ("adam", "osp"):
        config = with_recipe(minute(steps=4, probe__every=1, checkpoint__every=0, probe__sites=()), recipe)
        runs.append(tmp_path / f"{recipe}.zarr")
        train(config, runs[-1])
    report = write_report(runs, tmp_path / "report.html")
    assert report.labels == ("Adam", "OSP")
    assert [len(verdict.findings) for verdict in report.verdicts] == [7, 7]
    data = page_data(report.html)
    assert [run["steps"] for run in data["runs"]] == [[0, 1, 2, 3, 4]] * 2
    titles = [variants["all"]["caption"] for variants in data["figures"] if "1" in variants]
    assert any(title.startswith("Training loss and OSP kurtosis") for title in titles)
    assert any(reason.startswith("activation_surface: Adam: ") for reason in report.left_out)


# -- the verb --------------------------------------------------------------------------------------------


def test_the_verb_writes_the_page_and_says_the_verdict(tmp_path, capsys, without_figures):
    path = write_run(tmp_path / "run.zarr", Plan(tokens=8))
    assert report_verb((path,), out=tmp_path / "r.html") == 0
    said = capsys.readouterr().out
    assert said.startswith("made-up-60M: massive activations on the first token; everyday channel outliers")
    assert f"report: {tmp_path / 'r.html'}" in said
    assert (tmp_path / "r.html").stat().st_size > 4e6


def test_the_verb_prints_findings_as_json(tmp_path, capsys, without_figures):
    path = write_run(tmp_path / "run.zarr", Plan(tokens=8))
    report_verb((path,), out=tmp_path / "r.html", json=True)
    found = json.loads(capsys.readouterr().out)
    assert found["runs"][0]["findings"][0]["rule"] == "massive"
    assert found["out"] == str(tmp_path / "r.html")


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("report.pdf", "a report is a page; let the name end in .html"),
        ("nowhere/report.html", "does not exist; make it first"),
    ],
)
def test_an_output_that_cannot_be_written_is_refused_before_any_work(tmp_path, out, message):
    with pytest.raises(UsageError, match=message):
        report_verb((tmp_path / "absent.zarr",), out=tmp_path / out)


def test_no_run_and_an_absent_run_are_refused(tmp_path):
    with pytest.raises(UsageError, match="report: give at least one run"):
        report_verb((), out=tmp_path / "r.html")
    with pytest.raises(StoreError, match=r"absent\.zarr"):
        report_verb((tmp_path / "absent.zarr",), out=tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()
