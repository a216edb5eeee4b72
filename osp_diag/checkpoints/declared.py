"""What a configuration declares, held against the weights beside it before anything is made of it.

A damaged or crafted ``config.json`` of a few hundred bytes can ask for a vocabulary of 10⁸ or 10⁶ layers;
making such a model, or only its list of labels, takes all memory there is, long before the weights are found
not to fit.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osp_diag.checkpoints.weight_files import read_json
from osp_diag.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["check_declared", "check_model_size"]

_SIZE = re.compile(
    r"(^|_)(size|sizes|dim|dims|width|heads?|labels|experts|positions?|embeddings?|ctx|rank|groups|embd|inner|"
    r"state|kernel|channels|d)(_|$)"
)
_LAYERS = re.compile(r"(^|_)(layers?|blocks?|depth|n_layer)$")
FREE = 2**24
"""A size up to this is never refused: the longest contexts are of ten million."""
FREE_LAYERS = 1_000


def check_declared(file: Path, weights: Sequence[Path]) -> None:
    """Refuse sizes that the weights cannot have.

    Parameters
    ----------
    file : the configuration, known to be a JSON object
    weights : the files of weights, known to be whole

    Raises
    ------
    CheckpointError : naming the entry
    """
    size = _bytes_of(weights)
    try:
        numbers = dict(_numbers(read_json(file)))
    except RecursionError:
        raise CheckpointError(f"{file} is nested too deep for a configuration") from None
    # A tensor takes hundreds of bytes of a file: its header's entry alone.
    most_layers = max(FREE_LAYERS, size // 64)
    for name, value in numbers.items():
        key = name.rpartition(".")[2].lower()
        most = most_layers if _LAYERS.search(key) else max(FREE, size) if _SIZE.search(key) else math.inf
        if value > most:
            raise CheckpointError(
                f"{file} declares {name}={value:,}, and the weights beside it have {size:,} bytes: they do "
                "not belong together, or the file is damaged. Copy or download it again"
            )


def _bytes_of(weights: Sequence[Path]) -> int:
    return sum(path.stat().st_size for path in weights)


def _numbers(value: Any, name: str = "") -> Iterator[tuple[str, float]]:
    if isinstance(value, bool):
        return
    if isinstance(value, (int, float)):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _numbers(item, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list):
        for item in value:
            yield from _numbers(item, name)


def check_model_size(
    config: Any, make: Callable[[Any], nn.Module], name: str, weights: Sequence[Path]
) -> None:
    """Refuse a configuration whose model is many times larger than the weights, which is made without memory.

    Parameters
    ----------
    config : transformers' configuration, whose sizes :func:`check_declared` has passed
    make : makes the model of a configuration
    weights : the files of weights

    Raises
    ------
    CheckpointError : the model has more than eight parameters a byte of the weights
    """
    import torch

    weight_bytes = _bytes_of(weights)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    sizes = [getattr(text, key, None) for key in ("vocab_size", "hidden_size", "intermediate_size")]
    vocabulary, width, inner = (size if isinstance(size, int) else 0 for size in sizes)
    layers = getattr(text, "num_hidden_layers", 0)
    layers = layers if isinstance(layers, int) else 0
    if width * (vocabulary + layers * max(inner, width)) <= 2 * weight_bytes:
        return  # surely not: no need to make it
    try:
        with torch.device("meta"):
            model = make(config)
    except Exception:
        return  # what is wrong shows, and is said, when it is made in earnest
    described = sum(parameter.numel() for parameter in model.parameters())
    described += sum(buffer.numel() for buffer in model.buffers())
    if described > 8 * weight_bytes + FREE:
        raise CheckpointError(
            f"{name} is not opened: its config.json describes a model of {described:,} numbers, and its "
            f"weights have {weight_bytes:,} bytes. They do not belong together; put the model's own "
            "config.json there"
        )
