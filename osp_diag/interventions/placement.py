"""From a tapped tensor to (batch, token, channel), or (batch, head, token, channel), and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from osp_diag.capture.hooks import batch_first, heads_first
from osp_diag.errors import CaptureError
from osp_diag.schema import RESIDUAL_SITES
from osp_diag.sites.names import SiteMap, Tap
from osp_diag.sites.stack import is_linear

__all__ = ["rewritten", "shares_its_input", "with_input", "with_output"]


def rewritten(
    sites: SiteMap, tap: Tap, value: Tensor, batch: int, tokens: int, edit: Callable[[Tensor], Tensor]
) -> Tensor:
    """``value`` as it is laid out, with ``edit`` applied to what is the site in it.

    Raises
    ------
    CaptureError : the tensor has not one vector a token in this pass
    """
    arranged = _arranged(sites, tap, value, batch, tokens)
    if arranged is value:
        return edit(value)
    # Layouts only move and select elements, so the places of these tell the way back.
    places = torch.arange(value.numel(), device=value.device).view(value.shape)
    places = _arranged(sites, tap, places, batch, tokens)
    result = value.flatten()
    result = result.clone() if result.data_ptr() == value.data_ptr() else result
    result[places.flatten()] = edit(arranged).flatten()
    return result.view(value.shape)


def _arranged(sites: SiteMap, tap: Tap, value: Tensor, batch: int, tokens: int) -> Tensor:
    part = value
    if tap.stream is not None and value.ndim == 4:
        part = value[tap.stream]
    if tap.channels_first and value.ndim == 3:
        part = value.transpose(1, 2)
    if sites.streams_in_a_row > 1 and value.ndim >= 3 and value.shape[1] == sites.streams_in_a_row * tokens:
        part = value[:, :tokens]
    arranged = batch_first(tap, part, batch, tokens)
    if arranged is None:
        raise CaptureError(
            f"{tap.site} of layer {tap.layer} is a tensor of shape {tuple(value.shape)} in this pass, which "
            f"has not one vector for each of {batch} × {tokens} tokens, so that it cannot be changed"
        )
    return heads_first(tap, arranged, batch, tokens) if tap.heads else arranged


def with_input(
    key: int | str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any], value: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a module with another tensor in one place."""
    if isinstance(key, int):
        return (*args[:key], value, *args[key + 1 :]), dict(kwargs)
    return args, {**kwargs, str(key): value}


def shares_its_input(module: nn.Module, tap: Tap) -> bool:
    """Whether others go on with the very tensor that a tapped module reads, and have to see it changed.

    So it is of the stream, which the block adds to, and of what several projections read.
    """
    of_several = tap.site.endswith("_input") and is_linear(module)
    return tap.side == "input" and (tap.site in RESIDUAL_SITES or of_several)


def with_output(key: int | str | None, result: Any, value: Tensor) -> Any:
    """What a module gives with another tensor in one place."""
    if key is None or isinstance(result, Tensor):
        return value
    if isinstance(result, Mapping):
        name = list(result)[int(key)]
        changed: Any = result.copy() if hasattr(result, "copy") else dict(result)
        changed[name] = value
        return changed
    items = [*result[: int(key)], value, *result[int(key) + 1 :]]
    return type(result)(*items) if hasattr(result, "_fields") else type(result)(items)
