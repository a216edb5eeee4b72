"""What the files of a checkpoint that another loop wrote say of model and optimizer, by our dotted keys."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from osp_diag.checkpoints.optimizer_state import OptimizerState
from osp_diag.checkpoints.saved_steps import SavedStep
from osp_diag.checkpoints.stored_tensors import StoredTensors
from osp_diag.checkpoints.weight_files import read_json

__all__ = ["configuration", "head_size_of", "roles_of"]

OF_NO_NUMBER = re.compile(
    r"^_|_token_ids?$|^(transformers_version|architectures|auto_map|use_cache|cache_implementation|(id2label|label2id)"
    r"(\..*)?|attn_implementation|problem_type|finetuning_task|torchscript|return_dict|output_\w+|dtype|torch_dtype"
    r"|chunk_size_feed_forward|pruned_heads|name_or_path)$"
)
"""Entries of config.json that decide no number: names, which tokens end a text, and the type that the weights
had, which these themselves say."""
OURS = {"rope_theta": "rope_theta", "tie_word_embeddings": "tie_embeddings"}
"""Last part of an entry's path → what a configuration of ours calls it."""

_OUTER = re.compile(r"(embed|wte|lm_head|head|output)\w*\.weight$")
_HEAD = re.compile(r"(lm_head|embed_out|unembed|output|decoder)\w*\.weight$")


def configuration(
    one: SavedStep, tensors: StoredTensors, optimizer: OptimizerState | None, batch_size: Any
) -> tuple[dict[str, Any], dict[str, str]]:
    """(values by dotted key, the file that says each) of model, stored weights, optimizer and batch."""
    config: dict[str, Any] = {}
    origins: dict[str, str] = {}

    def add(values: Mapping[str, Any], origin: str) -> None:
        config.update(values)
        origins.update(dict.fromkeys(values, origin))

    if one.config_file is not None:
        entries = _flat(read_json(one.config_file))
        add({f"model.{key}": value for key, value in entries}, "config.json")
    commonest = Counter(tensors.dtypes.values()).most_common(1)
    if commonest:
        add({"dtype": commonest[0][0]}, "the files of weights")
    if optimizer is not None:
        settings = {f"optimizer.{name}": value for name, value in optimizer.settings.items()}
        add(settings, "the state of the optimizer")
    if batch_size is not None:
        add({"batch_size": batch_size}, "trainer_state.json")
    return config, origins


def _flat(entries: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in entries.items():
        if OF_NO_NUMBER.search(name):
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{name}.")
        elif name in OURS:
            # Versions of transformers keep it in different places.
            yield OURS[name], value
        else:
            yield f"{path}{name}", value


def roles_of(shapes: Mapping[str, tuple[int, ...]], config: Mapping[str, Any]) -> dict[str, str]:
    """Parameter → ``vector``, ``embedding``, ``head`` or ``hidden``, by shape and name."""
    rows = config.get("model.vocab_size")
    roles = {}
    for name, shape in shapes.items():
        is_outer = len(shape) == 2 and (shape[0] == rows if rows else bool(_OUTER.search(name)))
        outer = "head" if _HEAD.search(name) else "embedding"
        roles[name] = "vector" if len(shape) < 2 else outer if is_outer else "hidden"
    return roles


def head_size_of(config: Mapping[str, Any]) -> int:
    """Rows of a head of the query projection; 0 where config.json does not tell."""

    def first(*names: str) -> int:
        values = [value for key, value in config.items() if key.rpartition(".")[2] in names]
        return next((value for value in values if type(value) is int and value > 0), 0)

    heads, width = (
        first("num_attention_heads", "n_head", "num_heads"),
        first("hidden_size", "n_embd", "d_model"),
    )
    return first("head_dim") or (width // heads if heads else 0)
