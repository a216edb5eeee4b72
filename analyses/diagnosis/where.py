"""Question 6: where channels are largest, and who writes them: places, never causes."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.emergence.writers import outlier_writers
from osp_diag.errors import StoreError

__all__ = ["places"]


def places(case: Case) -> Iterator[str]:
    """A sentence: where the largest channels are, and who writes them."""
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
