"""Muon: momentum made orthogonal, matrix by matrix; grouped by shape, and shared out over the ranks."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from osp_diag.errors import TrainingError
from osp_diag.trainer.optimizers.newton_schulz import newton_schulz, newton_schulz_dtype
from osp_diag.trainer.optimizers.sharding import Placement, Shipment, local, placement_of
from osp_diag.trainer.optimizers.squares import SquareSums

__all__ = ["Muon", "update_scale"]

CHUNK_ELEMENTS = 2**26
"""Matrices orthogonalised together have at most so many entries: enough of them to fill a GPU, few enough
that the copies take some hundred MiB and no more."""

HYPERPARAMETERS = ("lr", "weight_decay", "momentum", "nesterov", "steps", "form", "dtype")
"""What a parameter group says of its own."""

UNDER_WAY = 2
"""So many chunks at once: the matrices of one travel while those of the other are being multiplied."""


def update_scale(shape: Iterable[int]) -> float:
    """0.2 √max(shape): an orthogonal matrix times this has about the RMS of an AdamW update.

    Liu et al. 2025, Muon is Scalable for LLM Training, https://arxiv.org/abs/2502.16982. A unit vector of n
    entries times 0.2 √n has exactly the RMS 0.2.
    """
    return 0.2 * math.sqrt(max(shape, default=1))


@dataclass
class _Stack:
    """Parameters of one shape, held by the ranks in one way, under one set of hyperparameters."""

    placement: Placement
    shape: torch.Size
    group: dict[str, Any]
    parameters: list[Tensor] = field(default_factory=list)

    def chunks(self) -> Iterator[_Stack]:
        together = self.placement.replicas * math.prod(self.shape)
        size = max(1, CHUNK_ELEMENTS // together) * self.placement.owners
        for start in range(0, len(self.parameters), size):
            chunk = self.parameters[start : start + size]
            yield _Stack(self.placement, self.shape, self.group, chunk)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024) with the update scaled to AdamW's RMS, over stacks of equal shapes.

    For a matrix W with gradient G, momentum β, learning rate η and weight decay λ:

        B ← β B + (1 − β) G  (``form="torch"``),   B ← β B + G  (``form="osp"``)
        M = (1 − β) G + β B  (``torch``),  G + β B  (``osp``);  without Nesterov M = B
        W ← (1 − η λ) W − η · 0.2 √max(rows, columns) · NewtonSchulz(M)

    Newton-Schulz divides by the norm first, so for matrices the two forms differ by rounding alone.
    ``torch.optim.Muon(adjust_lr_fn="match_rms_adamw")`` is the same, a matrix at a time.

    Vectors and scalars have no singular vectors; as OSP published it (Park et al. 2025,
    https://arxiv.org/abs/2506.19697) they move by η · 0.2 √n · M / ‖M‖, whatever the form. Which of all these
    decay is the groups' affair: OSP's code decays vectors, too, :func:`~osp_diag.trainer.optimizers.route`
    does not.

    Several ranks: every matrix is orthogonalised on one of them (docs/decisions.md, Training). Parameters
    that FSDP2 cut by rows stay cut, and their momentum with them; the rows of M go to the matrix's owner
    and the result comes back, both in the dtype of the iteration. Repeated parameters (DDP) are dealt to the
    ranks of ``process_group``, which exchange results; every rank then holds the same bits.

    Parameters
    ----------
    params : tensors, (name, tensor) pairs or groups of either; names serve messages. A group may have
        hyperparameters of its own: ``lr``, ``weight_decay``, ``momentum``, ``nesterov``, ``steps``, ``form``
        and ``dtype``
    lr, weight_decay, momentum, nesterov : η, λ, β
    steps : of Newton-Schulz
    dtype : of Newton-Schulz; ``auto``: bfloat16 where the device multiplies it in hardware. The one taken is
        in the attribute ``newton_schulz_dtype``
    form : of the momentum buffer
    process_group : of the ranks that hold the same plain parameters and gradients; None: each works alone.
        DTensors know their own. An optimizer with one can be neither copied nor pickled

    Attributes
    ----------
    orthogonalised : matrices that this rank orthogonalised in the last step
    recording : keep in ``last_update`` what the next steps do
    last_update : parameter → the squares of the last step's update (W ← (1 − ηλ) W − η · update), summed, of
        the rows that this rank holds. Only while recording

    Raises
    ------
    TrainingError : a parameter has more than two dimensions, or is cut otherwise than by rows
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        nesterov: bool = True,
        steps: int = 5,
        dtype: Literal["auto", "bfloat16", "float32"] = "auto",
        form: Literal["torch", "osp"] = "torch",
        process_group: ProcessGroup | None = None,
    ) -> None:
        self._process_group = process_group
        self._reset()
        values = (lr, weight_decay, momentum, nesterov, steps, form, dtype)
        super().__init__(params, dict(zip(HYPERPARAMETERS, values, strict=True)))

    def _reset(self) -> None:
        """What is of this process and of the last step, and so in no state."""
        self.orthogonalised = 0
        self.recording = False
        self.last_update: dict[Tensor, SquareSums] = {}
        self._placements: dict[Tensor, Placement] = {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Move further parameters, too, with hyperparameters of their own or the defaults.

        Raises
        ------
        TrainingError : a parameter has more than two dimensions, or is cut otherwise than by rows
        """
        super().add_param_group(param_group)
        try:
            self._place(self.param_groups[-1])
        except TrainingError:
            del self.param_groups[-1]
            raise

    def _place(self, group: dict[str, Any]) -> None:
        placements = {}
        for index, parameter in enumerate(group["params"]):
            name = group["param_names"][index] if "param_names" in group else f"parameter {index}"
            if parameter.ndim > 2:
                raise TrainingError(
                    f"{name} has shape {tuple(parameter.shape)}; Muon moves matrices, vectors and scalars"
                )
            placements[parameter] = placement_of(name, parameter, self._process_group)
        self._placements |= placements

    def __getstate__(self) -> dict[str, Any]:
        """As torch's, which copies and pickles by it; with the ranks, which only a copy can keep."""
        return {**super().__getstate__(), "process_group": self._process_group}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take up a copy's, a pickle's or (torch's way) a state dict's groups and buffers."""
        if "process_group" in state:  # a new object, of which __init__ was not called
            state = dict(state)
            self._process_group = state.pop("process_group")
            self._reset()
        super().__setstate__(state)
        self._placements = {}
        for group in self.param_groups:
            for name in HYPERPARAMETERS:  # a state dict may be older than one of them
                group.setdefault(name, self.defaults[name])
            self._place(group)

    @property
    def newton_schulz_dtype(self) -> torch.dtype:
        """In which the first group's matrices are multiplied."""
        return self._dtype_of(self.param_groups[0])

    def _dtype_of(self, group: dict[str, Any]) -> torch.dtype:
        return newton_schulz_dtype(group["params"][0].device, group["dtype"])

    @overload
    def step(self, closure: None = None, *, skip: Tensor | None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float], *, skip: Tensor | None = None) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None, *, skip: Tensor | None = None) -> float | None:
        """Move every parameter that has a gradient; waits for nothing on the host.

        Parameters
        ----------
        closure : computes the loss again
        skip : a boolean scalar on the device; where it is true parameters and momentum stay as they are, to
            the bit, whatever the gradients
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.orthogonalised, self.last_update = 0, {}
        tasks, matrices = [], 0
        for stack in self._stacks():
            if len(stack.shape) < 2:
                self._move_vectors(stack, skip)
                continue
            for chunk in stack.chunks():
                tasks.append(self._move_matrices(chunk, matrices % chunk.placement.owners, skip))
                matrices += len(chunk.parameters)
        _interleave(tasks)
        return loss

    def _stacks(self) -> list[_Stack]:
        stacks: dict[Any, _Stack] = {}
        for number, group in enumerate(self.param_groups):
            for parameter in group["params"]:
                if parameter.grad is not None:
                    placement = self._placements[parameter]
                    key = (number, parameter.shape, parameter.dtype, parameter.device, placement)
                    stack = stacks.setdefault(key, _Stack(placement, parameter.shape, group))
                    stack.parameters.append(parameter)
        return list(stacks.values())

    def momentum_buffer(self, parameter: Tensor) -> Tensor:
        """B of a parameter, cut over the ranks as it is; zeros before its first step."""
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state["momentum_buffer"]

    def _directions(self, stack: _Stack, skip: Tensor | None) -> list[Tensor]:
        """M of each parameter, after its buffer has taken up the gradient; of this rank's rows."""
        parameters, group = stack.parameters, stack.group
        momentum = group["momentum"]
        gradients = [local(parameter.grad) for parameter in parameters if parameter.grad is not None]
        buffers = [local(self.momentum_buffer(parameter)) for parameter in parameters]
        before = [buffer.clone() for buffer in buffers] if skip is not None else []
        # B ← β B + (1 − β) G, or B ← β B + G.
        if group["form"] == "torch":
            torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        else:
            torch._foreach_mul_(buffers, momentum)
            torch._foreach_add_(buffers, gradients)
        if skip is not None:
            for buffer, old in zip(buffers, before, strict=True):
                torch.where(skip, old, buffer, out=buffer)
        if not group["nesterov"]:
            return buffers
        # M = (1 − β) G + β B, or G + β B.
        if group["form"] == "torch":
            return list(torch._foreach_lerp(gradients, buffers, momentum))
        return list(torch._foreach_add(gradients, buffers, alpha=momentum))

    def _move_matrices(self, stack: _Stack, first_owner: int, skip: Tensor | None) -> Iterator[None]:
        """Move the matrices of a chunk, dealt to ranks from ``first_owner`` on; pauses while they travel."""
        rows, columns = stack.shape
        shipment = Shipment(stack.placement, len(stack.parameters), rows, columns, first_owner)
        dtype = self._dtype_of(stack.group)
        shipment.send(self._directions(stack, skip), dtype)
        yield
        matrices = shipment.owned_matrices()
        self.orthogonalised += len(matrices)
        if len(matrices):
            matrices = newton_schulz(matrices, steps=stack.group["steps"], dtype=dtype)
        shipment.send_back(matrices)
        yield
        shipment.send_to_replicas()
        yield
        results = shipment.result_rows().to(stack.parameters[0].dtype)
        places = [shipment.place(number) for number in range(len(stack.parameters))]
        rows = local(stack.parameters[0]).shape[0]
        self._apply(stack, results, [results[place][:rows] for place in places], skip)
        if self.recording:
            squares = (update_scale(stack.shape) * results).square()
            by_row, by_column = squares.sum(-1), squares.sum(-2)
            for parameter, place in zip(stack.parameters, places, strict=True):
                self.last_update[parameter] = SquareSums(by_row[place][:rows], by_column[place])

    def _move_vectors(self, stack: _Stack, skip: Tensor | None) -> None:
        moments = self._directions(stack, skip)
        directions = torch.stack([direction.flatten() for direction in moments])
        squares = directions.square().sum(1, keepdim=True)
        if stack.placement.shard_group is not None:
            dist.all_reduce(squares, group=stack.placement.shard_group)
        # M / ‖M‖, the norm over all shards.
        directions = directions / (squares.sqrt() + 1e-8)
        shape = local(stack.parameters[0]).shape
        self._apply(stack, directions, [direction.view(shape) for direction in directions], skip)
        if self.recording:
            squares = (update_scale(stack.shape) * directions).square()
            for parameter, squares_of_entries in zip(stack.parameters, squares, strict=True):
                self.last_update[parameter] = SquareSums(squares_of_entries, squares_of_entries)

    def _apply(self, stack: _Stack, memory: Tensor, updates: list[Tensor], skip: Tensor | None) -> None:
        """Decay and move; ``updates`` are views of ``memory``, one a parameter."""
        lr, weight_decay = stack.group["lr"], stack.group["weight_decay"]
        values = [local(parameter) for parameter in stack.parameters]
        # W ← (1 − ηλ) W − η · 0.2 √max(rows, columns) · update; a skipped step multiplies by 1 and adds 0.
        decay_factor: float | Tensor = 1 - lr * weight_decay
        if skip is not None:
            memory.masked_fill_(skip, 0.0)
            decay_factor = torch.where(skip, 1.0, decay_factor).to(values[0].dtype)
        if weight_decay:
            torch._foreach_mul_(values, decay_factor)
        torch._foreach_add_(values, updates, alpha=-lr * update_scale(stack.shape))


def _interleave(tasks: list[Iterator[None]]) -> None:
    """Run the tasks in order, some at a time, each up to its next pause in turn."""
    waiting, running = deque(tasks), deque[Iterator[None]]()
    while waiting or running:
        while waiting and len(running) < UNDER_WAY:
            running.append(waiting.popleft())
        task = running.popleft()
        if next(task, StopIteration) is not StopIteration:
            running.append(task)
