"""How heads make their sinks: planted sinks of each kind are told apart, and what is missing is said."""

from __future__ import annotations

import numpy as np
import pytest

import osp_diag
from osp_diag.analyses.sinks.implementation import DEFINITIONS, KINDS, logit_edges, sink_implementation
from osp_diag.analyses.sinks.rotary_pairs import rotary_pairs
from osp_diag.analyses.sinks.rules import SinkRules
from osp_diag.analyses.sinks.statement import sink_statement
from osp_diag.errors import StoreError, UsageError
from osp_diag.estimators.attention_tiles import LogitGrid
from osp_diag.runs.run import Run
from tests.sink_runs import HOT, PLANTED, SPIKE, TOKENS, WIDTH, channel_norms, label_norms, rotated, sink_run
from tests.synthetic_runs import with_attrs, without
from tests.tiny_checkpoints import byte_tokenizer, llama

QUIET = ("no sink",) * len(PLANTED)
EVERY = {kind: 2 * place for place, kind in enumerate(PLANTED)}
"""Kind → the query head that it was planted in."""


@pytest.fixture(scope="module")
def run() -> Run:
    return sink_run({0: QUIET, 10: PLANTED})


@pytest.fixture(scope="module")
def found(run):
    return sink_implementation(run)


def of_kind(found, kind, layer=1):
    return found.isel(step=-1).sel(layer=layer, head=EVERY[kind])


# -- planted sinks ---------------------------------------------------------------------------------------


def test_planted_sinks_of_every_kind_are_told_apart(found):
    kinds = found["kind"].sel(step=10)
    for kind, head in EVERY.items():
        expected = "balanced" if kind == "norm" else kind
        assert kinds.sel(head=head).values.tolist() == [expected, expected], kind
    assert (kinds.sel(head=kinds["head"] % 2 == 1) == "no sink").all()
    assert (found["kind"].sel(step=0) == "no sink").all()
    assert set(np.unique(found["kind"])) <= set(KINDS)


def test_the_position_of_the_logits_is_the_planted_one(found):
    for kind, sink, other, part in (
        ("negative infinity", 1.0, -9.0, 0.9),
        ("mixed", 5.0, -5.0, 0.5),
        ("balanced", 8.0, 0.0, 0.0),
    ):
        at = of_kind(found, kind)
        assert at["sink_logit"].item() == pytest.approx(sink, abs=0.2)
        assert at["other_logit"].item() == pytest.approx(other, abs=0.2)
        assert at["logit_gap"].item() == pytest.approx(sink - other, abs=0.3)
        assert at["negative_part"].item() == pytest.approx(part, abs=0.03)
        assert at["other_negative_share"].item() == pytest.approx(0.5 if part == 0 else 1.0, abs=0.03)
        assert at["delta_logit"].item() == pytest.approx(sink - other, rel=0.2)
        assert abs(at["logit_skew"].sel(key_class="other").item()) < 0.15
    assert of_kind(found, "unclear")["logit_gap"].item() < 0


def test_channels_and_geometry_are_the_planted_ones(found):
    hot, spread, norm = (of_kind(found, kind) for kind in ("negative infinity", "balanced", "norm"))
    assert hot["channel_use"].item() == "concentrated"
    assert hot["channels_90"].item() == 1
    assert int(np.argmax(hot["sink_logit_contribution"].values)) == HOT
    assert spread["channel_use"].item() == norm["channel_use"].item() == "spread"
    assert spread["channels_90_share"].item() > 0.8
    assert spread["sink_logit_contribution"].sum().item() == pytest.approx(8.0, abs=0.2)
    assert [at["geometry"].item() for at in (hot, spread, norm)] == ["alignment", "alignment", "norm"]
    assert spread["sink_cosine"].item() == pytest.approx(0.99, abs=0.02)
    assert spread["alignment_factor"].item() == pytest.approx(
        spread["sink_cosine"].item() * np.sqrt(WIDTH), rel=1e-6
    )
    assert norm["norm_factor"].item() > 10 > 2 > norm["alignment_factor"].item() > 1
    assert of_kind(found, "no sink")["channel_use"].item() == "no sink"
    assert of_kind(found, "learned sink")["geometry"].item() == "learned sink"


def test_rotary_frequencies_value_drain_and_residual_are_the_planted_ones(found):
    hot = of_kind(found, "negative infinity")
    assert found.attrs["rotary_layout"] == "half"
    assert int(np.argmax(hot["frequency_contribution"].values)) == HOT
    assert hot["frequencies_90"].item() == 1
    assert hot["frequency_position"].item() == pytest.approx(HOT / (WIDTH // 2 - 1), abs=0.02)
    np.testing.assert_allclose(
        hot["frequency_contribution"].sum(), hot["sink_logit_contribution"].sum(), rtol=1e-6
    )
    np.testing.assert_allclose(found["wavelength"][[0, 8]], [2 * np.pi, 2 * np.pi * 100])
    assert hot["value_drain"].item() == pytest.approx(0.1, abs=0.03)
    assert of_kind(found, "no sink")["value_drain"].item() == pytest.approx(1.0, abs=0.1)
    assert of_kind(found, "learned sink")["learned_sink_mass"].item() > 0.9
    # The spike is in the block's output, so that the layer after reads it.
    assert found["residual_spike"].sel(step=10).values.tolist() == [1.0, SPIKE]
    assert found["residual_massive"].sel(step=10).values.tolist() == [0.0, 1.0]


def test_a_sink_emerges_at_the_step_from_which_on_it_lasts():
    def kinds(*planted):
        return tuple(planted)

    steps = {
        0: kinds("no sink", "no sink", "balanced"),
        5: kinds("mixed", "no sink", "balanced"),
        10: kinds("no sink", "no sink", "balanced"),
        20: kinds("negative infinity", "mixed", "balanced"),
        30: kinds("balanced", "no sink", "balanced"),
    }
    found = sink_implementation(sink_run(steps))
    np.testing.assert_array_equal(found["emergence_step"].sel(layer=0, head=[0, 2, 4]), [20, np.nan, 0])
    np.testing.assert_array_equal(found["emergence_after"].sel(layer=0, head=[0, 2, 4]), [10, np.nan, np.nan])
    assert found["kind"].sel(layer=0, head=0).values.tolist() == [
        "no sink", "mixed", "no sink", "negative infinity", "balanced"
    ]  # fmt: skip
    assert "between steps" not in sink_statement(found)
    assert "first lasting sink is layer 0, head 4, at step 0" in sink_statement(found)
    only = sink_implementation(sink_run(steps), steps=[10, 20])
    assert only["step"].values.tolist() == [10, 20]
    assert only["emergence_step"].sel(layer=0, head=0).item() == 20


def test_every_number_says_what_it_is(found):
    assert set(found.data_vars) == set(DEFINITIONS)
    assert all(values.attrs["definition"] and values.attrs["units"] for values in found.data_vars.values())
    assert found.attrs["rule_sink_rate"] == 0.5
    assert found.attrs["sequence_length"] == TOKENS


def test_the_rules_can_be_moved(run):
    strict = sink_implementation(run, rules=SinkRules(negative=0.95, concentrated=0.02, learned=1.0))
    assert of_kind(strict, "negative infinity")["kind"].item() == "mixed"
    assert of_kind(strict, "negative infinity")["channel_use"].item() == "spread"
    assert of_kind(strict, "learned sink")["kind"].item() == "no sink"
    with pytest.raises(UsageError, match=r"SinkRules: epsilon is 0; it is a share, more than 0"):
        SinkRules(epsilon=0.0)
    with pytest.raises(UsageError, match=r"balanced \(0.7\) has to be less than negative \(0.5\)"):
        SinkRules(balanced=0.7, negative=0.5)


# -- rotary pairs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "width", "said"),
    [("half", WIDTH, "half"), ("interleaved", WIDTH, "interleaved"), ("half", 8, "half")],
)
def test_pairs_are_found_by_the_energy_that_rotation_keeps(layout, width, said):
    x = np.random.default_rng(3).standard_normal((3, 2, TOKENS, WIDTH)) * np.linspace(0.2, 3, WIDTH)
    pairs = rotary_pairs(norms_run(x, rotated(x, layout, width)), 0)
    assert (pairs.layout, len(pairs.first)) == (said, width // 2)
    both = np.sort(np.concatenate([pairs.first, pairs.second]))
    np.testing.assert_array_equal(both, np.arange(width))
    assert int(pairs.second[0]) == (1 if layout == "interleaved" else width // 2)


def test_without_a_rotation_there_are_no_pairs():
    x = np.random.default_rng(3).standard_normal((3, 2, TOKENS, WIDTH))
    assert rotary_pairs(norms_run(x, x), 0).layout == "no channel is rotated"
    assert "no pairing of the channels keeps their energy" in rotary_pairs(norms_run(x, 2 * x), 0).layout
    lacking = without(norms_run(x, x), ["query_pre_rope"])
    assert rotary_pairs(lacking, 0).layout.startswith("the run lacks head_channel_norm")


def norms_run(before: np.ndarray, after: np.ndarray) -> Run:
    sites = {"query_pre_rope": before, "query_post_rope": after}
    groups = {site: label_norms({0: channel_norms(x)}) for site, x in sites.items()}
    return Run.in_memory([(0, groups)], {}, {"model_name": "norms"})


# -- what it says ----------------------------------------------------------------------------------------


def test_the_statement_holds_the_numbers(found):
    said = " ".join(sink_statement(found).split())
    for part in (
        "planted, step 10: 10 of 28 heads sink on the first token",
        "(of 64 tokens, BOS no)",
        "Learned sinks: 2 heads give theirs 99% of their attention.",
        "Logits: 2 negative infinity, 2 mixed, 4 balanced, 2 unclear.",
        "concentrated in 6 heads, spread in 4",
        "6 by alignment, 2 by norm, 2 by neither",
        "1 of 16 carry 90% of the sink key's logit",
        "below 0.5 in 10 of 10 sink heads",
        "5 of 10 sink heads read a massive activation of the first token",
        "between steps 0 and 10",
    ):
        assert part in said, part
    assert "0 of 28 heads sink" in sink_statement(found, step=0)
    assert "there is no sink to explain" in " ".join(sink_statement(found, step=0).split())
    with pytest.raises(UsageError, match=r"there is no step 7; there are 0, 10"):
        sink_statement(found, step=7)


def test_evidence_that_a_run_lacks_is_nan_and_left_out_of_the_statement(run):
    lost = ["sink_logit_contribution", "sink_logit_channels_90", "sink_cosine", "value_drain"]
    poor = without(run, [f"attention/{name}" for name in lost] + ["residual_post", "embedding"])
    found = sink_implementation(poor)
    assert of_kind(found, "mixed")["kind"].item() == "mixed"
    assert of_kind(found, "mixed")["channel_use"].item() == "not measured"
    assert of_kind(found, "mixed")["geometry"].item() == "not measured"
    assert np.isnan(found["value_drain"]).all()
    assert np.isnan(found["residual_spike"]).all()
    said = sink_statement(found)
    assert "Logits:" in said
    assert not any(
        word in said for word in ("Channels", "Alignment", "Rotary", "Value drain", "Residual", "nan")
    )


def test_what_cannot_be_answered_is_refused(run):
    with pytest.raises(StoreError, match=r"looks at attention, and the run has no site 'attention'"):
        sink_implementation(without(run, ["attention"]))
    with pytest.raises(
        StoreError, match=r"needs logit_density at the site 'attention', which the run of planted"
    ):
        sink_implementation(without(run, ["attention/logit_density"]))
    with pytest.raises(StoreError, match=r"needs epsilon 0.4, and the run of planted has 0.1, 0.2, 0.3"):
        sink_implementation(run, rules=SinkRules(epsilon=0.4))
    with pytest.raises(UsageError, match=r"the run of planted has no step 3; the nearest are 0, 10"):
        sink_implementation(run, steps=[3])
    with pytest.raises(UsageError, match=r"steps is empty; leave it out for all"):
        sink_implementation(run, steps=[])
    with pytest.raises(UsageError, match=r"every token is a sequence of its own"):
        sink_implementation(with_attrs(run, sequence_length=1))


def test_edges_of_the_bins_follow_from_their_centres():
    for grid in (LogitGrid(), LogitGrid(bins=64, limit=50.0)):
        np.testing.assert_allclose(logit_edges(grid.centres), grid.edges, rtol=1e-9, atol=1e-12)


# -- a real model ----------------------------------------------------------------------------------------


def test_a_random_model_has_no_sinks_and_its_rotary_pairs_are_found(tmp_path):
    run = osp_diag.probe(
        llama(), tokenizer=byte_tokenizer(), tokens=512, seq_len=64, out=tmp_path / "run.zarr", device="cpu"
    )
    found = sink_implementation(run)
    assert (found["kind"] == "no sink").all()
    assert found.attrs["rotary_layout"] == "half"
    np.testing.assert_allclose(
        found["frequency_contribution"].sum("frequency"),
        found["sink_logit_contribution"].sum("head_channel"),
        rtol=1e-5,
        atol=1e-9,
    )
    assert "there is no sink to explain" in " ".join(sink_statement(found).split())
