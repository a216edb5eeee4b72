"""The wheel in a bare environment, beside the packages of PyPI whose names our folders have."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PIP = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
# Coqpit is what the other `trainer` cannot be imported without; all else that it wants is in our environment.
OTHERS = ("trainer==0.0.36", "figures==0.4.4", "coqpit==0.0.17")

IN_THE_BARE_ENVIRONMENT = """
import importlib, sys
from pathlib import Path

for name in ("osp_diag", "osp_diag.trainer", "osp_diag.analyses", "osp_diag.figures", "osp_diag.cli"):
    home = Path(importlib.import_module(name).__file__)
    assert home.is_relative_to(sys.prefix), f"{name} came from {home}, not from the wheel"
house = Path(sys.modules["osp_diag"].__file__).parent
assert (house / "py.typed").is_file(), "the wheel is not typed"
for folder in ("text", "trainer/data", "figures/report/templates", "figures/report/static"):
    assert any(path.suffix != ".py" for path in (house / folder).iterdir()), f"{folder} lacks its data"
from osp_diag.figures import draw, names
from osp_diag.trainer import train
assert callable(draw) and callable(train) and "sink_map" in names()
"""
THE_OTHERS = """
import figures, trainer
assert trainer.Trainer.__module__ == "trainer.trainer"
assert not hasattr(figures, "draw")
"""


def run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    # Of a copy: what an earlier build left in the tree would go into the wheel as well.
    folder, copy = tmp_path_factory.mktemp("wheel"), tmp_path_factory.mktemp("source") / "house"
    left_out = shutil.ignore_patterns(
        ".*", "build", "dist", "*.egg-info", "__pycache__", "demo", "docs", "tests"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=left_out)
    run(*PIP, "wheel", "--no-deps", "-c", str(ROOT / "constraints.txt"), "-w", str(folder), str(copy))
    (path,) = folder.glob("osp_diag-*.whl")
    return path


def test_every_file_of_the_wheel_lies_within_osp_diag(wheel):
    with zipfile.ZipFile(wheel) as archive:
        roots = {name.partition("/")[0] for name in archive.namelist()}
    assert {root for root in roots if not root.endswith(".dist-info")} == {"osp_diag"}


@pytest.mark.slow
def test_it_stands_beside_the_other_trainer_and_figures(wheel, tmp_path):
    run(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv"))
    python = str(tmp_path / "venv" / "bin" / "python")
    into = (*PIP, "--python", python, "install", "--no-deps", "--ignore-requires-python")
    # Ours in the middle: whichever is installed last must overwrite nothing.
    run(*into, OTHERS[0], OTHERS[2])
    run(*into, str(wheel))
    run(*into, OTHERS[1])
    # Path files inside a borrowed directory are not read: the editable install cannot stand in for the wheel.
    where = "import sysconfig; print(sysconfig.get_path('purelib'))"
    (Path(run(python, "-c", where).strip()) / "borrowed.pth").write_text(run(sys.executable, "-c", where))
    run(python, "-W", "error", "-c", IN_THE_BARE_ENVIRONMENT, cwd=tmp_path)
    run(python, "-c", THE_OTHERS, cwd=tmp_path)
    command = str(tmp_path / "venv" / "bin" / "osp-diag")
    assert run(command, "--version", cwd=tmp_path).startswith("osp-diag ")
    assert "verbs:" in run(command, "--help", cwd=tmp_path)
