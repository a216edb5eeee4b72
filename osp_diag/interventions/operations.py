"""The operations on activations, as functions of one tensor."""

from __future__ import annotations

from functools import lru_cache

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from osp_diag.errors import UsageError
from osp_diag.interventions.intervention import Intervention

__all__ = ["changed", "random_rotation"]

_LAYER_STRIDE = 100_003
"""Between the seeds of two rotations, so that each layer has its own."""


def changed(
    intervention: Intervention,
    layer: int,
    x: Float[Tensor, "batch *head token channel"],
    chosen: Bool[Tensor, "batch token"],
) -> Float[Tensor, "batch *head token channel"]:
    """A copy of ``x`` in which the chosen tokens' heads and channels are changed.

    Raises
    ------
    UsageError : a channel or head that the site does not have, or means that were not measured
    """
    place = f"{intervention.site} of layer {layer}"
    channels = _indices(intervention, intervention.channels, x.shape[-1], "channels", place)
    heads = None
    if x.ndim == 4:
        heads = _indices(intervention, intervention.heads, x.shape[1], "heads", place)
        chosen = chosen[:, None, :, None]
    elif intervention.heads is not None:
        raise UsageError(f"{intervention}: {place} has no axis of heads; name channels alone")
    else:
        chosen = chosen[:, :, None]
    part = x if heads is None else x[:, heads]
    part = part[..., channels]
    new = torch.where(chosen, _operate(intervention, layer, part, heads), part)
    result = x.clone()
    if heads is None:
        result[..., channels] = new
    else:
        result[:, heads[:, None], :, channels[None, :]] = new.permute(1, 3, 0, 2)
    return result


def _indices(
    intervention: Intervention, numbers: tuple[int, ...] | None, size: int, what: str, place: str
) -> Tensor:
    beyond = [] if numbers is None else [number for number in numbers if not 0 <= number < size]
    if beyond:
        raise UsageError(f"{intervention}: {place} has {what} 0 to {size - 1}, not {beyond[0]}")
    return torch.arange(size) if numbers is None else torch.tensor(numbers)


def _operate(intervention: Intervention, layer: int, x: Tensor, heads: Tensor | None) -> Tensor:
    match intervention.operation:
        case "zero":
            return torch.zeros_like(x)
        case "clip":
            return x.clamp(-intervention.number, intervention.number)
        case "scale":
            return x * intervention.number
        case "rotate":
            seed = intervention.seed * _LAYER_STRIDE + layer
            rotation = random_rotation(x.shape[-1], seed).to(x.device)
            return (x.double() @ rotation.T).to(x.dtype)
        case "mean":
            return _means(intervention, layer, x, heads)
        case _:
            raise UsageError(f"{intervention}: {intervention.operation} is no operation on activations")


def _means(intervention: Intervention, layer: int, x: Tensor, heads: Tensor | None) -> Tensor:
    if isinstance(intervention.value, (int, float)):
        return torch.full_like(x, intervention.number)
    if intervention.value is None or layer not in intervention.value:
        raise UsageError(
            f"{intervention}: the means of layer {layer} are not known; measure them first, with "
            "osp_diag.interventions.with_means"
        )
    # (channel,) or (head, channel), of the chosen ones.
    mean = torch.as_tensor(intervention.value[layer]).to(x.device, x.dtype)
    return (mean if heads is None or mean.ndim < 2 else mean[None, :, None, :]).expand_as(x)


@lru_cache(maxsize=64)
def random_rotation(size: int, seed: int) -> Float[Tensor, "size size"]:
    """An orthogonal matrix drawn evenly from all of them (Haar), float64.

    Q of the QR decomposition of a Gaussian matrix, its columns' signs those of R's diagonal (Mezzadri, 2007).
    """
    generator = torch.Generator().manual_seed(seed)
    q, r = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return q * torch.where(r.diagonal() < 0, -1.0, 1.0)
