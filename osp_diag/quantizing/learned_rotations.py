"""Rotations of the stream and of values, turned so that a model with rounded activations predicts best."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from osp_diag.checkpoints.checkpoint import evaluation_mode
from osp_diag.errors import NonFiniteError, UsageError
from osp_diag.quantizing.block_passes import calibration_ids
from osp_diag.quantizing.conventions import PLAIN, Convention
from osp_diag.quantizing.rotated_loss import STREAM, RotatedLoss, rotated_loss
from osp_diag.quantizing.rotations import DenseRotation, StreamRotations, random_rotations
from osp_diag.quantizing.setting import UNQUANTIZED, Setting
from osp_diag.quantizing.stream_structure import measure_structure
from osp_diag.sites import find_sites
from osp_diag.sites.trace import unwrap

__all__ = ["LearnedRotations", "cayley", "learned_rotations"]

STEPS = 8
RATE = 0.003
GROWTH = 1.2
"""Of the rate after a step that lowered the loss."""
TOKENS = 4096
ACTIVATIONS_KEYS_VALUES = Setting(UNQUANTIZED, 4, 4)
"""What is rounded while SpinQuant learns: not the weights, which GPTQ takes care of later."""


@dataclass(frozen=True, kw_only=True)
class LearnedRotations(StreamRotations):
    """Learned rotations, with what they gained on the text that they were learned on."""

    losses: tuple[float, ...]
    """cross entropy a token, in nats, of the start and of each step that was tried; the rotations are those of
    the least"""


def cayley(
    start: Float[Tensor, "channel channel"], turn: Float[Tensor, "channel channel"]
) -> Float[Tensor, "channel channel"]:
    """Q₀ (I + A)⁻¹ (I − A) with A = (M − Mᵀ)/2: orthogonal whatever M is, and the start Q₀ at M = 0."""
    skew = (turn - turn.T) / 2
    one = torch.eye(len(turn), dtype=turn.dtype, device=turn.device)
    return start @ torch.linalg.solve(one + skew, one - skew)


def learned_rotations(
    model: nn.Module,
    calibration: Any,
    *,
    setting: Setting = ACTIVATIONS_KEYS_VALUES,
    convention: Convention = PLAIN,
    seed: int = 0,
    steps: int = STEPS,
    rate: float = RATE,
    tokens: int = TOKENS,
    blocks: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LearnedRotations:
    """R1 and R2 with which a model whose activations, keys and values are rounded predicts calibration tokens.

    After SpinQuant (Liu et al. 2024, arXiv 2405.16406). They start at Hadamard matrices of random signs and go
    downhill on the matrices M of :func:`cayley`, each step for all tokens together. A step that does not lower
    the loss is taken back and the next one is half as long, so that on these tokens they are never worse than
    the start. The loss and its gradients are those of :func:`~osp_diag.quantizing.rotated_loss.rotated_loss`.

    Parameters
    ----------
    model : causal language model whose stream can be rotated
    calibration : token ids of shape (sequence, position); the first ``tokens`` of them are learned on
    setting : bits of activations, keys and values; those of weights are passed over
    convention : of the grids
    seed : of the start
    steps : how many are tried
    rate : by about how many radians the first one turns each channel
    tokens : how many to learn on, in whole sequences, at least one
    blocks : path or pattern of the stack of blocks, where the guess fails
    progress : called with (passes over a sequence done, passes in all)

    Raises
    ------
    UsageError : nothing to round, steps or a rate that have no meaning, sequences of one token
    TokenError : no tokens, or foreign ones
    CheckpointError : a stream that cannot be rotated, or blocks that cannot be run one after the other
    SiteError : no blocks were found
    NonFiniteError : the model's loss is not finite
    """
    if setting.activation_bits == setting.key_value_bits == UNQUANTIZED or steps < 1 or not rate > 0:
        raise UsageError(
            f"setting={setting}, steps={steps}, rate={rate}: learning rotations needs activations, keys or "
            "values that are rounded, 1 or more steps and a rate above 0"
        )
    model = unwrap(model)
    ids = calibration_ids(model, calibration)
    if ids.shape[1] < 2:
        raise UsageError("learning rotations needs sequences of 2 or more tokens")
    ids = ids[: max(1, tokens // ids.shape[1])]
    sites = find_sites(model, blocks=blocks)
    structure = measure_structure(model, sites, blocks=blocks)
    start = random_rotations(structure, seed)
    problem = rotated_loss(
        model, ids, sites, structure, setting=setting, convention=convention, blocks=blocks
    )
    device = next(model.parameters()).device
    rotations = {STREAM: start.stream, **start.values}
    starts = {key: rotation.matrix(torch.float64).to(device) for key, rotation in rotations.items()}
    with evaluation_mode(model), problem as loss:
        done = _Counter(progress, (steps + 1) * len(ids))
        matrices, losses = _descended(loss, starts, steps, rate, done)
    note = (
        f"rotations learned in {steps} steps on {ids.numel():,} tokens: their loss with activations, keys and "
        f"values rounded went from {losses[0]:.4f} to {min(losses):.4f} nats a token"
    )
    return LearnedRotations(
        stream=DenseRotation(matrices.pop(STREAM)),
        values={layer: DenseRotation(matrix) for layer, matrix in matrices.items()},
        notes=(*start.notes, note),
        losses=tuple(losses),
    )


def _descended(
    loss: RotatedLoss, starts: dict[int, Tensor], steps: int, rate: float, done: Callable[[], None]
) -> tuple[dict[int, Tensor], list[float]]:
    """(the best rotations, the losses of all that were tried)."""
    best = {key: torch.zeros_like(matrix) for key, matrix in starts.items()}
    trial, slopes, losses = best, dict[int, Tensor](), list[float]()
    for step in range(steps + 1):
        turns = {key: turn.clone().requires_grad_() for key, turn in trial.items()}
        matrices = {key: cayley(starts[key], turn) for key, turn in turns.items()}
        value, gradients = loss.of(matrices, gradients=step < steps, progress=done)
        if not losses and not math.isfinite(value):
            raise NonFiniteError(
                f"rotations cannot be learned: the loss of the model with rounded activations is {value}"
            )
        better = all(value < earlier for earlier in losses)
        losses.append(value)
        rate = rate * GROWTH if better else rate / 2
        best = trial if better else best
        if better and gradients:
            found = torch.autograd.grad(
                list(matrices.values()), list(turns.values()), [gradients[key] for key in matrices]
            )
            slopes = {key: slope / _size(slope) for key, slope in zip(turns, found, strict=True)}
        trial = {key: turn - rate * slopes[key] for key, turn in best.items()}
    return {key: cayley(starts[key], turn) for key, turn in best.items()}, losses


def _size(slope: Tensor) -> Tensor:
    """Of a row, in the mean: divided by it, a step turns every channel by about 1 radian."""
    return (slope.norm() / len(slope) ** 0.5).clamp(min=torch.finfo(slope.dtype).tiny)


class _Counter:
    """Counts calls, and tells of them."""

    def __init__(self, progress: Callable[[int, int], None] | None, in_all: int) -> None:
        self._progress, self._in_all, self._done = progress, in_all, 0

    def __call__(self) -> None:
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._in_all)
