"""A figure that is one file more, as a user would add it, for the time of a test."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

__all__ = ["new_figure"]


@pytest.fixture
def new_figure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], Path]]:
    """A function that makes a figure of a name and the text of its file."""
    from osp_diag import figures
    from osp_diag.figures import _registry  # not at the top: every test imports this file by conftest.py

    folder = tmp_path / "more_figures"
    folder.mkdir()
    monkeypatch.setattr(figures, "__path__", [*figures.__path__, str(folder)])

    def add(name: str, text: str) -> Path:
        path = folder / f"{name}.py"
        path.write_text(text, encoding="utf-8")
        _registry.aliases.cache_clear()
        return path

    yield add
    for path in folder.glob("*.py"):
        sys.modules.pop(f"{figures.__name__}.{path.stem}", None)
        if hasattr(figures, path.stem):
            delattr(figures, path.stem)
    _registry.aliases.cache_clear()
