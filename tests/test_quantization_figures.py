"""Figures of results at few bits: numbers, rows and columns, and runs that hold none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from osp_diag import figures
from osp_diag.analyses.recipes import PAPER_ORDER
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures._registry import figure_module
from osp_diag.figures.backend import none
from osp_diag.figures.styles import load_style
from osp_diag.quantizing.results import result_rows, results_dataset
from osp_diag.runs.run import Run
from tests.recipe_runs import training_run
from tests.synthetic_runs import OUTLIER_FREE, synthetic_run, without
from tests.synthetic_statics import FULL, PARTS, few_bits, loss_at

RECIPES = ("OSP", "Muon", "Adam")
KURTOSIS = {"Adam": 40.0, "Muon": 8.0, "OSP": 0.1}
HARM = {"Adam": 2.0, "Muon": 0.5, "OSP": 0.0}


@pytest.fixture(scope="module")
def recipes() -> list[Run]:
    """Three trainings, out of the paper's order, with the perplexities that their kurtosis suggests."""
    runs = []
    for recipe in RECIPES:
        run = training_run(recipe, [0.2, KURTOSIS[recipe]])
        run.tree["quantization"] = few_bits(HARM[recipe])
        runs.append(run)
    return runs


def recording(name: str, runs, width: str = "two-column", **options) -> none.Canvas:
    module = figure_module(name)
    canvas: none.Canvas = module.draw(
        module.prepare(runs, **options), none, style=load_style("paper"), width=width
    )
    return canvas


def steep() -> Run:
    run = without(synthetic_run(), ["quantization"])
    run.tree["quantization"] = few_bits(harm=3.0)
    return run


def calls(panel: none.Panel, primitive: str) -> list[dict]:
    return [call for name, call in panel.calls if name == primitive]


def test_the_papers_numbers_are_aliases():
    known = figures.aliases()
    assert (known["fig4"], known["fig1"], known["table2"]) == (
        "bit_width_sweep",
        "quantization_scatter",
        "ablation_table",
    )


# -- the sweep -------------------------------------------------------------------------------------------


def test_a_sweep_has_weights_and_activations_alone_from_16_bits_down():
    found = figures.draw("fig4", [synthetic_run(), synthetic_run(OUTLIER_FREE)], backend="none")
    assert found["bits"].values.tolist() == [16, 8, 6, 5, 4, 3]
    of_adam = found["perplexity"].sel(run="made-up-60M")
    for sweep, settings in (("weights", (3, 16)), ("activations", (16, 4))):
        expected = np.exp(loss_at(*settings, harm=1.0))
        assert of_adam.sel(sweep=sweep, bits=min(settings)) == pytest.approx(expected)
    assert np.isnan(of_adam.sel(sweep="activations", bits=3))
    assert of_adam.sel(sweep="weights", bits=16) == pytest.approx(np.exp(FULL))
    for said in ("Perplexity of 69 tokens (made-up text, sequences of 24)", "round-to-nearest", "step 0"):
        assert said in found.attrs["caption"]


@pytest.mark.parametrize(
    ("width", "places"), [("two-column", [(0, 0), (0, 1)]), ("one-column", [(0, 0), (1, 0)])]
)
def test_a_sweep_is_drawn_in_two_panels_of_evenly_spaced_bits(width, places):
    canvas = recording("fig4", [synthetic_run()], width)
    assert list(canvas.panels) == places
    left, right = canvas.panels.values()
    assert calls(left, "ticks")[0]["texts"] == ["16", "8", "6", "5", "4", "3"]
    assert calls(right, "ticks")[0]["texts"] == ["16", "8", "6", "5", "4"]
    assert calls(left, "line")[0]["x"].tolist() == [0, 1, 2, 3, 4, 5]
    assert left.labels["y_scale"] == "linear"
    assert recording("fig4", [steep()]).panels[0, 0].labels["y_scale"] == "log"


def test_a_sweep_relative_to_16_bits():
    found = figures.draw("fig4", synthetic_run(), backend="none", relative=True)
    np.testing.assert_allclose(found["perplexity"].sel(bits=16), 1.0)
    assert found["perplexity"].sel(sweep="weights", bits=4).item() == pytest.approx(np.e)
    assert recording("fig4", [synthetic_run()], relative=True).panels[0, 0].labels["y_label"] == (
        "perplexity / that at 16 bits"
    )


def test_a_sweep_has_a_line_a_method():
    run = without(synthetic_run(), ["quantization"])
    rows = result_rows(few_bits(1.0))
    better = [replace(row, method="gptq", negative_log_likelihood=FULL + 0.1) for row in rows[1:]]
    run.tree["quantization"] = results_dataset([*rows, *better])
    found = figures.draw("fig4", run, backend="none", method="rtn,gptq")
    assert found["run"].values.tolist() == ["RTN", "GPTQ"]
    at = found["perplexity"].sel(sweep="weights", bits=4)
    np.testing.assert_allclose(at, np.exp([loss_at(4, 16, 1.0), FULL + 0.1]))
    assert "so many bits, by RTN, GPTQ" in found.attrs["caption"]
    two = figures.draw("fig4", [run, run], backend="none", method="rtn, gptq")
    assert len(set(two["run"].values.tolist())) == 4
    foreign = [replace(row, token_fingerprint="other") for row in (rows[0], *better)]
    run.tree["quantization"] = results_dataset([*rows, *foreign])
    with pytest.raises(StoreError, match="rtn, gptq were measured on different tokens; measure with"):
        figures.draw("fig4", run, backend="none", method="rtn,gptq")


# -- the scatter -----------------------------------------------------------------------------------------


def test_a_scatter_of_perplexities_with_the_diagonal(recipes):
    found = figures.draw("quantization_scatter", recipes, backend="none")
    assert found["run"].values.tolist() == list(RECIPES)
    np.testing.assert_allclose(found["full"], np.exp(FULL))
    np.testing.assert_allclose(found["few_bits"], [np.exp(loss_at(4, 4, HARM[r])) for r in RECIPES])
    panel = recording("fig1", recipes).panels[0, 0]
    diagonal = calls(panel, "line")[0]
    assert diagonal["label"] == "no loss"
    assert diagonal["x"].tolist() == diagonal["y"].tolist()
    assert [call["label"] for call in calls(panel, "scatter")] == list(RECIPES)
    assert panel.labels["x_scale"] == panel.labels["y_scale"] == "log"
    assert calls(panel, "limits")[0]["low"] < np.exp(FULL) < calls(panel, "limits")[0]["high"]


def test_a_scatter_against_kurtosis_or_tokens(recipes):
    by_kurtosis = figures.draw("fig1", recipes, backend="none", against="kurtosis")
    np.testing.assert_allclose(by_kurtosis["full"], [KURTOSIS[recipe] for recipe in RECIPES])
    assert "osp_excess_kurtosis/1" in by_kurtosis.attrs["caption"]
    by_tokens = figures.draw(
        "fig1", recipes, backend="none", against="tokens", weight_bits=8, activation_bits=8
    )
    np.testing.assert_allclose(by_tokens["full"], 10 * 2048)
    assert by_tokens.attrs["title"] == "Perplexity at W8A8 against tokens seen in training"
    with pytest.raises(UsageError, match=r"against is perplexity, kurtosis, tokens, not 'loss'"):
        figures.draw("fig1", recipes, backend="none", against="loss")
    with pytest.raises(StoreError, match=r"does not say how many tokens a step of training takes"):
        figures.draw("fig1", synthetic_run(), backend="none", against="tokens")
    with pytest.raises(StoreError, match=r"holds no perplexity at W2A2; measure it with .*--bits W2A2"):
        figures.draw("fig1", recipes, backend="none", weight_bits=2, activation_bits=2)


# -- the table -------------------------------------------------------------------------------------------


def test_the_table_has_the_papers_rows_and_what_was_measured(recipes):
    found = figures.draw("ablation_table", recipes, backend="none")
    assert found["run"].values.tolist() == [name for name in PAPER_ORDER if name in RECIPES]
    assert found["column"].values.tolist() == [
        "OSP kurtosis",
        *(f"perplexity {bits}" for bits in ("W16A16", "W8A8", "W4A16", "W4A8", "W4A4")),
    ]
    np.testing.assert_allclose(found["value"].sel(column="OSP kurtosis"), [40.0, 8.0, 0.1])
    np.testing.assert_allclose(
        found["value"].sel(column="perplexity W4A4"),
        [np.exp(loss_at(4, 4, HARM[r])) for r in found["run"].values],
    )


def test_cells_are_tinted_from_best_to_worst_and_say_their_numbers(recipes):
    panel = recording("table2", recipes).panels[0, 0]
    shades = calls(panel, "heat_map")[0]["values"]
    assert shades.shape == (4, 6)
    np.testing.assert_allclose(shades[:3, 0], [0, np.log(80) / np.log(400), 1])
    assert (shades[:3, 1] == 0).all()  # all equal
    assert np.isnan(shades[3]).all()  # the names of the columns
    texts = {(call["x"], call["y"]): call["text"] for call in calls(panel, "annotate")}
    assert texts[0.0, 3.0] == "OSP\nkurtosis"
    assert [texts[0.0, row] for row in (2.0, 1.0, 0.0)] == ["40", "8", "0.1"]
    narrow = recording("table2", recipes, "one-column").panels[0, 0]
    assert "W8\nA8" in [call["text"] for call in calls(narrow, "annotate")]


def test_a_number_that_a_run_lacks_is_a_dash(recipes):
    partial = training_run("Muon-only", [0.2, 3.0])
    everything = few_bits(0.3)
    partial.tree["quantization"] = everything.isel(setting=everything["weight_bits"].values == 16)
    panel = recording("table2", [*recipes, partial]).panels[0, 0]
    texts = {(call["x"], call["y"]): call["text"] for call in calls(panel, "annotate")}
    assert texts[5.0, 2.0] == "\u2013"


# -- where few bits hurt ---------------------------------------------------------------------------------


def test_sensitivity_is_a_row_a_part_with_all_layers_behind_a_gap():
    found = figures.draw("bit_sensitivity", [synthetic_run(), synthetic_run(OUTLIER_FREE)], backend="none")
    assert found["part"].values.tolist() == list(PARTS)
    assert found["divergence"].sel(run="made-up-60M", part="inputs:mlp_hidden", layer=3) == 0.1
    assert (
        "KL(full ‖ rounded) by token: 4-4-4, rtn, convention plain; 69 tokens (made-up text)"
        in (found.attrs["caption"])
    )
    cells = calls(recording("bit_sensitivity", [synthetic_run()]).panels[0, 0], "heat_map")[0]
    assert cells["x"].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert cells["y_texts"] == list(PARTS)[::-1]
    assert np.isnan(cells["values"][:, 6]).all()
    np.testing.assert_allclose(cells["values"][::-1, 7], found["divergence_all_layers"][0])
    np.testing.assert_allclose(cells["values"][::-1, 3], [0.001, 0.01, 0.1, 0.0001])


def test_errors_by_layer_and_the_curve_of_channels():
    panels = recording("quantization_error", [synthetic_run()]).panels
    whole, accumulated, local = calls(panels[0, 0], "line")
    assert [line["dash"] for line in (whole, accumulated, local)] == ["solid", "dashed", "dotted"]
    assert np.isnan(accumulated["y"][0])
    assert local["y"].max() == local["y"][3] == 0.01
    np.testing.assert_allclose(calls(panels[0, 1], "line")[0]["y"], [1, 1 / 2, 1 / 3, 1 / 5])
    assert calls(panels[0, 1], "ticks")[0]["texts"] == ["0", "1", "2", "4"]
    for name in ("bit_sensitivity", "quantization_error"):
        with pytest.raises(StoreError, match=r"run of made-up-60M holds no .*osp-diag advise CHECKPOINT"):
            figures.draw(name, synthetic_run(few_bits=False), backend="none")


# -- runs without results --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bit_width_sweep", "quantization_scatter", "ablation_table"])
def test_runs_without_results_are_refused_with_how_to_get_them(name):
    with pytest.raises(StoreError, match=r"made-up-60M holds no results at few bits; .*osp-diag quantize"):
        figures.draw(name, [synthetic_run(OUTLIER_FREE), synthetic_run(few_bits=False)], backend="none")


def test_results_without_a_sweep_or_by_another_method():
    run = synthetic_run()
    rows = run["quantization"]
    few = rows.isel(setting=(rows["weight_bits"].values == 4) & (rows["activation_bits"].values == 4))
    bare = without(run, ["quantization"])
    bare.tree["quantization"] = few
    with pytest.raises(StoreError, match=r"hold no sweep of weights or activations alone; measure with"):
        figures.draw("fig4", bare, backend="none")
    with pytest.raises(StoreError, match=r"no results of gptq in the convention osp; it has rtn in plain"):
        figures.draw("fig4", run, backend="none", method="gptq", convention="osp")
