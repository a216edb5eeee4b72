"""Merging estimator states over ranks: three collectives, whatever the number of sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist

from osp_diag.estimators.base import Field, Layout, State

__all__ = [
    "communication_device",
    "is_distributed",
    "is_first_rank",
    "merge_over_ranks",
    "on_first_rank",
    "rank_of_all",
]

Key = Any
_OPERATIONS = {"sum": dist.ReduceOp.SUM, "maximum": dist.ReduceOp.MAX, "minimum": dist.ReduceOp.MIN}


def is_distributed() -> bool:
    """Whether several processes share the work."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def is_first_rank() -> bool:
    """Whether this process is the one that writes and prints."""
    return not is_distributed() or dist.get_rank() == 0


def rank_of_all() -> tuple[int, int]:
    """Which process this is, and how many share the work."""
    return (dist.get_rank(), dist.get_world_size()) if is_distributed() else (0, 1)


def on_first_rank(action: Callable[[], object]) -> None:
    """Let rank 0 act while the others wait; if it fails, all raise its error instead of waiting for ever."""
    failure: list[BaseException | None] = [None]
    if is_first_rank():
        try:
            action()
        except Exception as error:
            if not is_distributed():
                raise
            failure = [error]
    if is_distributed():
        dist.broadcast_object_list(failure, src=0)
        if failure[0] is not None:
            raise failure[0]


def communication_device() -> torch.device:
    """Where a tensor has to be that the ranks add up."""
    if dist.get_backend() == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _gathered(value: Any) -> list[Any]:
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def _extended(value: torch.Tensor | None, shape: tuple[int, ...], identity: float) -> torch.Tensor:
    """``value`` filled up with the identity: a rank whose sequences were shorter, or that saw nothing."""
    extended = torch.full(shape, identity, dtype=torch.float64)
    if value is not None:
        extended[tuple(slice(0, size) for size in value.shape)] = value.detach().to("cpu", torch.float64)
    return extended


def merge_over_ranks(
    states: Mapping[Key, State],
    layouts: Mapping[Key, Layout],
    fields: Callable[[Key, Layout], Mapping[str, Field]],
) -> tuple[dict[Key, State], dict[Key, Layout]]:
    """The states of all ranks' tokens together, on every rank, as CPU tensors in float64.

    All sums travel in one vector, all maxima in another and all minima in a third. A rank that saw
    nothing at a site (an expert without tokens, say) contributes the identity.

    Parameters
    ----------
    states, layouts : what this rank measured, by key
    fields : how the fields of a key combine
    """
    # Ranks saw sequences of different lengths: an entry is as large as the largest of any rank.
    merged_layouts: dict[Key, Layout] = {}
    shapes: dict[tuple[Key, str], tuple[int, ...]] = {}
    own_shapes = {key: {name: tuple(v.shape) for name, v in state.items()} for key, state in states.items()}
    for their_layouts, their_shapes in _gathered((dict(layouts), own_shapes)):
        for key, layout in their_layouts.items():
            widest = merged_layouts.get(key)
            merged_layouts[key] = layout if widest is None or layout.tokens > widest.tokens else widest
        for key, by_name in their_shapes.items():
            for name, shape in by_name.items():
                largest = shapes.get((key, name), shape)
                shapes[key, name] = tuple(map(max, largest, shape))
    order = sorted(shapes, key=str)
    combine = {(key, name): fields(key, merged_layouts[key])[name] for key, name in order}
    merged: dict[Key, State] = {}
    device = communication_device()
    # One collective for each way of combining: the entries end to end in one vector, cut apart after it.
    for combination, operation in _OPERATIONS.items():
        entries = [entry for entry in order if combine[entry].combine == combination]
        if not entries:
            continue
        pieces = [
            _extended(states.get(key, {}).get(name), shapes[key, name], combine[key, name].identity).reshape(
                -1
            )
            for key, name in entries
        ]
        vector = torch.cat(pieces).to(device)
        dist.all_reduce(vector, operation)
        for (key, name), piece in zip(entries, vector.cpu().split([len(p) for p in pieces]), strict=True):
            merged.setdefault(key, {})[name] = piece.reshape(shapes[key, name])
    return merged, merged_layouts
