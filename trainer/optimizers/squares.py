"""Sums of squares over the rows and columns of parameters, wherever their rows are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from jaxtyping import Float
from torch import Tensor

from osp_diag.trainer.optimizers.sharding import full_rows, local, placement_of, sum_over_shards

__all__ = ["SquareSums", "of_parameters", "of_whole", "square_sums", "sums"]


class SquareSums(NamedTuple):
    """Numbers that are not negative, summed along either dimension.

    ``row`` has one sum for every row, ``column`` for every column. A vector has its own numbers in both, as
    if it were a diagonal.
    """

    row: Float[Tensor, " row"]
    column: Float[Tensor, " column"]


def square_sums(values: Tensor) -> SquareSums:
    """Sums of the squares of a matrix or vector."""
    return sums(values.square())


def sums(values: Tensor) -> SquareSums:
    """Sums of a matrix or vector."""
    if values.ndim < 2:
        return SquareSums(values.flatten(), values.flatten())
    return SquareSums(values.sum(1), values.sum(0))


def of_whole(local_sums: Mapping[str, SquareSums], parameters: Mapping[str, Tensor]) -> dict[str, SquareSums]:
    """The sums of whole parameters from those of the rows that each rank holds.

    One collective for all of them where parameters are sharded: every rank has to call it.

    Parameters
    ----------
    local_sums : name → sums of this rank's rows
    parameters : name → the parameter, which knows how it is placed
    """
    names, parts, placements = list(local_sums), [], []
    for name in names:
        parameter = parameters[name]
        placement = placement_of(name, parameter, None)
        rows = parameter.shape[0] if parameter.ndim else 1
        row = full_rows(local_sums[name].row, placement, rows)
        parts += [row, local_sums[name].column if parameter.ndim > 1 else row]
        placements += [placement, placement]
    summed = sum_over_shards(parts, placements)
    return {name: SquareSums(*summed[2 * index : 2 * index + 2]) for index, name in enumerate(names)}


def of_parameters(parameters: Mapping[str, Tensor]) -> dict[str, SquareSums]:
    """Sums of the squares of whole parameters; a collective where they are sharded."""
    local_sums = {name: square_sums(local(parameter.detach())) for name, parameter in parameters.items()}
    return of_whole(local_sums, parameters)
