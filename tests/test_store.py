"""The writer: what lands on disk, what is refused, and resuming."""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr
from hypothesis import given
from hypothesis import strategies as st

from osp_diag.errors import StoreError
from osp_diag.runs.format import jsonable
from osp_diag.runs.lock import LOCK_NAME
from osp_diag.runs.writer import RunWriter
from tests.run_fixtures import ATTRIBUTES, check_run, groups, site, snapshot, write_run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def begun(path: Path, **options: Any) -> RunWriter:
    return RunWriter(path, ATTRIBUTES, **options)


class TestOnDisk:
    def test_xarray_reads_back_what_was_appended(self, path: Path) -> None:
        with begun(path) as writer:
            for step in range(5):
                writer.append(step, groups(step))
        assert check_run(path) == [0, 1, 2, 3, 4]
        with xr.open_datatree(path, engine="zarr") as tree:
            kurtosis = tree["residual_post/osp_excess_kurtosis"]
            assert kurtosis.dims == ("step", "layer", "stratum")
            assert kurtosis.dtype == np.float32
            assert kurtosis.attrs["ceiling"] == 2.0
            assert tree["residual_post"].attrs == {"note": "made up"}
            assert tree["raw/residual_post"]["moments.fourth"].dtype == np.float64
            assert tree.attrs["model_name"] == "tiny"
            assert tree["linear_input/mlp.down_proj"].sizes["channel"] == 9
            assert kurtosis.sel(step=3, layer=2, stratum="delimiter").item() == 322.0

    @pytest.mark.parametrize("chunk_steps", [1, 3, 64])
    @pytest.mark.parametrize("block", [1, 2, 7, 100])
    def test_blocks_and_chunks_do_not_change_what_is_read(
        self, path: Path, chunk_steps: int, block: int
    ) -> None:
        with begun(path, block=block, chunk_steps=chunk_steps) as writer:
            for step in range(0, 40, 4):
                writer.append(step, groups(step))
        assert len(check_run(path, every=4)) == 10

    def test_plain_zarr_reads_it_with_and_without_consolidated_metadata(self, path: Path) -> None:
        write_run(path)
        for consolidated in (True, False):
            root = zarr.open_group(path, mode="r", use_consolidated=consolidated)
            array = root["residual_post/osp_excess_kurtosis"]
            assert array.shape == (3, 3, 4)
            assert array[2, 1, 3] == 2013.0

    def test_few_files(self, path: Path) -> None:
        write_run(path, steps=tuple(range(0, 600, 10)))
        files = sorted(file.name for file in (path / "residual_post" / "osp_excess_kurtosis").iterdir())
        assert files == ["c.0.0.0", "zarr.json"]
        assert not (path / LOCK_NAME).exists()

    def test_large_rows_get_chunks_of_fewer_steps(self, path: Path) -> None:
        wide = xr.Dataset({"channel_rms": (("layer", "channel"), np.ones((2, 40_000), np.float32))})
        with begun(path) as writer:
            for step in range(3):
                writer.append(step, {"mlp_hidden": wide * step})
        assert len(list((path / "mlp_hidden" / "channel_rms").glob("c.*"))) == 3
        with xr.open_datatree(path, engine="zarr") as tree:
            np.testing.assert_array_equal(tree["mlp_hidden/channel_rms"][:, 0, 0], [0, 1, 2])

    def test_every_numeric_type_and_non_finite_values(self, path: Path) -> None:
        kinds = ["bool", "int8", "uint16", "int32", "int64", "float16", "float32", "float64"]
        values = {f"as_{kind}": (("layer",), np.array([0, 1, 1]).astype(kind)) for kind in kinds}
        values["odd"] = (("layer",), np.array([np.nan, np.inf, -np.inf]))
        values["scalar"] = ((), np.float64(3.5))
        with begun(path) as writer:
            writer.append(0, {"embedding": xr.Dataset(values)})
        with xr.open_datatree(path, engine="zarr") as tree:
            found = tree["embedding"].to_dataset().load()
        for kind in kinds:
            assert found[f"as_{kind}"].dtype == kind
            np.testing.assert_array_equal(found[f"as_{kind}"][0], values[f"as_{kind}"][1])
        np.testing.assert_array_equal(found["odd"][0], [np.nan, np.inf, -np.inf])
        assert found["scalar"].dims == ("step",)

    def test_coordinates_without_a_dimension_of_their_name(self, path: Path) -> None:
        named = site(0).assign_coords(kind=("layer", ["dense", "dense", "expert"]))
        with begun(path) as writer:
            writer.append(0, {"mlp_hidden": named})
        with xr.open_datatree(path, engine="zarr") as tree:
            assert tree["mlp_hidden"].coords["kind"].values.tolist() == ["dense", "dense", "expert"]

    def test_rows_are_copied_when_they_are_appended(self, path: Path) -> None:
        values = np.zeros((2,), np.float32)
        with begun(path, block=10) as writer:
            writer.append(0, {"embedding": xr.Dataset({"x": (("layer",), values)})})
            values[:] = 9
        with xr.open_datatree(path, engine="zarr") as tree:
            assert tree["embedding/x"].values.tolist() == [[0.0, 0.0]]

    def test_units_that_look_like_time_stay_numbers(self, path: Path) -> None:
        with begun(path) as writer:
            writer.append_series(0, {"probe_seconds": 1.5}, {"probe_seconds": {"units": "seconds"}})
        from osp_diag.runs.run import open_run

        assert open_run(path).series["probe_seconds"].values.tolist() == [1.5]

    def test_readers_see_committed_steps_only(self, path: Path) -> None:
        with begun(path, block=3) as writer:
            seen = []
            for step in range(7):
                writer.append(step, groups(step))
                seen.append(len(check_run(path)))
            assert seen == [0, 0, 3, 3, 3, 6, 6]
            writer.flush()
            assert len(check_run(path)) == 7

    def test_an_exception_inside_the_block_loses_nothing(self, path: Path) -> None:
        def interrupted() -> None:
            with begun(path, block=50) as writer:
                writer.append(0, groups(0))
                writer.append(1, groups(1))
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert check_run(path) == [0, 1]


class TestAttributes:
    def test_are_made_plain(self, path: Path) -> None:
        odd = {
            "count": np.int64(3),
            "flag": np.bool_(True),
            "rate": np.float32(0.5),
            "nothing": None,
            "nan": float("nan"),
            "ceiling": np.inf,
            "floor": [-np.inf, 1],
            "names": {"b", "a"},
            "array": np.arange(2),
            "path": Path("x/y"),
            "day": date(2026, 1, 2),
            "nested": {1: (np.float64(1.0), "z")},
        }
        with RunWriter(path, odd):
            pass
        stored = json.loads((path / "zarr.json").read_text())["attributes"]
        assert stored == {
            "osp_diag_run": 1,
            "count": 3,
            "flag": True,
            "rate": 0.5,
            "nothing": None,
            "nan": "NaN",
            "ceiling": "Infinity",
            "floor": ["-Infinity", 1],
            "names": ["a", "b"],
            "array": [0, 1],
            "path": "x/y",
            "day": "2026-01-02",
            "nested": {"1": [1.0, "z"]},
        }

    def test_what_is_no_json_is_refused_by_name(self, path: Path) -> None:
        with pytest.raises(StoreError, match=r"attributes.sites.value is a builtins.object, which cannot be"):
            RunWriter(path, {"sites": {"value": object()}})
        assert not path.exists()

    @given(
        st.recursive(
            st.none() | st.booleans() | st.integers(-100, 100) | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
            ),
            max_leaves=8,
        )
    )
    def test_json_of_anything_is_strict_and_stays_as_it_is(self, value: Any) -> None:
        plain = jsonable(value)
        assert json.loads(json.dumps(plain, allow_nan=False)) == plain
        assert jsonable(plain) == plain


class TestSteps:
    @pytest.mark.parametrize("again", [5, 4, -1])
    def test_a_step_is_recorded_once_and_in_order(self, path: Path, again: int) -> None:
        with begun(path) as writer:
            writer.append(5, groups(5))
            with pytest.raises(
                StoreError, match=rf"step {again} cannot be appended to .*already reaches step 5; .*"
            ):
                writer.append(again, groups(again))
            assert writer.steps == [5]

    @pytest.mark.parametrize("step", [1.0, "1", None])
    def test_a_step_is_a_whole_number(self, path: Path, step: Any) -> None:
        with begun(path) as writer, pytest.raises(StoreError, match="a step is a whole number, not"):
            writer.append(step, groups(1))

    def test_numpy_integers_are_steps(self, path: Path) -> None:
        with begun(path) as writer:
            writer.append(np.int32(0), groups(0))
        assert check_run(path) == [0]


def _without(name: str) -> dict[str, xr.Dataset]:
    return {key: value for key, value in groups(1).items() if key != name}


def _with(dataset: xr.Dataset) -> dict[str, xr.Dataset]:
    return groups(1) | {"residual_post": dataset}


MISMATCHES = {
    "a missing group": (_without("raw/residual_post"), r"raw/residual_post/moments.fourth is missing"),
    "a new group": (groups(1) | {"embedding": site(1)}, r"embedding/osp_excess_kurtosis is new"),
    "a missing variable": (_with(site(1).drop_vars("token_count")), r"residual_post/token_count is missing"),
    "a new variable": (_with(site(1).assign(more=("layer", np.ones(3)))), r"residual_post/more is new"),
    "other dimensions": (
        _with(site(1).assign(token_count=("channel", np.ones(5, np.int64)))),
        r"residual_post/token_count has dimensions \('channel',\), before \('layer',\)",
    ),
    "another size": (_with(site(1, layers=2)), r"has shape \(2, 4\), before \(3, 4\)"),
    "another type": (
        _with(site(1).assign(token_count=("layer", np.ones(3, np.float32)))),
        r"residual_post/token_count has type float32, before int64",
    ),
    "other coordinates": (
        _with(site(1).assign_coords(layer=[0, 1, 7])),
        r"coordinate residual_post/layer is \[0, 1, 7\], before \[0, 1, 2\]",
    ),
    "no coordinates": (_with(site(1).drop_vars("stratum")), r"residual_post/stratum is missing"),
}


class TestSameThingsAtEveryStep:
    @pytest.mark.parametrize("resumed", [False, True])
    @pytest.mark.parametrize("case", MISMATCHES)
    def test_what_differs_is_named(self, path: Path, case: str, resumed: bool) -> None:
        wrong, message = MISMATCHES[case]
        writer = begun(path)
        writer.append(0, groups(0))
        if resumed:
            writer.close()
            writer = begun(path, resume=True)
        with writer:
            with pytest.raises(StoreError, match=message):
                writer.append(1, wrong)
            writer.append(1, groups(1))
        assert check_run(path) == [0, 1]

    def test_many_differences_are_cut_short(self, path: Path) -> None:
        with begun(path) as writer:
            writer.append(0, groups(0))
            with pytest.raises(StoreError, match=r"… and \d+ more"):
                writer.append(1, {"elsewhere": site(1)})

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            ({}, "the first step of .* has no variables"),
            (
                {"a": site(0).expand_dims("step")},
                "the dataset of 'a' has 'step' in it; give one step at a time",
            ),
            ({"series": site(0)}, "record them with append_series"),
            ({"../elsewhere": site(0)}, "a group cannot be named '../elsewhere'"),
            ({"": site(0)}, "a group cannot be named ''"),
            ({"a": xr.Dataset({"x": ("layer", np.ones(2, complex))})}, "variable a/x has type complex128"),
            (
                {"a": xr.Dataset({"x": ("layer", ["p", "q"])})},
                "a/x is text, which cannot be recorded by step",
            ),
            ({"a": xr.Dataset({"zarr.json": ("layer", [1])})}, "a variable cannot be named 'zarr.json'"),
            ({"a": xr.Dataset({"b": 1.0}), "a/b": site(0)}, "'a/b' would be a group and a variable of"),
            ({"a": xr.Dataset({"x": ("head", np.ones(0))})}, r"a/x has no elements \(shape \(0,\)\)"),
            ({"step": site(0)}, "'step' would be a group and a variable of"),
            (
                {"a": site(0), "a/b": site(0, layers=2)},
                "'layer' in a/b differs from 'layer' in a, which it would inherit",
            ),
        ],
    )
    def test_what_could_not_be_opened_again_is_not_begun(
        self, path: Path, wrong: dict[str, xr.Dataset], message: str
    ) -> None:
        with begun(path) as writer:
            with pytest.raises(StoreError, match=message):
                writer.append(0, wrong)
            writer.append(0, groups(0))
        assert check_run(path) == [0]


class TestStatic:
    def test_text_and_activations(self, path: Path) -> None:
        write_run(path)
        with xr.open_datatree(path, engine="zarr") as tree:
            assert tree["snapshot/token_text"].values.tolist() == ["The", " café", "\n", "<script>"]
            expected = snapshot()["snapshot/residual_post"]
            xr.testing.assert_equal(tree["snapshot/residual_post"].to_dataset().drop_dims("step"), expected)

    def test_large_ones_are_cut_by_layer(self, path: Path) -> None:
        values = np.random.default_rng(0).random((3, 700, 900)).astype(np.float32)
        dataset = xr.Dataset({"activation": (("layer", "token", "channel"), values)})
        with begun(path) as writer:
            writer.write_static("snapshot/residual_post", dataset)
        names = sorted(file.name for file in (path / "snapshot/residual_post/activation").glob("c.*"))
        assert names == ["c.0.0.0", "c.1.0.0", "c.2.0.0"]
        with xr.open_datatree(path, engine="zarr") as tree:
            np.testing.assert_array_equal(tree["snapshot/residual_post/activation"], values)

    def test_a_second_one_needs_to_be_meant(self, path: Path) -> None:
        write_run(path)
        changed = snapshot()["snapshot/residual_post"] + 1
        with begun(path, resume=True) as writer:
            assert "snapshot/residual_post" in writer
            assert "snapshot/embedding" not in writer
            with pytest.raises(
                StoreError, match=r"activation is already in .*; pass replace=True to exchange"
            ):
                writer.write_static("snapshot/residual_post", changed)
            writer.write_static("snapshot/residual_post", changed, replace=True)
        with xr.open_datatree(path, engine="zarr") as tree:
            np.testing.assert_array_equal(tree["snapshot/residual_post/activation"], changed["activation"])

    def test_text_that_is_no_utf8(self, path: Path) -> None:
        broken = xr.Dataset({"token_text": ("token", np.array(["fine", "\ud83d"]))})
        with begun(path) as writer:
            writer.write_static("snapshot", broken)
        with xr.open_datatree(path, engine="zarr") as tree:
            assert tree["snapshot/token_text"].values.tolist() == ["fine", "?"]

    def test_a_group_has_one_set_of_coordinates(self, path: Path) -> None:
        with begun(path) as writer:
            writer.write_static("tokens", xr.Dataset({"a": ("token", [1, 2])}, coords={"token": [0, 1]}))
            writer.write_static("tokens", xr.Dataset({"b": ("token", [3, 4])}, coords={"token": [0, 1]}))
            with pytest.raises(StoreError, match=r"coordinate tokens/token is \[5, 6\], before \[0, 1\]"):
                writer.write_static("tokens", xr.Dataset({"c": ("token", [1, 2])}, coords={"token": [5, 6]}))
        with xr.open_datatree(path, engine="zarr") as tree:
            assert sorted(tree["tokens"].data_vars) == ["a", "b"]


class TestSeries:
    def test_has_its_own_steps_and_late_names(self, path: Path) -> None:
        with begun(path, series_block=3) as writer:
            for step in range(10):
                writer.append_series(step, {"loss": step / 2})
                if step % 4 == 0:
                    writer.append(step // 4, groups(step // 4))
                    writer.append_series(step, {"probe_seconds": 0.5})
        check_run(path)
        with xr.open_datatree(path, engine="zarr") as tree:
            seconds = tree["series/probe_seconds"].values
            np.testing.assert_array_equal(np.isfinite(seconds), np.arange(10) % 4 == 0)

    @pytest.mark.parametrize("reopen", [False, True])
    def test_one_step_is_completed_but_nothing_is_recorded_twice(self, path: Path, reopen: bool) -> None:
        writer = begun(path)
        writer.append_series(0, {"loss": 0.0})
        writer.append_series(3, {"loss": 1.5})
        if reopen:
            writer.close()
            writer = begun(path, resume=True)
        with writer:
            writer.append_series(3, {"grad_norm": 7.0})
            with pytest.raises(StoreError, match="series loss of step 3 is already recorded"):
                writer.append_series(3, {"loss": 2.0})
            with pytest.raises(StoreError, match=r"step 2 cannot be appended .* already reaches step 3"):
                writer.append_series(2, {"loss": 2.0})
        with xr.open_datatree(path, engine="zarr") as tree:
            assert tree["series/loss"].values.tolist() == [0.0, 1.5]
            np.testing.assert_array_equal(tree["series/grad_norm"].values, [np.nan, 7.0])

    @pytest.mark.parametrize("name", ["", "a/b", "logged_step", "step", ".hidden"])
    def test_names(self, path: Path, name: str) -> None:
        with begun(path) as writer, pytest.raises(StoreError, match="a series cannot be named"):
            writer.append_series(0, {name: 1.0})

    def test_values_are_numbers(self, path: Path) -> None:
        with begun(path) as writer, pytest.raises(StoreError, match="series 'loss' is 'high', not a number"):
            writer.append_series(0, {"loss": "high"})  # type: ignore[dict-item]
