"""Noticing that a step went wrong before it does harm, on the device, and finding where it began.

A bad step is made to do nothing: its update is cancelled on the device by a flag, so that weights and
optimizer state stay those of the last good step although the host learns of it only some steps later
(docs/decisions.md, Training).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from osp_diag.sites.trace import unwrap
from osp_diag.trainer.config import DivergenceConfig

__all__ = ["Watch", "first_bad_tensor", "unseen_cause"]

LEAST = 10
"""Losses that a standard deviation needs before a spike can be told from the beginning of training."""


class Watch:
    """Judges every step on the device.

    A step is bad if its loss or gradient norm is NaN or Inf, or if its loss is a spike: more than
    ``spike`` standard deviations above the mean of the last ``window`` good losses. Under the policy
    ``stop`` every later step is bad as well, so that nothing moves until the host has stopped.

    Attributes
    ----------
    losses : the last good losses, a ring of ``window``
    count : how many good steps there were
    stopped : 1 once a step was bad under the policy ``stop``
    """

    def __init__(self, config: DivergenceConfig, device: torch.device) -> None:
        self.config = config
        self.losses = torch.zeros(config.window, device=device)
        self.count = torch.zeros((), dtype=torch.int64, device=device)
        self.stopped = torch.zeros((), dtype=torch.bool, device=device)

    def judge(self, loss: Tensor, gradient_norm: Tensor) -> Tensor:
        """Whether this step is bad, as a boolean scalar on the device; its loss joins the ring if not."""
        bad = ~(torch.isfinite(loss) & torch.isfinite(gradient_norm))
        if self.config.policy == "ignore":
            return torch.zeros_like(bad)
        if self.config.spike is not None:
            bad |= self._is_spike(loss)
        if self.config.policy == "stop":
            bad |= self.stopped
            self.stopped |= bad
        # Without a branch, which would wait for the device: a bad step writes back what the ring has there.
        place = (self.count % self.config.window).reshape(1)
        entry = torch.where(bad, self.losses.gather(0, place), loss.detach().to(self.losses.dtype).reshape(1))
        self.losses.scatter_(0, place, entry)
        self.count += ~bad
        return bad

    def _is_spike(self, loss: Tensor) -> Tensor:
        filled = torch.clamp(self.count, max=self.config.window)
        # Mean and standard deviation over the part of the ring that is filled.
        valid = torch.arange(self.config.window, device=loss.device) < filled
        count = torch.clamp(filled, min=1)
        mean = torch.where(valid, self.losses, 0).sum() / count
        variance = torch.where(valid, (self.losses - mean) ** 2, 0).sum() / count
        limit = mean + self.config.spike * variance.sqrt()  # type: ignore[operator]
        return (filled >= min(LEAST, self.config.window)) & (loss > limit)

    def state_dict(self) -> dict[str, Tensor]:
        """What a resumed run needs to judge alike."""
        return {"losses": self.losses, "count": self.count}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up where :meth:`state_dict` was made."""
        self.losses.copy_(state["losses"])
        self.count.copy_(state["count"])


def first_bad_tensor(model: nn.Module, losses: Iterable[Tensor]) -> str | None:
    """Where the first NaN or Inf of a step arises, in words: parameter, forward pass, or gradient.

    Forward and backward passes run to their end whatever is found, since other ranks may wait for them.

    Parameters
    ----------
    model : as it was before the step
    losses : makes the step's losses again, one forward pass at a time

    Returns
    -------
    str : or None where nothing of this rank is NaN or Inf
    """
    model = unwrap(model)
    causes = [
        f"parameter {name} holds NaN or Inf before the step"
        for name, parameter in model.named_parameters()
        if not _finite(parameter)
    ]
    with _watched(model, causes):
        for loss in losses:
            if not causes and not _finite(loss):
                causes.append("the loss is the first that is not finite")
            loss.backward()
    causes += [
        f"the gradient of {name} is the first that is not finite"
        for name, parameter in reversed(list(model.named_parameters()))
        if parameter.grad is not None and not _finite(parameter.grad)
    ]
    return causes[0] if causes else None


def _finite(values: Tensor) -> bool:
    local = values.to_local() if hasattr(values, "to_local") else values
    return bool(torch.isfinite(local).all())


@contextmanager
def _watched(model: nn.Module, causes: list[str]) -> Iterator[None]:
    """Hooks that note the first module output, or gradient of one, that is not finite."""
    handles = []

    def note(tensor: Tensor, origin: str) -> None:
        if not causes and not _finite(tensor):
            causes.append(f"{origin} is the first that is not finite")

    def watch(name: str, module: nn.Module) -> None:
        def forward(_: nn.Module, __: object, output: object) -> None:
            for tensor in _tensors(output):
                note(tensor, f"the output of {name}")
                if tensor.requires_grad:
                    tensor.register_hook(
                        lambda gradient: note(gradient, f"the gradient at the output of {name}")
                    )

        handles.append(module.register_forward_hook(forward))

    for name, module in model.named_modules():
        if name and not any(True for _ in module.children()):
            watch(name, module)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _tensors(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        if value.is_floating_point():
            yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from _tensors(part)


def unseen_cause(values: Mapping[str, float]) -> str:
    """What went wrong in a step in which no tensor is NaN or Inf when it is made again."""
    if math.isfinite(values["loss"] + values["gradient_norm"]):
        return "no NaN or Inf, the loss is a spike"
    if math.isfinite(values["loss"]):
        return "every gradient is finite, and the sum of their squares is not"
    return "every tensor of the step is finite when it is made again, eagerly"
