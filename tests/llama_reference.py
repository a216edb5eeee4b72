"""The training model once more, in float64 NumPy with the whole T×T array, from its weights alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from osp_diag.trainer.config import ModelConfig
from osp_diag.trainer.model import Llama

Sites = dict[tuple[str, int], np.ndarray]

KINDS = ("softmax", "softmax_off_by_one", "learned_sink", "gated")


def tiny(**changes: Any) -> ModelConfig:
    """Two layers of 32 channels, grouped keys, an odd scale of the norms."""
    values: dict[str, Any] = {
        "vocabulary_size": 97,
        "hidden_size": 32,
        "layers": 2,
        "heads": 4,
        "key_value_heads": 2,
        "max_length": 64,
    }
    return ModelConfig(**(values | changes))


def stirred(config: ModelConfig, seed: int = 0) -> Llama:
    """A model whose every parameter differs from its initial value: larger weights, gains that vary."""
    torch.manual_seed(seed)
    model = Llama(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.mul_(1 + 0.3 * torch.rand_like(parameter))
            elif name.endswith("sinks"):
                parameter.copy_(torch.randn_like(parameter) + 0.5)
            elif "embedding_projection" in name:
                parameter.add_(torch.randn_like(parameter) * 0.05)
            else:
                parameter.mul_(8)
    return model.eval()


def dense(
    query: np.ndarray, key: np.ndarray, value: np.ndarray, allowed: np.ndarray, sinks: np.ndarray | None
) -> np.ndarray:
    """Attention's output (batch, head, token, channel) by definition; ``sinks`` are logits of each head."""
    heads = query.shape[1]
    key, value = (np.repeat(part, heads // part.shape[1], axis=1) for part in (key, value))
    logits = np.einsum("bhic,bhjc->bhij", query, key) / np.sqrt(query.shape[-1])
    weights = np.where(allowed, np.exp(logits), 0.0)
    total = weights.sum(-1, keepdims=True)
    if sinks is not None:
        total = total + np.exp(sinks)[None, :, None, None]
    return np.einsum("bhij,bhjc->bhic", weights / total, value)


def sink_logits(model: nn.Module, config: ModelConfig, layer: int) -> np.ndarray | None:
    if config.attention == "softmax_off_by_one":
        return np.zeros(config.heads)
    if config.attention == "learned_sink":
        return model.state_dict()[f"model.layers.{layer}.self_attn.sinks"].double().numpy()
    return None


def rotated(x: np.ndarray, positions: np.ndarray, theta: float) -> np.ndarray:
    """(batch, head, token, channel): channel i and i + d/2 as one complex number, turned."""
    half = x.shape[-1] // 2
    pairs = x[..., :half] + 1j * x[..., half:]
    angle = positions[:, None, :, None] * theta ** (-np.arange(half) / half)
    turned = pairs * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], axis=-1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class Reference:
    """``sites`` and ``logits`` of one forward pass; ``document_ids`` as the model takes them."""

    def __init__(self, model: Llama, ids: torch.Tensor, document_ids: torch.Tensor | None = None) -> None:
        self.config, self.model = model.config, model
        self.weights: Mapping[str, np.ndarray] = {
            name: value.detach().double().numpy() for name, value in model.state_dict().items()
        }
        self.sites: Sites = {}
        self._places(ids.shape, None if document_ids is None else document_ids.numpy())
        self.logits = self._forward(ids.numpy())

    def _places(self, shape: Any, documents: np.ndarray | None) -> None:
        batch, tokens = shape
        self.positions = np.tile(np.arange(tokens), (batch, 1))
        self.allowed = np.tile(np.tril(np.ones((tokens, tokens), dtype=bool)), (batch, 1, 1, 1))
        if documents is not None:
            for b, t in np.ndindex(batch, tokens):
                same = t > 0 and documents[b, t] == documents[b, t - 1]
                self.positions[b, t] = self.positions[b, t - 1] + 1 if same else 0
            self.allowed &= (documents[:, :, None] == documents[:, None, :])[:, None]

    def _norm(self, name: str, x: np.ndarray, default: float) -> np.ndarray:
        gain = self.weights.get(f"{name}.weight", default)
        return gain * x / np.sqrt((x**2).mean(-1, keepdims=True) + self.config.norm_epsilon)

    def _forward(self, ids: np.ndarray) -> np.ndarray:
        w, config = self.weights, self.config
        scale = 1.0 if config.norm_scale is None else config.norm_scale
        x = w["model.embed_tokens.weight"][ids]
        if config.embedding_projection:
            x = x @ w["model.embedding_projection.weight"].T
        self.sites["embedding", 0] = x
        for layer in range(config.layers):
            name = f"model.layers.{layer}"
            read = self._norm(f"{name}.input_layernorm", x, scale)
            added = self._attention(f"{name}.self_attn", layer, read)
            middle = x + added
            fed = self._norm(f"{name}.post_attention_layernorm", middle, scale)
            gate, up = (fed @ w[f"{name}.mlp.{part}_proj.weight"].T for part in ("gate", "up"))
            hidden = gate * sigmoid(gate) * up
            contribution = hidden @ w[f"{name}.mlp.down_proj.weight"].T
            seen = {
                "residual_pre": x, "attention_input": read, "attention_contribution": added,
                "residual_mid": middle, "mlp_input": fed, "mlp_hidden": hidden,
                "mlp_contribution": contribution, "residual_post": middle + contribution,
            }  # fmt: skip
            self.sites |= {(site, layer): value for site, value in seen.items()}
            x = middle + contribution
        x = self._norm("model.norm", x, scale)
        self.sites["final_norm", config.layers - 1] = x
        if config.embedding_projection:
            x = x @ w["unembedding_projection.weight"].T
        return x @ w["lm_head.weight"].T

    def _attention(self, name: str, layer: int, x: np.ndarray) -> np.ndarray:
        w, config = self.weights, self.config
        query, key, value = (
            (x @ w[f"{name}.{part}_proj.weight"].T).reshape(*x.shape[:2], -1, config.head_size)
            for part in ("q", "k", "v")
        )
        if config.query_key_norm:
            query, key = self._norm(f"{name}.q_norm", query, 1.0), self._norm(f"{name}.k_norm", key, 1.0)
        self.sites |= {
            ("query_pre_rope", layer): query,
            ("key_pre_rope", layer): key,
            ("value", layer): value,
        }
        query, key, value = (part.transpose(0, 2, 1, 3) for part in (query, key, value))
        query, key = (rotated(part, self.positions, config.rope_theta) for part in (query, key))
        self.sites |= {
            (site, layer): part.transpose(0, 2, 1, 3)
            for site, part in (("query_post_rope", query), ("key_post_rope", key))
        }
        out = dense(query, key, value, self.allowed, sink_logits(self.model, config, layer))
        out = out.transpose(0, 2, 1, 3).reshape(x.shape)
        if config.attention == "gated":
            out = out * sigmoid(x @ w[f"{name}.gate_proj.weight"].T)
        self.sites["attention_output", layer] = out
        return out @ w[f"{name}.o_proj.weight"].T
