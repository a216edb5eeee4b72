"""A quantized checkpoint for others: integers and scales as compressed-tensors has them, and vLLM loads."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from osp_diag.checkpoints import Checkpoint
from osp_diag.errors import CheckpointError, UsageError
from osp_diag.quantizing.conventions import convention_named
from osp_diag.quantizing.grid import Grid
from osp_diag.quantizing.linears import BlockLinear, block_linears
from osp_diag.quantizing.methods import method_named
from osp_diag.quantizing.setting import UNQUANTIZED, Setting
from osp_diag.quantizing.simulate import quantized_weights
from osp_diag.quiet import quietly
from osp_diag.sites.trace import unwrap

__all__ = ["PACKED_BITS", "check_exportable", "packed", "save_quantized"]

PACKED_BITS = (4, 8)
"""Bits of weights that loaders of the format have kernels for."""
_FORMAT = "pack-quantized"


def check_exportable(setting: Setting, method: str, convention: str) -> None:
    """Refuse what the format cannot hold, before any work is done.

    Raises
    ------
    UsageError : with the reason
    """
    if setting.weight_bits not in PACKED_BITS:
        reason = f"weights of {setting.weight_bits} bits: loaders take 4 and 8"
    elif setting.key_value_bits != UNQUANTIZED:
        reason = "keys and values: its grids of them are one a layer, not one a token and head"
    elif method_named(method).rotation != "none":
        reason = f"{method}: the Hadamard matrices that multiply activations as they run"
    elif setting.activation_bits != UNQUANTIZED and not _plain_inputs(convention):
        reason = f"the convention {convention}: a grid a head for the input of attention's output projection"
    else:
        return
    raise UsageError(
        f"compressed-tensors cannot hold {reason}; save what it can, such as --bits 4-16-16 --method gptq"
    )


def _plain_inputs(convention: str) -> bool:
    """Whether attention's output has one grid a token, as other inputs have."""
    rules = convention_named(convention)
    return rules.attention_output(8, 64) == rules.activations(8)


def save_quantized(
    checkpoint: Checkpoint,
    folder: Path,
    setting: Setting,
    *,
    method: str = "rtn",
    convention: str = "plain",
    calibration: Any = None,
    blocks: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a checkpoint with the blocks' Linears as integers of few bits, for transformers and vLLM.

    Weights are stored as they are simulated: symmetric codes and a scale for each output channel in the
    weight's dtype, so that float32 loses nothing and bfloat16 the last bits of the scale. Inputs are not
    stored: the configuration asks for a grid a token, asymmetric and dynamic. The rest of the model stays as
    it is.

    Parameters
    ----------
    checkpoint : of transformers
    folder : to make
    setting, method, convention, calibration, blocks, progress : as
        :func:`osp_diag.quantizing.simulate.quantized` takes them

    Raises
    ------
    UsageError : what the format cannot hold, or a folder that is there
    CheckpointError : a checkpoint that transformers did not make
    """
    check_exportable(setting, method, convention)
    model: Any = unwrap(checkpoint.model)
    if not hasattr(model, "save_pretrained") or not hasattr(model, "config"):
        raise CheckpointError(f"{checkpoint.name} is no model of transformers, whose format this is")
    if folder.exists():
        raise UsageError(f"{folder} is there already; give a folder that is not")
    grid = convention_named(convention).weights(setting.weight_bits)
    linears = block_linears(model, blocks=blocks)
    originals = {linear.path: linear.module.weight.detach() for linear in linears}
    rounding = quantized_weights(
        model, setting.weight_bits, method=method, convention=convention, calibration=calibration,
        blocks=blocks, progress=progress,
    )  # fmt: skip
    tensors = dict(model.state_dict())
    with rounding:
        for linear in linears:
            tensors.pop(f"{linear.path}.weight")
            tensors |= _stored(linear, grid, originals[linear.path])
    # Written beside its place, so that what is there is whole.
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as place:
        with quietly():
            model.save_pretrained(place, state_dict=tensors)
            if checkpoint.tokenizer is not None and hasattr(checkpoint.tokenizer, "save_pretrained"):
                checkpoint.tokenizer.save_pretrained(place)
        _describe(Path(place) / "config.json", model, linears, setting)
        shutil.copytree(place, folder)
    return folder


def _stored(linear: BlockLinear, grid: Grid, original: Float[Tensor, "row column"]) -> dict[str, Tensor]:
    """What the format has in place of a weight, which lies on the grid of the original one."""
    weight = linear.module.weight.detach()
    scales = grid.scales(original)
    codes = grid.codes(weight, scales)
    # In bfloat16 a weight may lie half a step beside its point at 8 bits, where a code is a toss-up.
    points = (codes * scales.scale).to(weight.dtype)
    off = ~torch.isclose(points, weight, rtol=4 * torch.finfo(weight.dtype).eps, atol=0)
    if float(off.double().mean()) > 1e-3:
        raise CheckpointError(
            f"{linear.path} was rounded on another grid than that of its weight, which cannot be stored"
        )
    bits = grid.bits
    return {
        f"{linear.path}.weight_packed": packed(codes.to(torch.int32), bits),
        f"{linear.path}.weight_scale": scales.scale.to(weight.dtype).cpu().contiguous(),
        f"{linear.path}.weight_shape": torch.tensor(weight.shape),
    }


def packed(codes: Int[Tensor, "row column"], bits: int) -> Int[Tensor, "row word"]:
    """Codes of 2, 4 or 8 bits in words of 32, the first in the lowest bits, each raised by 2ᵇ⁻¹."""
    each = 32 // bits
    values = codes.cpu().long() + 2 ** (bits - 1)
    padded = nn.functional.pad(values, (0, -values.shape[1] % each)).unflatten(1, (-1, each))
    words = (padded << (bits * torch.arange(each))).sum(-1)
    # As the int32 of the same 32 bits.
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32).contiguous()


def _describe(path: Path, model: nn.Module, linears: tuple[BlockLinear, ...], setting: Setting) -> None:
    inside = {linear.path for linear in linears}
    outside = [name for name, m in model.named_modules() if isinstance(m, nn.Linear) and name not in inside]
    inputs = None
    if setting.activation_bits != UNQUANTIZED:
        inputs = _arguments(setting.activation_bits, symmetric=False, strategy="token", dynamic=True)
    weights = _arguments(setting.weight_bits, symmetric=True, strategy="channel", dynamic=False)
    config = json.loads(path.read_text(encoding="utf-8"))
    config["quantization_config"] = {
        "quant_method": "compressed-tensors",
        "format": _FORMAT,
        "quantization_status": "compressed",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": inputs,
                "output_activations": None,
                "format": _FORMAT,
            }
        },
        "ignore": outside,
        "kv_cache_scheme": None,
    }
    path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _arguments(bits: int, *, symmetric: bool, strategy: str, dynamic: bool) -> dict[str, Any]:
    return {
        "num_bits": bits,
        "type": "int",
        "symmetric": symmetric,
        "strategy": strategy,
        "dynamic": dynamic,
        "group_size": None,
        "actorder": None,
        "block_structure": None,
        "observer": None if dynamic else "minmax",
        "observer_kwargs": {},
    }
