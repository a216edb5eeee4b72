"""Tiny models from the configurations of transformers: sizes set by the names of attributes."""

from __future__ import annotations

import itertools
import warnings
from typing import Any

import torch
from torch import nn

__all__ = ["MANY_PARAMETERS", "CannotBeBuiltError", "sharpen", "tiny_configuration", "tiny_model"]

MANY_PARAMETERS = 20_000_000
VOCABULARY = 96
LAYERS = 2

_NAMES_BY_SIZE = (
    (VOCABULARY, "vocab_size text_vocab_size decoder_vocab_size src_vocab_size tgt_vocab_size n_vocab"),
    (VOCABULARY, "vocab_size_per_layer_input"),
    (32, "hidden_size d_model n_embd dim emb_dim embed_dim model_dim word_embed_proj_dim embedding_size"),
    (32, "attention_hidden_size decoder_hidden_size encoder_hidden_size lru_width input_embedding_size"),
    (32, "projection_dim out_hidden_size output_dim pooler_hidden_size"),
    (LAYERS, "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers depth num_blocks"),
    (LAYERS, "num_decoder_layers num_encoder_layers encoder_num_hidden_layers"),
    (4, "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads"),
    (4, "num_encoder_attention_heads num_decoder_attention_heads linear_num_value_heads"),
    (2, "num_key_value_heads num_kv_heads linear_num_key_heads index_n_heads"),
    (8, "head_dim d_kv dim_head attention_head_dim global_head_dim kv_channels hidden_size_per_layer_input"),
    (8, "linear_key_head_dim linear_value_head_dim index_head_dim v_head_dim"),
    (48, "intermediate_size ffn_dim n_inner d_ff d_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim"),
    (48, "feed_forward_size intermediate_size_mlp dim_ff dff mlp_hidden_size feedforward_dim hidden_dim_ff"),
    (16, "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size expert_dim"),
    (16, "moe_shared_expert_intermediate_size shared_intermediate_size expert_intermediate_size"),
    (4, "num_experts n_routed_experts num_local_experts moe_num_experts num_routed_experts"),
    (2, "num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token"),
    (1, "n_group topk_group n_groups n_shared_experts num_shared_experts first_k_dense_replace"),
    (1, "num_dense_layers"),
    (64, "max_position_embeddings n_positions n_ctx max_seq_len context_length max_source_positions"),
    (64, "max_target_positions seq_length index_topk"),
    (5, "sliding_window window_size attention_window_size local_window"),
    (4, "state_size ssm_state_size mamba_d_state time_step_rank mamba_dt_rank rotary_dim qk_rope_head_dim"),
    (6, "qk_nope_head_dim"),
    (10, "kv_lora_rank"),
    (12, "q_lora_rank image_size"),
    (4, "patch_size"),
    (3, "num_channels"),
)
SIZES = {name: size for size, names in _NAMES_BY_SIZE for name in names.split()}
"""What an attribute of this name becomes, wherever a configuration has it."""

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
       "cls_token_id": 1, "sep_token_id": 2, "mask_token_id": 3, "forced_eos_token_id": 2,
       "lang_id": 0, "unk_token_id": 3}  # fmt: skip

_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1, "mamba_expand": 2}
_DEFAULT_ROPE = {"rope_type": "default", "rope_theta": 1e4}
OWN: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA2 | {"attn_layer_indices": [1]},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "reformer": {"is_decoder": True, "axial_pos_embds": False},
    "falcon_h1": _MAMBA2,
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": _MAMBA2 | {"layer_types": ["mamba", "attention"]},
    "longcat_flash": {"head_dim": 4},
    "youtu": {"head_dim": 4},
    "zaya": {"num_experts_per_tok": 1},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 0, "mask_token_id": 3},
    "esmc": {"num_key_value_heads": 4},
    "longformer": {"attention_window": [4, 4]},
    "luke": {"entity_vocab_size": 10, "entity_emb_size": 16},
    "xmod": {"default_language": "en_XX"},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "mamba2": {"num_heads": 8, "head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "neomme": {
        "rope_parameters": {
            kind: _DEFAULT_ROPE | {"partial_rotary_factor": 0.5}
            for kind in ("full_attention", "sliding_attention")
        }
    },
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
}
"""What a model type needs besides."""


class CannotBeBuiltError(Exception):
    """Why there is no tiny model of an architecture."""


def tiny_configuration(configuration: type, **options: Any) -> Any:
    """A configuration of the class with small sizes; so are those inside it (of text, of images)."""
    template = configuration()
    overrides = _overrides(template)
    overrides |= OWN.get(getattr(template, "model_type", ""), {}) | options
    return configuration(**overrides)


def _overrides(template: Any) -> dict[str, Any]:
    values = {name: value for name, value in vars(template).items() if not name.startswith("_")}
    names = dict(getattr(template, "attribute_map", {}))
    values |= {alias: getattr(template, alias, None) for alias in names}
    parts = set(getattr(template, "sub_configs", {}))
    changed: dict[str, Any] = {}
    layers = LAYERS
    read_only = {n for n in dir(type(template)) if isinstance(getattr(type(template), n), property)}
    values = {name: value for name, value in values.items() if name not in read_only}
    for name, value in values.items():
        if name in parts:
            continue
        if name in SIZES and isinstance(value, int) and not isinstance(value, bool):
            changed[name] = SIZES[name]
        elif name in IDS and isinstance(value, int):
            changed[name] = IDS[name]
    kinds = values.get("layer_types") or values.get("layers_block_type")
    if isinstance(kinds, list):
        layers = max(LAYERS, len(set(kinds)))
    for name, value in values.items():
        is_per_layer = isinstance(value, list) and len(value) == len(kinds or [])
        if name in ("layer_types", "layers_block_type") and isinstance(value, list):
            distinct = list(dict.fromkeys(value))
            changed[name] = list(itertools.islice(itertools.cycle(distinct), layers))
        elif is_per_layer and value:
            changed[name] = value[:layers]
    if layers != LAYERS:
        changed |= {n: layers for n in ("num_hidden_layers", "n_layer", "num_layers") if n in changed}
    for name in parts:
        part = getattr(template, name, None)
        if part is not None and not isinstance(part, dict):
            changed[name] = type(part)(**_overrides(part) | OWN.get(getattr(part, "model_type", ""), {}))
    if (
        "kv_lora_rank" in changed
    ):  # latent attention: every head has keys of its own, and rotates a part of them
        changed |= {"num_key_value_heads": 4} if "num_key_value_heads" in changed else {}
        changed.pop("head_dim", None)
        changed |= {"num_attention_heads": 4} if "num_attention_heads" in names else {}
    # An alias and what it stands for would be set twice.
    return {n: v for n, v in changed.items() if names.get(n) not in {*changed, *read_only}}


def tiny_model(model_class: Any, configuration: Any, *, seed: int = 0, sharp: bool = True) -> nn.Module:
    """A model with seeded weights in evaluation mode.

    Raises
    ------
    CannotBeBuiltError : it would still be large, or the class refuses the sizes
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            shape = model_class._from_config(configuration)
        number = sum(p.numel() for p in shape.parameters())
        if number > MANY_PARAMETERS:
            raise CannotBeBuiltError(
                f"{number / 1e6:,.0f} million parameters are left with small sizes set by name"
            )
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = model_class._from_config(configuration)
    if sharp:
        sharpen(model, seed)
    return model.eval()


def sharpen(model: nn.Module, seed: int = 0) -> None:
    """Larger weights than at initialisation, where attention is nearly uniform and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim > 1 and "A_log" not in name:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            elif "sinks" in name or not parameter.any():
                parameter.copy_(noise * 0.3)
