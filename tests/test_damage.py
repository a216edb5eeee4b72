"""Which statistic predicts damage: one number a checkpoint, ranks against SciPy, too few checkpoints."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr
from scipy.stats import spearmanr

from osp_diag.analyses.damage import HEADLINE, damage_table, rank_correlations, statistics_of
from osp_diag.errors import StoreError, UsageError
from osp_diag.runs.headline import headline_kurtosis
from tests.recipe_runs import training_run
from tests.synthetic_runs import synthetic_run, without
from tests.synthetic_statics import few_bits


def a_table(seed: int = 0, checkpoints: int = 9) -> xr.Dataset:
    generator = np.random.default_rng(seed)
    damage = generator.lognormal(size=(checkpoints, 2))
    # With ties, one that orders as damage does, one that never changes, and one that is missing once.
    values = np.stack(
        [
            generator.integers(0, 4, checkpoints),
            damage[:, 0] ** 3,
            np.full(checkpoints, 2.0),
            np.where(np.arange(checkpoints) == 3, np.nan, 1.0),
        ],
        axis=1,
    )
    return xr.Dataset(
        {"value": (("checkpoint", "statistic"), values), "damage": (("checkpoint", "setting"), damage)},
        coords={
            "statistic": ["ties", "order", "constant", "missing"],
            "setting": ["W4A4", "W4A16"],
            "lineage": ("checkpoint", [f"training {i // 3}" for i in range(checkpoints)]),
        },
    )


@pytest.mark.parametrize("seed", range(5))
def test_the_correlation_is_spearmans(seed):
    table = a_table(seed)
    correlations = rank_correlations(table, resamples=0)["correlation"]
    for statistic in ("ties", "order"):
        for setting in table["setting"].values:
            expected = spearmanr(
                table["value"].sel(statistic=statistic), table["damage"].sel(setting=setting)
            ).statistic
            assert float(correlations.sel(statistic=statistic, setting=setting)) == pytest.approx(expected)


def test_what_does_not_vary_or_is_missing_has_no_correlation():
    correlations = rank_correlations(a_table())
    assert np.isnan(correlations["correlation"].sel(statistic=["constant", "missing"])).all()
    assert float(correlations["correlation"].sel(statistic="order", setting="W4A4")) == pytest.approx(1.0)
    assert float(correlations["low"].sel(statistic="order", setting="W4A4")) == pytest.approx(1.0)


def test_checkpoints_of_one_training_are_one_piece_of_evidence():
    table = a_table()
    apart = table.assign_coords(lineage=("checkpoint", [str(i) for i in range(9)]))
    width = [
        float((r["high"] - r["low"]).sel(statistic="ties", setting="W4A4"))
        for r in map(rank_correlations, (table, apart))
    ]
    assert width[0] != width[1]


def test_too_few_checkpoints_are_refused():
    with pytest.raises(UsageError, match="rank correlations of 4 checkpoints say nothing; give 5 or more"):
        rank_correlations(a_table(checkpoints=4))


def test_a_run_gives_one_number_for_each_statistic():
    run = synthetic_run()
    numbers = statistics_of(run)
    assert numbers[HEADLINE] == headline_kurtosis(run)["all"]
    site = run.at("residual_post").isel(step=-1)["osp_excess_kurtosis"].sel(stratum="rest")
    assert numbers["residual_post osp_excess_kurtosis [rest] mean"] == pytest.approx(float(site.mean()))
    assert numbers["residual_post osp_excess_kurtosis [rest] largest"] == pytest.approx(float(site.max()))
    assert not [name for name in numbers if "channel_rms" in name]


def test_damage_is_counted_from_full_precision():
    runs = {}
    for name, harm in {"quiet": 0.1, "loud": 1.0}.items():
        run = training_run("Adam", [0.2, 40.0])
        run.tree["quantization"] = few_bits(harm)
        runs[name] = run
    table = damage_table(runs, {"quiet": "one", "loud": "one"})
    assert list(table["lineage"].values) == ["one", "one"]
    label = next(name for name in table["setting"].values if name.startswith("W4A4"))
    results = runs["loud"]["quantization"]
    rows = {
        tuple(int(results[f"{part}_bits"][i]) for part in ("weight", "activation")): float(
            results["negative_log_likelihood"][i]
        )
        for i in range(results.sizes["setting"])
    }
    assert float(table["damage"].sel(checkpoint="loud", setting=label)) == pytest.approx(
        rows[4, 4] - rows[16, 16]
    )
    assert float(table["damage"].sel(setting=label, checkpoint="quiet")) < 0.5 * float(
        table["damage"].sel(setting=label, checkpoint="loud")
    )


def test_a_run_without_results_is_refused():
    with pytest.raises(StoreError, match="holds no results at few bits; measure with"):
        damage_table({"a": without(synthetic_run(), ["quantization"])})
