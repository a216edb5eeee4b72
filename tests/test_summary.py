"""The summary of a run: numbers from the right layers, heads and strata; verdicts; plain words."""

from __future__ import annotations

import json

import numpy as np
import pytest

from osp_diag.analyses.summary.protocol_comparison import compare_protocols
from osp_diag.analyses.summary.summary import summarise
from osp_diag.errors import StoreError, UsageError
from osp_diag.runs.headline import headline_kurtosis
from osp_diag.runs.run import Run
from osp_diag.schema import network_order
from tests.synthetic_runs import OUTLIER_FREE, Plan, synthetic_run, with_attrs, without

PLAN = Plan()


@pytest.fixture(scope="module")
def run():
    return synthetic_run(PLAN)


@pytest.fixture(scope="module")
def published():
    return synthetic_run(PLAN, protocol="osp-published")


def changed(run: Run, path: str, values) -> Run:
    """The same run with one variable replaced, ``values`` being a function of the old ones."""
    copy = without(run, [])
    site, _, name = path.rpartition("/")
    copy.tree[site][name] = copy.tree[site][name].copy(data=values(copy.tree[site][name].values.copy()))
    return copy


def test_the_headline_is_the_mean_over_the_scripts_hidden_states(run):
    def of(site):
        return run.at(site)["osp_excess_kurtosis"].isel(step=-1)

    states = [of("embedding").isel(layer=0)]
    states += [of("residual_post").sel(layer=layer) for layer in range(PLAN.layers - 1)]
    states += [of("final_norm").isel(layer=0)]
    found = summarise(run)
    assert found.hidden_states == PLAN.layers + 1
    for stratum in ("all", "first", "delimiter", "rest"):
        expected = np.mean([float(state.sel(stratum=stratum)) for state in states])
        assert found.osp_kurtosis_by_stratum[stratum] == pytest.approx(expected)
    assert found.osp_kurtosis == found.osp_kurtosis_by_stratum["all"] == headline_kurtosis(run)["all"]
    assert found.osp_kurtosis_of_ceiling == pytest.approx(found.osp_kurtosis / (PLAN.channels - 3))
    assert found.osp_kurtosis_over_floor == pytest.approx(found.osp_kurtosis / 0.1953, rel=0.12)


def test_the_last_blocks_output_never_counts_unless_there_is_no_final_norm(run):
    def spoil(values):
        values[:, -1] = 1e6
        return values

    spoilt = changed(run, "residual_post/osp_excess_kurtosis", spoil)
    assert summarise(spoilt).osp_kurtosis == summarise(run).osp_kurtosis
    without_norm = summarise(without(spoilt, ["final_norm"]))
    assert without_norm.osp_kurtosis > 1e5
    assert without_norm.hidden_states == PLAN.layers + 1
    assert "there is no final norm" in without_norm.text()


def test_massive_activations_and_where_they_begin(run):
    found = summarise(run)
    assert found.massive_emergence_layer == found.jump_layer == PLAN.emergence_layer
    assert found.jump_factor > 100
    assert found.massive_channels == PLAN.massive_channels
    assert found.massive_per_sequence == pytest.approx(2)
    assert found.massive_on_first == 1
    assert found.largest_magnitude == pytest.approx(PLAN.massive, rel=0.1)
    assert found.largest_site in ("residual_pre", "residual_post")
    assert found.largest_channel == PLAN.massive_channels[0]


def test_everyday_channels_speak_of_the_tokens_that_are_neither_first_nor_delimiters(run):
    found = summarise(run)
    assert found.everyday_kurtosis == found.osp_kurtosis_by_stratum["rest"]
    channels = (PLAN.everyday_channel,)
    assert found.outlier_feature_channels == {"attention_input": channels, "mlp_input": channels}
    site = run.at("residual_post")["max_median_ratio"].isel(step=-1).sel(stratum="rest")
    assert found.everyday_max_median_ratio == pytest.approx(float(site.mean()))


def test_sinks_and_logits(run):
    found = summarise(run)
    attention = run.at("attention").isel(step=-1)
    rate = attention["sink_rate"].sel(epsilon=0.3, sink_position=0).values
    assert found.sink_rate == pytest.approx(rate.mean())
    assert found.sink_heads == (rate >= 0.5).sum()
    assert found.heads == PLAN.layers * PLAN.heads
    assert found.first_token_attention == pytest.approx(
        float(attention["first_token_attention"].sel(stratum="all").mean())
    )
    assert (found.largest_logit_layer, found.largest_logit_head) == PLAN.sink_head
    assert found.heads_above_qk_clip == 1


def test_layers_without_attention_count_neither_as_heads_nor_as_zero(run):
    def hole(values):
        values[:, 0] = np.nan
        return values

    found = summarise(changed(run, "attention/sink_rate", hole))
    assert found.heads == (PLAN.layers - 1) * PLAN.heads
    assert found.sink_rate > summarise(run).sink_rate


@pytest.mark.parametrize(
    ("changes", "verdict"),
    [
        (
            {},
            "massive activations on the first token; everyday channel outliers; attention sinks; "
            "attention logits above 100",
        ),
        (
            {"everyday": 0.0},
            "massive activations on the first token; attention sinks; attention logits above 100",
        ),
        ({"massive": 0.0}, "everyday channel outliers"),
        ({"massive": 0.0, "everyday": 0.0}, "outlier-free"),
        (
            {"massive": 60.0, "everyday": 0.0},
            "outliers on the first token only; attention sinks; attention logits above 100",
        ),
        ({"massive": 0.0, "everyday": 4.2, "channels": 512}, "mild heavy tails, no outliers"),
    ],
)
def test_verdicts(changes, verdict):
    assert summarise(synthetic_run(**changes)).verdict == verdict


def test_the_text_says_it_in_words(run):
    text = summarise(run).text()
    assert max(map(len, text.splitlines())) <= 100
    flat = " ".join(text.split())
    for said in (
        "made-up-60M, 72 tokens in sequences of 24 (made-up text), protocol sequence, BOS no, float32",
        "Verdict: massive activations on the first token; everyday channel outliers; attention sinks; "
        "attention logits above 100.",
        "OSP kurtosis (osp_excess_kurtosis/1, mean over 7 hidden states): 23.2",
        "of 61, what a token with a single large channel scores",
        "Massive activations: layers 3 to 5, up to 2 in a sequence, in channels 17, 41; 100% of them on",
        "1 LLM.int8() outlier feature at attention_input",
        "one head exceeds 100, where QK-Clip would act",
    ):
        assert said in flat, said
    clean = summarise(synthetic_run(OUTLIER_FREE)).text()
    assert "Massive activations: none" in clean
    assert "below 100, where QK-Clip would" in clean


def test_one_token_sequences_have_no_sinks_to_speak_of(published):
    found = summarise(published)
    assert found.sink_rate is None
    assert set(found.osp_kurtosis_by_stratum) == {"all", "first"}
    assert "attend to nothing but themselves" in found.text()


def test_nonfinite_tokens_are_located_in_network_order(run):
    def from_layer(layer, count):
        def put(values):
            values[:, layer:, 0] = count
            return values

        return put

    def at_layer_four(values):
        values[:, 4] = 7
        return values

    broken = changed(run, "residual_post/nonfinite_token_count", from_layer(4, 5.0))
    broken = changed(broken, "mlp_input/nonfinite_token_count", from_layer(4, 2.0))
    broken = changed(broken, "residual_pre/nonfinite_token_count", from_layer(5, 5.0))
    broken = changed(broken, "mlp_input/nonfinite_first_token", at_layer_four)
    found = summarise(broken)
    assert (found.nonfinite_site, found.nonfinite_layer, found.nonfinite_token) == ("mlp_input", 4, 7)
    assert found.nonfinite_channel is None
    assert found.nonfinite_tokens == 5
    assert found.verdict.startswith("NaN or Inf in the activations; massive")
    assert "It begins at mlp_input, layer 4" in found.text()
    assert summarise(run).nonfinite_tokens == 0


def test_network_order_is_the_way_of_the_data():
    places = [("final_norm", 5), ("residual_post", 0), ("linear_input:mlp.up_proj", 0), ("residual_pre", 1),
              ("attention_input", 0), ("embedding", 0)]  # fmt: skip
    assert network_order(places) == [
        ("embedding", 0),
        ("attention_input", 0),
        ("residual_post", 0),
        ("linear_input:mlp.up_proj", 0),
        ("residual_pre", 1),
        ("final_norm", 5),
    ]


def test_a_chosen_step(run):
    stepped = synthetic_run(steps=(0, 100))
    assert summarise(stepped, step=0).verdict == "outlier-free"
    assert summarise(stepped).step == 100
    assert "step 100" in " ".join(summarise(stepped).text().split())
    with pytest.raises(UsageError, match=r"has no step 50; the nearest are 0, 100"):
        summarise(stepped, step=50)


def test_a_run_of_few_statistics_says_what_is_missing():
    bare = without(
        synthetic_run(attention=False, snapshots=False), ["embedding", "residual_post/top_magnitude"]
    )
    found = summarise(bare)
    assert found.osp_kurtosis is None
    assert "was not measured at embedding, so there is no headline number" in found.text()
    assert found.massive_emergence_layer == PLAN.emergence_layer
    only = without(bare, ["residual_post", "residual_pre", "attention_input", "mlp_input"])
    assert summarise(only).verdict == "not enough was measured for a verdict"
    with pytest.raises(StoreError, match=r"holds no statistics"):
        summarise(without(only, ["final_norm"]))


def test_everything_survives_json(run, published):
    for found in (summarise(run), summarise(published), compare_protocols(run, published)):
        assert json.loads(json.dumps(found.as_dict(), allow_nan=False)) == found.as_dict()


def test_protocols_side_by_side(run, published):
    found = compare_protocols(run, published)
    assert found.sequence == summarise(run).osp_kurtosis
    assert found.published == summarise(published).osp_kurtosis > 1.25 * found.sequence
    first, second = found.text().splitlines()
    assert first == (
        "OSP kurtosis by protocol: 23.2 on real sequences of 24 tokens, "
        "29.2 as the released OSP script feeds tokens."
    )
    assert "every token sits at position 0 and becomes a sink or spike token" in second
    clean = compare_protocols(
        synthetic_run(OUTLIER_FREE), synthetic_run(OUTLIER_FREE, protocol="osp-published")
    )
    assert "hardly different from the others, so the two agree" in clean.text()
    assert (
        "without the context"
        in compare_protocols(
            run, changed(published, "residual_post/osp_excess_kurtosis", np.zeros_like)
        ).text()
    )


def test_protocols_that_cannot_be_compared(run, published):
    with pytest.raises(UsageError, match=r"where 'sequence' belongs, it was given 'osp-published'"):
        compare_protocols(published, run)
    with pytest.raises(UsageError, match=r"the two runs are of different models"):
        compare_protocols(run, with_attrs(published, model_fingerprint="another"))
    with pytest.raises(StoreError, match=r"the osp-published run has no headline kurtosis"):
        compare_protocols(run, without(published, ["embedding"]))
