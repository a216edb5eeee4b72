"""What it would save to leave the hottest channels of every Linear's input in 16 bits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Int64
from torch import Tensor, nn

from osp_diag.checkpoints.checkpoint import evaluation_mode
from osp_diag.errors import UsageError
from osp_diag.quantizing.block_passes import calibration_ids
from osp_diag.quantizing.divergence import ReferencePredictions
from osp_diag.quantizing.linears import BlockLinear, block_linears
from osp_diag.quantizing.perplexity import predictions, refuse_what_sees_ahead
from osp_diag.quantizing.setting import Setting
from osp_diag.quantizing.simulate import quantized
from osp_diag.sites import find_sites
from osp_diag.sites.trace import unwrap

__all__ = ["COUNTS", "hottest_channels", "spared_channels"]

COUNTS = (0, 1, 2, 4, 8, 16, 32, 64)
"""Channels that stay in 16 bits."""


def hottest_channels(
    model: nn.Module, linears: Sequence[BlockLinear], tokens: Any, *, batch_size: int = 1
) -> dict[str, Int64[Tensor, " channel"]]:
    """The channels of each Linear's input by their mean |x| over tokens, the largest first.

    A mean of magnitudes, since a channel costs every token whose range it widens; by the largest |x|, the
    channels of a few massive tokens would come first.

    Raises
    ------
    TokenError : no tokens, or foreign ones
    """
    ids = calibration_ids(model, tokens)
    sums: dict[str, Tensor] = {}

    def adding(path: str) -> Callable[..., None]:
        def add(module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            values = inputs[0] if inputs else keywords["input"]
            total = values.detach().abs().double().flatten(0, -2).sum(0)
            sums[path] = sums[path] + total if path in sums else total

        return add

    with evaluation_mode(model), torch.no_grad(), ExitStack() as undo:
        for linear in linears:
            hook = linear.module.register_forward_pre_hook(adding(linear.path), with_kwargs=True)
            undo.callback(hook.remove)
        device = next(model.parameters()).device
        for batch in ids.split(batch_size):
            model(batch.to(device))
    return {path: total.argsort(descending=True, stable=True) for path, total in sums.items()}


def spared_channels(
    model: nn.Module,
    tokens: Any,
    setting: Setting,
    *,
    calibration: Any,
    counts: Sequence[int] = COUNTS,
    convention: str = "plain",
    batch_size: int | None = None,
    blocks: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """The damage of rounding to nearest if the k hottest channels of every Linear's input stay as they are.

    With them stay the columns of the weight that read them, so that their products are exact; the grid of a
    token is then that of its other channels (LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339, with a
    number of channels for a threshold).

    Parameters
    ----------
    tokens : ids (sequence, position) that are evaluated
    setting : bits of the others
    calibration : other ids, by which channels are ranked
    counts : numbers of channels; those above what the widest Linear reads are left out

    Returns
    -------
    ``damage`` and ``divergence`` (channels) in nats by token, and ``share`` (channels), of the weights'
    numbers that stay.

    Raises
    ------
    UsageError : no counts, or negative ones
    TokenError, CheckpointError, SiteError : as :func:`osp_diag.quantizing.simulate.quantized`
    """
    chosen = sorted(set(counts))
    if not chosen or chosen[0] < 0:
        raise UsageError(f"counts={tuple(counts)}: give numbers of channels, 0 or more, such as 0 1 2 4")
    model = unwrap(model)
    sites = find_sites(model, blocks=blocks)
    linears = block_linears(model, sites=sites)
    refuse_what_sees_ahead(model, tokens)
    widest = max(linear.module.in_features for linear in linears)
    chosen = [k for k in chosen if k <= widest] or [widest]
    ranked = hottest_channels(model, linears, calibration)
    unreached = [linear.path for linear in linears if linear.path not in ranked]
    numbers = np.full((3, len(chosen)), np.nan)
    weights = sum(linear.module.weight.numel() for linear in linears)
    with ReferencePredictions() as reference:
        options: dict[str, Any] = {"batch_size": batch_size, "known_causal": True, "reference": reference}
        full = predictions(model, tokens, **options)
        count = len(full.surprise) * full.tokens
        for index, k in enumerate(chosen):
            channels = {path: order[:k] for path, order in ranked.items()}
            rounding = quantized(
                model, setting, convention=convention, full_precision_channels=channels, sites=sites
            )
            with rounding:
                rounded = predictions(model, tokens, **options)
            numbers[0, index] = (rounded.surprise.sum() - full.surprise.sum()) / count
            numbers[1, index] = rounded.divergence[: len(reference)].sum() / (len(reference) * full.tokens)
            columns = [min(k, x.module.in_features) * x.module.out_features for x in linears if k]
            numbers[2, index] = sum(columns) / weights
            if progress is not None:
                progress(index + 1, len(chosen))
    definitions = {
        "damage": ("nat", "rise of the negative log-likelihood by token"),
        "divergence": ("nat", "mean KL(full ‖ rounded) by token"),
        "share": ("1", "of the numbers in the blocks' Linears that stay in 16 bits"),
    }
    variables = {
        name: ("channels", row, {"units": unit, "definition": definition})
        for row, (name, (unit, definition)) in zip(numbers, definitions.items(), strict=True)
    }
    coordinates = {"channels": ("channels", chosen, {"definition": "of every Linear's input, in 16 bits"})}
    attributes: dict[str, Any] = {
        "setting": str(setting),
        "convention": convention,
        "method": "rtn",
        "tokens": count,
    }
    if unreached:
        attributes["notes"] = [f"not reached by the calibration, rounded whole: {', '.join(unreached)}"]
    return xr.Dataset(variables, coords=coordinates, attrs=attributes)
