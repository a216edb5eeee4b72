"""What the optimizers and weights say about outliers to come, as datasets for the run store."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import xarray as xr
from torch import Tensor, nn

from osp_diag.trainer.optimizers.build import Optimizers
from osp_diag.trainer.optimizers.concentration import (
    CONCENTRATION,
    ORTHOGONALITY,
    ROW_NORMS,
    TOP_ROWS,
    concentration,
    orthogonality,
    row_norms,
)
from osp_diag.trainer.optimizers.routing import named_parameters, role_of
from osp_diag.trainer.optimizers.sharding import local
from osp_diag.trainer.optimizers.squares import SquareSums, of_parameters, of_whole, sums
from osp_diag.trainer.parallel import gathered, reshard

__all__ = ["optimizer_evidence"]

BLOCK = re.compile(r"(?:^|\.)layers\.(\d+)\.(.+?)(?:\.weight)?$")

SIDES = ("row", "column")

SIDE = (
    "side row: a row of the weight is an output channel (of embedding and head: a vocabulary entry); column: "
    "an input channel (of the embedding: a channel of the residual stream)"
)

GAIN = {
    "mean": ("1", "mean of the gains"),
    "max": ("1", "largest magnitude of the gains"),
}

Definitions = Mapping[str, tuple[str, str]]
Statistics = dict[str, dict[str, Tensor]]
"""Parameter name → variable → a tensor of the variable's own dimensions."""


@torch.no_grad()
def optimizer_evidence(model: nn.Module, optimizers: Optimizers) -> dict[str, xr.Dataset]:
    """Small datasets about the optimizers' state, their last step and the weights.

    ``optimizer/second_moment``
        concentration, over rows and over columns, of AdamW's v (e_j: its mean over the other side)
    ``optimizer/update``
        the same of the last step's update of every matrix (e_j: mean of its squares), if it was recorded
        (:meth:`Optimizers.record_updates`)
    ``weights/norm_gain``
        concentration of every norm's gains (e_j: γ_j²), their mean and largest
    ``weights/embedding_rows``
        norms of the rows of embedding and head
    ``weights/embedding_projection``
        distance of the projections from orthogonal matrices

    Variables are called by the group and the statistic (``update_top_share``). In the first three,
    parameters of blocks have the dimensions ``layer`` and ``matrix`` (or ``norm``), those outside
    ``outside_matrix`` (or ``outside_norm``) in variables named ``outside_…``. Groups, variables and
    shapes depend on the model and its routing alone, not on the step: before the first step, moments and
    updates are NaN.

    One transfer to the host a group. Where parameters are sharded every rank has to call this: sums over rows
    and columns are exchanged, and projections gathered whole.
    """
    reshard(model)
    parameters = named_parameters(model)
    matrices = {name: value for name, value in parameters.items() if value.ndim == 2}
    trained = {name: value for name, value in matrices.items() if value.requires_grad}
    groups = {
        "optimizer/second_moment": _second_moment(optimizers, trained),
        "optimizer/update": _updates(optimizers, trained),
        "weights/norm_gain": _gains(parameters),
        "weights/embedding_rows": _embedding_rows(matrices),
        "weights/embedding_projection": _projections(matrices),
    }
    return {name: dataset for name, dataset in groups.items() if dataset is not None}


def _second_moment(optimizers: Optimizers, matrices: Mapping[str, Tensor]) -> xr.Dataset | None:
    if optimizers.adamw is None:
        return None
    states = {name: optimizers.adamw.state[value] for name, value in matrices.items()}
    states = {name: state for name, state in states.items() if state}
    local_sums = {name: sums(local(state["exp_avg_sq"])) for name, state in states.items()}
    has_stepped = {name: state["step"] > 0 for name, state in states.items()}
    statistics = _sides(of_whole(local_sums, matrices), lambda name: has_stepped[name])
    return _dataset(
        statistics,
        "second_moment",
        "matrix",
        CONCENTRATION,
        {"side": SIDES},
        f"of AdamW's second moment; {SIDE}",
    )


def _updates(optimizers: Optimizers, matrices: Mapping[str, Tensor]) -> xr.Dataset | None:
    squares = optimizers.update_squares()
    # What did not move stands in as even energies, whose numbers become NaN: the shapes never change.
    even = {
        name: SquareSums(*(torch.ones(size, device=value.device) for size in value.shape))
        for name, value in matrices.items()
    }
    statistics = _sides(
        {name: squares.get(name, even[name]) for name in matrices},
        lambda name: torch.tensor(name in squares),
    )
    return _dataset(
        statistics,
        "update",
        "matrix",
        CONCENTRATION,
        {"side": SIDES},
        f"of the last step's update, squared; {SIDE}",
    )


def _sides(
    energies: Mapping[str, SquareSums], defined: Callable[[str], Tensor]
) -> dict[str, dict[str, Tensor]]:
    """Concentration along both sides of each matrix; channels of equal number are computed together."""
    lengths: dict[int, list[tuple[str, int]]] = {}
    for name, energy in energies.items():
        for side, values in enumerate(energy):
            lengths.setdefault(values.shape[0], []).append((name, side))
    by_side: dict[tuple[str, int], dict[str, Tensor]] = {}
    for members in lengths.values():
        computed = concentration(torch.stack([energies[name][side] for name, side in members]))
        for index, member in enumerate(members):
            by_side[member] = {variable: values[index] for variable, values in computed.items()}
    return {
        name: {
            variable: torch.where(
                defined(name).to(energy.row.device),
                torch.stack([by_side[name, side][variable] for side in range(len(SIDES))]),
                torch.nan,
            )
            for variable in CONCENTRATION
        }
        for name, energy in energies.items()
    }


def _gains(parameters: Mapping[str, Tensor]) -> xr.Dataset | None:
    statistics = {}
    for name, value in parameters.items():
        if value.ndim < 2 and name.removesuffix(".weight").endswith("norm"):
            gains = gathered(value).flatten().to(torch.float32)
            statistics[name] = concentration(gains.square()) | {
                "mean": gains.mean(),
                "max": gains.abs().amax(),
            }
    return _dataset(
        statistics, "norm_gain", "norm", CONCENTRATION | GAIN, {}, "of the gains of a norm; e_j = γ_j²"
    )


def _embedding_rows(matrices: Mapping[str, Tensor]) -> xr.Dataset | None:
    vocabulary_matrices = {
        name: value for name, value in matrices.items() if role_of(name, value) in ("embedding", "head")
    }
    statistics = {name: row_norms(energy.row) for name, energy in of_parameters(vocabulary_matrices).items()}
    ranks = {"rank": tuple(range(TOP_ROWS))}
    return _dataset(statistics, "embedding", "matrix", ROW_NORMS, ranks, "of vocabulary entries", outside="")


def _projections(matrices: Mapping[str, Tensor]) -> xr.Dataset | None:
    statistics = {
        name: orthogonality(gathered(value))
        for name, value in matrices.items()
        if role_of(name, value) == "embedding_projection"
    }
    return _dataset(
        statistics,
        "embedding_projection",
        "matrix",
        ORTHOGONALITY,
        {},
        "of an embedding projection P",
        outside="",
    )


def _dataset(
    statistics: Statistics,
    subject: str,
    kind: str,
    definitions: Definitions,
    inner: Mapping[str, tuple[Any, ...]],
    description: str,
    *,
    outside: str = "outside_",
) -> xr.Dataset | None:
    """Statistics of parameters in arrays over layers, and over what is outside the blocks.

    ``subject`` begins the names of the variables, so that no two in a run share a name and not a definition;
    ``kind`` is the dimension that tells parameters of a layer apart; ``inner`` are coordinates of the
    dimensions that variables have of their own; ``outside`` begins the names of what is not in a block.
    """
    if not statistics:
        return None
    values = _on_host(statistics)
    inside = {name: match for name in statistics if (match := BLOCK.search(name))}
    beyond = [name for name in statistics if name not in inside]
    layers = sorted({int(match[1]) for match in inside.values()})
    kinds = list(dict.fromkeys(match[2] for match in inside.values()))
    dataset = xr.Dataset(coords={name: list(labels) for name, labels in inner.items()})
    for variable, (units, definition) in definitions.items():
        inner_dims = () if next(iter(values.values()))[variable].ndim == 0 else tuple(inner)
        shape = tuple(len(inner[name]) for name in inner_dims)
        attributes = {"units": units, "definition": f"{definition}; {description}"}
        if inside:
            array = np.full((len(layers), len(kinds), *shape), np.nan)
            for name, match in inside.items():
                array[layers.index(int(match[1])), kinds.index(match[2])] = values[name][variable]
            dataset[f"{subject}_{variable}"] = (("layer", kind, *inner_dims), array, attributes)
        if beyond:
            array = np.stack([values[name][variable] for name in beyond])
            dataset[f"{outside}{subject}_{variable}"] = ((f"{outside}{kind}", *inner_dims), array, attributes)
    if inside:
        dataset = dataset.assign_coords({"layer": layers, kind: kinds})
    if beyond:
        labels = [name.removeprefix("model.").removesuffix(".weight") for name in beyond]
        dataset = dataset.assign_coords({f"{outside}{kind}": labels})
    return dataset


def _on_host(statistics: Statistics) -> dict[str, dict[str, np.ndarray]]:
    """The same numbers in NumPy, by a single transfer."""
    tensors = [value for variables in statistics.values() for value in variables.values()]
    flat = torch.cat([value.reshape(-1).to(torch.float64) for value in tensors]).cpu()
    parts = iter(flat.split([value.numel() for value in tensors]))
    return {
        name: {variable: next(parts).reshape(value.shape).numpy() for variable, value in variables.items()}
        for name, variables in statistics.items()
    }
