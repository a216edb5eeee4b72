"""The house as it is installed: cheap imports, the arrows at run time, ranges and pins that agree."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import osp_diag
from osp_diag.errors import OspDiagError

ROOT = Path(__file__).parents[1]
PACKAGES = ("analyses", "cli", "figures", "trainer")
"""Folders at the top of the repository that are installed as packages within osp_diag."""
EXTRAS = (
    "jax",
    "jaxlib",
    "nnsight",
    "datasets",
    "compressed_tensors",
    "dash",
    "lm_eval",
    "pytorch_optimizer",
    "tensorboard",
    "trackio",
    "wandb",
)

IMPORT_EVERY_MODULE = """
import importlib, pkgutil
def import_every_module(package, besides="?"):
    module = importlib.import_module(package)
    for found in pkgutil.walk_packages(module.__path__, package + ".", lambda _: None):
        if not found.name.endswith("__main__") and not found.name.startswith(besides):
            importlib.import_module(found.name)
"""

BLOCK_THE_EXTRAS = f"""
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {EXTRAS}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
"""


def modules_after(code: str) -> set[str]:
    """The names of the modules that a fresh interpreter holds after running ``code``."""
    report = "\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code + report], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def test_importing_osp_diag_is_cheap_and_quiet():
    loaded = modules_after("import warnings; warnings.simplefilter('error')\nimport osp_diag")
    assert not loaded & {"torch", "jax", "xarray", "numpy", "transformers", "matplotlib"}
    ours = {name for name in loaded if name.startswith("osp_diag")}
    assert ours == {"osp_diag", "osp_diag.errors", "osp_diag.lazy", "osp_diag.version"}


def test_the_names_of_sites_load_no_framework():
    loaded = modules_after("import osp_diag.sites.names, osp_diag.schema")
    assert not loaded & {"torch", "jax", "xarray", "numpy"}


def test_importing_every_estimator_loads_neither_torch_nor_jax_nor_the_rest_of_osp_diag():
    loaded = modules_after(IMPORT_EVERY_MODULE + "import_every_module('osp_diag.estimators')")
    assert not loaded & {"torch", "jax", "transformers", "xarray"}
    ours = {name for name in loaded if name.startswith("osp_diag") and "estimators" not in name}
    vocabulary = {f"osp_diag.{name}" for name in ("errors", "lazy", "schema", "version", "wording")}
    assert ours == {"osp_diag", *vocabulary}


def test_importing_every_figure_loads_no_model_library():
    loaded = modules_after(IMPORT_EVERY_MODULE + "import_every_module('osp_diag.figures')")
    assert not loaded & {"torch", "jax", "transformers", "osp_diag.trainer"}


@pytest.mark.slow
def test_every_module_of_the_core_imports_without_the_extras():
    loaded = modules_after(
        BLOCK_THE_EXTRAS
        + IMPORT_EVERY_MODULE
        # The callbacks are left out: their base classes are of libraries that look for loggers themselves.
        + "import_every_module('osp_diag', besides='osp_diag.trainer.callbacks')\n"
        "import osp_diag\n[getattr(osp_diag, name) for name in osp_diag.__all__]\n"
    )
    assert "torch" in loaded
    assert not loaded & set(EXTRAS)


def test_public_names_are_listed_and_load_on_first_use():
    for package in (osp_diag, osp_diag.analyses, osp_diag.figures, osp_diag.trainer):
        assert dir(package) == sorted(package.__all__)
        assert all(getattr(package, name) is not None for name in package.__all__)
    assert osp_diag.OspDiagError is OspDiagError
    assert osp_diag.estimators is sys.modules["osp_diag.estimators"]
    assert callable(osp_diag.open_run)
    assert isinstance(osp_diag.Run, type)


def test_probe_is_the_function_and_stays_so():
    import osp_diag.probing

    assert osp_diag.probe is osp_diag.probing.probe
    assert osp_diag.Probe is osp_diag.probing.Probe
    assert callable(osp_diag.probe)


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match=r"^module 'osp_diag' has no attribute 'kurtosis'$"):
        osp_diag.kurtosis  # noqa: B018


def test_the_installed_version_is_the_one_that_the_package_tells():
    assert importlib.metadata.version("osp-diag") == osp_diag.__version__


@pytest.mark.parametrize("package", PACKAGES)
def test_each_folder_at_the_top_is_a_package_of_osp_diag_and_nothing_else(package):
    assert (ROOT / "osp_diag" / package).samefile(ROOT / package)
    alone = [sys.executable, "-c", f"import {package}"]
    done = subprocess.run(alone, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert f"write osp_diag.{package} for ours, or start Python elsewhere" in done.stderr


def test_the_house_is_typed():
    assert (ROOT / "osp_diag" / "py.typed").is_file()


def test_every_requirement_is_pinned_within_its_range():
    wanted = project()["dependencies"] + [
        r for extra in project()["optional-dependencies"].values() for r in extra
    ]
    for requirement in map(Requirement, wanted):
        # Triton's release is torch's choice: the CUDA builds of torch each require one of their own.
        if requirement.name in ("osp-diag", "triton"):
            continue
        assert canonicalize_name(requirement.name) in pins(), (
            f"constraints.txt does not pin {requirement.name}"
        )
        assert Version(pins()[canonicalize_name(requirement.name)]) in requirement.specifier


def test_pins_name_released_versions_only():
    for name, version in pins().items():
        assert name == canonicalize_name(name)
        released = r"[0-9]+(\.[0-9]+)*(\.?post[0-9]+)?"
        # What wandb requires of these exists as a pre-release only.
        if name == "cwevals" or name.startswith("opentelemetry-"):
            released += r"(b[0-9]+)?"
        assert re.fullmatch(released, version), f"{name}=={version}"


def test_what_formats_a_commit_is_the_ruff_that_was_tested():
    hooks = (ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8")
    assert set(re.findall(r"ruff==[0-9.]+", hooks)) == {f"ruff=={pins()['ruff']}"}


def test_make_says_what_to_do_where_no_python_will_do(tmp_path):
    shutil.copy(ROOT / "Makefile", tmp_path)
    done = subprocess.run(
        ["make", "install", "PYTHON=no-such-python"], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 2
    assert "osp-diag needs Python 3.11, 3.12 or 3.13 with the venv module, and none was found" in done.stderr
    assert "make demo PYTHON=/path/to/python3.12" in done.stderr
    assert not (tmp_path / ".venv").exists()
