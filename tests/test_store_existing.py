"""Existing runs: resuming, overwriting, one writer at a time, and disks that fail."""

from __future__ import annotations

import errno
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
import zarr

from osp_diag.errors import StoreError
from osp_diag.runs.lock import LOCK_NAME
from osp_diag.runs.writer import RunWriter, check_destination
from tests.run_fixtures import ATTRIBUTES, check_run, groups, site, write_run


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.zarr"


def begun(path: Path, **options: Any) -> RunWriter:
    return RunWriter(path, ATTRIBUTES, **options)


class TestResume:
    def test_continues(self, path: Path) -> None:
        for first in (0, 3, 6):
            with begun(path, resume=True, chunk_steps=4) as writer:
                assert writer.last_step == (first - 1 if first else None)
                for step in range(first, first + 3):
                    writer.append(step, groups(step))
        assert len(check_run(path)) == 9

    def test_other_conditions_are_told_field_by_field(self, path: Path) -> None:
        write_run(path)
        before = (path / "zarr.json").read_bytes()
        other = ATTRIBUTES | {
            "model_fingerprint": "xyz",
            "sites": {"residual_post": "patched"},
            "estimators": ["osp_excess_kurtosis/2"],
            "seed": 1,
        }
        with pytest.raises(StoreError) as caught:
            RunWriter(path, other, resume=True)
        message = str(caught.value)
        assert "cannot be resumed: it was written under other conditions" in message
        assert 'model_fingerprint: "abc" → "xyz"' in message
        assert 'sites.residual_post: "the output of every block" → "patched"' in message
        assert 'sites.query_post_rope: "no rotary embedding" → absent' in message
        assert 'estimators: ["osp_excess_kurtosis/1"] → ["osp_excess_kurtosis/2"]' in message
        assert "seed: absent → 1" in message
        assert "protocol" not in message
        assert (path / "zarr.json").read_bytes() == before

    def test_circumstances_may_differ_and_are_kept(self, path: Path) -> None:
        write_run(path, steps=(0, 10))
        later = {
            "created": "2026-02-02",
            "command": "again",
            "versions": {"torch": "2.12"},
            "device": "cuda:0",
        }
        with RunWriter(path, ATTRIBUTES | later, resume=True) as writer:
            assert writer.attributes["device"] == "cpu"
            assert writer.attributes["resumed"] == [later | {"after_step": 10}]
        with begun(path, resume=True) as writer:
            assert len(writer.attributes["resumed"]) == 2

    def test_truncate_after_makes_room_for_steps_trained_again(self, path: Path) -> None:
        with begun(path, chunk_steps=4, block=3) as writer:
            for step in range(11):
                writer.append(step, groups(step))
                writer.append_series(step, {"loss": step / 2})
            assert writer.truncate_after(100) == 0
            assert writer.truncate_after(5) == 5
            assert writer.steps == [0, 1, 2, 3, 4, 5]
            assert check_run(path) == [0, 1, 2, 3, 4, 5]
            assert zarr.open_group(path, use_consolidated=False)["series/loss"].shape == (6,)
            writer.append_series(5, {"late": 1.0})
            for step in range(6, 9):
                writer.append(step, groups(step))
                writer.append_series(step, {"loss": step / 2})
        assert len(check_run(path)) == 9

    def test_truncate_to_nothing(self, path: Path) -> None:
        write_run(path)
        with begun(path, resume=True) as writer:
            assert writer.truncate_after(-1) == 3
            assert writer.last_step is None
            writer.append(0, groups(0))
        assert check_run(path) == [0]

    def test_a_copy_made_by_another_tool_is_read_only(self, path: Path, tmp_path: Path) -> None:
        write_run(path)
        document = json.loads((path / "zarr.json").read_text())
        member = document["consolidated_metadata"]["metadata"]["residual_post/channel_rms"]
        member["codecs"] = member["codecs"][:1]
        (path / "zarr.json").write_text(json.dumps(document))
        with pytest.raises(
            StoreError, match="residual_post/channel_rms is not laid out as osp_diag writes it"
        ):
            begun(path, resume=True)

    def test_a_damaged_chunk_is_an_error_not_a_number(self, path: Path) -> None:
        write_run(path)
        chunk = path / "residual_post" / "channel_rms" / "c.0.0.0"
        data = bytearray(chunk.read_bytes())
        data[len(data) // 2] ^= 0xFF
        chunk.write_bytes(data)
        writer = begun(path, resume=True)
        with pytest.raises(StoreError, match=r"chunk .*c.0.0.0 is damaged"):
            writer.append(30, groups(30))
        with pytest.raises(StoreError, match=r"chunk .*c.0.0.0 is damaged"):
            writer.close()


class TestExistingPath:
    def test_a_run_is_described_and_what_to_do(self, path: Path) -> None:
        write_run(path)
        with pytest.raises(
            StoreError, match=r"already holds a run \(tiny, 3 steps, created 2026-01-01.*resume=True"
        ):
            begun(path)

    def test_both_ways_at_once(self, path: Path) -> None:
        with pytest.raises(StoreError, match="either resumed or overwritten"):
            begun(path, resume=True, overwrite=True)

    @pytest.mark.parametrize("options", [{}, {"resume": True}, {"overwrite": True}])
    def test_a_foreign_folder_is_left_alone(self, tmp_path: Path, options: dict[str, bool]) -> None:
        (tmp_path / "thesis.tex").write_text("years of work")
        with pytest.raises(StoreError, match=r"it holds 1 entries \(thesis.tex\) and is no run"):
            begun(tmp_path, **options)
        assert [file.name for file in tmp_path.iterdir()] == ["thesis.tex"]

    def test_a_foreign_zarr_hierarchy_is_left_alone(self, path: Path) -> None:
        zarr.create_group(path).create_array("x", shape=(2,), dtype="f4")
        with pytest.raises(StoreError, match="is a Zarr hierarchy but not a run of osp_diag"):
            begun(path, overwrite=True)
        assert (path / "x").exists()

    def test_a_file(self, tmp_path: Path) -> None:
        (tmp_path / "run").write_text("")
        with pytest.raises(StoreError, match="a file is there; choose another path"):
            begun(tmp_path / "run")

    def test_overwrite_deletes_the_run_and_nothing_else(self, path: Path) -> None:
        write_run(path)
        (path / "picture.png").write_text("kept")
        (path / "residual_post" / "notes.txt").write_text("kept")
        with begun(path, overwrite=True) as writer:
            assert writer.steps == []
            writer.append(0, {"embedding": site(0)})
        files = {str(file.relative_to(path)) for file in path.rglob("*") if file.is_file()}
        assert {"picture.png", "residual_post/notes.txt"} <= files
        assert not any(name.startswith(("series", "raw", "snapshot")) for name in files)
        assert files >= {"embedding/osp_excess_kurtosis/c.0.0.0"}

    def test_an_empty_folder_and_missing_parents_are_fine(self, tmp_path: Path) -> None:
        (tmp_path / "empty").mkdir()
        begun(tmp_path / "empty").close()
        begun(tmp_path / "a" / "b" / "c").close()

    def test_check_destination_changes_nothing(self, tmp_path: Path, path: Path) -> None:
        check_destination(path)
        check_destination(tmp_path / "a" / "b")
        assert list(tmp_path.iterdir()) == []
        write_run(path)
        check_destination(path, overwrite=True)
        with pytest.raises(StoreError, match="already holds a run"):
            check_destination(path)
        (tmp_path / "file").write_text("")
        with pytest.raises(StoreError, match="file is a file; choose another path"):
            check_destination(tmp_path / "file" / "run")

    def test_options_are_checked(self, path: Path) -> None:
        with pytest.raises(StoreError, match="block must be at least 1, not 0"):
            begun(path, block=0)


class TestOneWriter:
    def test_twice_in_one_process(self, path: Path) -> None:
        with begun(path):
            with pytest.raises(StoreError, match="already open for writing in this process"):
                begun(path, resume=True)
            with pytest.raises(StoreError, match="already open for writing in this process"):
                begun(path, overwrite=True)
        begun(path, resume=True).close()

    def test_another_process(self, path: Path) -> None:
        code = f"from osp_diag.runs.writer import RunWriter; RunWriter({str(path)!r}, {{}}, resume=True)"
        with RunWriter(path, {}):
            found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert found.returncode != 0
        assert f"is being written by process {os.getpid()} on " in found.stderr

    def test_a_lock_file_that_a_dead_process_left_locks_nothing(self, path: Path) -> None:
        begun(path).close()
        (path / LOCK_NAME).write_text('{"pid": 999999, "host": "gone", "since": "1970"}')
        begun(path, resume=True).close()
        (path / LOCK_NAME).write_text("rubbish")
        begun(path, resume=True).close()

    def test_a_forked_child_may_not_write(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        with begun(path) as writer:
            monkeypatch.setattr(os, "getpid", lambda: writer._owner + 1)
            with pytest.raises(StoreError, match="not by its forked child"):
                writer.append(0, groups(0))
            monkeypatch.undo()
            writer.append(0, groups(0))

    def test_a_closed_writer_says_so(self, path: Path) -> None:
        writer = begun(path)
        writer.close()
        writer.close()
        assert "closed" in repr(writer)
        with pytest.raises(StoreError, match="is closed; open the run again with resume=True"):
            writer.append(0, groups(0))

    def test_a_file_system_without_locks_warns(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def unsupported(*_: Any) -> None:
            raise OSError(errno.ENOSYS, "Function not implemented")

        monkeypatch.setattr("fcntl.lockf", unsupported)
        with pytest.warns(UserWarning, match="offers no file locks"):
            begun(path).close()

    def test_a_system_without_locks_is_refused(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("osp_diag.runs.lock.fcntl", None)
        with pytest.raises(StoreError, match="this system has no POSIX file locks"):
            begun(path)


class TestFullDisk:
    def test_what_is_safe_is_told_and_writing_goes_on_when_there_is_space(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with begun(path) as writer:
            writer.append(0, groups(0))
            writer.append(1, groups(1))
            real, calls = os.replace, []

            def full(source: Any, target: Any) -> None:
                calls.append(target)
                if len(calls) > 3:
                    raise OSError(errno.ENOSPC, "No space left on device", str(target))
                real(source, target)

            with monkeypatch.context() as patch:
                patch.setattr(os, "replace", full)
                with pytest.raises(StoreError) as caught:
                    writer.append(2, groups(2))
            message = str(caught.value)
            assert message.startswith(f"cannot write run {path}: no space left (")
            assert "its 2 committed steps (the last is step 1) are safe" in message
            assert "Free space, then call flush() again, or open the run with resume=True" in message
            assert check_run(path) == [0, 1]
            writer.flush()
            assert check_run(path) == [0, 1, 2]

    def test_a_real_limit_on_file_size(self, path: Path) -> None:
        wide = xr.Dataset({"x": (("layer", "channel"), np.random.default_rng(0).random((20, 5000)))})
        small = xr.Dataset({"x": (("layer",), np.zeros(2))})
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        with begun(path) as writer:
            writer.append(0, {"embedding": small})
            try:
                resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
                with pytest.raises(
                    StoreError, match=r"no space left .*its 1 committed step \(the last is step 0\)"
                ):
                    writer.write_static("snapshot/embedding", wide)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            writer.append(1, {"embedding": small})
        with xr.open_datatree(path, engine="zarr") as tree:
            assert tree.coords["step"].values.tolist() == [0, 1]
            assert "snapshot" not in tree.children

    def test_the_first_exception_is_the_one_that_is_seen(
        self, path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        def failing(patch: pytest.MonkeyPatch) -> None:
            with begun(path, block=9) as writer:
                writer.append(0, groups(0))
                patch.setattr(os, "replace", full)
                raise ZeroDivisionError

        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError) as caught:
            failing(patch)
        assert "While closing the run after this: cannot write run" in caught.value.__notes__[0]
        begun(path, resume=True).close()

    def test_a_folder_that_may_not_be_written(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def refused(*_: Any, **__: Any) -> None:
            raise PermissionError(errno.EACCES, "Permission denied", "x")

        monkeypatch.setattr(Path, "mkdir", refused)
        with pytest.raises(
            StoreError, match=r"Permission denied \(x\); its 0 committed steps are safe. Mend this"
        ):
            begun(tmp_path / "run.zarr")
