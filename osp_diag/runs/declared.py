"""One probed step as plain arrays, beside the labels that were declared once for all steps.

A step of a default probe has 1,100 arrays whose dimensions, coordinates, units and definitions are the same
at every step. They are declared where a group is first seen; a later step hands over its numbers, and
labelled Datasets are made of them only for whoever looks (docs/decisions.md, Runs).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import xarray as xr

__all__ = ["Arrays", "DeclaredGroup", "DeclaredVariable", "GroupStep", "ProbedStep", "parts_of", "unmeasured"]

Arrays = Mapping[str, np.ndarray]
"""The numbers of one group at one step, by variable."""


def unmeasured(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """What stands for numbers that a step does not have: NaN, or −1 among integers, which are labels."""
    return np.full(shape, np.nan if dtype.kind == "f" else -1, dtype)


@dataclass(frozen=True, eq=False)
class DeclaredVariable:
    """Everything about a variable of a group but its numbers."""

    dims: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    attributes: Mapping[str, Any]

    def fits(self, values: np.ndarray) -> bool:
        """Whether these can be the variable's numbers at a step."""
        return values.shape == self.shape and values.dtype == self.dtype


@dataclass(frozen=True, eq=False)
class DeclaredGroup:
    """A group of a run without its numbers. Two steps that share this object have the same labels."""

    variables: Mapping[str, DeclaredVariable]
    coordinates: xr.Coordinates
    attributes: Mapping[Any, Any]

    @classmethod
    def of(cls, dataset: xr.Dataset) -> DeclaredGroup:
        """The labels of ``dataset``."""
        # Not `data_vars`, which makes a labelled array of each of hundreds.
        variables = {
            str(name): DeclaredVariable(
                tuple(map(str, variable.dims)), variable.shape, variable.dtype, dict(variable.attrs)
            )
            for name, variable in dataset.variables.items()
            if name not in dataset.coords
        }
        return cls(variables, dataset.coords.copy(deep=True), dict(dataset.attrs))

    def labels(self, dimension: str) -> np.ndarray | None:
        """The coordinate of a dimension; None if it has none."""
        return self.coordinates[dimension].values if dimension in self.coordinates else None

    def dataset(self, arrays: Arrays) -> xr.Dataset:
        """The numbers of one step with their labels."""
        variables = {
            name: xr.Variable(variable.dims, arrays[name], variable.attributes)
            for name, variable in self.variables.items()
        }
        return xr.Dataset(variables, self.coordinates, self.attributes)


@dataclass(frozen=True, eq=False)
class GroupStep:
    """The numbers of one group at one step, and where their labels are."""

    declared: DeclaredGroup
    arrays: Arrays

    @cached_property
    def dataset(self) -> xr.Dataset:
        """The labelled numbers, made when they are first asked for."""
        return self.declared.dataset(self.arrays)


@dataclass(frozen=True, eq=False)
class ProbedStep(Mapping[str, xr.Dataset]):
    """One probed step: site or group → Dataset without the step, made when it is looked at.

    ``groups`` has the same as plain arrays, or as Datasets where the maker had nothing else.
    """

    groups: Mapping[str, GroupStep | xr.Dataset] = field(default_factory=dict)

    def __getitem__(self, group: str) -> xr.Dataset:
        part = self.groups[group]
        return part.dataset if isinstance(part, GroupStep) else part

    def __contains__(self, group: object) -> bool:
        return group in self.groups

    def __iter__(self) -> Iterator[str]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __or__(self, datasets: Mapping[str, xr.Dataset]) -> ProbedStep:
        """The step with further datasets."""
        return ProbedStep({**self.groups, **parts_of(datasets)})


def parts_of(groups: Mapping[str, xr.Dataset]) -> Mapping[str, GroupStep | xr.Dataset]:
    """The groups of a step as its maker had them: of a :class:`ProbedStep` no Dataset is made."""
    return groups.groups if isinstance(groups, ProbedStep) else groups
