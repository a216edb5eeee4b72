"""Measuring the matrices of projections: one, a gate beside its up projection, experts that are modules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from osp_diag.capture.down_projection import down_projection, expert_projection, fused_part
from osp_diag.estimators.base import Layout, State, Suite
from osp_diag.estimators.swiglu_alignment import GateObservation
from osp_diag.estimators.weight_outliers import WeightObservation

__all__ = ["Projection", "measure_expert_weights", "measure_gate", "measure_weight"]

Projection = tuple[nn.Module, tuple[int, int, int, int] | None]
"""A projection, and which part of it where it is fused."""


def measure_weight(
    suite: Suite, module: nn.Module, inputs: Tensor, fused: tuple[int, int, int, int] | None
) -> tuple[Layout, State] | str:
    """Measure a projection's matrix, or the part of a fused one; text says why it cannot be read.

    Parameters
    ----------
    inputs : what the projection was given, which tells its rows from its columns
    fused : which part
    """
    weight = _matrix((module, fused), inputs)
    if isinstance(weight, str):
        return weight
    observation = WeightObservation(weight)
    return observation.layout, suite.measure(observation)


def measure_gate(
    suite: Suite, gate: Projection, up: Projection, inputs: Tensor
) -> tuple[Layout, State] | str:
    """Measure a gate projection beside its up projection; text says why they cannot be read.

    Both are read before the gate runs; of an up projection that FSDP shards apart from it the whole is
    gathered, on all ranks alike.
    """
    matrices = []
    for projection in (gate, up):
        weight = _matrix(projection, inputs)
        if isinstance(weight, str):
            return weight
        matrices.append(weight)
    if matrices[0].shape != matrices[1].shape or matrices[0].shape[0] != 1:
        shapes = " and ".join(str(tuple(matrix.shape[1:])) for matrix in matrices)
        return f"its gate and up projections of shapes {shapes} are not of the same neurons"
    observation = GateObservation(matrices[0][0], matrices[1][0])
    return observation.layout, suite.measure(observation)


def _matrix(projection: Projection, inputs: Tensor) -> Tensor | str:
    module, fused = projection
    weight = down_projection(module, inputs)
    return weight if fused is None or isinstance(weight, str) else fused_part(weight, fused)


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
