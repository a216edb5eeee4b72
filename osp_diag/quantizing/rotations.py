"""Rotations that leave a model's predictions as they are and spread its outliers: QuaRot's R1 to R4."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.utils import parametrize

from osp_diag.errors import CheckpointError, UsageError
from osp_diag.quantizing.folding import norm_gains
from osp_diag.quantizing.hadamard import Hadamard, hadamard, signed_hadamard
from osp_diag.quantizing.stream_structure import (
    ADVICE,
    StreamStructure,
    ValuePath,
    measure_structure,
)
from osp_diag.sites import SiteMap, find_sites
from osp_diag.sites.trace import run_example, undisturbed, unwrap

__all__ = [
    "AppliedRotation",
    "DenseRotation",
    "Rotation",
    "RotationKind",
    "StreamRotations",
    "down_projections",
    "folded_gains",
    "random_rotations",
    "rotated",
]

RotationKind = Literal["none", "ffn-hadamard", "random", "learned"]

_MOVED = {torch.float32: 1e-3, torch.float64: 1e-6}
_MOVED_IN_HALF_PRECISION = 0.2
"""How far logits may move, of their own length: rounding moves them by less, a wrong rotation by about 1."""


class Rotation(Protocol):
    """An orthogonal matrix Q."""

    def apply(self, values: Float[Tensor, "*rows channel"]) -> Float[Tensor, "*rows channel"]:
        """x Q, of each row."""
        ...

    def matrix(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "channel channel"]:
        """Q, dense."""
        ...


@dataclass(frozen=True, eq=False)
class DenseRotation:
    """A rotation that is held as a matrix."""

    values: Float[Tensor, "channel channel"]

    def apply(self, values: Float[Tensor, "*rows channel"]) -> Float[Tensor, "*rows channel"]:
        """x Q, in the dtype of ``values``."""
        return values @ self.values.to(values.device, values.dtype)

    def matrix(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "channel channel"]:
        """The matrix itself."""
        return self.values.to(dtype)


@dataclass(frozen=True, kw_only=True)
class StreamRotations:
    """R1 of the residual stream, and R2 of each layer's values, the same for all its heads."""

    stream: Rotation
    values: Mapping[int, Rotation]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class AppliedRotation:
    """What was rotated."""

    kind: RotationKind
    notes: tuple[str, ...] = ()
    """what differs from full rotations of everything: blocks of a Hadamard matrix, values left as they are"""
    key_rotation: Hadamard | None = None
    """R3, by which queries and keys are to be multiplied behind RoPE where keys are rounded; None: the method
    asks for none"""
    online: Mapping[str, Hadamard] = field(default_factory=dict)
    """R4: Linear → what its input is multiplied by at every call"""


@contextmanager
def rotated(
    model: nn.Module,
    kind: RotationKind = "random",
    *,
    seed: int = 0,
    rotations: StreamRotations | None = None,
    blocks: str | None = None,
) -> Iterator[AppliedRotation]:
    """The same function computed in rotated coordinates, while this lasts.

    - ``none``: nothing is changed.
    - ``ffn-hadamard``: R4 alone. The MLP's hidden state is multiplied by a Hadamard matrix H at every call,
      and the down projection's weight too: W h = (W H)(Hᵀ h).
    - ``random`` (QuaRot, Ashkboos et al. 2024, arXiv 2404.00456): gains of norms are moved into the Linears
      that read them; R1 rotates the stream by a Hadamard matrix of random signs (embedding, all that writes
      the stream, all that reads it, the head); R2 rotates each head's values and the columns of the
      attention's output projection; R3 is left to who rounds keys (``key_rotation``); and R4.
    - ``learned`` (SpinQuant, Liu et al. 2024, arXiv 2405.16406): the same with the given R1 and R2.

    Parameters are exchanged, never written to, so a tied head is untied for the time; hooks multiply the
    inputs of the down projections. All is put back afterwards, also after an error. The changed matrices take
    their memory twice; products are float32 (float64 for float64).

    Parameters
    ----------
    model : causal language model; ``ffn-hadamard`` asks for blocks with down projections alone
    seed : of the random signs; results at few bits differ widely between seeds
    rotations : R1 and R2 of ``learned``
    blocks : path or pattern of the stack of blocks, where the guess fails

    Raises
    ------
    UsageError : no such kind, or ``learned`` without rotations
    CheckpointError : a model whose stream or MLP cannot be rotated (see
        :func:`~osp_diag.quantizing.stream_structure.measure_structure` and
        :func:`~osp_diag.quantizing.folding.norm_gains`), or whose logits change by more than rounding
    SiteError : no blocks were found
    """
    if kind not in get_args(RotationKind):
        raise UsageError(f"rotation {kind!r} is unknown; there are {', '.join(get_args(RotationKind))}")
    if (kind == "learned") != (rotations is not None):
        raise UsageError("give `rotations=` with the kind 'learned', and with no other")
    if kind == "none":
        yield AppliedRotation(kind=kind)
        return
    model = unwrap(model)
    sites = find_sites(model, blocks=blocks)
    downs = down_projections(model, sites)
    structure = None if kind == "ffn-hadamard" else measure_structure(model, sites, blocks=blocks)
    if structure is not None and rotations is None:
        rotations = random_rotations(structure, seed)
    plan = _Plan(model)
    applied = _planned(plan, kind, downs, structure, rotations)
    with ExitStack() as undo:
        with undisturbed(model):
            before = _logits(model)
            plan.carry_out(undo)
            for path, matrix in applied.online.items():
                hook = _multiplication_of_inputs(matrix)
                undo.callback(
                    model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True).remove
                )
            _refuse_other_logits(model, before, _logits(model))
        yield applied


def random_rotations(structure: StreamStructure, seed: int) -> StreamRotations:
    """R1 and R2 as Hadamard matrices of random signs, of one seed."""
    generator = torch.Generator().manual_seed(seed)
    stream = signed_hadamard(structure.width, generator)
    values = {path.layer: signed_hadamard(path.width, generator) for path in structure.values}
    matrices = (stream.hadamard, *(rotation.hadamard for rotation in values.values()))
    return StreamRotations(
        stream=stream, values=values, notes=tuple(m.description for m in matrices if not m.is_full)
    )


@contextmanager
def folded_gains(model: nn.Module, structure: StreamStructure) -> Iterator[None]:
    """The gains of all norms before the readers of the stream moved into these, while this lasts.

    Raises
    ------
    CheckpointError : as :func:`~osp_diag.quantizing.folding.norm_gains`
    """
    plan = _Plan(model)
    _fold_gains(plan, structure)
    with ExitStack() as undo:
        plan.carry_out(undo)
        yield


def _fold_gains(plan: _Plan, structure: StreamStructure) -> None:
    norms = {path: None for path in structure.readers.values() if path is not None}
    measured = {path: norm_gains(path, plan.model.get_submodule(path), structure.width) for path in norms}
    for linear, norm in structure.readers.items():
        if norm is not None and measured[norm].parameter is not None:
            gains = measured[norm].gains
            plan.add(linear, "weight", lambda weight, gains=gains: weight * gains.to(weight))
    for path, norm in measured.items():
        if norm.parameter is not None:
            neutral = norm.neutral
            plan.add(path, norm.parameter, lambda weight, fill=neutral: torch.full_like(weight, fill))


def _planned(
    plan: _Plan,
    kind: RotationKind,
    downs: dict[str, Hadamard],
    structure: StreamStructure | None,
    rotations: StreamRotations | None,
) -> AppliedRotation:
    notes = [matrix.description for matrix in downs.values() if not matrix.is_full]
    key_rotation = None
    for path, matrix in downs.items():
        plan.add_linear(path, matrix.apply)
    if structure is not None and rotations is not None:
        _fold_gains(plan, structure)
        _rotate_stream(plan, structure, rotations.stream)
        for path in structure.values:
            _rotate_values(plan, path, rotations.values[path.layer])
        if structure.values:
            key_rotation = hadamard(structure.values[0].width)
        notes += [*rotations.notes, *structure.notes]
    return AppliedRotation(
        kind=kind, notes=tuple(dict.fromkeys(notes)), key_rotation=key_rotation, online=downs
    )


def _rotate_stream(plan: _Plan, structure: StreamStructure, rotation: Rotation) -> None:
    for path in structure.embeddings:
        plan.add(path, "weight", rotation.apply)
    for path in structure.readers:
        plan.add_linear(path, rotation.apply)
    for path in dict.fromkeys(structure.writers):
        plan.add_linear(path, lambda weight: rotation.apply(weight.T).T, bias=rotation.apply)


def _rotate_values(plan: _Plan, path: ValuePath, rotation: Rotation) -> None:
    def of_rows(weight: Tensor) -> Tensor:
        """Rows are (group, slot, width): those of the values are rotated within their head."""
        groups, slots, first, count = path.fused or (1, weight.shape[0] // path.width, 0, None)
        rows = weight.clone().reshape(groups, slots, path.width, -1)
        chosen = slice(first, None if count is None else first + count)
        rows[:, chosen] = rotation.apply(rows[:, chosen].transpose(-1, -2)).transpose(-1, -2)
        return rows.reshape(weight.shape)

    plan.add_linear(path.value, of_rows, bias=of_rows)
    plan.add_linear(
        path.output,
        lambda weight: rotation.apply(weight.unflatten(-1, (-1, path.width))).flatten(-2),
    )


class _Plan:
    """What is to be done to which parameters: all is looked at before anything is changed."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._steps: dict[tuple[str, str], list[Callable[[Tensor], Tensor]]] = {}

    def add(self, path: str, parameter: str, step: Callable[[Tensor], Tensor]) -> None:
        """Raises CheckpointError for a parameter that cannot be exchanged."""
        module = self.model.get_submodule(path)
        _check(f"{path}.{parameter}", module, parameter)
        self._steps.setdefault((path, parameter), []).append(step)

    def add_linear(
        self,
        path: str,
        step: Callable[[Tensor], Tensor],
        *,
        bias: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """A step of a weight, and one of the bias where the Linear has one."""
        module = self.model.get_submodule(path)
        if not isinstance(module, nn.Linear):
            raise CheckpointError(
                f"{path} is a {type(module).__name__}, not an nn.Linear: which of its axes are output channels "
                "is unknown, so it cannot be rotated"
            )
        self.add(path, "weight", step)
        if bias is not None and module.bias is not None:
            self.add(path, "bias", bias)

    @torch.no_grad()
    def carry_out(self, undo: ExitStack) -> None:
        for (path, name), steps in self._steps.items():
            module = self.model.get_submodule(path)
            original = getattr(module, name)
            working = original.detach()
            working = working if working.dtype == torch.float64 else working.float()
            for step in steps:
                working = step(working)
            undo.callback(setattr, module, name, original)
            setattr(module, name, nn.Parameter(working.to(original.dtype), requires_grad=False))


def _check(name: str, module: nn.Module, parameter: str) -> None:
    values = getattr(module, parameter)
    if parametrize.is_parametrized(module, parameter):
        reason = "it is computed from others; remove the parametrization first"
    elif values.is_meta:
        reason = "it is kept elsewhere until it is used; open the model on one device"
    elif not values.is_floating_point() or hasattr(values, "full_tensor"):
        reason = "it is quantized or sharded already; open the original checkpoint on one device"
    else:
        return
    raise CheckpointError(f"{name} cannot be rotated: {reason}")


def down_projections(model: nn.Module, sites: SiteMap) -> dict[str, Hadamard]:
    """Linear → the Hadamard matrix of its input, of all that read an MLP's hidden state.

    Raises
    ------
    CheckpointError : there is none, or experts are stacked in one parameter
    """
    paths = [tap.module for tap in sites.taps if tap.site == "mlp_hidden" and tap.side == "input"]
    for layer in sites.expert_layers:
        if layer not in sites.expert_modules:
            raise CheckpointError(
                f"the MLP of layer {layer} of {type(model).__name__} cannot be rotated: its experts are stacked "
                "in one parameter, and no Linear reads their hidden states; the methods rtn and gptq need no "
                "rotation"
            )
        paths += [down for _, down in sites.expert_modules[layer]]
    if not paths:
        raise CheckpointError(
            f"the MLPs of {type(model).__name__} cannot be rotated: no down projection was found "
            f"({sites.absent.get('mlp_hidden', 'there is none')}); the methods rtn and gptq need no rotation"
        )
    widths = {path: model.get_submodule(path).weight.shape[-1] for path in paths}
    return {path: hadamard(int(width)) for path, width in widths.items()}


def _multiplication_of_inputs(matrix: Hadamard) -> Any:
    def multiplied(
        module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs:
            return (matrix.apply(inputs[0]), *inputs[1:]), keywords
        return inputs, keywords | {"input": matrix.apply(keywords["input"])}

    return multiplied


def _logits(model: nn.Module) -> Tensor:
    """What the model gives for eleven tokens."""
    result = run_example(model, None)
    logits = getattr(result, "logits", result[0] if isinstance(result, (tuple, list)) else result)
    return logits.detach()


def _refuse_other_logits(model: nn.Module, before: Tensor, after: Tensor) -> None:
    limit = _MOVED.get(before.dtype, _MOVED_IN_HALF_PRECISION)
    size = float(before.double().norm())
    moved = float((after.double() - before.double()).norm())
    if size == size and size < float("inf") and not moved <= limit * size:
        raise CheckpointError(
            f"{type(model).__name__} predicts otherwise when it is rotated: its logits move by {moved / size:.1%} "
            f"of their size, so that something reads or writes what is rotated without being seen; {ADVICE}"
        )
