"""A few numbers of every parameter, so often that an edit between two checkpoints has a step and a place."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
import xarray as xr
from jaxtyping import Float, Float32
from torch import Tensor

from osp_diag.probing.ranks import is_distributed
from osp_diag.runs.declared import DeclaredGroup, GroupStep
from osp_diag.trainer.config import TrainConfig
from osp_diag.trainer.optimizers.sharding import Placement, local, placement_of

__all__ = ["DIRECTIONS", "WeightSketch", "sketch_period"]

DIRECTIONS = 8
"""Random projections of each parameter: as many as a byte has bits, which are their signs."""

STATISTICS = {
    "norm": ("1", "‖W‖_F"),
    "row_norm_max": ("1", "max over rows of ‖w_i‖; of a vector its entries are the rows"),
    "row_norm_median": ("1", "lower median over rows of ‖w_i‖"),
    "top_row": ("row", "number of the row with the largest norm"),
}
PROJECTION = (
    "1",
    "Σ_ij s_i W_ij t_j with signs s and t drawn from the parameter's name and shape: linear in W, with the "
    "mean 0 and the variance ‖W‖_F² over all signs",
)

SMALL = 10_000_000
"""Parameters up to which a sketch costs nothing that anybody would notice."""
_TOKENS = 2**20
"""Once in so many tokens a sketch is 0.064% of the steps at 1.4B on an H200 (benchmarks/weight_sketch.py)."""


def sketch_period(config: TrainConfig, parameters: int) -> int:
    """Steps between two sketches where ``sketch_every`` says nothing.

    Each step for a small model, else so that a sketch comes once in a million tokens. Ranks do not count:
    they share its work as they share the step's.
    """
    if config.sketch_every is not None:
        return config.sketch_every
    return 1 if parameters <= SMALL else math.ceil(_TOKENS / config.tokens_per_step)


@dataclass(frozen=True)
class _Alike:
    """Parameters with equally many rows, whose numbers are computed together."""

    indices: list[int]
    rows: int
    start: int
    """Where this rank's rows begin."""
    row_signs: Float[Tensor, "parameter row direction"]
    """Of this rank's rows."""


class WeightSketch:
    """Norm, row norms and random projections of parameters, wherever their rows are.

    A projection is linear: the same edit of a weight changes it by as much, whatever the weight is. Signs are
    the bits of SHAKE-256 of the parameter's name,
    shape and side, so that sketches of different runs, machines and numbers of ranks can be compared.

    Parameters
    ----------
    parameters : by name; sharded by rows (FSDP2, HSDP), repeated (DDP) or alone
    """

    def __init__(self, parameters: Mapping[str, Tensor]) -> None:
        self._parameters = list(parameters.values())
        group = dist.group.WORLD if is_distributed() else None
        self._column_signs: list[Tensor] = []
        self._works_on: list[bool] = []
        """Whether this rank, and not another that has the same rows, works on a parameter."""
        members: dict[tuple[int, int], list[tuple[int, Placement, Tensor]]] = {}
        for index, (name, parameter) in enumerate(parameters.items()):
            rows = parameter.shape[0] if parameter.ndim else 1
            columns = parameter.numel() // rows
            title = f"{name} {tuple(parameter.shape)}"
            self._column_signs.append(_signs(f"{title} columns", columns).to(parameter.device))
            placement = placement_of(name, parameter, group)
            self._works_on.append(index % placement.replicas == placement.replica)
            signs = _signs(f"{title} rows", rows).to(parameter.device)
            members.setdefault((rows, placement.shards), []).append((index, placement, signs))
        self._alike = [self._together(rows, parts) for (rows, _), parts in members.items()]
        order = [index for alike in self._alike for index in alike.indices]
        device = self._parameters[0].device
        self._order = torch.tensor(np.argsort(order), device=device)
        self._declared = _declared(list(parameters))

    def _together(self, rows: int, parts: list[tuple[int, Placement, Tensor]]) -> _Alike:
        _, placement, _ = parts[0]
        start = placement.shard * placement.shard_rows(rows)
        length = self._matrix(parts[0][0]).shape[0]
        signs = torch.stack([row_signs[start : start + length] for _, _, row_signs in parts])
        return _Alike([index for index, _, _ in parts], rows, start, signs)

    @torch.no_grad()
    def take(self) -> Float32[Tensor, "parameter number"]:
        """The sketch of the weights as they are now, on the device; nothing waits on the host.

        A collective where there are several ranks. The columns are those of :data:`STATISTICS` and then the
        projections.
        """
        norms, projections = [], []
        for alike in self._alike:
            of_rows, onto = self._of_own_rows(alike)
            norms.append(of_rows)
            projections.append(onto)
        if is_distributed():
            flat = torch.cat([part.flatten() for part in (*norms, *projections)])
            dist.all_reduce(flat)
            pieces = iter(flat.split([part.numel() for part in (*norms, *projections)]))
            norms = [next(pieces).view(part.shape) for part in norms]
            projections = [next(pieces).view(part.shape) for part in projections]
        sketches = [
            torch.cat([_row_statistics(of_rows), onto], dim=1)
            for of_rows, onto in zip(norms, projections, strict=True)
        ]
        return torch.cat(sketches)[self._order]

    def labelled(self, values: Float32[np.ndarray, "parameter number"]) -> GroupStep:
        """What :meth:`take` returned, on the host, with its labels."""
        arrays = dict(zip(STATISTICS, np.ascontiguousarray(values[:, : len(STATISTICS)].T), strict=True))
        arrays["projection"] = np.ascontiguousarray(values[:, len(STATISTICS) :])
        return GroupStep(self._declared, arrays)

    def _of_own_rows(self, alike: _Alike) -> tuple[Tensor, Tensor]:
        """Norms of all rows, 0 of those that are not here, and this rank's part of the projections."""
        signs = alike.row_signs
        length = signs.shape[1]
        norms = signs.new_zeros(len(alike.indices), alike.rows)
        projected = torch.zeros_like(signs)
        for place, index in enumerate(alike.indices):
            if self._works_on[index]:
                matrix = self._matrix(index)
                norms[place, alike.start : alike.start + length] = torch.linalg.vector_norm(matrix, dim=1)
                torch.mm(matrix, self._column_signs[index], out=projected[place])
        # Σ_i s_i (Σ_j W_ij t_j) of each direction.
        return norms, (projected * signs).sum(1)

    def _matrix(self, index: int) -> Float32[Tensor, "row column"]:
        """What this rank holds of a parameter, as a matrix; a vector's entries are rows."""
        value = local(self._parameters[index]).detach()
        rows, columns = value.shape[0] if value.ndim else 1, len(self._column_signs[index])
        return value.reshape(rows, columns).to(torch.float32)


def _signs(text: str, count: int) -> Float32[Tensor, "entry direction"]:
    """±1, the bits of SHAKE-256 of ``text``."""
    data = np.frombuffer(hashlib.shake_256(text.encode()).digest(count), np.uint8)
    bits = np.unpackbits(data[:, None], axis=1)
    return torch.from_numpy(1 - 2 * bits.astype(np.float32))


def _row_statistics(norms: Float[Tensor, "parameter row"]) -> Float[Tensor, "parameter statistic"]:
    largest, place = norms.max(1)
    whole = torch.linalg.vector_norm(norms, dim=1)
    return torch.stack([whole, largest, norms.median(1).values, place.to(norms.dtype)], dim=1)


def _declared(names: list[str]) -> DeclaredGroup:
    count = len(names)
    variables = {
        name: ("parameter", np.zeros(count, np.float32), {"units": units, "definition": definition})
        for name, (units, definition) in STATISTICS.items()
    }
    units, definition = PROJECTION
    projection = (
        ("parameter", "direction"),
        np.zeros((count, DIRECTIONS), np.float32),
        {"units": units, "definition": definition},
    )
    return DeclaredGroup.of(
        xr.Dataset(
            {**variables, "projection": projection},
            coords={"parameter": names, "direction": np.arange(DIRECTIONS)},
        )
    )
