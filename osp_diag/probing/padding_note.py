"""What a reader of the norms of recurrent states should know of sequences with padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from osp_diag.estimators.base import State
from osp_diag.schema import MIXER_STATE

__all__ = ["padding_note"]


def padding_note(states: Mapping[tuple[Any, ...], State]) -> list[str]:
    """The note on sequences whose recurrent states were left out because of their padding, if there are any.

    Parameters
    ----------
    states : by (site, layer, what is observed)
    """
    name = "mixer_state.padded"
    counts = [float(s[name]) for (site, *_), s in states.items() if site == MIXER_STATE and name in s]
    count = int(max(counts, default=0))
    if not count:
        return []
    return [
        f"the recurrent states of {count} sequence{'s' if count > 1 else ''} with padding are not in "
        f"{MIXER_STATE}: whether padding enters a state depends on the model"
    ]
