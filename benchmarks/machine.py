"""On what a benchmark ran."""

from __future__ import annotations

import platform

import torch

__all__ = ["machine"]


def machine(device: torch.device) -> str:
    """The processor and torch, for the table's title."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads, torch {torch.__version__}"
