"""Rotary frequencies of GGUF files, whose scaling and factors transformers' conversion leaves out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osp_diag.errors import CheckpointError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

__all__ = ["FACTORS", "check_frequencies", "rotary_scaling"]

FACTORS = ("rope_freqs.weight", "rope_factors_short.weight", "rope_factors_long.weight")
"""Tensors by which llama.cpp divides the frequencies: Llama 3.1's and its kin, and LongRoPE's two."""


def rotary_scaling(path: Path, architecture: str, metadata: Mapping[str, Any], config: Any) -> dict[str, Any]:
    """What the file says of its frequencies and the configuration does not: keys of ``rope_parameters``.

    Frequency i is θ^(−2i/d) / factorᵢ. Factors that stand in the file as they are become transformers'
    ``longrope``, the one kind that takes them one by one.

    Raises
    ------
    CheckpointError
        The scaling is of another kind, or half of it is missing.
    """
    factors = _factors(path)
    rope = f"{architecture}.rope."
    kind = str(metadata.get(f"{rope}scaling.type", "none"))
    factor = metadata.get(f"{rope}scaling.factor", metadata.get(f"{rope}scale_linear"))
    length = metadata.get(f"{rope}scaling.original_context_length")
    if FACTORS[0] in factors:
        return _factor_by_factor(
            factors[FACTORS[0]], factors[FACTORS[0]], config.max_position_embeddings, 1.0
        )
    if any(name in factors for name in FACTORS[1:]):
        short, long = (factors.get(name) for name in FACTORS[1:])
        if short is None or long is None or length is None:
            raise CheckpointError(
                f"{path} has one half of LongRoPE: of {FACTORS[1]}, {FACTORS[2]} and "
                f"{rope}scaling.original_context_length it lacks one. Use another GGUF file of the model"
            )
        scaling = _factor_by_factor(short, long, int(length), metadata.get(f"{rope}scaling.attn_factor"))
        return scaling | {"factor": config.max_position_embeddings / int(length)}
    if _settled(config) or factor in (None, 1.0, 0.0) or (kind == "none" and factor is None):
        return {}
    if kind in ("none", "linear"):  # earlier files have the factor alone
        return {"rope_type": "linear", "factor": float(factor)}
    if kind == "yarn" and length is not None:
        return {"rope_type": "yarn", "factor": float(factor), "original_max_position_embeddings": int(length)}
    raise CheckpointError(
        f"{path} scales its rotary frequencies by {kind!r}, which cannot be carried over from GGUF. Use the "
        "model's safetensors"
    )


def check_frequencies(path: Path, model: PreTrainedModel, scaling: Mapping[str, Any]) -> None:
    """Refuse a model whose class has not taken the factors that the file gives one by one.

    Raises
    ------
    CheckpointError
        Its frequencies are others than θ^(−2i/d) / factorᵢ.
    """
    import torch

    if "short_factor" not in scaling:
        return
    factors = torch.tensor(scaling["short_factor"], dtype=torch.float64)
    exponents = torch.arange(len(factors), dtype=torch.float64) / len(factors)
    expected = model.config.rope_parameters["rope_theta"] ** -exponents / factors
    frequencies = [buffer.double() for name, buffer in model.named_buffers() if name.endswith("inv_freq")]
    fits = [f.shape == expected.shape and torch.allclose(f, expected, rtol=1e-4) for f in frequencies]
    if not fits or not all(fits):
        raise CheckpointError(
            f"{path} gives its rotary frequencies as a tensor, which {type(model).__name__} of transformers "
            "does not take. Use the model's safetensors"
        )


def _factors(path: Path) -> dict[str, list[float]]:
    import gguf

    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors if tensor.name in FACTORS}
    return {
        name: [float(value) for value in gguf.dequantize(tensor.data, tensor.tensor_type).reshape(-1)]
        for name, tensor in tensors.items()
    }


def _factor_by_factor(
    short: list[float], long: list[float], length: int, attention_factor: float | None
) -> dict[str, Any]:
    scaling: dict[str, Any] = {
        "rope_type": "longrope",
        "short_factor": short,
        "long_factor": long,
        "factor": 1.0,
        "original_max_position_embeddings": length,
    }
    return scaling if attention_factor is None else scaling | {"attention_factor": float(attention_factor)}


def _settled(config: Any) -> bool:
    """Whether the conversion has carried the scaling over by itself."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return parameters.get("rope_type", "default") != "default"
