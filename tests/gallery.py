"""The script that builds the gallery, which is no part of a package."""

from __future__ import annotations

import sys
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

SCRIPT = Path(__file__).parents[1] / "docs" / "build_gallery.py"


@cache
def gallery() -> ModuleType:
    """``docs/build_gallery.py`` as a module."""
    spec = spec_from_file_location("build_gallery", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for the names of their annotations
    spec.loader.exec_module(module)
    return module
