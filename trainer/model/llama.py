"""The model: a Llama by Hugging Face's names, with OSP's norms and embedding projections."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from osp_diag.errors import UsageError
from osp_diag.trainer.config import ModelConfig
from osp_diag.trainer.data.batch import IGNORED
from osp_diag.trainer.model.attention import Attention
from osp_diag.trainer.model.initialising import draw_weights, spend_layer_draws
from osp_diag.trainer.model.masks import Mask, attention_mask, document_starts
from osp_diag.trainer.model.norms import make_norm
from osp_diag.trainer.model.rotary import Rotation, rotation

__all__ = ["Block", "Llama", "LlamaOutput"]


class LlamaOutput(NamedTuple):
    """What a forward pass gives."""

    loss: Float[Tensor, ""] | None
    """mean cross-entropy over the labelled positions, in nats and float32; 0 where there is none"""
    logits: Float[Tensor, "sequence position vocabulary"]


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) ⊙ up(x)) (Shazeer, 2020)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width, inner = config.hidden_size, config.feed_forward_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(
        self, x: Float[Tensor, "sequence position channel"]
    ) -> Float[Tensor, "sequence position channel"]:
        return self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        norm = (config.norm, config.hidden_size, config.norm_scale, config.norm_epsilon)
        self.input_layernorm = make_norm(*norm)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = make_norm(*norm)
        self.mlp = FeedForward(config)

    def forward(
        self, x: Float[Tensor, "sequence position channel"], by: Rotation, mask: Mask
    ) -> Float[Tensor, "sequence position channel"]:
        x = x + self.self_attn(self.input_layernorm(x), by, mask)
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Everything between token ids and the head: embedding, its projection, blocks, last norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        width = config.hidden_size
        self.config = config
        self.activation_checkpointing = False
        self.embed_tokens = nn.Embedding(config.vocabulary_size, width)
        self.embedding_projection: nn.Module | None = None
        if config.embedding_projection:
            self.embedding_projection = nn.Linear(width, width, bias=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = make_norm(config.norm, width, config.norm_scale, config.norm_epsilon)

    def forward(
        self,
        input_ids: Int[Tensor, "sequence position"],
        document_ids: Int[Tensor, "sequence position"] | None,
    ) -> Float[Tensor, "sequence position channel"]:
        tokens, device = input_ids.shape[1], input_ids.device
        positions = torch.arange(tokens, device=device)[None]
        starts = None
        if document_ids is not None:
            starts = document_starts(document_ids)
            positions = positions - starts
        by = rotation(positions, self.config.head_size, self.config.rope_theta)
        mask = attention_mask(self.config, tokens, device, starts)
        x = self.embed_tokens(input_ids)
        if self.embedding_projection is not None:
            x = self.embedding_projection(x)
        for block in self.layers:
            if self.activation_checkpointing and torch.is_grad_enabled():
                # Nothing in a block draws random numbers.
                x = checkpoint(block, x, by, mask, use_reentrant=False, preserve_rng_state=False)
            else:
                x = block(x, by, mask)
        return self.norm(x)


class CrossEntropy(nn.Module):
    """−log p(label), mean over labelled positions, in float32.

    A module, so that it can be compiled: one kernel then reads the logits as they are, where one operation
    after another writes float32 copies of what is the largest array of a training step.
    """

    def forward(
        self,
        logits: Float[Tensor, "sequence position vocabulary"],
        labels: Int[Tensor, "sequence position"],
    ) -> Float[Tensor, ""]:
        total = functional.cross_entropy(
            logits.flatten(0, 1).float(), labels.flatten(), ignore_index=IGNORED, reduction="sum"
        )
        # A micro-batch may have no labelled position, and must not make a NaN of the others.
        return total / (labels != IGNORED).sum().clamp(min=1)


class Llama(nn.Module):
    """A causal language model.

    Parameters
    ----------
    config : what it is. All matrices are drawn from a normal distribution with ``initializer_range`` (the
        output projections of attention and MLP too, as Hugging Face initialises Llama and not divided by
        √(2·layers) as GPT-2: the paper names no other, and a stream that starts with smaller contributions
        would shift the very thing that is watched here). Embedding projections are orthogonal, so that
        they keep every norm at first; gains start at ``norm_scale``, sink logits at 0.

    With embedding projections P and P', embedding E and head W, the first block reads P·e and the logits
    are W·(P'·n), n being the last norm's output.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.unembedding_projection: nn.Module | None = None
        if config.embedding_projection:
            self.unembedding_projection = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
        self.lm_head = nn.Linear(config.hidden_size, config.vocabulary_size, bias=False)
        if config.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.cross_entropy = CrossEntropy()
        self.initialise()

    def initialise(self) -> None:
        """Draw all weights anew from torch's random state."""
        projections = (self.model.embedding_projection, self.unembedding_projection)
        draw_weights(self, deviation=self.config.initializer_range, orthogonal=projections)

    def initialise_shards(self) -> None:
        """Give a sharded model the weights that a model made whole would have after the same seed."""
        spend_layer_draws(self)
        self.initialise()

    @property
    def blocks(self) -> nn.ModuleList:
        """The blocks, as units of compilation and sharding."""
        return self.model.layers

    def compile_parts(self) -> None:
        """Compile each block, all of which share one graph, and the loss."""
        # Inductor suggests TF32. Under autocast the products are bfloat16; the float32 that is left is meant.
        warnings.filterwarnings("ignore", message="TensorFloat32 tensor cores", category=UserWarning)
        for part in (*self.blocks, self.cross_entropy):
            part.compile()

    def set_activation_checkpointing(self, on: bool) -> None:
        """Keep of each block only its input, and run it once more in the backward pass (non-reentrant)."""
        self.model.activation_checkpointing = on

    def parameter_count(self) -> int:
        """Number of parameters; a tied head counts once."""
        return sum(parameter.numel() for parameter in self.parameters())

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations of a training step per token, as model FLOPs utilisation counts them.

        6N + 12 · layers · hidden_size · sequence_length (Chowdhery et al., 2022, appendix B): N parameters
        that multiply activations (the embedding is a look-up and counts as a head alone), and attention
        without a discount for causality. What activation checkpointing computes twice counts once.
        """
        lookup = 0 if self.config.tie_embeddings else self.model.embed_tokens.weight.numel()
        attention = 12 * self.config.layers * self.config.hidden_size * sequence_length
        return 6.0 * (self.parameter_count() - lookup) + attention

    def forward(
        self,
        input_ids: Int[Tensor, "sequence position"],
        labels: Int[Tensor, "sequence position"] | None = None,
        document_ids: Int[Tensor, "sequence position"] | None = None,
    ) -> LlamaOutput:
        """Logits of every position's next token, and the loss where labels are given.

        Parameters
        ----------
        input_ids : token ids
        labels : the next tokens, already shifted; −100 where there is none
        document_ids : equal within a document. Attention does not cross from one to the next, and
            positions begin at 0 in each. None: a sequence is one document

        Raises
        ------
        UsageError : more positions than ``model.max_length``
        """
        if input_ids.shape[1] > self.config.max_length:
            raise UsageError(
                f"{input_ids.shape[1]} positions are more than model.max_length={self.config.max_length}; "
                "give shorter sequences, or a model made for longer ones"
            )
        x = self.model(input_ids, document_ids)
        if self.unembedding_projection is not None:
            x = self.unembedding_projection(x)
        logits = self.lm_head(x)
        return LlamaOutput(None if labels is None else self.cross_entropy(logits, labels), logits)
