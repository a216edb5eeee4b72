"""Tiny GGUF files of Llama and of a mixture of experts, as llama.cpp's converter lays them out."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from tests.tiny_checkpoints import transformers

_OUTSIDE = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
_INSIDE = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def experts() -> transformers.Qwen3MoeForCausalLM:
    config = transformers.Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=64,
    )
    return transformers.Qwen3MoeForCausalLM(config).eval()


def tensors_of(model: nn.Module, architecture: str) -> dict[str, np.ndarray]:
    """A model's weights under GGUF's names, queries and keys of a Llama in llama.cpp's order."""
    config = model.config
    tensors = {}
    for key, value in model.state_dict().items():
        values, name = value.float().numpy(), key.removesuffix(".weight")
        if name in _OUTSIDE:
            tensors[f"{_OUTSIDE[name]}.weight"] = values
            continue
        _, _, layer, inner = name.split(".", 3)
        if inner == "mlp.experts.gate_up_proj":
            gate, up = np.split(values, 2, axis=1)
            tensors[f"blk.{layer}.ffn_gate_exps.weight"] = gate
            tensors[f"blk.{layer}.ffn_up_exps.weight"] = up
        elif inner == "mlp.experts.down_proj":
            tensors[f"blk.{layer}.ffn_down_exps.weight"] = values
        else:
            if architecture == "llama" and inner in ("self_attn.q_proj", "self_attn.k_proj"):
                query = inner == "self_attn.q_proj"
                heads = config.num_attention_heads if query else config.num_key_value_heads
                rows, columns = values.shape
                values = values.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2)
                values = values.reshape(rows, columns)
            tensors[f"blk.{layer}.{_INSIDE[inner]}.weight"] = values
    return tensors


def write_model(
    path: Path,
    model: nn.Module,
    architecture: str = "llama",
    *,
    without: Collection[str] = (),
    extra: Mapping[str, np.ndarray] | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> Path:
    """A GGUF file of a model; ``metadata`` is added to what describes it, or takes its place."""
    import gguf

    config = model.config
    entries: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": 10000.0,
        "rope.dimension_count": config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size,
    }
    if architecture == "qwen3moe":
        entries |= {"expert_count": config.num_experts, "expert_used_count": config.num_experts_per_tok}
        entries |= {"attention.key_length": config.head_dim}
    entries |= metadata or {}
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in entries.items():
        kind = {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)]
        kind(f"{architecture}.{key}", value)
    tensors = tensors_of(model, architecture) | dict(extra or {})
    for name, values in tensors.items():
        if name not in without:
            writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
