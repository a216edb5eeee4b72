"""How much of a device's arithmetic a training step uses."""

from __future__ import annotations

import torch

__all__ = ["model_flops_utilisation", "peak_flops"]

PEAK = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L4": 121e12,
    "B200": 2250e12,
}
"""Name in the device's → dense bfloat16 operations a second, from NVIDIA's data sheets."""


def peak_flops(device: torch.device) -> float | None:
    """Dense bfloat16 operations a second of a known GPU; None for any other device."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((flops for model, flops in PEAK.items() if model in name), None)


def model_flops_utilisation(
    tokens_per_second: float, flops_per_token: float, device: torch.device, ranks: int
) -> float | None:
    """MFU (Chowdhery et al. 2022, appendix B): operations that the model needs, over what the devices can do.

    Recomputed activations and the optimizer do not count. None where the device's peak is not known.
    """
    peak = peak_flops(device)
    return None if peak is None else tokens_per_second * flops_per_token / (peak * ranks)
