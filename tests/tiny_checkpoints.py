"""Tiny checkpoints on disk, with a tokenizer that reads any text as bytes."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
from torch import nn

from osp_diag.quiet import quietly

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

BYTES = 256
VOCABULARY = BYTES + 4
LENGTH = 64
"""The longest sequence that the tiny models take."""


def byte_tokenizer(*, puts_bos: bool = False) -> transformers.PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<s>"])
    if puts_bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", BYTES)]
        )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>")


def llama(layers: int = 2) -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=1,
            vocab_size=VOCABULARY,
            max_position_embeddings=LENGTH,
        )
    ).eval()


def gpt2() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": LENGTH}
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()


def bert() -> transformers.BertForMaskedLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    config = transformers.BertConfig(**sizes, vocab_size=VOCABULARY, max_position_embeddings=LENGTH)
    return transformers.BertForMaskedLM(config).eval()


def save(model: nn.Module, directory: Path, tokenizer=None) -> Path:
    with quietly():
        model.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    return directory


class NoBlocks(nn.Module):
    """An embedding and a projection: nothing is stacked."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.head = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embedding(tokens))


class Diverging(nn.Module):
    """Makes a NaN of one channel of one position, as a forward pass that overflows does."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        x[:, 5:6, 3] = float("nan")
        return x


def without_blocks() -> tuple[nn.Module, transformers.PreTrainedTokenizerFast]:
    return NoBlocks(), byte_tokenizer()


def diverging() -> tuple[nn.Module, transformers.PreTrainedTokenizerFast]:
    """A loader, as the command line takes it, of a Llama whose second block gives a NaN."""
    model = llama()
    projection = model.model.layers[1].mlp.down_proj
    model.model.layers[1].mlp.down_proj = nn.Sequential(projection, Diverging())
    return model, byte_tokenizer()


def slow() -> tuple[nn.Module, transformers.PreTrainedTokenizerFast]:
    """A loader of a Llama whose passes take their time, and that tells a file of each."""
    import os
    import time

    model = llama()
    passes = 0

    def after(*_: object) -> None:
        nonlocal passes
        passes += 1
        Path(os.environ["PASSES"]).write_text(str(passes))
        time.sleep(0.2)

    model.register_forward_hook(after)
    return model, byte_tokenizer()
