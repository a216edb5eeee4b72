"""The device of a rank, and what to say when its memory is full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from osp_diag.errors import TrainingError, UsageError
from osp_diag.trainer.config import TrainConfig

__all__ = ["autocast_of", "device_of", "memory_advice"]


def autocast_of(config: TrainConfig, device: torch.device) -> AbstractContextManager[None]:
    """The context in which a training of this configuration runs its model."""
    if config.dtype == "bfloat16":
        # Its cache would hold bfloat16 copies of all weights at once, which FSDP gathers block by block.
        return torch.autocast(device.type, torch.bfloat16, cache_enabled=False)
    return nullcontext()


def device_of(name: str) -> torch.device:
    """The device of this rank.

    Raises
    ------
    UsageError : there is none of that name
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Of plain "cuda" this is the one that the rank has set.
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UsageError(f"device={name!r} is not on this machine ({error}); give auto or cpu") from error


@contextmanager
def memory_advice(config: TrainConfig, device: torch.device, ranks: int) -> Iterator[None]:
    """Turn running out of the device's memory into advice.

    Raises
    ------
    TrainingError : naming the keys that need less
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        sequences = config.micro_batch_size or config.batch_size // ranks
        raise TrainingError(
            f"{device} ran out of memory at {sequences} sequences of {config.data.sequence_length} tokens a "
            "forward pass; give a smaller micro_batch_size, activation_checkpointing=true, or more ranks "
            "with parallel.mode=fsdp"
        ) from error
