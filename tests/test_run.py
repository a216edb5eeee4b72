"""Reading runs: access by statistic and by site, growing runs, bad paths, and how a run shows itself."""

from __future__ import annotations

import json
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

from osp_diag.errors import StoreError
from osp_diag.runs.headline import headline
from osp_diag.runs.run import Run, open_run
from osp_diag.runs.writer import RunWriter
from osp_diag.wording import number
from tests.run_fixtures import ATTRIBUTES, groups, site, snapshot, write_run


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("runs") / "run.zarr")


@pytest.fixture
def run(path: Path) -> Run:
    return open_run(path)


@pytest.fixture
def in_memory() -> Run:
    steps = [(step, groups(step)) for step in (0, 10, 20)]
    return Run.in_memory(steps, snapshot(), ATTRIBUTES, {"loss": {0: 3.0, 5: 2.9}, "grad_norm": {5: 1.0}})


class TestOpening:
    def test_what_it_says_of_itself(self, run: Run, path: Path) -> None:
        assert run.path == path
        assert run.attrs["protocol"] == "sequence"
        assert run.steps.tolist() == [0, 10, 20]
        assert run.sites == ["residual_post", "linear_input:mlp.down_proj"]
        assert run.absent_sites == {"query_post_rope": "no rotary embedding"}
        assert run.layers.tolist() == [0, 1, 2]
        assert run.estimators == ["osp_excess_kurtosis/1"]
        assert run.statistics == ["absolute_maximum", "channel_rms", "osp_excess_kurtosis", "token_count"]
        assert list(run) == run.statistics
        assert "osp_excess_kurtosis" in run
        assert "kurtosis" not in run
        assert list(run.summary_attributes)[:2] == ["model_name", "model_fingerprint"]
        assert "versions" not in run.summary_attributes

    def test_nothing_is_loaded_before_it_is_used(self, run: Run) -> None:
        assert not run.at("residual_post")["channel_rms"].variable._in_memory

    def test_neither_torch_nor_jax_is_imported(self, path: Path) -> None:
        code = (
            "import sys, osp_diag; "
            f"run = osp_diag.open_run({str(path)!r}); "
            "repr(run), run._repr_html_(), run['osp_excess_kurtosis'].load(); "
            "print(sorted({'torch', 'jax', 'transformers', 'matplotlib'} & set(sys.modules)))"
        )
        found = subprocess.run(
            [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
        )
        assert (found.stdout.strip(), found.stderr) == ("[]", "")

    def test_text_paths_too(self, path: Path) -> None:
        assert open_run(str(path)).steps.size == 3


class TestBadPaths:
    def test_missing(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match="there is no such file or folder; check the path"):
            open_run(tmp_path / "nowhere.zarr")

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("")
        with pytest.raises(StoreError, match=r"is a file; a run is a folder"):
            open_run(tmp_path / "run")

    def test_a_folder_that_is_no_run(self, tmp_path: Path) -> None:
        with pytest.raises(StoreError, match=r"is not a run: it has no zarr.json; give the folder that"):
            open_run(tmp_path)

    def test_another_zarr_hierarchy(self, tmp_path: Path) -> None:
        zarr.create_group(tmp_path / "other.zarr")
        with pytest.raises(StoreError, match="is a Zarr hierarchy but not a run of osp_diag"):
            open_run(tmp_path / "other.zarr")

    @pytest.mark.parametrize("text", ["{", "[]", '"x"'])
    def test_damaged_metadata(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "zarr.json").write_text(text)
        with pytest.raises(StoreError, match=r"zarr.json is damaged|not a run of osp_diag"):
            open_run(tmp_path)

    def test_a_damaged_coordinate(self, tmp_path: Path) -> None:
        path = write_run(tmp_path / "run.zarr")
        (path / "step" / "c.0").write_bytes(b"rubbish")
        with pytest.raises(
            StoreError, match=r"^chunk .*step/c.0 is damaged \(.*\); restore the run from a copy$"
        ):
            open_run(path)

    def test_a_newer_format(self, tmp_path: Path) -> None:
        path = write_run(tmp_path / "run.zarr")
        document = json.loads((path / "zarr.json").read_text())
        document["attributes"]["osp_diag_run"] = 2
        (path / "zarr.json").write_text(json.dumps(document))
        with pytest.raises(StoreError, match="run format 2, newer than the 1 known here; upgrade osp_diag"):
            open_run(path)

    def test_empty(self, tmp_path: Path) -> None:
        path = tmp_path / "run.zarr"
        RunWriter(path, ATTRIBUTES).close()
        with pytest.raises(StoreError, match="is empty: no step is recorded yet"):
            open_run(path)

    def test_series_alone_are_enough(self, tmp_path: Path) -> None:
        path = tmp_path / "run.zarr"
        with RunWriter(path, ATTRIBUTES) as writer:
            writer.append_series(0, {"loss": 1.0})
        run = open_run(path)
        assert run.steps.size == 0
        assert run.sites == []
        assert run.series["loss"].item() == 1.0
        assert "steps     0" in repr(run)
        assert "<details>" in run._repr_html_()


class TestStatistics:
    def test_one_over_all_sites(self, run: Run) -> None:
        kurtosis = run["osp_excess_kurtosis"]
        assert kurtosis.dims == ("site", "step", "layer", "stratum")
        assert kurtosis.sel(site="residual_post", step=20, layer=1, stratum="rest").item() == 2013.0
        assert kurtosis.sel(site="linear_input:mlp.down_proj", step=0, layer=0, stratum="all").item() == 0.5
        assert kurtosis.attrs["long_name"] == "excess kurtosis, OSP's formula"

    def test_a_ceiling_that_depends_on_the_site_is_a_coordinate(self, run: Run) -> None:
        ceiling = run["osp_excess_kurtosis"].coords["ceiling"]
        assert ceiling.dims == ("site",)
        assert ceiling.values.tolist() == [2.0, 6.0]

    def test_what_a_site_lacks_is_nan(self, run: Run) -> None:
        rms = run["channel_rms"]
        assert rms.sizes["channel"] == 9
        assert rms.dtype == np.float32
        assert np.isnan(rms.sel(site="residual_post", channel=7)).all()
        assert np.isfinite(rms.sel(site="linear_input:mlp.down_proj")).all()

    def test_layers_are_joined_by_number_and_unlabelled_dimensions_by_position(self) -> None:
        first = xr.Dataset({"x": (("layer", "bin"), np.ones((1, 2)))}, coords={"layer": [2]})
        last = xr.Dataset({"x": (("layer", "bin"), np.ones((2, 3)))}, coords={"layer": [0, 1]})
        joined = Run.in_memory([(0, {"final_norm": first, "embedding": last})], {}, {})["x"]
        assert joined["site"].values.tolist() == ["embedding", "final_norm"]
        assert joined["layer"].values.tolist() == [0, 1, 2]
        np.testing.assert_array_equal(np.isfinite(joined.isel(step=0)).sum(("layer", "bin")).values, [6, 2])

    def test_the_name_of_a_group_gives_its_dataset(self, run: Run) -> None:
        assert run["snapshot"]["token_text"].values.tolist()[0] == "The"
        assert "channel_rms" in run["residual_post"]

    def test_a_name_with_a_typing_error(self, run: Run) -> None:
        with pytest.raises(StoreError, match=r"has no statistic 'osp_kurtosis'; did you mean osp_excess_k"):
            run["osp_kurtosis"]
        with pytest.raises(
            StoreError, match=r"has no statistic 'zzz'; there are absolute_maximum, channel_rms"
        ):
            run["zzz"]

    def test_as_a_table(self, run: Run) -> None:
        frame = run.to_frame("channel_rms")
        assert list(frame.columns) == ["site", "step", "layer", "channel", "channel_rms"]
        assert len(frame) == 3 * 3 * (5 + 9)


class TestSites:
    def test_one_site(self, run: Run) -> None:
        dataset = run.at("linear_input:mlp.down_proj")
        assert dataset["step"].values.tolist() == [0, 10, 20]
        expected = groups(10)["linear_input:mlp.down_proj"]
        xr.testing.assert_equal(dataset.sel(step=10, drop=True).load(), expected)

    def test_raw_sums(self, run: Run) -> None:
        sums = run.raw("residual_post")["moments.fourth"]
        assert sums.dtype == np.float64
        assert sums.sel(step=20).values.max() == 20.1

    def test_snapshots_carry_their_tokens(self, run: Run) -> None:
        dataset = run.snapshot("residual_post")
        assert dataset["activation"].dims == ("layer", "token", "channel")
        assert dataset["activation"].coords["token_text"].values.tolist() == [
            "The",
            " café",
            "\n",
            "<script>",
        ]

    @pytest.mark.parametrize(
        ("call", "name", "message"),
        [
            ("at", "residual_past", "has no site 'residual_past'; did you mean residual_post"),
            ("at", "query_post_rope", "has no site 'query_post_rope': no rotary embedding"),
            ("at", "down_proj", "did you mean linear_input:mlp.down_proj"),
            ("at", "raw", "has no site 'raw'"),
            ("at", "linear_input", "has no site 'linear_input'"),
            (
                "raw",
                "linear_input:mlp.down_proj",
                "has no raw sums of 'linear_input:mlp.down_proj'; there is only resid",
            ),
            ("snapshot", "value", "has no snapshot of 'value'; there is only residual_post"),
        ],
    )
    def test_what_is_not_there(self, run: Run, call: str, name: str, message: str) -> None:
        with pytest.raises(StoreError) as caught:
            getattr(run, call)(name)
        assert message in str(caught.value)

    def test_series(self, run: Run) -> None:
        assert run.series["step"].values.tolist() == [0, 5, 10, 15, 20, 25]
        assert run.series["loss"].sel(step=15).item() == pytest.approx(2.8)
        assert np.isnan(run.series["learning_rate"].sel(step=0))


def test_a_growing_run_is_seen_after_refresh(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        writer.append(0, groups(0))
        run = open_run(path)
        writer.append(1, groups(1))
        assert run.steps.tolist() == [0]
        assert run["token_count"].shape == (2, 1, 3)
        assert run.refresh() is run
        assert run.steps.tolist() == [0, 1]
        assert run["token_count"].sel(site="residual_post").values.tolist() == [[0] * 3, [1] * 3]


def test_absences_that_show_late_are_kept_and_do_not_hinder_resuming(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    with RunWriter(path, ATTRIBUTES) as writer:
        writer.append(0, groups(0))
        writer.note_absent_sites({"attention": "no attention here"})
        writer.note_absent_sites({"value": "no values"})
    with RunWriter(path, ATTRIBUTES, resume=True) as writer:
        writer.append(1, groups(1))
    assert open_run(path).absent_sites == {
        "query_post_rope": "no rotary embedding",
        "attention": "no attention here",
        "value": "no values",
    }


class TestInMemory:
    def test_is_the_run_that_would_be_written(self, in_memory: Run, run: Run) -> None:
        assert in_memory.path is None
        assert in_memory.sites == run.sites
        assert in_memory.steps.tolist() == run.steps.tolist()
        for name in run.sites:
            xr.testing.assert_identical(in_memory.at(name), run.at(name).load())
        xr.testing.assert_equal(in_memory.snapshot("residual_post"), run.snapshot("residual_post").load())
        assert in_memory.attrs == run.attrs

    def test_series(self, in_memory: Run) -> None:
        np.testing.assert_array_equal(in_memory.series["grad_norm"], [np.nan, 1.0])
        assert Run.in_memory([], {}, {}).series.sizes == {"step": 0}

    def test_refresh_does_nothing(self, in_memory: Run) -> None:
        assert in_memory.refresh().steps.size == 3
        assert repr(in_memory).startswith("<osp_diag.Run>")


class _Checker(HTMLParser):
    """Collects tags and checks that they close in order."""

    void = ("input", "br", "use", "path", "img")

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append(tag)
        if tag not in self.void:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.void:
            assert self.open.pop() == tag


def _run(path: Path, parts: dict[str, xr.Dataset], **attributes: Any) -> Run:
    with RunWriter(path, ATTRIBUTES | attributes) as writer:
        writer.append(7, parts)
    return open_run(path)


class TestDisplay:
    def test_text(self, run: Run, path: Path) -> None:
        lines = repr(run).splitlines()
        assert lines == [
            "<osp_diag.Run>",
            "  model        tiny (LlamaForCausalLM, 3 layers, 5 channels)",
            "  protocol     sequence (BOS no, sequences of 16)",
            "  tokens       1,024 from built-in text (float32)",
            "  steps        3: 0 to 20",
            "  sites        2: residual_post, linear_input:mlp.down_proj",
            "  absent       query_post_rope (no rotary embedding)",
            f"  path         {path}",
            "  largest |x|  4,040 (residual_post, layer 2)",
        ]

    def test_hidden_states_are_those_of_the_osp_script(self, tmp_path: Path) -> None:
        last = site(1, layers=1).assign_coords(layer=[2])
        run = _run(
            tmp_path / "run.zarr", {"embedding": site(0, 1), "residual_post": site(1), "final_norm": last}
        )
        found = headline(run)
        assert found["osp_excess_kurtosis_tensors"] == 4  # embedding, two blocks of three, final norm
        assert found["osp_excess_kurtosis"] == pytest.approx((0 + 100 + 110 + 100) / 4)
        assert (found["absolute_maximum"], found["absolute_maximum_layer"]) == (240.0, 2)

    def test_without_the_usual_statistics(self, tmp_path: Path) -> None:
        odd = xr.Dataset({"sink_rate": (("head",), np.ones(2))})
        run = _run(tmp_path / "run.zarr", {"attention": odd})
        assert headline(run) == {}
        assert "largest" not in repr(run)
        assert "<th>OSP" not in run._repr_html_()

    def test_not_finite(self, tmp_path: Path) -> None:
        broken = site(1).assign(absolute_maximum=(("layer", "stratum"), np.full((3, 4), np.nan)))
        run = _run(tmp_path / "run.zarr", {"residual_post": broken})
        assert "absolute_maximum" not in headline(run)
        assert "nan" in run._repr_html_()

    def test_html_is_well_formed_and_self_contained(self, run: Run) -> None:
        html = run._repr_html_()
        checker = _Checker()
        checker.feed(html)
        assert checker.open == []
        assert "script" not in checker.tags
        assert ">linear_input:mlp.down_proj</td>" in html
        assert "src=" not in html
        assert "http://" not in html.replace("http://www.w3.org", "")

    def test_hostile_names_are_shown_as_text(self, tmp_path: Path) -> None:
        evil = "<script>alert('x')</script>"
        run = _run(
            tmp_path / "run.zarr",
            {f"linear_input:{evil.replace('/', '')}": site(0).assign_attrs(note=evil)},
            model_name=evil,
            sites={evil: evil},
            token_source=evil,
        )
        html = run._repr_html_()
        checker = _Checker()
        checker.feed(html)
        assert "script" not in checker.tags
        assert "&lt;script&gt;alert" in html
        assert evil in repr(run)

    @pytest.mark.parametrize(
        ("value", "text"),
        [
            (0.0, "0"),
            (0.04169, "0.0417"),
            (82.94, "82.9"),
            (25812.4, "25,812"),
            (1e-5, "1.00e-05"),
            (3e9, "3.00e+09"),
            (float("inf"), "inf"),
        ],
    )
    def test_numbers(self, value: float, text: str) -> None:
        assert number(value) == text
