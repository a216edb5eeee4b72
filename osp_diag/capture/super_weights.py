"""The entry of a down projection between the channels with the largest activations, once these are known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from osp_diag.capture.down_projection import down_projection
from osp_diag.estimators.base import State

__all__ = ["with_super_weights"]

_INPUT, _OUTPUT, _WEIGHT = (f"product_peak.{field}" for field in ("input", "output", "weight"))


def with_super_weights(
    states: Mapping[tuple[Any, ...], State], projections: Mapping[int, nn.Module]
) -> dict[tuple[Any, ...], State]:
    """States with W_rc filled in, r and c being the channels with the largest output and input.

    On every rank, because those that hold a matrix between them have to put it together. Where a weight
    cannot be read, it stays unknown.

    Parameters
    ----------
    states : by (site, layer, what is observed), of all ranks together
    projections : layer → its down projection
    """
    complete = dict(states)
    for key in sorted(states, key=str):
        state = states[key]
        if _WEIGHT not in state or key[1] not in projections:
            continue
        width = state[_INPUT].shape[-1]
        with torch.no_grad():
            weight = down_projection(projections[key[1]], torch.empty(0, width))
            if isinstance(weight, str):
                continue
            row, column = (state[name].argmax().to(weight.device) for name in (_OUTPUT, _INPUT))
            value = weight[0, row, column].to(state[_WEIGHT])
        complete[key] = state | {_WEIGHT: value}
    return complete
