"""The loss of a model whose activations are rounded in rotated coordinates, and its gradient by the rotations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int64
from torch import Tensor, nn
from torch.nn import functional

from osp_diag.quantizing.block_passes import BlockPasses
from osp_diag.quantizing.conventions import Convention
from osp_diag.quantizing.grid import Grid
from osp_diag.quantizing.hadamard import Hadamard, hadamard
from osp_diag.quantizing.rotations import down_projections, folded_gains
from osp_diag.quantizing.setting import UNQUANTIZED, Setting
from osp_diag.quantizing.stream_structure import StreamStructure
from osp_diag.seams.call import AttentionCall
from osp_diag.seams.editing import AttentionEditing
from osp_diag.sites import SiteMap

__all__ = ["STREAM", "RotatedLoss", "rotated_loss", "rounded_by_step"]

STREAM = -1
"""The key of the stream's rotation, beside the numbers of layers, by which those of values go."""

Matrices = Mapping[int, Float[Tensor, "channel channel"]]


def rounded_by_step(grid: Grid, values: Float[Tensor, "*rows channel"]) -> Float[Tensor, "*rows channel"]:
    """Rounded values, as x + ε s(x): with the gradient of the values and of the step s, errors ε held fixed.

    A rotation changes the error mostly by the range of the values, which sets the step. Passed straight
    through (with the step held fixed as well) the gradient says nothing of that: errors of one size in all
    channels look the same in all coordinates.

    Parameters
    ----------
    grid : asymmetric, of rows or of groups
    """
    grouped = values if grid.group_size is None else values.unflatten(-1, (-1, grid.group_size))
    low, high = grouped.amin(-1, keepdim=True), grouped.amax(-1, keepdim=True)
    if grid.zero_in_range:
        low, high = low.clamp(max=0), high.clamp(min=0)
    span = high - low
    with torch.no_grad():
        error = grid.rounded(values).reshape(grouped.shape) - grouped
        relative = torch.where(span == 0, 0, error / span)
    return (grouped + relative * span).reshape(values.shape)


@contextmanager
def rotated_loss(
    model: nn.Module,
    ids: Int64[Tensor, "sequence position"],
    sites: SiteMap,
    structure: StreamStructure,
    *,
    setting: Setting,
    convention: Convention,
    blocks: str | None = None,
) -> Iterator[RotatedLoss]:
    """The loss as a function of rotations, while this lasts; afterwards the model is what it was.

    Weights are neither rotated nor rounded. A rotated and rounded input with a rotated weight is, in the model's
    own coordinates, Q round(x Q)ᵀ, which is computed at the inputs of the blocks' Linears; gradients pass the
    rounding straight through. Keys are rounded behind a Hadamard matrix, as the inputs of down projections are.

    Parameters
    ----------
    model : causal language model, in evaluation mode
    ids : tokens to predict; a sequence a pass
    setting : bits of activations, keys and values; those of weights are passed over

    Raises
    ------
    CheckpointError : a stream that cannot be rotated, or blocks that cannot be run one after the other
    """
    downs = down_projections(model, sites)
    with ExitStack() as undo:
        undo.enter_context(folded_gains(model, structure))
        loss = RotatedLoss(BlockPasses(model, ids, blocks=blocks), structure, setting, convention)
        loss.act(downs, undo)
        yield loss


class RotatedLoss:
    """See :func:`rotated_loss`, which makes one."""

    def __init__(
        self, passes: BlockPasses, structure: StreamStructure, setting: Setting, convention: Convention
    ) -> None:
        self._passes, self._structure = passes, structure
        self._setting, self._convention = setting, convention
        self._states = passes.first_states()
        self._leaves: dict[int, Tensor] = {}
        self._layer = 0

    def of(
        self, matrices: Matrices, *, gradients: bool = True, progress: Callable[[], None] | None = None
    ) -> tuple[float, dict[int, Float[Tensor, "channel channel"]]]:
        """(cross entropy a predicted token in nats, its gradients by the rotations' entries).

        Gradients go back block by block, each run once more on the state that it read: besides the model there
        are the states of one sequence and the activations of one block. (torch's checkpointing runs blocks once
        more in a thread of its own where there is a GPU, in which attention is not edited.)

        Parameters
        ----------
        matrices : :data:`STREAM` or a layer → rotation of the stream, or of the layer's values
        gradients : leave them out, and {} is returned
        progress : called after each sequence
        """
        self._leaves = {key: matrix.detach().requires_grad_() for key, matrix in matrices.items()}
        tokens = sum(batch[:, 1:].numel() for batch in self._passes.batches)
        total = 0.0
        for ids, state in zip(self._passes.batches, self._states, strict=True):
            total += self._of_batch(ids, state, gradients)
            if progress is not None:
                progress()
        if not gradients:
            return total / tokens, {}
        return total / tokens, {
            key: (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad) / tokens
            for key, leaf in self._leaves.items()
        }

    def _of_batch(self, ids: Tensor, state: Tensor, gradients: bool) -> float:
        states = [state]
        with torch.no_grad():
            for layer in range(len(self._passes.blocks)):
                states.append(self._run(layer, states[-1]))
        last = states.pop().detach().requires_grad_(gradients)
        with torch.set_grad_enabled(gradients):
            logits = self._passes.rest(ids, last)[:, :-1].flatten(0, 1)
            logits = logits if logits.dtype == torch.float64 else logits.float()
            loss = functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum")
        if gradients:
            (gradient,) = torch.autograd.grad(loss, last)
            for layer in reversed(range(len(states))):
                gradient = self._backward(layer, states.pop(), gradient)
        return float(loss.detach())

    def _run(self, layer: int, state: Tensor) -> Tensor:
        self._layer = layer
        return self._passes.run(layer, state)

    @torch.enable_grad()
    def _backward(self, layer: int, state: Tensor, gradient: Tensor) -> Tensor:
        """Through one block: the gradient by the state before it; those by its rotations are added up."""
        before = state.detach().requires_grad_()
        leaves = [self._leaves[key] for key in (STREAM, layer) if key in self._leaves]
        behind = self._run(layer, before)
        inward, *of_leaves = torch.autograd.grad(behind, [before, *leaves], gradient, allow_unused=True)
        for leaf, part in zip(leaves, of_leaves, strict=True):
            if part is not None:
                leaf.grad = part if leaf.grad is None else leaf.grad + part
        return inward

    def act(self, downs: Mapping[str, Hadamard], undo: ExitStack) -> None:
        """Round the inputs of the blocks' Linears, keys and values until ``undo`` is closed."""
        if self._setting.activation_bits != UNQUANTIZED:
            self._round_readers(undo)
            for path in self._structure.values:
                self._before(path.output, lambda x, width=path.width: self._rounded_heads(x, width), undo)
            for down, matrix in downs.items():
                self._before(down, lambda x, matrix=matrix: self._rounded_hidden(x, matrix), undo)
        if self._setting.key_value_bits != UNQUANTIZED:
            editing = AttentionEditing(self._passes.model, self._edited, masks=False)
            undo.callback(editing.stop)
            editing.start()

    def _round_readers(self, undo: ExitStack) -> None:
        """Of all readers of the stream but the head, which is not rounded: at the norm that several share."""
        norms = {}
        for path, norm in self._structure.readers.items():
            if path in self._structure.head:
                continue
            if norm is None:
                self._before(path, self._rounded_stream, undo)
            else:
                norms[norm] = self._passes.model.get_submodule(norm)
        for module in norms.values():
            hook = module.register_forward_hook(lambda module, inputs, output: self._rounded_stream(output))
            undo.callback(hook.remove)

    def _before(self, path: str, change: Callable[[Tensor], Tensor], undo: ExitStack) -> None:
        def changed(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
            if inputs:
                return (change(inputs[0]), *inputs[1:]), keywords
            return inputs, keywords | {"input": change(keywords["input"])}

        module = self._passes.model.get_submodule(path)
        undo.callback(module.register_forward_pre_hook(changed, with_kwargs=True).remove)

    def _rounded_stream(self, values: Tensor) -> Tensor:
        if STREAM not in self._leaves:
            return values
        matrix = self._leaves[STREAM].to(values.dtype)
        grid = self._convention.activations(self._setting.activation_bits)
        return rounded_by_step(grid, values @ matrix) @ matrix.T

    def _rounded_heads(self, values: Tensor, width: int) -> Tensor:
        matrix = self._leaves[self._layer].to(values.dtype)
        grid = self._convention.attention_output(self._setting.activation_bits, width)
        rounded = rounded_by_step(grid, (values.unflatten(-1, (-1, width)) @ matrix).flatten(-2))
        return (rounded.unflatten(-1, (-1, width)) @ matrix.T).flatten(-2)

    def _rounded_hidden(self, values: Tensor, matrix: Hadamard) -> Tensor:
        grid = self._convention.activations(self._setting.activation_bits)
        return matrix.undo(rounded_by_step(grid, matrix.apply(values)))

    def _edited(self, call: AttentionCall) -> AttentionCall:
        if call.key is None or call.value is None or call.crosses:
            return call
        turn, bits = hadamard(call.key.shape[-1]), self._setting.key_value_bits
        keys = turn.undo(rounded_by_step(self._convention.keys(bits), turn.apply(call.key)))
        values, grid = call.value, self._convention.values(bits)
        if self._layer not in self._leaves:
            return replace(call, key=keys, value=rounded_by_step(grid, values))
        matrix = self._leaves[self._layer].to(values.dtype)
        return replace(call, key=keys, value=rounded_by_step(grid, values @ matrix) @ matrix.T)
