"""The matrix of a projection as estimators take it, whatever way a module holds it.

It is read just before the projection runs. Then a weight that FSDP shards is whole, one that a device map
keeps elsewhere is about to be fetched, and it is the weight that this forward pass multiplies by.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from jaxtyping import Float
from torch import Tensor, nn

from osp_diag.capture.experts import DOWN_NAMES

__all__ = [
    "down_projection",
    "expert_projection",
    "fused_part",
    "output_projection",
    "projection_weight",
    "weights_at_hand",
    "whole_weight",
]

_FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def down_projection(
    module: nn.Module, hidden: Float[Tensor, "*batch width"]
) -> Float[Tensor, "expert row channel"] | str:
    """The weights of a projection, or of the experts stacked in a module's parameter.

    Parameters
    ----------
    module : a projection (``nn.Linear``, GPT-2's ``Conv1D`` …), or the module that holds the experts
    hidden : what it is called with: the projection's input, or the state that the experts share

    Returns
    -------
    A view if it can be one: rows are output channels. Text that says why not, where the weight is packed or
    quantised, or does not tell its rows from its columns.
    """
    with weights_at_hand(module):
        if isinstance(module, nn.Conv1d):
            matrix = _of_convolution(module)
            return matrix if isinstance(matrix, str) else matrix[None]
        matrices = {n: p for n, p in module.named_parameters(recurse=False) if p.ndim == 3}
        if matrices:
            return _expert_down_projection(module, matrices, hidden.shape[-1])
        whole = projection_weight(module)
        if isinstance(whole, str):
            return whole
        oriented = _oriented(module, whole, columns=hidden.shape[-1])
        return oriented if isinstance(oriented, str) else oriented[None]


def expert_projection(module: nn.Module, rows: int) -> Float[Tensor, "expert row channel"] | str:
    """The weights of one expert's down projection, by how many channels it gives."""
    with weights_at_hand(module):
        whole = projection_weight(module)
        if isinstance(whole, str):
            return whole
        oriented = _oriented(module, whole, rows=rows)
        return oriented if isinstance(oriented, str) else oriented[None]


def fused_part(
    weight: Float[Tensor, "expert row channel"], part: tuple[int, int, int, int]
) -> Float[Tensor, "expert row channel"]:
    """The rows of a fused projection that a tap's ``fused`` names."""
    groups, slots, first, count = part
    return weight.unflatten(1, (groups, slots, -1))[:, :, first : first + count].flatten(1, 3)


def output_projection(
    module: nn.Module, heads: int, width: int
) -> Float[Tensor, "head row value_channel"] | str:
    """W_O by head: the columns of attention's output projection that read each head's output.

    Parameters
    ----------
    module : the projection, whose input is the heads' outputs concatenated
    heads, width : how many heads, and how wide the values of one are
    """
    with weights_at_hand(module):
        whole = projection_weight(module)
        if isinstance(whole, str):
            return whole
        oriented = _oriented(module, whole, columns=heads * width)
        return oriented if isinstance(oriented, str) else oriented.unflatten(1, (heads, width)).movedim(1, 0)


def _oriented(
    module: nn.Module, whole: Tensor, *, rows: int | None = None, columns: int | None = None
) -> Float[Tensor, "row channel"] | str:
    """A projection's matrix with its output channels as rows, by how many it gives or takes."""
    size, axis = (columns, 1) if rows is None else (rows, 0)
    if whole.ndim != 2 or size not in whole.shape:
        what = f"over {size} input channels" if rows is None else f"that gives {size} channels"
        return f"its weight of shape {tuple(whole.shape)} is no matrix {what}"
    transposed = whole.shape[axis] != size
    if whole.shape[0] == whole.shape[1]:
        transposed = "conv1d" in type(module).__name__.lower()
    return whole.T if transposed else whole


def _of_convolution(module: nn.Conv1d) -> Tensor | str:
    """The matrix of a convolution over single tokens: block-diagonal where it has groups."""
    whole = projection_weight(module)
    if isinstance(whole, str):
        return whole
    return torch.block_diag(*whole[..., 0].chunk(module.groups))


def projection_weight(module: nn.Module) -> Tensor | str:
    """The matrix that a projection multiplies by, adapters included; text where there is no one matrix."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        return f"its projection ({type(module).__name__}) has no weight of its own"
    whole = whole_weight(weight)
    return whole if isinstance(whole, str) or not _is_adapted(module) else _with_adapters(module, whole)


def _is_adapted(module: nn.Module) -> bool:
    """Whether a projection holds further matrices beside its weight, as LoRA's and DoRA's do."""
    if nn.utils.parametrize.is_parametrized(module):
        return False
    inner = [p for child in module.children() for p in child.parameters()]
    return sum(p.ndim >= 2 for p in inner) > 1


def _with_adapters(module: nn.Module, weight: Tensor) -> Tensor | str:
    """W + Σ scale · B·A of the adapters that are on, as peft's layers give it; text where they don't."""
    name = type(module).__name__
    difference_of = getattr(module, "get_delta_weight", None)
    if difference_of is None:
        return f"its projection ({name}) is adapted: no one matrix of it multiplies its input"
    if getattr(module, "merged", False) or getattr(module, "disable_adapters", False):
        return weight
    adapters = [a for a in module.active_adapters if a in getattr(module, "lora_A", {})]  # type: ignore[union-attr]
    variants = getattr(module, "lora_variant", None) or getattr(module, "use_dora", None) or {}
    if not adapters or any(variants.get(adapter) for adapter in adapters):
        return f"its projection ({name}) is adapted by more than products of low rank (DoRA and its like)"
    with torch.no_grad():
        return weight + sum(difference_of(adapter).detach().to(weight) for adapter in adapters)


def _expert_down_projection(module: nn.Module, matrices: dict[str, nn.Parameter], width: int) -> Tensor | str:
    down = [p for name, p in matrices.items() if DOWN_NAMES.search(name)]
    if len(down) != 1:
        return (
            f"of its experts' parameters ({', '.join(matrices)}) not one alone is named as a down projection"
        )
    whole = whole_weight(down[0])
    if isinstance(whole, str):
        return whole
    _, left, right = whole.shape
    if width not in (left, right):
        return f"its experts' weights of shape {tuple(whole.shape)} do not give {width} channels"
    transposed: object = left != width
    if left == right:
        transposed = getattr(module, "is_transposed", None)
        if not isinstance(transposed, bool):
            return "its experts' matrices are square, and nothing says which side is the input"
    return whole.transpose(1, 2) if transposed else whole


def whole_weight(weight: Tensor) -> Tensor | str:
    """The plain tensor behind a parameter; what is sharded by DTensor is gathered, on all its ranks alike."""
    if hasattr(weight, "full_tensor"):
        weight = weight.full_tensor()
    elif type(weight) not in (Tensor, nn.Parameter):
        return f"its weight is stored as {type(weight).__name__}"
    if weight.dtype not in _FLOATING:
        return f"its weight is quantised ({str(weight.dtype).removeprefix('torch.')})"
    if weight.is_meta:
        return "its weight is on no device while the model runs"
    return weight.detach()


@contextmanager
def weights_at_hand(module: nn.Module) -> Iterator[None]:
    """Within, weights that a device map of accelerate keeps on the host or on disk are at hand."""
    if not any(p.is_meta for p in module.parameters(recurse=False)):
        yield
        return
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield
