"""Versions of the libraries that a number can depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from osp_diag.version import __version__

__all__ = ["library_versions"]

LIBRARIES = ("torch", "transformers", "accelerate", "numpy", "tokenizers", "xarray", "zarr", "jax")


def library_versions() -> dict[str, str]:
    """Installed library → version, Python's and our own included."""
    # Our own is not asked of the installer: a clone need not be installed.
    found = {"osp-diag": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
