"""Whether the tensors of a GGUF file and the model that is made of them are the same numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osp_diag.checkpoints.gguf_rope import FACTORS
from osp_diag.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["refuse_fewer_numbers", "refuse_other_depth", "set_expert_sizes", "unused_tensors"]

Tensors = Mapping[str, tuple[int, ...]]
"""Name → dimensions, the fastest first."""

EXPERT_SIZES = {
    ".ffn_down_exps.weight": "moe_intermediate_size",
    ".ffn_down_shexp.weight": "shared_expert_intermediate_size",
}


def refuse_other_depth(path: Path, architecture: str, metadata: Mapping[str, Any], tensors: Tensors) -> None:
    """Blocks beyond ``block_count`` would be left out, and those below it made up.

    Raises
    ------
    CheckpointError
        The tensors are of more or fewer blocks than the metadata say.
    """
    named = {int(match[1]) for name in tensors if (match := re.match(r"blk\.(\d+)\.", name))}
    count = metadata.get(f"{architecture}.block_count")
    if not named or not isinstance(count, int) or max(named) + 1 == count:
        return
    raise CheckpointError(
        f"{path} contradicts itself: {architecture}.block_count is {count:,}, and its tensors are of "
        f"blocks 0 to {max(named):,}. It was edited or written wrongly; use another GGUF file of the model"
    )


def set_expert_sizes(tensors: Tensors, config: Any) -> None:
    """Set the width of experts, which the conversion leaves at its class's default, from their tensors."""
    for tensor, field in EXPERT_SIZES.items():
        width = next((size[0] for name, size in tensors.items() if name.endswith(tensor)), None)
        if width is not None and hasattr(config, field):
            setattr(config, field, width)


def refuse_fewer_numbers(path: Path, tensors: Tensors, model: PreTrainedModel) -> None:
    """Refuse zeros, which the conversion leaves where one of the tensors that make up experts is missing.

    Raises
    ------
    CheckpointError
        The model has more numbers than the file.
    """
    lacking = _numbers_in(model) - _stored(tensors)
    if lacking <= 0:
        return
    inside = [match.groups() for name in tensors if (match := re.match(r"blk\.(\d+)\.(.+)", name))]
    blocks, kinds = {block for block, _ in inside}, {kind for _, kind in inside}
    absent = sorted(
        f"blk.{block}.{kind}" for block in blocks for kind in kinds if (block, kind) not in inside
    )
    named = f"; other blocks have what this lacks: {', '.join(absent[:3])}" if absent else ""
    raise CheckpointError(
        f"{path} lacks tensors: it holds {lacking:,} numbers fewer than {type(model).__name__} has{named}. "
        "Use another GGUF file of the model"
    )


def unused_tensors(architecture: str, tensors: Tensors, model: PreTrainedModel) -> set[str]:
    """Tensors of the file that are in no parameter of the model."""
    from transformers.modeling_gguf_pytorch_utils import (
        TENSOR_PROCESSORS,
        TensorProcessor,
        get_gguf_hf_weights_map,
    )

    if _stored(tensors) <= _numbers_in(model):
        return set()
    processor = TENSOR_PROCESSORS.get(architecture, TensorProcessor)(config=model.config.to_dict())
    used = get_gguf_hf_weights_map(model, processor)
    # Experts that the file stacks are taken apart by the conversion, under names of their own.
    return {name for name in tensors if name not in used and name not in FACTORS and "_exps." not in name}


def _stored(tensors: Tensors) -> int:
    return sum(math.prod(size) for name, size in tensors.items() if name not in FACTORS)


def _numbers_in(model: PreTrainedModel) -> int:
    return sum({values.data_ptr(): values.numel() for values in model.parameters()}.values())
