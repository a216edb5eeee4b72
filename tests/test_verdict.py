"""The judgement on a run: each rule on either side of its threshold, with the place it speaks of."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from osp_diag.analyses.emergence.history import onsets
from osp_diag.analyses.sinks.implementation import sink_implementation
from osp_diag.analyses.summary.verdict import RULES, STATES, verdict
from osp_diag.errors import UsageError
from osp_diag.estimators.token_kurtosis import gaussian_floor
from osp_diag.quantizing.results import result_rows, results_dataset
from osp_diag.runs.run import Run
from tests.emerging_runs import Course, Training, emerging_run
from tests.sink_runs import sink_run
from tests.synthetic_runs import OUTLIER_FREE, Plan, synthetic_run, without

PLAN = Plan()


def by_rule(found):
    return {finding.rule: finding for finding in found.findings}


@pytest.fixture(scope="module")
def planted():
    return verdict(synthetic_run(PLAN))


def test_planted_outliers_are_found_where_they_are(planted):
    found = by_rule(planted)
    assert planted.state == "raised"
    assert planted.headline.startswith(
        "massive activations on the first token; everyday channel outliers; attention sinks"
    )
    assert found["nonfinite"].state == "clear"
    massive = found["massive"]
    assert (massive.state, massive.stratum, massive.channel) == ("raised", "first", PLAN.massive_channels[0])
    assert f"layers {PLAN.emergence_layer} to {PLAN.layers - 1}" in massive.text
    everyday = found["everyday"]
    assert (everyday.state, everyday.channel) == ("raised", PLAN.everyday_channel)
    assert everyday.layer == 0  # where the stream around the channel is still small
    assert found["sinks"].state == "raised"
    assert "emergence" not in found


def test_kurtosis_stands_against_the_gaussian_floor_of_its_width(planted):
    found = by_rule(planted)["kurtosis"]
    floor = gaussian_floor(PLAN.channels)
    assert found.value == pytest.approx(planted.summary.osp_kurtosis / floor)
    assert f"Gaussian floor ({floor:.3g})" in found.text
    values = synthetic_run(PLAN).at("residual_post")["osp_excess_kurtosis"].isel(step=0).sel(stratum="first")
    assert (found.site, found.stratum, found.layer) == ("residual_post", "first", int(values.argmax("layer")))
    assert f"on the first token: {float(values.max()):.3g}." in found.text


def test_a_model_without_outliers_is_clear():
    found = verdict(synthetic_run(OUTLIER_FREE))
    assert found.state == "clear"
    assert found.headline == "outlier-free"
    assert {finding.state for finding in found.findings} == {"clear"}


def test_logits_that_qk_clip_would_clip_reach_the_headline():
    run = synthetic_run(OUTLIER_FREE)
    nodes = {node.path: node.to_dataset(inherit=False).copy(deep=True) for node in run.tree.subtree}
    nodes["/attention"]["max_logit"].values[0, 2, 1] = 130.0
    found = verdict(Run(xr.DataTree.from_dict(nodes)))
    logits = by_rule(found)["logits"]
    assert (logits.state, logits.layer, logits.head, logits.value) == ("raised", 2, 1, 130.0)
    assert found.headline == "outlier-free; attention logits above 100"


def test_nan_is_broken_and_located():
    run = synthetic_run(PLAN)
    nodes = {node.path: node.to_dataset(inherit=False).copy(deep=True) for node in run.tree.subtree}
    site = nodes["/residual_post"]
    site["nonfinite_token_count"].values[0, 4:] = 3.0
    site["nonfinite_first_token"].values[0, 4] = 5.0
    site["nonfinite_first_channel"].values[0, 4] = 9.0
    found = verdict(Run(xr.DataTree.from_dict(nodes)))
    finding = by_rule(found)["nonfinite"]
    assert found.state == finding.state == "broken"
    assert finding.text.startswith(
        "NaN or Inf in 3 tokens, beginning at residual_post, layer 4, token 5, channel 9"
    )
    assert found.headline.startswith("NaN or Inf in the activations")


def test_what_was_not_measured_is_unknown_and_says_why():
    run = without(
        synthetic_run(PLAN),
        [
            "attention",
            *(f"{site}/osp_excess_kurtosis" for site in ("embedding", "residual_post", "final_norm")),
        ],
    )
    found = by_rule(verdict(run))
    assert found["sinks"].text == "Attention sinks were not measured."
    assert {found[rule].state for rule in ("sinks", "logits", "kurtosis", "everyday")} == {"unknown"}
    assert "was not measured at embedding and residual_post" in found["kurtosis"].text


def test_onsets_give_the_first_block_output_that_leaves_the_noise_for_good():
    courses = {("residual_post", 2): Course(100, 20), ("residual_post", 3): Course(200, 20)}
    run = emerging_run(Training(courses=courses, sites=("residual_post", "embedding", "final_norm")))
    found = by_rule(verdict(run, onsets=onsets(run, draws=10)))["emergence"]
    assert (found.state, found.site, found.layer) == ("raised", "residual_post", 2)
    assert 90 <= found.step <= 130
    assert "2 of 4 block outputs leave the noise for good" in found.text


def test_noise_has_no_onset():
    run = emerging_run(Training(courses={}))
    found = by_rule(verdict(run, onsets=onsets(run, draws=0)))["emergence"]
    assert found.state == "clear"
    assert found.text.startswith("None of 4 block outputs leaves the noise for good")


def test_what_four_bits_cost_is_said_where_a_run_holds_results(planted):
    found = by_rule(planted)["few_bits"]
    assert (found.state, found.value) == ("raised", pytest.approx(np.exp(2)))
    assert found.text == "At 4-4-16 (RTN, plain) perplexity is 7.39 times that at 16-16-16."
    run = synthetic_run(PLAN)
    rows = result_rows(run["quantization"])
    few = next(row for row in rows if (row.weight_bits, row.activation_bits) == (4, 4))
    better = replace(few, method="gptq", negative_log_likelihood=few.negative_log_likelihood - 1)
    run.tree["quantization"] = results_dataset([*rows[:1], replace(few, divergence=0.5), better])
    text = "At 4-4-16 (RTN, plain) perplexity is 7.39 times that at 16-16-16, KL 0.5 nat"
    said = run.summary().text().replace("\n  ", " ")
    assert f"{text}; least by GPTQ, plain: 2.72 times" in said
    assert "few_bits" not in by_rule(verdict(synthetic_run(PLAN, few_bits=False)))
    assert "few_bits" not in synthetic_run(PLAN, few_bits=False).summary().as_dict()


def test_it_is_plain_values_for_json(planted):
    plain = planted.as_dict()
    assert plain["state"] == "raised"
    assert {finding["rule"] for finding in plain["findings"]} == set(RULES) - {"emergence"}
    assert all(finding["definition"] == RULES[finding["rule"]] for finding in plain["findings"])


def test_the_worst_comes_first(planted):
    order = [STATES.index(finding.state) for finding in planted.findings]
    assert order == sorted(order)
    assert planted.findings[-1].rule == "nonfinite"


def test_sinks_are_told_by_the_way_they_are_made():
    run = sink_run({0: ["no sink", "no sink"], 10: ["negative infinity", "balanced"]})
    found = by_rule(verdict(run, sinks=sink_implementation(run)))["sinks"]
    assert found.text.endswith("Their logits: negative infinity 2, balanced 2.")


def test_an_unknown_step_is_refused():
    with pytest.raises(UsageError, match=r"has no step 7; the nearest are 0"):
        verdict(synthetic_run(PLAN), step=7)


def test_thinned_runs_keep_ends_and_the_steps_asked_for():
    from osp_diag.analyses.thinned_run import thinned_run

    run = emerging_run(Training())
    short = thinned_run(run, 5, always=[130])
    assert short.steps.tolist() == [0, 100, 130, 200, 290, 390]
    values = run.at("residual_post")["osp_excess_kurtosis"].sel(step=130).values
    np.testing.assert_array_equal(
        short.at("residual_post")["osp_excess_kurtosis"].sel(step=130).values, values
    )
    assert thinned_run(run, 40) is run
