"""What loading leaves over: tensors that the file lacks, that do not fit, and that nothing uses."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from osp_diag.checkpoints.weights import WRAPPERS
from osp_diag.errors import CheckpointError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["needed", "refuse_incomplete", "stray_prefix", "unused_notes", "without_wrappers"]

_WEIGHT_SCALE = re.compile(
    r"(?:^|[._])(?:scale_weight|scales|scale_inv|absmax|SCB|qzeros|zeros|g_idx"
    r"|weight_(?:packed|shape|g_idx|zero_point)"
    r"|(?:weight|qweight|proj|w\d|blocks?)(?:_global|_inv)*_scales?(?:_\w+)?)$"
)
"""What quantised formats call the factors of weights: compressed-tensors, ModelOpt, AutoFP8, DeepSeek, GPTQ,
AWQ, bitsandbytes. Scales of activations (``input_scale``, ``k_scale``) change no weight."""


def needed(missing: Iterable[str]) -> list[str]:
    """The missing tensors without which the model is another: BERT's pooler comes after every site."""
    return sorted(key for key in missing if "pooler" not in key)


def refuse_incomplete(name: str, model: nn.Module, report: Mapping[str, Any]) -> None:
    """Refuse a model of which a tensor is made up, or whose weights are multiples of the true ones.

    Parameters
    ----------
    report
        What ``from_pretrained(..., output_loading_info=True)`` returns beside the model.

    Raises
    ------
    CheckpointError
        Tensors are missing or of another shape, or the scales of quantised weights are left over.
    """
    kind = type(model).__name__
    absent = needed(report["missing_keys"])
    if absent:
        raise CheckpointError(
            f"{name} lacks {len(absent)} tensors of {kind}, the first {absent[0]!r}: the weights do not "
            "belong to this configuration, or were not written whole. Random numbers would stand in for "
            "them, so it is not opened"
        )
    if report["mismatched_keys"]:
        key, shape, expected = min(report["mismatched_keys"], key=str)
        raise CheckpointError(
            f"{name} does not fit its config.json: {key!r} has shape {tuple(shape)}, and the configuration "
            f"asks for {tuple(expected)}"
        )
    scales = _unused_scales(report["unexpected_keys"])
    if scales:
        raise CheckpointError(
            f"the weights of {name} are quantised, and what scales them is not used: {len(scales)} tensors, "
            f"the first {scales[0]!r}. Without them every weight is a multiple of the true one. Open the "
            "original checkpoint, or one dequantised by the tool that wrote this, or give a loader "
            "module:function that multiplies them"
        )


def _unused_scales(unexpected: Collection[str]) -> list[str]:
    """Scales whose weight is used; a layer that is left out takes its scales with it."""
    left_out = {key.rpartition(".")[0] for key in unexpected if key.endswith((".weight", ".qweight"))}
    scales = [key for key in unexpected if _WEIGHT_SCALE.search(key)]
    return sorted(key for key in scales if key.rpartition(".")[0] not in left_out)


def unused_notes(unexpected: Collection[str]) -> tuple[str, ...]:
    """What is to be said of tensors that nothing uses. A head that goes unused comes after every site."""
    unused = sorted(unexpected)
    if not unused or all("head" in key or "predictions" in key for key in unused):
        return ()
    what = "1 tensor of the file is" if len(unused) == 1 else f"{len(unused)} tensors of the file are"
    return (f"{what} not used by the model, the first {unused[0]!r}.",)


def without_wrappers(key: str) -> str:
    """A parameter's name without what DDP, torch.compile, FSDP and activation checkpointing add to it."""
    return WRAPPERS.sub("", key)


def stray_prefix(missing: Collection[str], unexpected: Collection[str]) -> str | None:
    """What stands before the names of a file's weights and is no part of the model's, or None.

    Wrappers inside of names are left out first (:func:`without_wrappers`); where these were all, the prefix
    is empty. It is the one by which more than half of the missing tensors are in the file.
    """
    absent = needed(missing)
    names = {without_wrappers(key) for key in unexpected}
    if not absent or not names:
        return None
    sample = max(absent, key=len)
    for name in names:
        prefix = name.removesuffix(sample)
        is_prefixed = name.endswith(sample) and prefix[-1:] in ("", ".")
        if is_prefixed and 2 * sum(prefix + key in names for key in absent) > len(absent):
            return prefix
    return None
