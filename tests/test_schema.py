"""What a run is made of, and the numbers to know first: one definition, whoever asks."""

from __future__ import annotations

import numpy as np
import pytest
import xarray as xr

from osp_diag.analyses.channels.comparison import compare_channels
from osp_diag.analyses.channels.hot import hot_channels
from osp_diag.analyses.channels.profiles import lower_median
from osp_diag.analyses.summary.summary import summarise
from osp_diag.analyses.summary.verdict import verdict
from osp_diag.errors import MissingError, StoreError, UsageError
from osp_diag.figures._hidden_states import kurtosis_by_step
from osp_diag.figures.report.tables import channel_table
from osp_diag.runs.headline import headline, headline_kurtosis
from osp_diag.runs.run import Run
from osp_diag.schema import BESIDE, SITES, STRATA, in_site_order, is_site, network_order
from osp_diag.trainer.headline import headline as logged_headline

WIDTH = 64


def statistic(value: float | list[float], estimator: str = "osp_excess_kurtosis/1") -> xr.DataArray:
    layers = np.atleast_1d(np.asarray(value, dtype=float))
    return xr.DataArray(
        np.repeat(layers[:, None], len(STRATA), axis=1),
        dims=("layer", "stratum"),
        coords={"layer": np.arange(len(layers)), "stratum": list(STRATA)},
        attrs={"estimator": estimator, "units": "1", "definition": estimator},
    )


def kurtosis_run(**attrs) -> Run:
    """Embedding 0, one block 10, final norm 5: the OSP script's mean is (0 + 5) / 2."""
    values = {"embedding": 0.0, "residual_post": 10.0, "final_norm": 5.0}
    return run_of(
        {site: xr.Dataset({"osp_excess_kurtosis": statistic(v)}) for site, v in values.items()}, **attrs
    )


def run_of(groups: dict[str, xr.Dataset], **attrs) -> Run:
    return Run.in_memory([(0, groups)], {}, {"hidden_size": WIDTH, "model_name": "made-up"} | attrs)


def without(run: Run, *sites: str) -> Run:
    groups = {site: run.at(site).isel(step=0, drop=True) for site in run.sites if site not in sites}
    return Run.in_memory([(0, groups)], {}, run.attrs)


class TestSites:
    def test_what_stands_beside_sites_is_no_site_and_stays_readable(self):
        update = xr.Dataset({"update_top_share": ("layer", [0.5])}, {"layer": [0]})
        run = run_of(
            {"residual_post": xr.Dataset({"osp_excess_kurtosis": statistic(1.0)}), "optimizer/update": update}
        )
        assert run.sites == ["residual_post"]
        assert run.beside == ["optimizer:update"]
        assert run["optimizer:update"]["update_top_share"].item() == 0.5
        assert "update_top_share" not in run.statistics

    def test_a_site_that_a_user_named_is_one_where_the_run_declares_it(self):
        groups = {"my_gate": xr.Dataset({"osp_excess_kurtosis": statistic(1.0)})}
        assert run_of(groups).sites == []
        assert run_of(groups, sites={"my_gate": "the gate"}).sites == ["my_gate"]

    def test_the_vocabulary_is_whole(self):
        assert not set(SITES) & set(BESIDE)
        assert all(is_site(site) for site in (*SITES, "linear_input:mlp.up_proj"))
        assert not any(is_site(group) for group in (*BESIDE, "optimizer:update"))
        assert in_site_order(reversed(SITES)) == list(SITES)
        places = [(site, 3) for site in SITES]
        assert [site for site, _ in network_order(reversed(places))] == list(SITES)


class TestStatistics:
    def test_one_name_under_two_estimators_is_not_joined(self):
        run = run_of(
            {
                "embedding": xr.Dataset({"max_median_ratio": statistic(2.0, "max_median_ratio/1")}),
                "residual_post": xr.Dataset({"max_median_ratio": statistic(3.0, "max_median_ratio/2")}),
            }
        )
        with pytest.raises(
            StoreError, match=r"different estimators \(max_median_ratio/1 at embedding; max_median"
        ):
            run["max_median_ratio"]
        assert run.at("embedding")["max_median_ratio"].sel(stratum="all").item() == 2.0

    def test_the_errors_are_also_pythons_own(self):
        run = kurtosis_run()
        with pytest.raises(KeyError, match="has no statistic 'kurtosis'; did you mean osp_excess_kurtosis"):
            run["kurtosis"]
        with pytest.raises(
            MissingError, match=r"^the run has no site 'residual_pots'; did you mean residual_post"
        ):
            run.at("residual_pots")
        with pytest.raises(ValueError, match="the run of made-up has no step 7; the nearest are 0"):
            summarise(run, step=7)
        assert issubclass(UsageError, ValueError)


class TestHeadline:
    def everywhere(self, run: Run) -> set[float | None]:
        """The headline number as each part of the house gives it."""
        groups = {site: run.at(site).isel(step=0, drop=True) for site in run.sites}
        try:
            drawn = kurtosis_by_step(run, "kurtosis_dynamics")[1][0]
        except StoreError:
            drawn = None
        return {
            headline(run).get("osp_excess_kurtosis"),
            headline_kurtosis(run).get("all"),
            summarise(run).osp_kurtosis,
            verdict(run).summary.osp_kurtosis,
            logged_headline(groups, run.declared_absent).get("osp_diag/osp_excess_kurtosis"),
            drawn,
        }

    def test_with_one_block_it_is_the_mean_of_embedding_and_final_norm(self):
        run = kurtosis_run()
        assert self.everywhere(run) == {2.5}
        assert "OSP excess kurtosis  2.5 (mean over 2 hidden states)" in repr(run)

    def test_where_one_state_is_nan_there_is_none_either(self):
        values = {"embedding": 0.0, "residual_post": 10.0, "final_norm": np.nan}
        run = run_of({site: xr.Dataset({"osp_excess_kurtosis": statistic(v)}) for site, v in values.items()})
        assert {
            number for number in self.everywhere(run) if number is not None and np.isfinite(number)
        } == set()

    @pytest.mark.parametrize("missing", ["embedding", "residual_post"])
    def test_without_a_state_there_is_none(self, missing):
        run = without(kurtosis_run(), missing)
        assert self.everywhere(run) == {None}
        assert "OSP excess kurtosis" not in repr(run)

    def test_without_a_final_norm_the_last_block_ends_the_list(self):
        assert self.everywhere(without(kurtosis_run(absent_sites={"final_norm": "none"}), "final_norm")) == {
            5.0
        }

    def test_a_final_norm_that_was_not_measured_is_not_taken_for_none(self):
        run = without(kurtosis_run(absent_sites={"value": "no attention"}), "final_norm")
        assert self.everywhere(run) == {None}
        assert "not measured at final_norm" in summarise(run).note


class TestHotChannels:
    def run(self, hottest: float) -> Run:
        rms = np.ones((1, 4, 8))
        rms[..., 4:] = 2.0  # the two middle channels are 1 and 2: the lower median is 1, the mean of both 1.5
        rms[..., 7] = hottest
        values = xr.DataArray(
            rms, dims=("layer", "stratum", "channel"), coords={"layer": [0], "stratum": list(STRATA)},
            attrs={"estimator": "channel_moments/1"},
        ).assign_coords(channel=np.arange(8))  # fmt: skip
        return run_of({"residual_post": xr.Dataset({"channel_rms": values})})

    @pytest.mark.parametrize(("hottest", "hot"), [(5.0, 1), (4.99, 0)])
    def test_five_times_the_lower_median_is_hot_everywhere(self, hottest, hot):
        run = self.run(hottest)
        course = hot_channels(run, top=2)
        assert course["hot_count"].sel(stratum="rest").item() == hot
        assert course["peak"].sel(stratum="rest").max().item() == hottest
        table = channel_table([run], ["made-up"], [None])
        assert [cells[1] for _, cells in table.rows] == [7, 7] * hot
        comparison = compare_channels(run, self.run(3.0)).data
        assert comparison["hot_count"].sel(run=comparison["run"].values[0]).sum().item() == hot

    def test_the_lower_median_is_an_element(self):
        assert lower_median(np.array([[4.0, 1.0, 3.0, 2.0]])).tolist() == [[2.0]]
        assert lower_median(np.array([[5.0, 1.0, 3.0]])).tolist() == [[3.0]]


def test_probe_and_report_judge_alike():
    heads = xr.DataArray([[150.0, 3.0]], dims=("layer", "head"), coords={"layer": [0]})
    run = kurtosis_run()
    groups = {site: run.at(site).isel(step=0, drop=True) for site in run.sites}
    run = run_of(groups | {"attention": xr.Dataset({"max_logit": heads})})
    assert run.summary().verdict == run.verdict().headline == verdict(run).headline
    assert run.summary().verdict.endswith("attention logits above 100")
