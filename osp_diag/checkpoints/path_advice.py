"""What is spelled nearly like a path that does not exist."""

from __future__ import annotations

from pathlib import Path

from osp_diag.wording import did_you_mean, nearest

__all__ = ["path_advice"]


def path_advice(path: Path) -> str:
    """Advice for a path that does not exist: what in its directory is spelled nearly so."""
    parent = next((p for p in path.parents if p.is_dir()), None)
    if parent is None:
        return ""
    name = path.relative_to(parent).parts[0]
    entries = [entry.name for entry in parent.iterdir()]
    if nearest(name, entries):
        return f"; in {parent}, {did_you_mean(name, entries)}"
    return f" (in {parent}, nothing is named like {name!r})"
