"""GPTQ: weights rounded column by column, each column's error made up for by those that follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from osp_diag.checkpoints.checkpoint import evaluation_mode
from osp_diag.errors import UsageError
from osp_diag.quantizing.block_passes import BlockPasses, calibration_ids
from osp_diag.quantizing.grid import Grid
from osp_diag.quantizing.linears import BlockLinear

__all__ = ["GptqWeights", "gptq_rounded", "gptq_weights"]

DAMPING = 0.01
COLUMNS_AT_ONCE = 128
_MOST_DAMPING = 1.0


@dataclass(frozen=True, kw_only=True)
class GptqWeights:
    """The rounded weights, and what went otherwise."""

    weights: dict[str, Tensor]
    """path of the Linear → its rounded weight, in the dtype of the model"""
    notes: tuple[str, ...]
    """Linears that were rounded to nearest, or needed more damping"""


class _Reached(Exception):  # noqa: N818 (no error)
    """All inputs that are asked for have come."""


def gptq_weights(
    model: nn.Module,
    linears: Iterable[BlockLinear],
    grid: Grid,
    calibration: Any,
    *,
    damping: float = DAMPING,
    columns_at_once: int = COLUMNS_AT_ONCE,
    batch_size: int = 1,
    blocks: str | None = None,
    in_place: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> GptqWeights:
    """Round weights of a model by GPTQ (Frantar et al. 2022, arXiv 2210.17323), and leave the model as it is.

    Block by block and, within a block, in the order in which Linears run: each is rounded for the inputs that
    come to it through all weights that were rounded before. Linears with the same input share its Hessian.
    Hooks that act on the model are part of it: enter a rotation first, and round activations afterwards.

    At one time there are, besides the model and the rounded weights, one Hessian and the states of the stream
    of all calibration tokens.

    Parameters
    ----------
    model : causal language model
    linears : those to round; all others stay as they are
    grid : of their rows
    calibration : token ids of shape (sequence, position), without padding
    damping : added to the Hessian's diagonal, in units of its mean
    columns_at_once : columns whose errors reach the rest of the matrix together; of no effect but on time
    batch_size : sequences a pass
    blocks : path or pattern of the stack of blocks, where the guess fails
    in_place : leave the rounded weights in the model, also after an error; who holds the others puts them
        back. They are then not in memory a second time
    progress : called with (blocks done, blocks in all)

    Raises
    ------
    UsageError : damping that is not above 0, or a grid with groups
    TokenError : no tokens, or foreign ones
    CheckpointError, SiteError : blocks that cannot be run one after the other
    """
    if not 0 < damping <= _MOST_DAMPING or columns_at_once < 1:
        raise UsageError(
            f"damping={damping}, columns_at_once={columns_at_once}: damping lies above 0 and is 1 at most, "
            "and 1 or more columns are rounded at once"
        )
    if grid.group_size is not None:
        raise UsageError(f"GPTQ rounds each row on one grid, not groups of {grid.group_size} of its channels")
    ids = calibration_ids(model, calibration)
    weights: dict[str, Tensor] = {}
    notes: list[str] = []
    with evaluation_mode(model), torch.no_grad(), ExitStack() as undo:
        passes = BlockPasses(model, ids, batch_size=batch_size, blocks=blocks)
        by_layer = _by_layer(passes, linears)
        states = passes.first_states()
        last = max((layer for layer, linears in enumerate(by_layer) if linears), default=-1)
        for layer in range(last + 1):
            for group in _groups(passes, layer, states[0], by_layer[layer]):
                # Rows do not depend on one another: those of all Linears of the group are one matrix.
                rounded, note = gptq_rounded(
                    torch.cat([linear.weight.detach() for linear in group.values()]),
                    _hessian(passes, layer, states, group),
                    grid,
                    damping=damping,
                    columns_at_once=columns_at_once,
                )
                notes += [f"{', '.join(group)}: {note}"] if note else []
                parts = rounded.split([linear.out_features for linear in group.values()])
                for (path, linear), part in zip(group.items(), parts, strict=True):
                    weights[path] = part.clone()
                    if not in_place:
                        undo.callback(setattr, linear, "weight", linear.weight)
                    linear.weight = nn.Parameter(weights[path], requires_grad=False)
            if layer < last:
                for index, state in enumerate(states):
                    states[index] = passes.run(layer, state)
            if progress is not None:
                progress(layer + 1, last + 1)
    return GptqWeights(weights=weights, notes=tuple(notes))


def _by_layer(passes: BlockPasses, linears: Iterable[BlockLinear]) -> list[dict[str, nn.Linear]]:
    by_layer: list[dict[str, nn.Linear]] = [{} for _ in passes.paths]
    for linear in linears:
        by_layer[linear.layer][linear.path] = linear.module
    return by_layer


def _groups(
    passes: BlockPasses, layer: int, state: Tensor, linears: dict[str, nn.Linear]
) -> list[dict[str, nn.Linear]]:
    """Linears in the order in which they run, those together that read the same tensor."""
    order: list[tuple[Tensor, dict[str, nn.Linear]]] = []

    def seen(path: str) -> Callable[[Tensor], None]:
        def see(values: Tensor) -> None:
            for read, group in order:
                if read is values:
                    group[path] = linears[path]
                    return
            order.append((values, {path: linears[path]}))

        return see

    with ExitStack() as undo:
        for path, linear in linears.items():
            _watch(linear, seen(path), undo)
        passes.run(layer, state)
    run = {path for _, group in order for path in group}
    # An expert to which no token of the first batch went may be asked in a later one.
    idle = [{path: linear} for path, linear in linears.items() if path not in run]
    return [*(group for _, group in order), *idle]


def _hessian(
    passes: BlockPasses, layer: int, states: list[Tensor], group: dict[str, nn.Linear]
) -> Float[Tensor, "column column"]:
    """Σ x xᵀ over the calibration's inputs of these Linears, in float32."""
    linear = next(iter(group.values()))
    hessian = torch.zeros(linear.in_features, linear.in_features, device=linear.weight.device)

    def add(values: Tensor) -> None:
        rows = values.reshape(-1, values.shape[-1]).float()
        hessian.addmm_(rows.T, rows)
        if len(values.shape) > 2:  # all tokens of the batch; experts are given rows, in several calls perhaps
            raise _Reached

    with ExitStack() as undo:
        _watch(linear, add, undo)
        for state in states:
            try:
                passes.run(layer, state)
            except _Reached:
                continue
    return hessian


def _watch(linear: nn.Linear, see: Callable[[Tensor], None], undo: ExitStack) -> None:
    """Call ``see`` with each input of a Linear, as other hooks have left it."""

    def hook(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        see(arguments[0] if arguments else keywords["input"])

    undo.callback(linear.register_forward_pre_hook(hook, with_kwargs=True).remove)


@torch.no_grad()
def gptq_rounded(
    weight: Float[Tensor, "row column"],
    hessian: Float[Tensor, "column column"],
    grid: Grid,
    *,
    damping: float = DAMPING,
    columns_at_once: int = COLUMNS_AT_ONCE,
) -> tuple[Float[Tensor, "row column"], str]:
    """(the rounded weight, a note or "") that makes ‖(W − Q) X‖² small, with H = X Xᵀ.

    Columns are rounded from the first to the last on grids that are fixed before. With U the upper Cholesky
    factor of (H + λ I)⁻¹, λ = damping · mean diag H, the error e = (w_j − q_j) / U_jj of column j changes the
    later ones: w_k ← w_k − e U_jk. Columns whose input is always 0 are rounded to nearest.

    In float32 (float64 where the matrix is not positive definite in that, and for float64 weights). Where
    that fails too, damping grows by factors of 10 up to 1, then all is rounded to nearest; the note says so.
    """
    exact = weight.dtype == torch.float64
    working = weight.clone() if exact else weight.float()
    scales = grid.scales(working)
    factor, note = _inverse_factor(hessian, damping, exact=exact)
    if factor is None:
        return grid.rounded(weight, scales), note
    factor = factor.to(working.dtype)
    working = working.clone() if working is weight else working
    rounded = torch.empty_like(working)
    columns = working.shape[1]
    for start in range(0, columns, columns_at_once):
        stop = min(start + columns_at_once, columns)
        part, inner = working[:, start:stop], factor[start:stop, start:stop]
        errors = torch.empty_like(part)
        for column in range(stop - start):
            values = part[:, column : column + 1]
            nearest = grid.rounded(values, scales)
            rounded[:, start + column] = nearest[:, 0]
            error = (values - nearest) / inner[column, column]
            errors[:, column] = error[:, 0]
            part[:, column + 1 :].addmm_(error, inner[column : column + 1, column + 1 :], alpha=-1)
        working[:, stop:].addmm_(errors, factor[start:stop, stop:], alpha=-1)
    return rounded.to(weight.dtype), note


def _inverse_factor(hessian: Tensor, damping: float, *, exact: bool) -> tuple[Tensor | None, str]:
    """The upper Cholesky factor of the damped Hessian's inverse, and what had to be done for it."""
    diagonal = hessian.diagonal()
    if not bool(diagonal.any()):
        return None, "rounded to nearest, since no calibration token came to it"
    if not bool(torch.isfinite(hessian).all()):
        return None, "rounded to nearest, since its inputs are not finite"
    mean, dead, asked = float(diagonal.double().mean()), diagonal == 0, damping
    while damping <= _MOST_DAMPING * (1 + 1e-9):
        for dtype in (torch.float64,) if exact else (torch.float32, torch.float64):
            damped = hessian.to(dtype, copy=True)
            damped.diagonal()[dead] = mean
            damped.diagonal().add_(damping * mean)
            factor = _upper_factor_of_inverse(damped)
            if factor is not None:
                return factor, "" if damping == asked else f"damping {damping:g}"
        damping *= 10
    return None, "rounded to nearest, since its Hessian cannot be inverted"


def _upper_factor_of_inverse(matrix: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(matrix)
    if int(failed):
        return None
    upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
    return None if int(failed) or not bool(torch.isfinite(upper).all()) else upper
