"""Measuring the matrices of projections, of a single one and of experts that are modules of their own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from osp_diag.capture.down_projection import down_projection, expert_projection, fused_part
from osp_diag.estimators.base import Layout, State, Suite
from osp_diag.estimators.weight_outliers import WeightObservation

__all__ = ["measure_expert_weights", "measure_weight"]


def measure_weight(
    suite: Suite, module: nn.Module, inputs: Tensor, fused: tuple[int, int, int, int] | None
) -> tuple[Layout, State] | str:
    """Measure a projection's matrix, or the part of a fused one; text says why it cannot be read.

    Parameters
    ----------
    inputs : what the projection was given, which tells its rows from its columns
    fused : which part
    """
    weight = down_projection(module, inputs)
    if fused is not None and not isinstance(weight, str):
        weight = fused_part(weight, fused)
    if isinstance(weight, str):
        return weight
    observation = WeightObservation(weight)
    return observation.layout, suite.measure(observation)


def measure_expert_weights(
    suite: Suite, experts: Sequence[nn.Module], rows: int
) -> tuple[Layout, State] | str:
    """Measure the experts' matrices one by one, labelled as if they were stacked."""
    states: list[State] = []
    for module in experts:
        weight = expert_projection(module, rows)
        if isinstance(weight, str):
            return weight
        observation = WeightObservation(weight)
        states.append(suite.measure(observation))
    layout = replace(observation.layout, experts=len(states))
    together = {}
    for name, spec in suite.fields(layout).items():
        values = [state[name] for state in states]
        if "expert" in spec.dims:
            together[name] = torch.cat(values, dim=spec.dims.index("expert"))
        else:
            # Maxima, as all that is measured of weights (docs/decisions.md, Estimators).
            together[name] = torch.stack(values).amax(0)
    return layout, together
