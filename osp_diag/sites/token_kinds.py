"""Kinds of tokens that a model itself tells apart: CLS, registers and patches, or images among text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import torch
from torch import Tensor, nn

from osp_diag.seams.threads import of_this_thread
from osp_diag.sites.names import SiteMap
from osp_diag.sites.trace import is_compiled, run_example, undisturbed, unfused, unwrap

__all__ = ["HasTokenId", "recognised_token_kinds"]

_KINDS_OF_PARAMETERS = {
    "cls_token": "cls",
    "class_token": "cls",
    "class_embedding": "cls",
    "distillation_token": "distillation",
    "dist_token": "distillation",
    "register_tokens": "register",
    "reg_token": "register",
    "storage_tokens": "register",
    "detection_tokens": "detection",
}
"""What models call the learned vectors that stand for no patch → the kind of token."""
_CONVOLUTIONS = (nn.Conv2d, nn.Conv3d)
_MODALITIES = ("image", "video", "audio")


@dataclass(frozen=True)
class HasTokenId:
    """Which ids are a certain one."""

    token: int

    def __call__(self, input_ids: Tensor) -> Tensor:
        return input_ids == self.token

    def __str__(self) -> str:
        return f"token id {self.token}"


# Why values decide, and nothing is guessed: docs/decisions.md, Capture.
def recognised_token_kinds(
    model: nn.Module, site_map: SiteMap, example: Mapping[str, Any] | tuple[Any, ...] | None = None
) -> dict[str, Any]:
    """Kind → where its tokens are, as :class:`~osp_diag.capture.token_kinds.TokenKinds` takes it.

    Of a vision model: while one of its learned tokens, or the convolution that embeds its patches, holds
    other numbers, those places of the stream change that are made of it. So the kinds are those of the very
    stream that is measured. Where both do not account for every place, once each, nothing is told apart.

    Of a model that reads images, video or sound among text: the ids that its configuration reserves for them.

    Parameters
    ----------
    example : the batch by which the sites were found

    Returns
    -------
    Empty where the model has no such kinds, or they are not known.
    """
    model = unwrap(model)
    return _kinds_of_patches(model, site_map, example) or _kinds_of_ids(model)


def _kinds_of_ids(model: nn.Module) -> dict[str, Any]:
    config = getattr(model, "config", None)
    kinds: dict[str, Any] = {}
    for kind in _MODALITIES:
        for name in (f"{kind}_token_id", f"{kind}_token_index"):
            token = getattr(config, name, None)
            if isinstance(token, int) and not isinstance(token, bool) and token >= 0:
                kinds[kind] = HasTokenId(token)
    return kinds


def _kinds_of_patches(
    model: nn.Module, site_map: SiteMap, example: Mapping[str, Any] | tuple[Any, ...] | None
) -> dict[str, Any]:
    embeddings = [m.weight for m in model.modules() if isinstance(m, _CONVOLUTIONS) and _embeds_patches(m)]
    if not embeddings:
        return {}
    stream = _stream(model, site_map, example)
    if stream is None:
        return {}

    def places_of(parameter: Tensor) -> list[int]:
        with _other_numbers(parameter):
            changed = _stream(model, site_map, example)
        if changed is None or changed.shape != stream.shape:
            return []
        return torch.nonzero((changed != stream).any(dim=(0, 2))).flatten().tolist()

    kinds: dict[str, list[int]] = {}
    for name, parameter in model.named_parameters():
        kind = _KINDS_OF_PARAMETERS.get(name.rsplit(".", 1)[-1])
        if kind is not None and (places := places_of(parameter)):
            kinds.setdefault(kind, []).extend(places)
    patches = max((places_of(weight) for weight in embeddings), key=len)
    claimed = sorted([*patches, *(place for places in kinds.values() for place in places)])
    if not patches or claimed != list(range(stream.shape[1])):
        return {}
    return _by_position(kinds, patches, stream.shape[1])


def _by_position(kinds: dict[str, list[int]], patches: list[int], tokens: int) -> dict[str, Any]:
    """Places before the patches count from the front, those behind from the end: images differ in size."""
    if patches != list(range(patches[0], patches[-1] + 1)):
        return {}
    ordered = sorted(kinds.items(), key=lambda item: item[1])
    places: dict[str, list[int] | EllipsisType] = {
        kind: [p if p < patches[0] else p - tokens for p in positions] for kind, positions in ordered
    }
    return {**places, "patch": ...}


def _embeds_patches(module: nn.Conv2d | nn.Conv3d) -> bool:
    """Whether the windows of a convolution over an image or a video do not overlap."""
    return module.kernel_size == module.stride and max(module.kernel_size) > 1


@contextmanager
def _other_numbers(parameter: Tensor) -> Iterator[None]:
    """Within, a parameter holds other memory, of random numbers; one of a type of its own stays as it is."""
    data = parameter.data
    if type(parameter) is not nn.Parameter or data.is_meta or not data.is_floating_point():
        yield
        return
    drawn = torch.randn(data.shape, generator=torch.Generator().manual_seed(0))
    parameter.data = drawn.to(data.device, data.dtype)
    try:
        yield
    finally:
        parameter.data = data


def _stream(
    model: nn.Module, site_map: SiteMap, example: Mapping[str, Any] | tuple[Any, ...] | None
) -> Tensor | None:
    """What enters the first block, (batch, token, channel) on the host; None in another layout."""
    entered: list[Tensor] = []

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        values = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor) and v.is_floating_point()]
        if values and not entered:
            entered.append(values[0].detach().to("cpu", copy=True))

    block = model.get_submodule(site_map.block_paths[0])
    # Random numbers of the model's own (masked patches) are the same every time.
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(unfused(model))
        if is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        # A block that only holds its parts never runs itself.
        for module in block.children() if isinstance(block, (nn.ModuleList, nn.ModuleDict)) else (block,):
            stack.callback(module.register_forward_pre_hook(of_this_thread(hook), with_kwargs=True).remove)
        run_example(model, example)
    if not entered or entered[0].ndim != 3:
        return None
    return entered[0].transpose(0, 1) if site_map.tokens_first else entered[0]
