"""torch's AdamW, fused where it can be, with its state there from the beginning."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from osp_diag.trainer.optimizers.sharding import local

__all__ = ["adamw", "adamw_step", "adamw_update"]

FUSED_DEVICES = ("cpu", "cuda")


def adamw(groups: list[dict[str, Any]], betas: tuple[float, float], epsilon: float) -> torch.optim.AdamW:
    """AdamW over parameter groups (``params``, ``lr``, ``weight_decay``); each of one kind, DTensor or plain.

    torch makes the moments when the first gradient comes; here they are zeros at once, so that a checkpoint
    can be read into them.
    """
    parameters = [parameter for group in groups for parameter in group["params"]]
    fused = all(value.device.type in FUSED_DEVICES and value.is_floating_point() for value in parameters)
    optimizer = torch.optim.AdamW(groups, betas=betas, eps=epsilon, fused=fused or None)
    for parameter in parameters:
        device = parameter.device if fused else "cpu"
        optimizer.state[parameter] = {
            "step": torch.zeros((), dtype=torch.float32, device=device),
            "exp_avg": torch.zeros_like(parameter, memory_format=torch.preserve_format),
            "exp_avg_sq": torch.zeros_like(parameter, memory_format=torch.preserve_format),
        }
    return optimizer


@torch.no_grad()
def adamw_step(optimizer: torch.optim.AdamW, skip: Tensor | None) -> None:
    """One step; where ``skip`` (a boolean scalar on the device) is true, parameters and state stay.

    The fused kernels take the flag as gradient scaling would hand it to them; others are put back afterwards.
    """
    if skip is None:
        optimizer.step()
    elif optimizer.defaults["fused"]:
        optimizer.found_inf = skip.to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
        del optimizer.found_inf  # type: ignore[attr-defined]
    else:
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        tensors = parameters + [
            value for parameter in parameters for value in optimizer.state[parameter].values()
        ]
        before = [value.clone() for value in tensors]
        optimizer.step()
        for value, old in zip(tensors, before, strict=True):
            value.copy_(torch.where(skip.to(value.device), old, value))


def adamw_update(optimizer: torch.optim.AdamW, group: dict[str, Any], parameter: Tensor) -> Tensor:
    """m̂ / (√v̂ + ε) of the last step, W ← (1 − ηλ) W − η · update; of the rows that this rank holds."""
    state, (beta1, beta2) = optimizer.state[parameter], group["betas"]
    # Without a gradient so far there were no steps, and the moments are 0.
    step = state["step"].to(parameter.device).clamp(min=1)
    # m̂ = m / (1 − β₁ᵗ) and v̂ = v / (1 − β₂ᵗ): the moments began at 0.
    mean = local(state["exp_avg"]) / (1 - beta1**step)
    square = local(state["exp_avg_sq"]) / (1 - beta2**step)
    return mean / (square.sqrt() + group["eps"])
