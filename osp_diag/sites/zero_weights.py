"""Weights that begin at zero, stood in for while sites are told by values.

An output projection, a gate or LoRA's second matrix that begins at zero makes many tensors equal that will
not stay so: the stream before and after a block, an adapted projection and its base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

__all__ = ["nonzero_weights"]

_SAMPLE = 64
"""Elements that are looked at before a whole weight is."""


# Why other weights for one pass, and not a copy of the model: docs/decisions.md, Capture.
@contextmanager
def nonzero_weights(model: nn.Module) -> Iterator[None]:
    """Within, parameters that are all zero hold random numbers, and afterwards their own memory again.

    Nothing is written to the model's memory: each such parameter is given other memory for a while. What is
    sharded, on no device, or of a type of its own is left as it is.
    """
    own = [(parameter, parameter.data) for parameter in model.parameters() if _is_zero(parameter)]
    try:
        for number, (parameter, data) in enumerate(own):
            generator = torch.Generator().manual_seed(number)
            # As a matrix that is drawn at random begins; a bias, gain or gate gets numbers that can be seen.
            deviation = data.shape[-1] ** -0.5 if data.ndim >= 2 else 0.5
            drawn = deviation * torch.randn(data.shape, generator=generator)
            parameter.data = drawn.to(data.device, data.dtype)
        yield
    finally:
        for parameter, data in own:
            parameter.data = data


def _is_zero(parameter: nn.Parameter) -> bool:
    if type(parameter) is not nn.Parameter or not parameter.is_floating_point() or parameter.numel() == 0:
        return False
    if parameter.is_meta or parameter.is_inference() or parameter.element_size() < 2:
        return False
    values = parameter.detach()
    sample = values[(0,) * (values.ndim - 1)][:_SAMPLE] if values.ndim else values
    return not bool(sample.any()) and not bool(values.any())
