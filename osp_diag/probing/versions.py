"""Versions of the libraries that a number can depend on."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["library_versions"]

LIBRARIES = ("osp-diag", "torch", "transformers", "numpy", "tokenizers", "xarray", "zarr", "jax")


def library_versions() -> dict[str, str]:
    """Installed library → version, Python's included."""
    found = {"python": platform.python_version()}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
