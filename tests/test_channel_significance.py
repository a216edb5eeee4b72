"""Significance of a comparison of channels: planted differences are found, chance is not."""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import kstest

import osp_diag
from osp_diag.analyses.channels.comparison import compare_channels
from osp_diag.analyses.channels.significance import group_sums
from osp_diag.cli.main import main
from tests.channel_runs import grouped_run, profile
from tests.tiny_checkpoints import byte_tokenizer, llama

APART = {"token_fingerprint": "other tokens"}


def pair(seed: int, heights: np.ndarray, others: np.ndarray, *, paired: bool = False, **options):
    """Two runs with these channels; fed the same tokens only if ``paired``."""
    rng = np.random.default_rng(seed)
    one = grouped_run(rng, heights=heights, model_name="one", **options)
    told = {"model_name": "two", "model_fingerprint": "two"} | ({} if paired else APART)
    return one, grouped_run(rng, heights=others, **told, **options)


def test_planted_differences_are_found_and_hardly_any_others():
    heights = np.stack([profile(400), profile(400)])
    planted = heights.copy()
    planted[1, 10:30] *= 1.3
    found = compare_channels(*pair(0, heights, planted)).data.sel(site="residual_post")
    different = found["difference_q"].values < 0.05
    assert different[1, 10:30].all()
    assert different.sum() - 20 <= 4  # 5% of those found, and some luck
    assert found["different_channels"].values.tolist() == different.sum(axis=1).tolist()
    margin = found["difference_margin"].values[1, 10:30]
    inside = np.abs(found["difference"].values[1, 10:30] + np.log10(1.3)) < margin
    assert inside.mean() > 0.8


@pytest.mark.parametrize("paired", [False, True])
def test_without_a_difference_p_is_uniform_and_little_is_found(paired):
    from osp_diag.analyses.channels import significance as module

    heights = np.stack([profile(600)])
    one, two = pair(1, heights, heights, paired=paired)
    sums = [group_sums(run, "residual_post", 7, "all") for run in (one, two)]
    rng = np.random.default_rng(2)
    draws = [module._weights(rng, 8) for _ in range(2)]
    if paired:
        draws[1] = draws[0]
    freedom = 7
    p = module._of_layer(*sums, 0, draws, paired=paired, freedom=freedom)["difference_p"]
    if paired:
        assert kstest(p, "uniform").pvalue > 0.01
        assert 0.02 < (p < 0.05).mean() < 0.08
    else:  # two sets of groups have more degrees of freedom than the min(G) - 1 used: on the safe side
        assert (p < 0.05).mean() < 0.06
        assert kstest(p, "uniform", alternative="greater").pvalue > 0.01
    found = compare_channels(one, two).data
    assert int(found["different_channels"].sum()) <= 3


def test_intervals_of_kurtosis_and_concentration_hold_what_they_say():
    heights = np.stack([profile(30, {3: 6.0})])
    held = np.zeros(2)
    trials = 80
    truth = (5.0, 36 / (36 + 29))
    for seed in range(trials):
        one, two = pair(seed, heights, heights)
        found = compare_channels(one, two).data.sel(site="residual_post", layer=0, run="one")
        for place, name in enumerate(("osp_excess_kurtosis", "top_share")):
            held[place] += abs(found[name].item() - truth[place]) < found[f"{name}_margin"].item()
    assert (held / trials > 0.88).all()
    assert (held / trials < 0.995).all()


def test_runs_of_the_same_tokens_are_compared_group_by_group():
    rng = np.random.default_rng(3)
    heights = np.stack([profile(200)])
    planted = heights * np.where(np.arange(200) < 20, 1.05, 1.0)
    shared = 0.5 * rng.standard_normal((8, 1, 200))
    together = compare_channels(*pair(4, heights, planted, paired=True, noise=0.01, shared=shared))
    apart = compare_channels(*pair(4, heights, planted, noise=0.01, shared=shared))
    assert "resampled together" in together.data.attrs["significance"]
    assert "resampled apart" in apart.data.attrs["significance"]
    q = together.data["difference_q"].squeeze().values
    assert (q[:20] < 0.05).all()
    assert (q[20:] < 0.05).sum() <= 3
    assert int(apart.data["different_channels"].sum()) == 0


def test_a_larger_kurtosis_is_told_with_its_interval():
    heights = np.stack([profile(50), profile(50)])
    rng = np.random.default_rng(5)
    one = grouped_run(rng, heights=heights, kurtosis=80.0, model_name="one")
    two = grouped_run(rng, heights=heights, kurtosis=2.0, model_name="two", model_fingerprint="two")
    comparison = compare_channels(one, two)
    found = comparison.data.sel(site="residual_post")
    assert (found["osp_excess_kurtosis_difference_q"] < 1e-4).all()
    assert (found["osp_excess_kurtosis_difference_margin"] < 5).all()
    text = " ".join(comparison.text().split())
    assert "Significance, OSP kurtosis at residual_post: " in text
    assert "different in 2 of 2 layers" in text
    assert "channels (all layers of residual_post) differ at a false discovery rate of 5%" in text
    layer = comparison.as_dict()["sites"]["residual_post"]["layers"][0]
    assert layer["osp_excess_kurtosis_difference"] == pytest.approx(78, abs=5)
    assert comparison.netcdf()


def test_other_widths_and_few_groups():
    one, _ = pair(6, np.stack([profile(50)]), np.stack([profile(50)]))
    _, wide = pair(6, np.stack([profile(90)]), np.stack([profile(90)]))
    found = compare_channels(one, wide).data
    assert "difference_q" not in found
    assert found["top_share_difference_q"].notnull().all()
    few = pair(7, np.stack([profile(50)]), np.stack([profile(50)]), groups=2)
    notes = compare_channels(*few)
    assert "difference_q" not in notes.data
    assert notes.data.attrs["significance"].startswith("not given: a bootstrap over token batches needs")


def test_a_probed_checkpoint_equals_itself_and_compare_says_how_it_knows(tmp_path, capsys):
    path = tmp_path / "run.zarr"
    osp_diag.probe(llama(), tokenizer=byte_tokenizer(), tokens=12 * 16, seq_len=16, out=path)
    assert main(["compare", str(path), str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert "over 8 groups of batches, resampled together" in said["significance"]
    layers = said["sites"]["residual_post"]["layers"]
    assert [layer["different_channels"] for layer in layers] == [0, 0]
    assert [layer["osp_excess_kurtosis_difference_q"] for layer in layers] == [1, 1]
    run = osp_diag.open_run(path)
    data = compare_channels(run, run).data.sel(site="residual_post")
    own = run.at("residual_post").isel(step=0).sel(stratum="all")
    for name, expected in (
        ("osp_excess_kurtosis", own["osp_excess_kurtosis"]),
        ("top_share", own["channel_share"].sel(top=1)),
    ):
        np.testing.assert_allclose(data[name].isel(run=0), expected, rtol=1e-5)
