"""Passes over a model's parameters: what identifies them, and whether they are finite."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

__all__ = ["fingerprint", "nonfinite_weights"]

SAMPLES = 64
"""Values of each tensor that enter the fingerprint themselves."""

WRAPPERS = re.compile(r"^(module\.)+|(?<![^.])(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")
"""What DDP, torch.compile, FSDP and activation checkpointing add to a parameter's name."""


def fingerprint(model: nn.Module) -> str:
    """32 hexadecimal digits that identify a model's parameters.

    SHA-256 over, for each parameter in order: its name (without the prefixes of torch.compile, DDP and
    FSDP), shape and dtype, the sum of all its bits read as 64-bit integers (modulo 2⁶⁴, so that it does
    not depend on the order of summation or the device), and 64 evenly spaced values. Every parameter is
    read, so a change to one value changes it. Parameters without data (meta device) count by shape.
    """
    import torch

    digest = hashlib.sha256()
    for name, values in _parameters(model):
        digest.update(f"{name}|{tuple(values.shape)}|{values.dtype}|".encode())
        if values.is_meta or values.numel() == 0:
            continue
        flat = values.reshape(-1)
        places = torch.linspace(0, flat.numel() - 1, min(SAMPLES, flat.numel()), dtype=torch.float64)
        sample = flat[places.to(torch.int64).to(flat.device)].contiguous().view(torch.uint8)
        digest.update(bytes(sample.cpu().numpy()))
        digest.update(_sum_of_bits(flat).to_bytes(8, "little", signed=True))
    return digest.hexdigest()[:32]


def nonfinite_weights(model: nn.Module) -> dict[str, int]:
    """How many values of each parameter are NaN or infinite; parameters without any are left out."""
    import torch

    # A sum is finite only if every term is. One that merely overflows has a count of 0 below.
    candidates = [
        (name, values)
        for name, values in _parameters(model)
        if values.is_floating_point() and not values.is_meta and values.numel()
    ]
    sums: dict[torch.device, list[Tensor]] = {}
    for _, values in candidates:
        total = values.float().sum() if values.element_size() == 1 else values.sum(dtype=_accumulator(values))
        sums.setdefault(values.device, []).append(total.double() if values.device.type != "mps" else total)
    # One wait for each device, not one for each tensor.
    fine = {device: iter(torch.stack(of_device).isfinite().tolist()) for device, of_device in sums.items()}
    suspects = [(name, values) for name, values in candidates if not next(fine[values.device])]
    counts = {name: int((~torch.isfinite(values.float())).sum()) for name, values in suspects}
    return {name: count for name, count in counts.items() if count}


def _accumulator(values: Tensor) -> torch.dtype:
    import torch

    return values.dtype if values.element_size() >= 4 else torch.float32


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in model.named_parameters():
        values = parameter.detach()
        # A sharded parameter speaks for this rank's part.
        yield WRAPPERS.sub("", name), values.to_local() if hasattr(values, "to_local") else values


def _sum_of_bits(flat: Tensor) -> int:
    import torch

    raw = flat.contiguous()
    if raw.storage_offset() * raw.element_size() % 8:
        raw = raw.clone()  # a view into another tensor's memory need not start at a multiple of 8 bytes
    # int64 sums wrap around: they are taken modulo 2⁶⁴ and do not depend on the order. The last bytes are one
    # more integer, padded with zeros; the result is brought back into the range of an int64.
    raw = raw.view(torch.uint8)
    whole = raw.numel() // 8 * 8
    total = int(raw[:whole].view(torch.int64).sum()) if whole else 0
    tail = bytes(raw[whole:].cpu().numpy()).ljust(8, b"\0")
    total += int.from_bytes(tail, "little", signed=True)
    return (total + 2**63) % 2**64 - 2**63
