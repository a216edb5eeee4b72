"""Small checkpoints on disk for the tests of opening them, and how a refusal is asserted."""

from __future__ import annotations

import json
import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from osp_diag.checkpoints import open_checkpoint
from osp_diag.errors import CheckpointError
from osp_diag.quiet import quietly

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

VOCABULARY = 64


def tiny_llama(**changes) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 32,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**(sizes | changes))).eval()


def tiny_tokenizer(words: int = VOCABULARY) -> transformers.PreTrainedTokenizerFast:
    vocabulary = {"[UNK]": 0} | {f"w{i}": i for i in range(1, words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]")


def save(model, directory: Path, tokenizer=None, **options) -> Path:
    with quietly():
        model.save_pretrained(directory, **options)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    return directory


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def refused(source, *parts: str, kind=CheckpointError, **options) -> str:
    """The message with which a source is refused; it must hold all ``parts``, in order."""
    with pytest.raises(kind) as caught:
        open_checkpoint(source, **options)
    message = str(caught.value)
    assert re.search(".*".join(map(re.escape, parts)), message, re.DOTALL), message
    return message


def same_parameters(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.state_dict().items(), right.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)
