"""Several ranks: the mesh, how the model is spread over it, and sums over all."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from osp_diag.errors import UsageError
from osp_diag.probing.ranks import is_distributed
from osp_diag.trainer.config import TrainConfig

__all__ = [
    "accumulating",
    "check_ranks",
    "distribute",
    "first_of_ranks",
    "gathered",
    "is_sharded",
    "reshard",
    "summed",
]


def check_ranks(config: TrainConfig, ranks: int) -> None:
    """Refuse, before anything is built, what cannot be shared out.

    Raises
    ------
    UsageError : the batch or the groups do not divide, or sharding was asked of a single process
    """
    if config.batch_size % ranks:
        raise UsageError(
            f"batch_size={config.batch_size} cannot be dealt to {ranks} ranks; give a multiple of {ranks}"
        )
    share = config.batch_size // ranks
    if config.micro_batch_size is not None and share % config.micro_batch_size:
        raise UsageError(
            f"micro_batch_size={config.micro_batch_size} does not divide the {share} sequences of a rank "
            f"(batch_size={config.batch_size} over {ranks} ranks)"
        )
    mode, shard = config.parallel.mode, config.parallel.shard
    if mode != "ddp" and ranks == 1:
        raise UsageError(
            f"parallel.mode={mode} shards over ranks and there is one; start with torchrun "
            "--nproc-per-node N, or leave it at ddp"
        )
    if mode == "hsdp" and (ranks % shard or ranks == shard):
        raise UsageError(
            f"parallel.shard={shard} does not make two or more equal groups of {ranks} ranks; give a proper "
            "divisor, or parallel.mode=fsdp"
        )


def distribute(
    model: nn.Module, blocks: nn.ModuleList, config: TrainConfig, device: torch.device
) -> nn.Module:
    """The model as the ranks share it: itself alone, wrapped by DDP, or sharded in place by FSDP2.

    Under ``fsdp`` and ``hsdp`` every block is a unit, gathered while it runs. Weights are gathered, and
    gradients summed, in float32, so that every mode computes the same under autocast (docs/decisions.md,
    Training).

    Parameters
    ----------
    model : on ``device`` with the same weights on every rank, or on ``meta`` where :func:`is_sharded`; its
        shards are then on ``device``, and empty
    blocks : its blocks
    """
    if not is_distributed():
        return model
    if not is_sharded(config):
        ids = [device.index or 0] if device.type == "cuda" else None
        # A view of the bucket as gradient saves a copy of all gradients.
        return nn.parallel.DistributedDataParallel(model, device_ids=ids, gradient_as_bucket_view=True)
    ranks = dist.get_world_size()
    if config.parallel.mode == "fsdp":
        mesh = init_device_mesh(device.type, (ranks,), mesh_dim_names=("shard",))
    else:
        shape = (ranks // config.parallel.shard, config.parallel.shard)
        mesh = init_device_mesh(device.type, shape, mesh_dim_names=("replicate", "shard"))
    for block in blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model.to_empty(device=device)


def is_sharded(config: TrainConfig) -> bool:
    """Whether the ranks hold parts of the parameters."""
    return is_distributed() and config.parallel.mode != "ddp"


def accumulating(model: nn.Module, last: bool) -> AbstractContextManager[None]:
    """Around a micro-batch: gradients are exchanged after the last one of a step alone."""
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return nullcontext() if last else model.no_sync()
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    return nullcontext()


def reshard(model: nn.Module) -> None:
    """Put FSDP's parameters back into their shards.

    After a forward pass without a backward one, the outermost module keeps its parameters whole, and these
    are not the tensors that the optimizer knows.
    """
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def summed(value: Tensor) -> Tensor:
    """The sum over ranks, on every rank; on the device, without waiting for it on the host."""
    if is_distributed():
        dist.all_reduce(value)
    return value


def first_of_ranks(text: str | None) -> str | None:
    """The text of the first rank that has one, on every rank; None where none has."""
    if not is_distributed():
        return text
    texts: list[str | None] = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    return next((text for text in texts if text is not None), None)


def gathered(value: Tensor) -> Tensor:
    """A sharded tensor as a plain one, whole on every rank; a collective."""
    return value.full_tensor() if isinstance(value, DTensor) else value
