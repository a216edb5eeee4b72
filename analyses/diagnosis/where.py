"""Question 6: where it is first seen in the network, and who writes what is large: never causes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.emergence.writers import outlier_writers
from osp_diag.errors import StoreError

__all__ = ["places"]

MOST = 3


def places(case: Case) -> Iterator[str]:
    """Sentences: what the monitor noticed first, in network order, and the writer of the largest channels."""
    noticed = [finding for finding in case.noticed if finding.site is not None]
    first: dict[str, str] = {}
    for finding in noticed:
        first.setdefault(finding.rule, finding.sentence)
    yield from list(first.values())[:MOST]
    yield from _writer(case)


def _writer(case: Case) -> Iterator[str]:
    try:
        writers = outlier_writers(case.run)
    except StoreError as error:
        case.not_recorded.append(f"who writes the largest channels: {error}")
        return
    last = writers.isel(step=-1).sel(stratum="all")
    energy = last["energy"].sum("part").values
    if not np.isfinite(energy).any():
        return
    layer = int(last["layer"].values[int(np.nanargmax(energy))])
    writer = str(last["writer"].sel(layer=layer).item())
    if writer:
        words = "most of it entered the block" if writer == "earlier" else f"written by {writer}"
        yield f"largest channels after layer {layer}: {words} (a writer, not a cause)"
