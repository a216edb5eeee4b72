"""From the training model's weights to those of a stock architecture, in float64."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from osp_diag.errors import TrainingError
from osp_diag.trainer.config import ModelConfig
from osp_diag.trainer.model import Llama

__all__ = [
    "EMBEDDING",
    "EMBEDDING_PROJECTION",
    "HEAD",
    "HEAD_PROJECTION",
    "check_exactness",
    "check_state",
    "folded_embedding",
    "folded_weights",
    "folding_sentences",
    "stock_architecture",
]

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
EMBEDDING_PROJECTION, HEAD_PROJECTION = "model.embedding_projection.weight", "unembedding_projection.weight"

_IMPOSSIBLE = {
    "softmax_off_by_one": (
        "no stock architecture adds 1 to the softmax's denominator (gpt-oss with its sink logits at 0 would, "
        "but its every MLP is a mixture of experts)"
    ),
    "learned_sink": (
        "of the stock architectures gpt-oss alone has sink logits, and its every MLP is a mixture of experts"
    ),
    "gated": (
        "of the stock architectures Qwen3-Next alone gates attention's output, and it holds linear-attention "
        "layers, partial rotation and a mixture of experts"
    ),
}


def check_exactness(config: ModelConfig) -> None:
    """Refuse what no stock architecture computes.

    Raises
    ------
    TrainingError : ``model.attention`` is not ``softmax``
    """
    if config.attention in _IMPOSSIBLE:
        raise TrainingError(
            f"model.attention={config.attention} cannot be exported: {_IMPOSSIBLE[config.attention]}, and no "
            "change of weights turns it into plain softmax. Keep the training checkpoint, or train with "
            "model.attention=softmax"
        )


def check_state(state: Mapping[str, Tensor], config: ModelConfig) -> None:
    """Refuse weights of another model.

    Raises
    ------
    TrainingError : missing, foreign or differently shaped weights, by name
    """
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in Llama(config).state_dict().items()}
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    problems = [f"{name} is missing" for name in expected if name not in shapes]
    problems += [f"{name} belongs to no such model" for name in shapes if name not in expected]
    problems += [
        f"{name} is {shapes[name]} and not {shape}"
        for name, shape in expected.items()
        if name in shapes and shapes[name] != shape
    ]
    if problems:
        more = f", and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise TrainingError(
            f"the weights are not those of the model that the configuration describes: "
            f"{', '.join(problems[:5])}{more}; give the configuration that they were trained with"
        )


def stock_architecture(config: ModelConfig) -> str:
    """Qwen3 is Llama with normed queries and keys; nothing else of it is used."""
    return "Qwen3ForCausalLM" if config.query_key_norm else "LlamaForCausalLM"


def is_tied(config: ModelConfig) -> bool:
    """Whether the exported head is the embedding: projections make two matrices of a shared one."""
    return config.tie_embeddings and not config.embedding_projection


def folded_weights(state: Mapping[str, Tensor], config: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Every weight of the stock model by name, on the CPU, in float64 where it was computed.

    Embedding and head are those of :func:`folded_embedding`. A scalar gain γ is γ in every channel, and so is
    the constant of ``srmsnorm``.
    """
    embedding, head = state[EMBEDDING], state[HEAD]
    if config.embedding_projection:
        embedding, head = folded_embedding(state)
    yield EMBEDDING, embedding.cpu()
    if not is_tied(config):
        yield HEAD, head.cpu()
    for name, value in state.items():
        if name.startswith("model.layers.") and not name.endswith("norm.weight"):
            yield name, value.cpu()
    constant = 1.0 if config.norm_scale is None else config.norm_scale
    for name, channels in _gains(config):
        default = 1.0 if name.endswith(("q_norm.weight", "k_norm.weight")) else constant
        gain = state[name] if name in state else torch.tensor([default])
        yield name, _double(gain).expand(channels).clone()


def folded_embedding(state: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """(embedding, head) with their projections multiplied in, on the CPU in float64.

    With embedding E, head W and the projections P, P': embedding E·Pᵀ, since the first block reads P·e, and
    head W·P', since the logits are W·(P'·n).
    """
    # E·Pᵀ: row i becomes P·e_i.
    embedding = _double(state[EMBEDDING]) @ _double(state[EMBEDDING_PROJECTION]).T
    return embedding, _double(state[HEAD]) @ _double(state[HEAD_PROJECTION])


def _double(value: Tensor) -> Tensor:
    return value.detach().cpu().double()


def _gains(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """(name, number of channels) of every gain in the stock architecture."""
    for layer in range(config.layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.input_layernorm.weight", config.hidden_size
        yield f"{prefix}.post_attention_layernorm.weight", config.hidden_size
        if config.query_key_norm:
            yield f"{prefix}.self_attn.q_norm.weight", config.head_size
            yield f"{prefix}.self_attn.k_norm.weight", config.head_size
    yield "model.norm.weight", config.hidden_size


def folding_sentences(config: ModelConfig) -> list[str]:
    """A sentence for everything in which the exported weights differ from the trained ones."""
    sentences = []
    if config.embedding_projection:
        sentences.append("Embedding projections are multiplied into embedding and head, in float64.")
    if config.embedding_projection and config.tie_embeddings:
        sentences.append(
            "Embedding and head, one matrix in training, became two: each took its own projection "
            "(tie_word_embeddings is false)."
        )
    if config.norm == "ssnorm":
        sentences.append("The scalar gain of every SSNorm stands in all channels of an RMSNorm's gain.")
    if config.norm == "srmsnorm":
        sentences.append("Norms without gains became RMSNorms with a constant one.")
    if config.query_key_norm:
        sentences.append(
            "Queries and keys are normed, unlike Llama's: the architecture is Qwen3, otherwise the same."
        )
    return sentences
