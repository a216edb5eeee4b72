"""Labelled arrays along the logged steps: the rows, commits, truncation and readers of scalars."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from osp_diag.errors import MissingError, StoreError
from osp_diag.probing.saving import write_run
from osp_diag.runs.declared import DeclaredGroup, GroupStep, ProbedStep
from osp_diag.runs.following import FollowedRun
from osp_diag.runs.packed import pack
from osp_diag.runs.run import Run, open_run
from osp_diag.runs.writer import RunWriter
from tests.run_fixtures import ATTRIBUTES
from tests.test_store_crash import Killed, killed_at

NAMES = ["q_proj", "norm"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def begun(path: Path, **options: Any) -> RunWriter:
    return RunWriter(path, ATTRIBUTES, **options)


def sketch(step: int, names: list[str] = NAMES) -> xr.Dataset:
    """Norms, of which the last is NaN, and projections."""
    norm = np.array([*(step + np.arange(len(names) - 1.0)), np.nan], np.float32)
    projection = step + np.arange(3.0 * len(names)).reshape(-1, 3)
    return xr.Dataset(
        {
            "norm": ("parameter", norm, {"units": "1"}),
            "projection": (("parameter", "direction"), projection),
        },
        coords={"parameter": names},
        attrs={"note": "made up"},
    )


def assert_sketches(dataset: xr.Dataset, steps: list[int], recorded: list[int]) -> None:
    assert dataset["step"].values.tolist() == steps
    for place, step in enumerate(steps):
        row = dataset.isel(step=place).drop_vars("step")
        expected = sketch(step) if step in recorded else sketch(step) * np.nan
        for name, values in expected.data_vars.items():
            np.testing.assert_array_equal(row[name].values, values.values)
            assert row[name].dtype == sketch(0)[name].dtype


def test_arrays_share_rows_with_the_scalars(path: Path) -> None:
    with begun(path, series_block=2) as writer:
        writer.append_series(1, {"loss": 3.0})
        writer.append_logged(2, {"weight_sketch": sketch(2)})
        writer.append_series(2, {"loss": 2.0})
        writer.append_series(3, {"loss": 1.0})
        declared = DeclaredGroup.of(sketch(4))
        arrays = {name: values.values for name, values in sketch(4).data_vars.items()}
        writer.append_logged(4, ProbedStep({"weight_sketch": GroupStep(declared, arrays)}))
    run = open_run(path)
    assert run.series["loss"].values.tolist()[:3] == [3.0, 2.0, 1.0]
    assert run.logged_groups == ["weight_sketch"]
    logged = run.logged("weight_sketch")
    assert_sketches(logged, [1, 2, 3, 4], [2, 4])
    assert logged["parameter"].values.tolist() == NAMES
    assert (logged["norm"].attrs, logged.attrs["note"]) == ({"units": "1"}, "made up")
    with xr.open_datatree(path, engine="zarr") as tree:
        assert tree["series/weight_sketch"]["logged_step"].values.tolist() == [1, 2, 3, 4]
    assert_sketches(open_run(pack(path)).logged("weight_sketch"), [1, 2, 3, 4], [2, 4])
    assert_sketches(FollowedRun(path).refresh().logged("weight_sketch"), [1, 2, 3, 4], [2, 4])
    assert "loss" in FollowedRun(path).refresh().series


def test_what_does_not_fit_is_refused_and_nothing_is_recorded(path: Path) -> None:
    with begun(path) as writer:
        writer.append_series(1, {"loss": 3.0})
        writer.append_logged(1, {"weight_sketch": sketch(1)})
        with pytest.raises(StoreError, match=r"weight_sketch/norm, .* of step 1 is already recorded"):
            writer.append_logged(1, {"weight_sketch": sketch(1)})
        with pytest.raises(StoreError, match="step 0 cannot be appended"):
            writer.append_logged(0, {"weight_sketch": sketch(0)})
        with pytest.raises(StoreError, match="does not match the steps already in") as caught:
            writer.append_logged(2, {"weight_sketch": sketch(2, ["q_proj", "gain"])})
        assert "coordinate series/weight_sketch/parameter is ['q_proj', 'gain']" in str(caught.value)
        with pytest.raises(StoreError, match="give floats, since steps without it read NaN"):
            writer.append_logged(2, {"ages": xr.Dataset({"age": ("parameter", [1, 2])})})
        with pytest.raises(StoreError, match="'series/loss' .*is a series of scalars"):
            writer.append_logged(2, {"loss": sketch(2)})
        with pytest.raises(StoreError, match="'series/weight_sketch' .*is a group of arrays"):
            writer.append_series(2, {"weight_sketch": 1.0})
        with pytest.raises(StoreError, match="record them with append_series, and arrays beside them"):
            writer.append(0, {"series/weight_sketch": sketch(0)})
    run = open_run(path)
    assert_sketches(run.logged("weight_sketch"), [1], [1])
    with pytest.raises(MissingError, match="has no logged group 'weight_sketches'.*weight_sketch"):
        run.logged("weight_sketches")


def test_a_group_that_began_later_is_gone_after_going_back(path: Path) -> None:
    with begun(path) as writer:
        writer.append_series(1, {"loss": 3.0})
        writer.append_logged(2, {"weight_sketch": sketch(2)})
        writer.truncate_after(1)
        assert not list(path.rglob("weight_sketch/norm"))
        writer.append_logged(3, {"weight_sketch": sketch(3, ["gain"])})
    assert open_run(path).logged("weight_sketch")["parameter"].values.tolist() == ["gain"]


def test_a_run_in_memory_has_them_too(path: Path) -> None:
    series, logged = {"loss": {1: 3.0, 2: 2.0}}, {"weight_sketch": {2: sketch(2), 4: sketch(4)}}
    run = Run.in_memory([], {}, ATTRIBUTES, series, logged)
    write_run(path, [], {}, ATTRIBUTES, series, logged=logged)
    for each in (run, open_run(path)):
        assert_sketches(each.logged("weight_sketch"), [1, 2, 4], [2, 4])
        assert np.isnan(each.series["loss"].values).tolist() == [False, False, True]


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.sampled_from(["series", "arrays", "both"]), st.integers(1, 3)),
        st.tuples(st.just("flush"), st.just(0)),
        st.tuples(st.just("truncate"), st.integers(0, 8)),
        st.tuples(st.just("reopen"), st.just(0)),
    ),
    max_size=12,
)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(operations=OPERATIONS, series_block=st.integers(1, 4))
def test_any_order_of_operations_leaves_what_a_list_would_hold(
    tmp_path_factory: pytest.TempPathFactory, operations: list[tuple[str, int]], series_block: int
) -> None:
    path = tmp_path_factory.mktemp("any") / "run.zarr"
    rows: dict[int, str] = {}
    writer = begun(path, series_block=series_block)
    for operation, size in operations:
        step = max(rows, default=0) + size
        if operation in ("series", "both"):
            writer.append_series(step, {"loss": step / 2})
        if operation in ("arrays", "both"):
            writer.append_logged(step, {"weight_sketch": sketch(step)})
        if operation in ("series", "arrays", "both"):
            rows[step] = operation
        elif operation == "flush":
            writer.flush()
        elif operation == "truncate":
            writer.truncate_after(size)
            rows = {step: kind for step, kind in rows.items() if step <= size}
        else:
            writer.close()
            writer = begun(path, resume=True, series_block=series_block)
    writer.close()
    recorded = [step for step, kind in rows.items() if kind != "series"]
    if rows:
        run = open_run(path)
        assert run.series["step"].values.tolist() == list(rows)
        assert bool(run.logged_groups) >= bool(recorded)
        if recorded:
            assert_sketches(run.logged("weight_sketch"), list(rows), recorded)


def test_death_at_every_file_operation(path: Path) -> None:
    def life() -> None:
        writer = begun(path, resume=True, series_block=1)
        rows = open_run(path).series["step"].values if list(path.glob("series/logged_step")) else []
        last = int(rows[-1]) if len(rows) else 0
        if last % 3 == 2:
            last -= 1
            writer.truncate_after(last)
        writer.append_series(last + 1, {"loss": 1.0})
        writer.append_logged(last + 1, {"weight_sketch": sketch(last + 1)})
        writer.close()

    operation = 0
    while True:
        try:
            with killed_at(operation):
                life()
        except Killed:
            pass
        else:
            break
        with begun(path, resume=True):
            pass
        run = open_run(path) if list(path.glob("series/logged_step/c.*")) else None
        if run is not None and run.logged_groups:
            dataset = run.logged("weight_sketch").load()
            steps = dataset["step"].values.tolist()
            assert steps == list(range(1, len(steps) + 1))
            recorded = np.isfinite(dataset["projection"].values).all(axis=(1, 2))
            assert_sketches(dataset, steps, [s for s, there in zip(steps, recorded, strict=True) if there])
        operation += 1
    assert operation > 20
    assert not list(path.rglob("*.partial"))
