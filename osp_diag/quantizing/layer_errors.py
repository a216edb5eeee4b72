"""How the error of few bits grows from layer to layer, which tokens and which channels carry it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import Tensor, nn

from osp_diag.checkpoints.checkpoint import evaluation_mode
from osp_diag.errors import UsageError
from osp_diag.quantizing.block_passes import BlockPasses, calibration_ids
from osp_diag.quantizing.methods import method_named
from osp_diag.quantizing.setting import Setting
from osp_diag.quantizing.simulate import quantized

__all__ = ["layer_errors"]

_DEFINITIONS = {
    "relative_error": "mean over tokens of ‖h^q_ℓ − h_ℓ‖² / ‖h_ℓ‖², h_ℓ the output of block ℓ",
    "local_error": "… of what the block's own rounding adds: ‖f^q_ℓ(h^q_ℓ₋₁) − f_ℓ(h^q_ℓ₋₁)‖² / ‖h_ℓ‖²",
    "accumulated_error": "… of what the block makes of the error it is given: "
    "‖f_ℓ(h^q_ℓ₋₁) − f_ℓ(h_ℓ₋₁)‖² / ‖h_ℓ‖²",
    "interaction": "… of twice the inner product of the two, over ‖h_ℓ‖²: the rest of relative_error",
}


def layer_errors(
    model: nn.Module,
    tokens: Any,
    setting: Setting,
    *,
    method: str = "rtn",
    convention: str = "plain",
    calibration: Any = None,
    batch_size: int = 1,
    blocks: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """The relative quantization error R_ℓ of every block's output, and its parts.

    With h_ℓ = f_ℓ(h_ℓ₋₁) at full precision and h^q_ℓ = f^q_ℓ(h^q_ℓ₋₁) at few bits, the error is

        h^q_ℓ − h_ℓ = [f^q_ℓ(h^q_ℓ₋₁) − f_ℓ(h^q_ℓ₋₁)] + [f_ℓ(h^q_ℓ₋₁) − f_ℓ(h_ℓ₋₁)],

    the local and the accumulated part, so that R = local + accumulated + interaction, token by token. Each is
    a mean over tokens of ratios, so that a first token of huge norm is one among others.

    Parameters
    ----------
    tokens : ids of shape (sequence, position), without padding
    setting, method, convention, calibration, blocks : as :func:`osp_diag.quantizing.simulate.quantized` takes
        them; methods that rotate the stream are refused, for its channels are then others
    batch_size : sequences a pass
    progress : told (blocks done, blocks in all)

    Returns
    -------
    By layer ``relative_error``, ``local_error``, ``accumulated_error``, ``interaction`` and ``gain`` =
    accumulated_ℓ / R_ℓ₋₁; ``error_by_channel`` (layer, channel), the share of the squared error that a
    channel carries, and ``error_by_position`` (layer, token_position), R of the tokens at a position.

    Raises
    ------
    UsageError : a method that rotates the stream
    TokenError, CheckpointError, SiteError : as :func:`~osp_diag.quantizing.simulate.quantized`, or blocks
        that cannot be run one after the other

    References
    ----------
    Vlassis et al. 2026, arXiv 2509.23500
    """
    if method_named(method).rotation in ("random", "learned"):
        raise UsageError(
            f"{method} rotates the residual stream, so its channels are not those of the full-precision "
            "model; take rtn, ffn-hadamard or gptq for errors by layer"
        )
    ids = calibration_ids(model, tokens)
    with evaluation_mode(model), torch.no_grad():
        passes = BlockPasses(model, ids, batch_size=batch_size, blocks=blocks)
        full = _states(passes, passes.first_states())
        rounding = quantized(
            model, setting, method=method, convention=convention, calibration=calibration, blocks=blocks
        )
        with rounding:
            rounded = _states(passes, [states[0] for states in full])
        rows = []
        for layer in range(len(passes.blocks)):
            rows.append(_errors(passes, layer, full, rounded))
            if progress is not None:
                progress(layer + 1, len(passes.blocks))
    return _dataset(rows, setting, method, convention, ids.numel())


def _states(passes: BlockPasses, first: list[Tensor]) -> list[list[Tensor]]:
    """Of each batch the state before every block, and behind the last."""
    states = []
    for state in first:
        own = [state]
        for layer in range(len(passes.blocks)):
            own.append(passes.run(layer, own[-1]))
        states.append(own)
    return states


def _errors(
    passes: BlockPasses, layer: int, full: list[list[Tensor]], rounded: list[list[Tensor]]
) -> dict[str, Float[np.ndarray, "..."]]:
    """Of one block, by batch: squared errors over tokens, channels, positions."""
    ratios: dict[str, list[np.ndarray]] = {name: [] for name in _DEFINITIONS}
    of_batches = []
    for own, other in zip(full, rounded, strict=True):
        h, h_rounded = own[layer + 1].double(), other[layer + 1].double()
        h_accumulated = passes.run(layer, other[layer]).double()
        local, accumulated = h_rounded - h_accumulated, h_accumulated - h
        size = h.square().sum(-1)
        parts = {
            "relative_error": (h_rounded - h).square().sum(-1),
            "local_error": local.square().sum(-1),
            "accumulated_error": accumulated.square().sum(-1),
            "interaction": 2 * (local * accumulated).sum(-1),
        }
        for name, values in parts.items():
            ratios[name].append((values / size).cpu().numpy())
        of_batches.append((h_rounded - h).square().sum((0, 1)).cpu().numpy())
    tokens = {name: np.concatenate(values) for name, values in ratios.items()}
    by_channel = np.sum(of_batches, axis=0)
    total = by_channel.sum()
    return {
        **{name: values.mean() for name, values in tokens.items()},
        "error_by_channel": by_channel / total if total > 0 else by_channel,
        "error_by_position": tokens["relative_error"].mean(0),
    }


def _dataset(
    rows: list[dict[str, Any]], setting: Setting, method: str, convention: str, tokens: int
) -> xr.Dataset:
    dims: dict[str, tuple[str, ...]] = {
        **dict.fromkeys(_DEFINITIONS, ("layer",)),
        "error_by_channel": ("layer", "channel"),
        "error_by_position": ("layer", "token_position"),
    }
    definitions = _DEFINITIONS | {
        "error_by_channel": "share of the squared error of a block's output that a channel carries",
        "error_by_position": "relative_error of the tokens at a position",
    }
    variables = {
        name: (where, np.stack([row[name] for row in rows]), {"units": "1", "definition": definitions[name]})
        for name, where in dims.items()
    }
    dataset = xr.Dataset(
        variables,
        coords={"layer": np.arange(len(rows))},
        attrs={"setting": str(setting), "method": method, "convention": convention, "tokens": tokens},
    )
    before = dataset["relative_error"].shift(layer=1)
    dataset["gain"] = (dataset["accumulated_error"] / before).assign_attrs(
        units="1", definition="accumulated_error of a block over relative_error of the one before it"
    )
    return dataset
