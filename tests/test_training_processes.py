"""Several training runs as processes: where each is put."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from trainer import ablation as processes
from trainer.ablation import train_all, visible_gpus
from trainer.presets import ablation, tiny


class Finished:
    """A process that notes its environment and is over after a few looks."""

    started: list[dict[str, str]]

    def __init__(self, command: list[str], *, env: dict[str, str], **_: Any) -> None:
        type(self).started.append(env)
        self.looks, self.returncode = 3, 0

    def poll(self) -> int | None:
        self.looks -= 1
        return None if self.looks > 0 else 0


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
    monkeypatch.setattr(processes, "POLL_SECONDS", 0.0)
    monkeypatch.setattr(Finished, "started", [], raising=False)
    monkeypatch.setattr(processes.subprocess, "Popen", Finished)
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
