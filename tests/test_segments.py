"""Runs that change on the way: segments of a store, and trainings that start from a checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from osp_diag.errors import StoreError, TrainingError, UsageError
from osp_diag.runs.run import open_run
from osp_diag.runs.writer import RunWriter
from osp_diag.trainer.checkpoint import folder_of, latest, read_checkpoint
from osp_diag.trainer.checkpoint_folder import CheckpointFolder
from osp_diag.trainer.exporting import trained_model
from osp_diag.trainer.loop import train
from tests.run_fixtures import ATTRIBUTES
from tests.training_runs import minute

FIRST = {**ATTRIBUTES, "config": {"optimizer.lr": 1e-3, "steps": 4}}
SECOND = {**ATTRIBUTES, "config": {"optimizer.lr": 1e-2, "steps": 4}}


def group(names: str, value: float) -> xr.Dataset:
    return xr.Dataset({"share": ("matrix", np.full(len(names), value))}, coords={"matrix": list(names)})


def two_segments(path: Path) -> None:
    with RunWriter(path, FIRST) as writer:
        for step in range(4):
            writer.append(step, {"a": group("xy", step), "b": group("x", step)}, partial=True)
    with RunWriter(path, SECOND, resume=True, segment_after=1) as writer:
        writer.truncate_after(1)
        for step in (2, 3):
            writer.append(step, {"a": group("yz", step), "b": group("x", step)}, partial=True)


class TestStore:
    def test_labels_are_joined_and_what_a_segment_lacks_is_nan(self, tmp_path: Path) -> None:
        path = tmp_path / "run.zarr"
        two_segments(path)
        run = open_run(path)
        assert run.beside == ["a", "b"]
        joined = run["a"]["share"].sel(matrix=["x", "y", "z"]).values
        np.testing.assert_array_equal(joined[:2], [[0, 0, np.nan], [1, 1, np.nan]])
        np.testing.assert_array_equal(joined[2:], [[np.nan, 2, 2], [np.nan, 3, 3]])
        np.testing.assert_array_equal(run["b"]["share"].values[:, 0], range(4))

    def test_the_run_says_what_changed_and_when(self, tmp_path: Path) -> None:
        path = tmp_path / "run.zarr"
        two_segments(path)
        run = open_run(path)
        assert [segment.after_step for segment in run.segments] == [-1, 1]
        assert run.segments[1].attributes["config"] == SECOND["config"]
        assert run.notes[-1] == "after step 1 the run went on with optimizer.lr: 0.001 → 0.01"

    def test_a_segment_is_resumed_under_its_own_attributes_and_dropped_with_its_steps(
        self, tmp_path: Path
    ) -> None:
        path = tmp_path / "run.zarr"
        two_segments(path)
        with pytest.raises(StoreError, match=r"config.optimizer.lr: 0\.01 → 0\.001"):
            RunWriter(path, FIRST, resume=True)
        with RunWriter(path, SECOND, resume=True) as writer:
            writer.append(4, {"a": group("yz", 4), "b": group("x", 4)}, partial=True)
        assert float(open_run(path)["a"]["share"].sel(step=4, matrix="z")) == 4
        with RunWriter(path, SECOND, resume=True) as writer:
            writer.truncate_after(0)
        assert len(open_run(path).segments) == 1

    def test_what_a_number_is_cannot_change(self, tmp_path: Path) -> None:
        path = tmp_path / "run.zarr"
        two_segments(path)
        with pytest.raises(StoreError, match=r"protocol: .* → .other."):
            RunWriter(path, {**SECOND, "protocol": "other"}, resume=True, segment_after=3)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("whole") / "run.zarr"
    train(minute(checkpoint__keep=9), out)
    return out


def copied(run: Path, folder: Path) -> Path:
    out = folder / "run.zarr"
    shutil.copytree(run, out)
    shutil.copytree(folder_of(run), folder_of(out))
    return out


def logits(checkpoint: Any) -> torch.Tensor:
    with torch.no_grad():
        return trained_model(checkpoint)(torch.arange(60).reshape(2, 30)).logits


def test_a_fork_without_changes_goes_on_as_the_run_did(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "fork.zarr"
    fork = train(minute(), out, start=folder_of(whole) / "step-00000004")
    assert fork.attrs["parent"]["step"] == 4
    assert fork.attrs["parent"]["reset"] == []
    ours, theirs = trained_model(latest(folder_of(out))), trained_model(latest(folder_of(whole)))  # type: ignore[arg-type]
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    np.testing.assert_array_equal(fork.series["loss"].sel(step=[5, 6]), open_run(whole).series["loss"][-2:])
    assert list(fork.steps) == [4, 6]  # where it begins, and as it is due


def test_another_architecture_that_computes_the_same_begins_with_the_same_function(
    whole: Path, tmp_path: Path
) -> None:
    changes = {"model__norm": "rmsnorm", "model__embedding_projection": False, "optimizer__name": "adamw"}
    out = tmp_path / "fork.zarr"
    run = train(minute(**changes), out, start=folder_of(whole) / "step-00000004")
    first = next(iter(sorted(folder_of(out).iterdir())))
    assert first.name == "step-00000004"

    before = logits(read_checkpoint(folder_of(whole) / "step-00000004"))
    torch.testing.assert_close(logits(read_checkpoint(first)), before, rtol=1e-4, atol=1e-5)
    reset = run.attrs["parent"]["reset"]
    assert "adamw: model.layers.0.mlp.down_proj.weight" in reset  # Muon's before
    assert any("the run began from step-00000004 of run" in note for note in run.notes)


def test_a_run_goes_on_as_a_segment_with_other_evidence(whole: Path, tmp_path: Path) -> None:
    out = copied(whole, tmp_path)
    config = minute(steps=9, optimizer__name="adamw", checkpoint__keep=9)
    run = train(config, out, start=out, segment=True)
    assert list(run.steps) == [0, 3, 6, 9]
    assert run.segments[1].attributes["config"]["optimizer.name"] == "adamw"
    second_moment = run["optimizer:second_moment"]["second_moment_top_share"].sel(matrix="mlp.down_proj")
    assert np.isnan(second_moment.sel(step=[0, 3, 6])).all()
    assert np.isfinite(second_moment.sel(step=9)).all()
    assert list(run.series["step"].values) == list(range(10))


def test_a_segment_killed_before_its_first_checkpoint_is_resumed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = copied(whole, tmp_path)
    config = minute(steps=9, optimizer__lr=1e-3, checkpoint__every=0)
    with monkeypatch.context() as patch:
        patch.setattr(CheckpointFolder, "save", lambda *_, **__: (_ for _ in ()).throw(OSError("killed")))
        with pytest.raises(OSError, match="killed"):
            train(config, out, start=out, segment=True)
    run = train(config, out, resume=True)
    assert len(run.segments) == 2
    assert list(run.steps) == [0, 3, 6, 9]


def test_what_is_refused(whole: Path, tmp_path: Path) -> None:
    out = copied(whole, tmp_path)
    with pytest.raises(
        TrainingError, match="reaches step 6, beyond step 4 of step-00000004; --overwrite drops"
    ):
        train(minute(steps=9), out, start=folder_of(out) / "step-00000004", segment=True)
    with pytest.raises(UsageError, match=r"is no checkpoint of .*other\.zarr"):
        train(minute(steps=9), tmp_path / "other.zarr", start=out, segment=True)
    with pytest.raises(UsageError, match="steps=6 is not beyond step 6"):
        train(minute(), tmp_path / "new.zarr", start=out)
    with pytest.raises(TrainingError, match=r"of other sizes: .*\.weight is"):
        train(minute(steps=9, model__hidden_size=64), tmp_path / "new.zarr", start=out)
    with pytest.raises(TrainingError, match=r"its head and its embedding are two matrices, and model\.tie"):
        train(minute(steps=9, model__tie_embeddings=True), tmp_path / "new.zarr", start=out)
    with pytest.raises(TrainingError, match="there is no training checkpoint at"):
        train(minute(steps=9), tmp_path / "new.zarr", start=tmp_path / "nothing")
