"""Several training runs as processes: where each is put, and what is said of one that fails."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO

import pytest

from osp_diag.errors import TrainingError
from osp_diag.trainer import ablation as processes
from osp_diag.trainer.ablation import train_all, visible_gpus
from osp_diag.trainer.presets import ablation, tiny


class Finished:
    """A process that notes its environment and is over after a few looks."""

    started: list[dict[str, str]]
    commands: list[list[str]]
    codes: list[int]
    says = b""

    def __init__(self, command: list[str], *, env: dict[str, str], stdout: BinaryIO, **_: Any) -> None:
        type(self).started.append(env)
        type(self).commands.append(command)
        self.looks = 3
        self.returncode = self.codes.pop(0) if self.codes else 0
        stdout.write(self.says)

    def poll(self) -> int | None:
        self.looks -= 1
        return None if self.looks > 0 else self.returncode

    def terminate(self) -> None:
        pass

    def wait(self) -> int:
        return self.returncode


def pretended(monkeypatch: pytest.MonkeyPatch, codes: Sequence[int] = (), says: str = "") -> None:
    """Runs are not started: each says this and ends with the next code, with 0 once there is none."""
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(Finished, "started", [], raising=False)
    monkeypatch.setattr(Finished, "commands", [], raising=False)
    monkeypatch.setattr(Finished, "codes", list(codes), raising=False)
    monkeypatch.setattr(Finished, "says", says.encode())
    monkeypatch.setattr(processes.subprocess, "Popen", Finished)


@pytest.mark.parametrize(
    ("gpus", "expected"),
    [
        ([], [None] * 6),
        (["4"], ["4"] * 6),
        (["0", "2"], ["0", "2", "0", "2", "0", "2"]),
    ],
    ids=["no GPU", "one", "two"],
)
def test_runs_are_spread_over_the_gpus(
    gpus: list[str], expected: list[str | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(processes, "visible_gpus", lambda: gpus)
    pretended(monkeypatch)
    paths = train_all(ablation(tiny()), tmp_path / "out", at_a_time=4)
    assert list(paths) == ["adam", "muon_only", "muon", "muon_ssnorm", "muon_embproj", "osp"]
    assert [env.get("CUDA_VISIBLE_DEVICES") for env in Finished.started] == expected


@pytest.mark.parametrize(
    ("named", "found"), [(None, ["0", "1"]), ("5,7", ["5", "7"]), ("GPU-ab,GPU-cd", ["GPU-ab", "GPU-cd"])]
)
def test_gpus_are_named_as_the_environment_names_them(
    named: str | None, found: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes.torch.cuda, "device_count", lambda: 2)
    if named is None:
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    else:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", named)
    assert visible_gpus() == found


FRAMES = "\n".join(f"  frame #{number}: in native code" for number in range(30))


@pytest.mark.parametrize(
    ("log", "told", "left_out"),
    [
        (
            f"step 7\nosp-diag: unexpected RuntimeError: CUDA error\n{FRAMES}",
            ["osp-diag: unexpected", "frame #13"],
            "frame #14",
        ),
        (f"step 7\n{FRAMES}\nKilled", ["  Killed", "frame #16"], "frame #15"),
    ],
    ids=["it says what", "it says nothing"],
)
def test_a_run_that_fails_is_told_by_its_own_words(
    log: str, told: list[str], left_out: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretended(monkeypatch, [2], log)
    with pytest.raises(TrainingError) as raised:
        train_all({"adam": tiny()}, tmp_path / "out")
    message = str(raised.value)
    assert f"the run adam failed with exit code 2; from {tmp_path}" in message
    assert all(part in message for part in told)
    assert left_out not in message
    assert "step 7" not in message
    assert message.endswith("the same command with --resume goes on from there.")


def test_a_run_that_crashes_is_taken_up_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretended(monkeypatch, [-6, -11, 0], "osp-diag: unexpected RuntimeError: CUDA error\n")
    told: list[str] = []
    train_all({"osp": tiny()}, tmp_path / "out", announce=told.append)
    assert [command[-1] for command in Finished.commands] == ["--overwrite", "--resume", "--resume"]
    assert len([line for line in told if line.endswith("osp goes on from its last checkpoint")]) == 2
    assert "the run osp failed with exit code -11" in told[2]
    assert "CUDA error" in told[2]
    assert (tmp_path / "out" / "osp.log").read_text().count("CUDA error") == 3


def test_a_run_that_crashes_again_and_again_has_failed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretended(monkeypatch, [-6, -6, -6])
    with pytest.raises(TrainingError, match="the run osp failed with exit code -6"):
        train_all({"osp": tiny()}, tmp_path / "out")


def test_another_thread_can_stop_them(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pretended(monkeypatch)
    stop = threading.Event()
    stop.set()
    with pytest.raises(TrainingError, match="the runs osp were stopped, and are saved where they were"):
        train_all({"osp": tiny()}, tmp_path / "out", stop=stop)


def test_what_an_earlier_life_of_a_run_said_is_not_its_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pretended(monkeypatch, [-9], "Killed\n")
    (tmp_path / "osp.log").write_text("osp-diag: interrupted; the state after step 5 is saved\n")
    with pytest.raises(TrainingError, match=r"the run osp failed with exit code -9; from .*\n  Killed\n"):
        train_all({"osp": tiny()}, tmp_path, resume=True)
    assert (tmp_path / "osp.log").read_text().endswith("is saved\nKilled\n")
