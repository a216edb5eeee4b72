"""Advice as files that other tools read: a recipe of llm-compressor, options of llama.cpp."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from osp_diag.errors import UsageError
from osp_diag.quantizing.advice import Advice, Trial
from osp_diag.quantizing.linears import BlockLinear, block_linears
from osp_diag.quantizing.sensitivity import parts_of_role
from osp_diag.quantizing.setting import UNQUANTIZED
from osp_diag.sites.trace import unwrap
from osp_diag.wording import number

__all__ = ["GGUF_TENSORS", "llama_cpp_options", "llm_compressor_recipe", "write_advice"]

GGUF_TENSORS = {
    ("query",): "attn_q",
    ("key",): "attn_k",
    ("value",): "attn_v",
    ("query", "key", "value"): "attn_qkv",
    ("attention_output",): "attn_output",
    ("gate",): "ffn_gate",
    ("up",): "ffn_up",
    ("gate", "up"): "ffn_up",
    ("down",): "ffn_down",
}
"""What a Linear is → what llama.cpp calls its tensor (gguf-py, constants.py)."""
_HIGH = "q8_0"
"""The type that stands for 16 bits there: at 8 bits a block of 32 weights loses next to nothing."""


def write_advice(folder: Path, advice: Advice, model: nn.Module, *, blocks: str | None = None) -> list[Path]:
    """Write ``recipe.yaml`` and ``tensor-types.txt`` into a folder, which is made; returns both.

    Raises
    ------
    UsageError : the folder cannot be made, or something else has its name
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(f"{folder}: no folder can be made there ({error.strerror})") from error
    texts = {
        "recipe.yaml": llm_compressor_recipe(advice, model, blocks=blocks),
        "tensor-types.txt": llama_cpp_options(advice, model, blocks=blocks),
    }
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    return [folder / name for name in texts]


def llm_compressor_recipe(advice: Advice, model: nn.Module, *, blocks: str | None = None) -> str:
    """YAML for llm-compressor's ``oneshot``: a QuantizationModifier that leaves out what is to stay.

    Weights are symmetric per channel, inputs asymmetric per token and dynamic; keys and values are left out,
    since llm-compressor has one grid of them a layer, and not one a token and head as was measured.
    """
    model = unwrap(model)
    inside = {linear.path for linear in block_linears(model, blocks=blocks)}
    outside = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in inside]
    trial = advice.best_linears
    ignored = [*outside, *(trial.linears if trial else ())]
    scheme: dict[str, Any] = {"targets": ["Linear"]}
    if advice.setting.weight_bits != UNQUANTIZED:
        scheme["weights"] = {
            "num_bits": advice.setting.weight_bits,
            "type": "int",
            "symmetric": True,
            "strategy": "channel",
        }
    if advice.setting.activation_bits != UNQUANTIZED:
        scheme["input_activations"] = {
            "num_bits": advice.setting.activation_bits,
            "type": "int",
            "symmetric": False,
            "strategy": "token",
            "dynamic": True,
        }
    lines = [*_measured(advice, trial), "quantization_stage:", "  quantization_modifiers:"]
    lines += ["    QuantizationModifier:", "      ignore:"]
    lines += [f"        - {json.dumps(name)}" for name in ignored] if ignored else ["        []"]
    # Flow style, which is JSON too.
    lines += ["      config_groups:", f"        group_0: {json.dumps(scheme)}"]
    return "\n".join(lines) + "\n"


def llama_cpp_options(advice: Advice, model: nn.Module, *, blocks: str | None = None) -> str:
    """An option of ``llama-quantize`` a line, each with what its Linear costs if it alone is rounded."""
    trial = advice.best_linears
    lines = [
        *_measured(advice, trial),
        "# llama.cpp's types are blocks of 32 or 256 weights on grids of their own: measure again what they "
        "cost.",
        "# Use: llama-quantize $(grep -v '^#' tensor-types.txt) in.gguf out.gguf Q4_0",
    ]
    for linear in block_linears(model, blocks=blocks):
        if trial is None or linear.path not in trial.linears:
            continue
        name = GGUF_TENSORS.get(linear.roles)
        if name is None:
            lines.append(f"# {linear.path}: llama.cpp's name of it is not known")
            continue
        lines.append(f"# {linear.path}: {_alone(linear, advice)}")
        lines.append(f"--tensor-type {re.escape(f'blk.{linear.layer}.{name}')}={_HIGH}")
    return "\n".join(lines) + "\n"


def _measured(advice: Advice, trial: Trial | None) -> list[str]:
    """What was measured, as comments."""
    lines = [
        f"# osp-diag advise: at {advice.setting} (convention {advice.convention}) KL to 16-16-16 is "
        f"{number(advice.divergence)} nat over {advice.tokens:,} tokens."
    ]
    best = advice.best
    if trial is None:
        lines.append("# No whole Linears within the budget are worth leaving in 16 bits: nothing is left.")
    else:
        lines.append(
            f"# With {trial.name} in 16 bits ({trial.share:.1%} of the blocks' weights) it is "
            f"{number(trial.divergence)} nat."
        )
    if best is not None and best is not trial:
        lines.append(
            f"# More was saved by what this file cannot say: {best.name}, {number(best.divergence)} nat."
        )
    if advice.setting.key_value_bits != UNQUANTIZED:
        lines.append("# Keys and values, which were rounded as well, are not in this file.")
    return lines


def _alone(linear: BlockLinear, advice: Advice) -> str:
    """What a Linear costs alone, of its weight and of the input that it reads."""
    divergence = advice.sensitivity["divergence"].sel(layer=linear.layer)
    costs: Mapping[str, float] = {
        str(part): float(divergence.sel(part=part))
        for part in divergence["part"].values
        if str(part) in {name for role in linear.roles for name in parts_of_role(role)}
    }
    words = [f"{part} {number(cost)} nat" for part, cost in costs.items() if np.isfinite(cost)]
    return ", ".join(words) + " alone" if words else "not measured alone"
