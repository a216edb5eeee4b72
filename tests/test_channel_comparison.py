"""The comparison of two models' channels, on runs whose channels are known."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from osp_diag.analyses.channels.comparison import compare_channels, matched_layers
from osp_diag.analyses.channels.profiles import (
    concentration_curve,
    concentration_distance,
    hot_distance,
    peak_distance,
    profile_distance,
    relative_rms,
    top_profile,
)
from osp_diag.errors import StoreError, UsageError
from osp_diag.runs.run import Run
from tests.channel_runs import channel_run, profile
from tests.synthetic_runs import without

DISTANCES = ("profile_distance", "peak_distance", "concentration_distance", "hot_distance")


def layers(*rows: np.ndarray) -> np.ndarray:
    return np.stack(rows)


@pytest.fixture(scope="module")
def first():
    """Channels 3 (in both layers) and 10 (in the second) are hot."""
    return channel_run(
        {"residual_post": layers(profile(100, {3: 10.0}), profile(100, {3: 100.0, 10: 10.0}))},
        model_name="one",
    )


@pytest.fixture(scope="module")
def second():
    """Channel 3 is hot in both layers, 20 in the first; everything 7 times as large."""
    return channel_run(
        {"residual_post": layers(profile(100, {3: 10.0, 20: 10.0}, 7.0), profile(100, {3: 10.0}, 7.0))},
        model_name="two",
        model_fingerprint="two",
    )


# -- the measures ----------------------------------------------------------------------------------------


def test_profiles_are_relative_to_the_lower_median():
    np.testing.assert_allclose(relative_rms(np.array([[4.0, 2.0, 8.0, 6.0]])), [[1.0, 0.5, 2.0, 1.5]])
    undefined = np.array([[0.0, 0.0, 1.0], [1.0, np.nan, 1.0], [1.0, np.inf, 1.0]])
    assert np.isnan(relative_rms(undefined)).all()


def test_one_hot_channel_has_known_distances():
    plain, spiked = profile(100), profile(100, {40: 1000.0})
    assert profile_distance(plain, spiked) == pytest.approx(3 / 100)  # 3 decades in 1% of the channels
    assert peak_distance(plain, spiked) == pytest.approx(3)
    assert hot_distance(plain, spiked) == pytest.approx(3)
    curves = [concentration_curve(values) for values in (plain, spiked)]
    energy = 1e6 / (1e6 + 99)
    assert concentration_distance(*curves) == pytest.approx(energy - 1 / 100)
    np.testing.assert_allclose(curves[0], np.linspace(0, 1, 101))
    np.testing.assert_allclose(curves[1][:3], [0, energy, energy + 1 / (1e6 + 99)])


def test_hot_channels_are_matched_by_height():
    one, two = profile(50, {1: 100.0, 2: 10.0}), profile(50, {30: 1000.0})
    assert hot_distance(one, two) == pytest.approx((1 + 1) / 2)  # 100 with 1000, 10 with 1
    assert hot_distance(profile(50), profile(50)) == 0.0
    assert hot_distance(profile(1), profile(50, {0: 10.0})) == pytest.approx(1)


def test_the_top_profile_keeps_the_hottest_channel():
    values = profile(10, {4: 8.0, 7: 5.0})
    shares = np.array([1e-5, 0.1, 0.11, 0.2, 0.3, 1.0])
    np.testing.assert_array_equal(top_profile(values, shares), [8, 8, 5, 5, 1, 1])


@given(
    st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=20),
    st.integers(1, 4),
    st.floats(1e-3, 1e3),
    st.randoms(use_true_random=False),
)
def test_neither_width_nor_scale_nor_order_makes_a_distance(heights, times, scale, random):
    one = np.array(heights)
    other = scale * np.repeat(one, times)
    random.shuffle(other)
    a, b = relative_rms(one), relative_rms(other)
    assert profile_distance(a, b) == pytest.approx(0, abs=1e-9)
    assert peak_distance(a, b) == pytest.approx(0, abs=1e-9)
    assert concentration_distance(*map(concentration_curve, (one, other))) == pytest.approx(0, abs=1e-9)


def test_what_is_undefined_stays_undefined():
    nothing, even = np.full(4, np.nan), np.ones(4)
    for distance in (profile_distance, peak_distance, hot_distance):
        assert np.isnan(distance(nothing, even))
        assert np.isnan(distance(even, nothing))
    np.testing.assert_allclose(concentration_curve(np.zeros(4)), [0, 0.25, 0.5, 0.75, 1])


def test_layers_match_by_number_or_by_depth():
    assert matched_layers([0, 1, 2], [0, 2], 3, 3) == [(0, 0), (2, 2)]
    assert matched_layers([5], [29], 6, 30) == [(5, 29)]
    assert matched_layers([0, 1], [0, 1, 2, 3, 4, 5], 2, 6) == [(0, 1), (1, 4)]
    assert matched_layers([0, 1, 2, 3], [0, 1], None, None) == [(0, 0), (1, 0), (2, 1), (3, 1)]


def test_permuted_channels_have_equal_profiles_but_are_not_equal():
    one = channel_run({"residual_post": layers(profile(20, {5: 10.0}))})
    two = channel_run({"residual_post": layers(profile(20, {6: 10.0}))}, model_name="two")
    found = compare_channels(one, two)
    assert found.data["profile_distance"].item() == 0
    assert "The sorted profiles are equal everywhere." in found.text()


def test_runs_of_other_layers_are_refused():
    one = channel_run({"residual_post": layers(profile(20), profile(20))})
    two = with_layers(one, [2, 3])
    with pytest.raises(
        StoreError, match="have no layer in common at any site; probe both at the same layers"
    ):
        compare_channels(one, two)


def with_layers(run: Run, numbers: list[int]) -> Run:
    nodes = {node.path: node.to_dataset(inherit=False) for node in run.tree.subtree}
    nodes["/residual_post"] = nodes["/residual_post"].assign_coords(layer=numbers)
    return Run(xr.DataTree.from_dict(nodes))


# -- runs ------------------------------------------------------------------------------------------------


def test_a_run_equals_itself(first):
    found = compare_channels(first, first)
    for name in DISTANCES:
        np.testing.assert_array_equal(found.data[name], np.zeros((1, 2)))
    assert float(np.abs(found.data["difference"]).max()) == 0.0
    assert list(found.data["run"].values) == ["one, run 1", "one, run 2"]
    assert set(found.data["hot_kind"].values) == {"shared"}
    assert "The channels are equal everywhere." in found.text()
    assert not any("unrelated" in note for note in found.notes)


def test_planted_hot_channels_are_found_shared_and_private(first, second):
    data = compare_channels(first, second).data
    site = data.sel(site="residual_post")
    assert site["hot_count"].values.tolist() == [[1, 2], [2, 1]]
    assert site["shared_hot_count"].values.tolist() == [1, 1]
    assert site["expected_shared_hot_count"].values == pytest.approx([0.02, 0.02])
    assert site["hot_jaccard"].values == pytest.approx([1 / 2, 1 / 2])
    table = {
        int(channel): (kind, ratio.tolist(), count.tolist())
        for channel, kind, ratio, count in zip(
            data["hot_channel"].values,
            data["hot_kind"].values,
            data["hot_ratio"].values.T,
            data["hot_layers"].values.T,
            strict=True,
        )
    }
    assert table == {
        3: ("shared", pytest.approx([100, 10]), [2, 2]),
        10: ("only first", pytest.approx([10, 1]), [1, 0]),
        20: ("only second", pytest.approx([1, 10]), [0, 1]),
    }
    assert int(data["hot_channel"][0]) == 3  # hottest first


def test_maps_and_their_difference(first, second):
    site = compare_channels(first, second).data.sel(site="residual_post")
    relative = site["relative_rms"]
    assert relative.sel(run="two", layer=0, channel=20).item() == 10
    expected = np.zeros((2, 100))
    expected[0, 20], expected[1, 3], expected[1, 10] = -1, 1, 1
    np.testing.assert_allclose(site["difference"], expected, atol=1e-6)
    hottest = site["sorted_difference"].isel(width_share=0).values
    np.testing.assert_allclose(hottest, [0, 1], atol=1e-9)
    np.testing.assert_allclose(site["energy_share"].sel(run="one", layer=0, k=1), 100 / 199)
    assert site["profile_distance"].values == pytest.approx([1 / 100, (1 + 1) / 100])
    assert site["peak_distance"].values == pytest.approx([0, 1], abs=1e-12)
    assert site["hot_distance"].values == pytest.approx([1 / 2, 1])
    assert all("definition" in data.attrs for data in (site["difference"], site["profile_distance"]))


def test_widths_may_differ():
    narrow = channel_run({"mlp_hidden": layers(profile(50, {1: 20.0}))}, model_name="narrow")
    wide = channel_run({"mlp_hidden": layers(profile(100, {7: 20.0, 8: 20.0}))}, model_name="wide")
    found = compare_channels(narrow, wide)
    site = found.data.sel(site="mlp_hidden", layer=0)
    for name in ("profile_distance", "peak_distance", "concentration_distance"):
        assert site[name].item() == pytest.approx(0, abs=1e-12)
    assert site["hot_distance"].item() == pytest.approx(np.log10(20) / 2)  # one hot channel against two
    assert np.isnan(site["shared_hot_count"].item())
    assert np.isnan(site["difference"].values).all()
    np.testing.assert_allclose(site["sorted_difference"], 0, atol=1e-12)
    assert sorted(found.data["hot_kind"].values.tolist()) == ["only first", "only second", "only second"]
    note = "widths differ (mlp_hidden 50 and 100): there, channels are compared by sorted profile only, on "
    assert note + "shares of the width" in found.notes


def test_depths_may_differ():
    deep = np.stack([profile(10, {0: float(height)}) for height in (10, 20, 30, 40)])
    shallow = channel_run({"residual_post": deep[[0, 2]]}, model_name="shallow")
    whole = channel_run({"residual_post": deep}, model_name="deep")
    found = compare_channels(shallow, whole)
    assert found.data["other_layer"].values.tolist() == [[0, 2]]
    assert float(found.data["profile_distance"].max()) == pytest.approx(0, abs=1e-12)
    assert any("matched by relative depth" in note for note in found.notes)
    assert any(note.startswith("2 layers of the second model have no match") for note in found.notes)


def test_two_steps_of_one_run():
    early, late = profile(20), profile(20, {5: 10.0})
    run = channel_run({"residual_post": layers(late)}, earlier={"residual_post": layers(early)})
    found = compare_channels(run, run, step=0, other_step=7)
    assert list(found.data["run"].values) == ["made-up, step 0", "made-up, step 7"]
    assert found.data["hot_kind"].values.tolist() == ["only second"]
    assert found.data["peak_distance"].item() == pytest.approx(1)
    with pytest.raises(UsageError, match="the run of made-up has no step 3; the nearest are 0, 7"):
        compare_channels(run, run, step=3)


def test_a_stratum_is_compared_alone():
    spiky = channel_run({"residual_post": layers(profile(20, {5: 100.0}))}, rest=0.0)
    even = channel_run({"residual_post": layers(profile(20))})
    assert compare_channels(spiky, even).data["peak_distance"].item() == pytest.approx(2)
    assert compare_channels(spiky, even, stratum="rest").data["peak_distance"].item() == 0
    none = compare_channels(spiky, even, stratum="delimiter")
    assert np.isnan(none.data["peak_distance"].item())
    assert np.isnan(none.data["hot_count"].values).all()
    assert any(note.startswith("residual_post, layers 0: not compared; there are no") for note in none.notes)
    assert "No layer could be compared" in none.text()
    with pytest.raises(UsageError, match="the stratum is one of all, first, delimiter, rest, not 'last'"):
        compare_channels(spiky, even, stratum="last")


def test_what_cannot_be_compared_is_refused(first, second):
    other = channel_run({"residual_post": layers(profile(100))}, model_name="two", protocol="osp-published")
    with pytest.raises(UsageError, match="one and two were probed under different protocols, sequence and"):
        compare_channels(first, other)
    with pytest.raises(StoreError, match="have no site in common with channel_rms; probe both with the est"):
        compare_channels(first, channel_run({"value": layers(profile(100))}, model_name="two"))
    with pytest.raises(
        UsageError, match="the run of one has no channel_rms at 'value'; it has residual_post"
    ):
        compare_channels(first, second, sites=["value"])


def test_what_differs_beside_the_models_is_noted(first):
    other = channel_run(
        {"residual_post": layers(profile(100), profile(100)), "value": layers(profile(100))},
        model_name="two",
        tokenizer="another",
        sequence_length=16,
        bos="document",
    )
    notes = compare_channels(first, other).notes
    assert any("were fed different tokens (tokenizer differ)" in note for note in notes)
    assert any(note.startswith("sequences of 8 and 16 tokens: first tokens weigh differ") for note in notes)
    assert "BOS differs: no and document" in notes
    assert any(note.startswith("value is not compared: the run of one does not hold it") for note in notes)
    assert any(note.startswith("weights not compared, for not both runs hold them: norm") for note in notes)
    rest = compare_channels(first, other, stratum="rest").notes
    assert not any("first tokens weigh" in note for note in rest)


def test_bases_of_other_models_are_said_to_be_unrelated_and_significance_is_not_given(first, second):
    found = compare_channels(first, second)
    assert any(note.startswith("bases of separately trained models are unrelated") for note in found.notes)
    text = " ".join(found.text().split())
    assert "significance not given: a bootstrap over token batches needs the channel sums of groups" in text
    assert "which one and two do not keep for these tokens; probe again with --token-groups 8" in text
    assert found.as_dict()["significance"].startswith("not given")


def test_weights_are_compared_where_both_runs_hold_them():
    def norms(gain: float) -> xr.Dataset:
        values = np.array([[1.0, gain]])
        return xr.Dataset(
            {"gain_max": (("layer", "norm"), values), "max_median_ratio": (("layer", "norm"), 2 * values)},
            coords={"layer": [0], "norm": ["input_layernorm", "post_attention_layernorm"]},
        )

    def down(ratio: float) -> xr.Dataset:
        rows = np.full((1, 20), 3.0)
        rows[0, 5] = ratio
        return xr.Dataset(
            {"weight_outlier_row_ratio": (("layer", "output_channel"), rows)},
            coords={"layer": [0], "output_channel": np.arange(20)},
        )

    sites = {"residual_post": layers(profile(20, {5: 30.0}))}
    one = channel_run(
        sites, model_name="one", groups={"weights/norm_gain": norms(4.0), "mlp_down_weight": down(9.0)}
    )
    two = channel_run(
        sites, model_name="two", groups={"weights/norm_gain": norms(1.0), "mlp_down_weight": down(6.0)}
    )
    found = compare_channels(one, two)
    largest = found.data["norm_gain_max"].max(("weight_layer", "norm"))
    assert dict(zip(largest["run"].values, largest.values, strict=True)) == {"one": 4.0, "two": 1.0}
    text = found.text()
    assert "Norm gains of blocks, largest over median: 8 (A), 2 (B)" in text
    assert "of A's hot channels of residual_post (5): largest 9, median of all rows 3" in text
    note = next(note for note in found.notes if note.startswith("weights not compared"))
    assert "embedding rows (weights:embedding_rows)" in note
    assert "norm gains" not in note


def test_rows_that_write_hot_channels_are_compared_where_checkpoints_were_probed():
    def maps(height: float) -> dict[str, xr.Dataset]:
        rows = np.full((2, 20), 0.5)
        rows[1, 5] = 0.5 * height
        wrong = xr.Dataset({"row_maximum": (("layer", "output_channel"), np.ones((2, 7)))})
        kept = xr.Dataset(
            {"row_maximum": (("layer", "output_channel"), rows)},
            coords={"layer": [0, 3], "output_channel": np.arange(20)},
        )
        return {"weight_map/self_attn.o_proj": kept, "weight_map/mlp.up_proj": wrong}

    sites = {"residual_post": layers(profile(20, {5: 30.0}))}
    one, two = (
        channel_run(sites, model_name=name, static=maps(height), hidden_size=20)
        for name, height in (("one", 6.0), ("two", 1.0))
    )
    found = compare_channels(one, two)
    ratio = found.data["projection_row_ratio"]
    assert ratio["projection"].values.tolist() == ["self_attn.o_proj"]
    assert ratio.sel(run="one", projection_layer=3, output_channel=5).item() == 6
    assert ratio.sel(run="two").max() == 1
    text = " ".join(found.text().split())
    assert (
        "Rows of self_attn.o_proj that write A's hot channels (5): max |W| up to 6 times that of the median "
        "row (channel 5, the 1st largest of 20 rows)"
    ) in text
    assert found.netcdf()
    assert "projection_row_ratio" not in compare_channels(one, channel_run(sites, model_name="two")).data


def test_one_run_in_need_of_a_site_says_its_reason(first):
    bare = channel_run(
        {"residual_post": layers(profile(100), profile(100)), "value": layers(profile(100))}, model_name="two"
    )
    reasoned = without(bare, ["value"])
    reasoned.tree.attrs["absent_sites"] = {"value": "the projection is fused"}
    with pytest.raises(UsageError, match=r"has no channel_rms at 'value' \(the projection is fused\)"):
        compare_channels(bare, reasoned, sites=["value"])
