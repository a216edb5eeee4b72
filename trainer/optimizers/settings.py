"""The hyperparameters that the optimizers hold when they are asked, whatever was configured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float64

from osp_diag.runs.declared import DeclaredGroup, GroupStep
from osp_diag.trainer.optimizers.build import Optimizers

__all__ = ["OptimizerSettings"]

VARIABLES = {
    "learning_rate": ("1", "the torch optimizer's own, after the schedule"),
    "weight_decay": ("1", "decoupled, multiplied by the learning rate"),
    "beta1": ("1", "decay of the first moment; NaN where the optimizer has none"),
    "beta2": ("1", "decay of the second moment; NaN where the optimizer has none"),
    "momentum": ("1", "Muon's; NaN where the optimizer has none"),
    "parameter_count": ("parameters", "entries of the parameters that it moves, over all ranks"),
}
"""Variable → units, definition, of what an optimizer holds for one of its parameter groups."""


class OptimizerSettings:
    """Reads the parameter groups of a run's optimizers.

    A group is called as in :attr:`Optimizers.groups`, ``optimizer.role``. Parameters of one role that torch's
    optimizer holds in several groups (of other rates, or devices) have a row for each, ``optimizer.role/2``.
    """

    def __init__(self, optimizers: Optimizers) -> None:
        self._optimizers = optimizers
        # The rows are settled now: a later step records what has become of these.
        self._places = [place for place, _ in self._parts()]
        names, rows = [], Counter[str]()
        for _, _, label in self._places:
            rows[label] += 1
            names.append(label if rows[label] == 1 else f"{label}/{rows[label]}")
        self._declared = DeclaredGroup.of(
            xr.Dataset(
                {
                    name: (
                        "parameter_group",
                        np.full(len(names), np.nan),
                        {"units": units, "definition": definition},
                    )
                    for name, (units, definition) in VARIABLES.items()
                },
                coords={"parameter_group": names},
            )
        )

    def values(self) -> Float64[np.ndarray, "parameter_group variable"]:
        """The settings now, in the order of :data:`VARIABLES`; nothing is read from the device."""
        parts = dict(self._parts())
        return np.array([self._row(place, parts.get(place, 0)) for place in self._places])

    def labelled(self, values: Float64[np.ndarray, "parameter_group variable"]) -> GroupStep:
        """What :meth:`values` returned with its labels."""
        return GroupStep(self._declared, dict(zip(VARIABLES, np.ascontiguousarray(values.T), strict=True)))

    def _parts(self) -> Iterator[tuple[tuple[str, int, str], int]]:
        """(optimizer, number of its parameter group, label) and the entries of the parameters there."""
        labels = {id(value): label for label, pairs in self._optimizers.groups.items() for _, value in pairs}
        for name, optimizer in self._optimizers.each.items():
            for number, group in enumerate(optimizer.param_groups):
                counts = Counter[str]()
                for value in group["params"]:
                    counts[labels.get(id(value), name)] += value.numel()
                for label, count in counts.items():
                    yield (name, number, label), count

    def _row(self, place: tuple[str, int, str], count: int) -> list[float]:
        name, number, _ = place
        group: dict[str, Any] = self._optimizers.each[name].param_groups[number]
        betas = group.get("betas", (np.nan, np.nan))
        return [
            float(value)
            for value in (
                group["lr"],
                group["weight_decay"],
                betas[0],
                betas[1],
                group.get("momentum", np.nan),
                count,
            )
        ]
