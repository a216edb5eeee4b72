"""Tiny random models of many architectures, from configs alone: nothing is downloaded.

``FAMILIES["llama"].build()`` gives a model in evaluation mode with seeded weights, ``.inputs()`` its batch.
Sizes differ from each other so that no axis can be taken for another: batch 2, 12 tokens, 4 heads, width 32.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

BATCH, TOKENS, VOCABULARY = 2, 12, 96
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
WINDOW = 5


@dataclass(frozen=True)
class Family:
    """One architecture: how to build a tiny one, and what it is good for in tests.

    Attributes:
        name: key in ``FAMILIES``.
        model: class name in transformers; its config's is ``config``.
        options: what the config gets besides ``COMMON``.
        note: what the architecture exercises.
        calls: self-attention calls in one forward pass; 0 for models without attention.
        seam: where they are seen under the default attention implementation.
        output_projection: where SDPA's weights are *not* those that eager attention returns: the module whose
            input is weights · values.
        encoder: attends in both directions.
        checkpointing: supports gradient checkpointing.
        implementations: the attention implementations that it can be run with.
    """

    name: str
    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    calls: int = 2
    seam: str = "attention interface"
    output_projection: str | None = None
    encoder: bool = False
    checkpointing: bool = True
    implementations: tuple[str, ...] = ("sdpa", "eager")

    @property
    def has_attention(self) -> bool:
        return self.calls > 0

    def build(self, implementation: str | None = None, *, seed: int = 0, **options: Any) -> nn.Module:
        """A model with seeded random weights, in evaluation mode."""
        import transformers

        with warnings.catch_warnings():
            # gpt_bigcode is imported here, and uses torch.jit.script.
            warnings.simplefilter("ignore", DeprecationWarning)
            config_class, model_class = getattr(transformers, self.config), getattr(transformers, self.model)
        template = config_class()
        sizes = {key: value for key, value in COMMON.items() if hasattr(template, key)}
        config = config_class(**sizes | self.options | options)
        arguments = {} if implementation is None else {"attn_implementation": implementation}
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = model_class._from_config(config, **arguments)
        _sharpen(model, seed)
        return model.eval()

    def inputs(self, *, padded: bool = False, seed: int = 1, tokens: int = TOKENS) -> dict[str, torch.Tensor]:
        """Token ids; ``padded`` leaves the last 3 positions of the second sequence empty."""
        generator = torch.Generator().manual_seed(seed)
        ids = torch.randint(4, VOCABULARY, (BATCH, tokens), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, -3:] = 0
        return {"input_ids": ids, "attention_mask": mask}


def _sharpen(model: nn.Module, seed: int) -> None:
    """Larger weights than at initialisation, where attention is nearly uniform and would hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
            if parameter.ndim > 1 and "A_log" not in name:
                parameter.copy_(noise * 1.5 / parameter.shape[-1] ** 0.5)
            elif "sinks" in name or not parameter.any():
                parameter.copy_(noise * 0.3)


def _window(*types: str) -> dict[str, Any]:
    return {"sliding_window": WINDOW, "layer_types": list(types)}


_SLIDING, _FULL = "sliding_attention", "full_attention"
_MIXTURE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

_TABLE = [
    Family("llama", "LlamaForCausalLM", "LlamaConfig", GROUPED, "RoPE, grouped queries"),
    Family(
        "mistral",
        "MistralForCausalLM",
        "MistralConfig",
        GROUPED | {"sliding_window": WINDOW},
        "sliding window",
    ),
    Family("mixtral", "MixtralForCausalLM", "MixtralConfig", GROUPED | {"num_local_experts": 4}, "experts"),
    Family("qwen2", "Qwen2ForCausalLM", "Qwen2Config", GROUPED, "biased q, k, v"),
    Family(
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        "Qwen2MoeConfig",
        GROUPED | _MIXTURE | {"num_experts": 4, "shared_expert_intermediate_size": 16},
        "experts with a shared one",
    ),
    Family(
        "qwen3", "Qwen3ForCausalLM", "Qwen3Config", GROUPED | {"head_dim": 10}, "QK-norm; heads × hd ≠ width"
    ),
    Family(
        "gemma", "GemmaForCausalLM", "GemmaConfig", {"num_key_value_heads": 1, "head_dim": 10}, "one key head"
    ),
    Family(
        "gemma2",
        "Gemma2ForCausalLM",
        "Gemma2Config",
        GROUPED
        | _window(_SLIDING, _FULL)
        | {"head_dim": 10, "query_pre_attn_scalar": 7, "attn_logit_softcapping": 2.0},
        "soft-capped logits (not under SDPA), sandwich norms, alternating windows, own scale",
        output_projection="o_proj",
    ),
    Family(
        "gemma3",
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        GROUPED | _window(_SLIDING, _FULL) | {"head_dim": 10, "query_pre_attn_scalar": 7},
        "QK-norm, two RoPE bases, alternating windows",
    ),
    Family("gpt2", "GPT2LMHeadModel", "GPT2Config", {}, "Conv1D, fused QKV, learned positions"),
    Family(
        "gpt2_upcast",
        "GPT2LMHeadModel",
        "GPT2Config",
        {"reorder_and_upcast_attn": True, "scale_attn_by_inverse_layer_idx": True},
        "under eager, asks for the implementation's name and computes attention itself",
    ),
    Family("gpt_neox", "GPTNeoXForCausalLM", "GPTNeoXConfig", {}, "parallel block, interleaved fused QKV"),
    Family(
        "gptj",
        "GPTJForCausalLM",
        "GPTJConfig",
        {"rotary_dim": 4},
        "parallel block, attention written out",
        seam="softmax",
        implementations=("eager",),
    ),
    Family(
        "gpt_neo",
        "GPTNeoForCausalLM",
        "GPTNeoConfig",
        {"attention_types": [[["global", "local"], 1]], "window_size": WINDOW},
        "attention written out, unscaled, local in every other layer",
        seam="softmax",
        implementations=("eager",),
    ),
    Family(
        "codegen",
        "CodeGenForCausalLM",
        "CodeGenConfig",
        {"rotary_dim": 4},
        "attention written out with nn.Softmax, fused QKV in 4 slices",
        seam="softmax",
        implementations=("eager",),
    ),
    Family("phi", "PhiForCausalLM", "PhiConfig", GROUPED | {"partial_rotary_factor": 0.5}, "parallel block"),
    Family("phi3", "Phi3ForCausalLM", "Phi3Config", GROUPED, "fused QKV and fused gate"),
    Family(
        "falcon",
        "FalconForCausalLM",
        "FalconConfig",
        {"multi_query": True},
        "parallel block, one key head, calls SDPA itself",
        seam="scaled_dot_product_attention",
    ),
    Family(
        "falcon_alibi",
        "FalconForCausalLM",
        "FalconConfig",
        {"alibi": True, "new_decoder_architecture": True, "num_kv_heads": 2},
        "ALiBi through SDPA's mask (transformers 5.17 adds it twice under eager)",
        seam="scaled_dot_product_attention",
        output_projection="dense",
    ),
    Family(
        "bloom",
        "BloomForCausalLM",
        "BloomConfig",
        {},
        "ALiBi, attention written out",
        seam="softmax",
        implementations=("eager",),
    ),
    Family(
        "mpt",
        "MptForCausalLM",
        "MptConfig",
        {"max_seq_len": 64},
        "ALiBi, attention written out",
        seam="softmax",
        implementations=("eager",),
    ),
    Family("opt", "OPTForCausalLM", "OPTConfig", {"ffn_dim": 48, "word_embed_proj_dim": 32}, "biases, ReLU"),
    Family("olmo2", "Olmo2ForCausalLM", "Olmo2Config", GROUPED, "norms after, QK-norm over all heads"),
    Family("cohere", "CohereForCausalLM", "CohereConfig", GROUPED | {"use_qk_norm": True}, "parallel block"),
    Family(
        "deepseek_v3",
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            "num_key_value_heads": 4,
            "q_lora_rank": 12,
            "kv_lora_rank": 10,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 6,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "n_group": 1,
            "topk_group": 1,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
        "MLA: values narrower than keys",
    ),
    Family(
        "gpt_oss",
        "GptOssForCausalLM",
        "GptOssConfig",
        GROUPED
        | _window(_SLIDING, _FULL)
        | {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
        "learned sink logits",
        implementations=("eager",),
    ),
    Family("starcoder2", "Starcoder2ForCausalLM", "Starcoder2Config", GROUPED, "biases, LayerNorm"),
    Family("stablelm", "StableLmForCausalLM", "StableLmConfig", GROUPED, "partial RoPE"),
    Family(
        "granite", "GraniteForCausalLM", "GraniteConfig", GROUPED | {"attention_multiplier": 0.2}, "own scale"
    ),
    Family(
        "glm4", "Glm4ForCausalLM", "Glm4Config", GROUPED | {"head_dim": 8}, "sandwich norms, partial RoPE"
    ),
    Family(
        "nemotron", "NemotronForCausalLM", "NemotronConfig", GROUPED | {"head_dim": 8}, "LayerNorm1P, ReLU²"
    ),
    Family("biogpt", "BioGptForCausalLM", "BioGptConfig", {}, "BART-like attention"),
    Family("gpt_bigcode", "GPTBigCodeForCausalLM", "GPTBigCodeConfig", {}, "one key head, fused QKV"),
    Family("bert", "BertForMaskedLM", "BertConfig", {}, "encoder", encoder=True),
    Family("roberta", "RobertaForMaskedLM", "RobertaConfig", {}, "encoder, offset positions", encoder=True),
    Family(
        "albert",
        "AlbertForMaskedLM",
        "AlbertConfig",
        {"embedding_size": 16},
        "one shared block",
        encoder=True,
        checkpointing=False,
    ),
    Family(
        "modernbert",
        "ModernBertForMaskedLM",
        "ModernBertConfig",
        {"local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2},
        "encoder with windows in both directions",
        encoder=True,
    ),
    Family(
        "t5_encoder",
        "T5EncoderModel",
        "T5Config",
        {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_heads": 4, "num_layers": 2},
        "encoder with relative position biases, unscaled",
        encoder=True,
    ),
    Family(
        "mamba",
        "MambaForCausalLM",
        "MambaConfig",
        {"state_size": 4},
        "state space: no attention",
        calls=0,
        implementations=(),
    ),
    Family(
        "rwkv",
        "RwkvForCausalLM",
        "RwkvConfig",
        {"attention_hidden_size": 32, "context_length": 64},
        "recurrent: no attention",
        calls=0,
        implementations=(),
    ),
]

FAMILIES: dict[str, Family] = {family.name: family for family in _TABLE}
