"""Optimizers over several ranks: DDP, FSDP2 and HSDP do what one process does, and share out the work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import xarray as xr
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from osp_diag.errors import TrainingError
from osp_diag.trainer.config import TrainConfig
from osp_diag.trainer.model import Llama
from osp_diag.trainer.optimizers import Muon, Optimizers, build_optimizer, optimizer_evidence, route
from osp_diag.trainer.optimizers.routing import named_trainable_parameters
from tests.rank_processes import Ranks
from tests.test_muon import parameters, set_gradients
from tests.test_optimizer_routing import configured
from tests.test_optimizers import train

# Rows that do not divide, fewer rows than ranks, one matrix alone, vectors that leave ranks empty.
SHAPES = [(8, 8), (7, 5), (7, 5), (3, 9), (3, 9), (3, 9), (12, 4), (6,), (1,), (1,)]
MATRICES = sum(len(shape) == 2 for shape in SHAPES)


def meshes(ranks: int) -> dict[str, DeviceMesh | None]:
    found: dict[str, DeviceMesh | None] = {"ddp": None, "fsdp": init_device_mesh("cpu", (ranks,))}
    if ranks == 4:
        found["hsdp"] = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    return found


def spread(value: Tensor, mesh: DeviceMesh | None) -> Tensor:
    if mesh is None:
        return value.detach().clone()
    placements = [Shard(0)] if mesh.ndim == 1 else [Replicate(), Shard(0)]
    return distribute_tensor(value.detach().clone(), mesh, placements)


def whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value


def summed(count: int) -> int:
    value = torch.tensor(count)
    dist.all_reduce(value)
    return int(value)


# Muon by itself


def _muon_is_the_same_and_orthogonalises_once(ranks: int) -> None:
    for mode, mesh in meshes(ranks).items():
        for form, dtype in (("torch", "float32"), ("osp", "float32"), ("torch", "bfloat16")):
            _same_as_alone(mode, mesh, form, dtype)
    mesh = init_device_mesh("cpu", (ranks,))
    columns = nn.Parameter(distribute_tensor(torch.zeros(4, 8), mesh, [Shard(1)]))
    with pytest.raises(TrainingError, match=r"odd.weight is placed as \(Shard\(dim=1\),\); Muon knows"):
        Muon([("odd.weight", columns)])


def _same_as_alone(mode: str, mesh: DeviceMesh | None, form: str, dtype: str) -> None:
    alone = parameters(SHAPES)
    moved = [nn.Parameter(spread(value, mesh)) for value in alone]
    options = {"lr": 0.02, "weight_decay": 0.1, "form": form, "dtype": dtype}
    single, shared = Muon(alone, **options), Muon(moved, process_group=dist.group.WORLD, **options)
    single.recording = shared.recording = True
    for step in range(5):
        set_gradients(alone, step)
        for value, reference in zip(moved, alone, strict=True):
            value.grad = spread(reference.grad, mesh)
        single.step()
        shared.step(skip=torch.tensor(False) if step == 3 else None)
    assert single.orthogonalised == MATRICES
    assert summed(shared.orthogonalised) == MATRICES, mode
    # No rank has more than its part of any shape, and they take turns at what is left over.
    assert shared.orthogonalised <= -(-MATRICES // dist.get_world_size()) + 1, mode
    for value, reference in zip(moved, alone, strict=True):
        torch.testing.assert_close(
            whole(value.detach()), reference.detach(), msg=lambda text: f"{mode}: {text}"
        )
        buffer = shared.momentum_buffer(value)
        torch.testing.assert_close(whole(buffer), single.momentum_buffer(reference))
        if isinstance(value, DTensor):
            assert isinstance(buffer, DTensor)
            assert buffer.placements == value.placements
        elif mode == "ddp":
            others = [torch.empty_like(value) for _ in range(dist.get_world_size())]
            dist.all_gather(others, value.detach())
            assert all(torch.equal(others[0], other) for other in others)


# A model with all its optimizers


def seeded(config: TrainConfig) -> nn.Module:
    torch.manual_seed(0)
    return Llama(config.model)


def alone(config: TrainConfig) -> tuple[nn.Module, Optimizers]:
    model = seeded(config)
    return model, Optimizers(named_trainable_parameters(model), route(model, config), config.optimizer)


def shared(config: TrainConfig, mesh: DeviceMesh | None) -> tuple[nn.Module, nn.Module, Optimizers]:
    model = seeded(config)
    if mesh is None:
        return nn.parallel.DistributedDataParallel(model), model, build_optimizer(model, config)
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model, model, build_optimizer(model, config)


RECIPES = [
    {},
    {"optimizer__muon_form": "osp", "model__query_key_norm": True},
    {"optimizer__name": "muon_only", "model__norm": "rmsnorm", "model__tie_embeddings": True},
    {"optimizer__name": "adamw", "model__norm": "rmsnorm"},
]

TRIED = {"ddp": (0,), "fsdp": (1, 2, 3), "hsdp": (1,)}
"""Which of them under which mode; the rest would tell nothing new."""


def recipe(number: int) -> TrainConfig:
    # A vocabulary that no number of ranks divides.
    odd = {"model__vocabulary_size": 41, "optimizer__newton_schulz_dtype": "float32"}
    return configured(**odd, **RECIPES[number])


def _training_is_the_same(ranks: int, folder: str) -> None:
    for mode, mesh in meshes(ranks).items():
        for number in TRIED[mode]:
            config = recipe(number)
            reference, single = alone(config)
            wrapped, model, optimizers = shared(config, mesh)
            single.record_updates(True)
            optimizers.record_updates(True)
            train(reference, single, range(3))
            train(wrapped, optimizers, range(3), torch.tensor(False))
            train_badly(model, optimizers)
            named = dict(reference.named_parameters())
            for name, value in model.named_parameters():
                torch.testing.assert_close(whole(value.detach()), named[name].detach(), rtol=1e-4, atol=1e-5)
            for name, value in single.update_rms().items():
                torch.testing.assert_close(optimizers.update_rms()[name], value, rtol=1e-3, atol=1e-5)
            expected = optimizer_evidence(reference, single)
            found = optimizer_evidence(model, optimizers)
            assert list(found) == list(expected)
            for group, dataset in expected.items():
                xr.testing.assert_allclose(found[group], dataset, rtol=2e-3)
            state = {"optimizer": optimizers.state_dict(), "model": model.state_dict()}
            dcp.save(state, checkpoint_id=Path(folder) / f"{mode}{number}")
    _refused(mesh)


def train_badly(model: nn.Module, optimizers: Optimizers) -> None:
    """A skipped step between recorded ones: nothing moves, though every gradient is NaN."""
    before = [whole(value.detach()).clone() for value in model.parameters()]
    squares = optimizers._squares
    for value in model.parameters():
        value.grad = torch.full_like(value, torch.nan)
    keep = optimizers.muon.last_update if optimizers.muon else None
    optimizers.step(skip=torch.tensor(True))
    optimizers.zero_grad()
    for value, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(whole(value.detach()), old)
    optimizers._squares = squares
    if optimizers.muon is not None:
        optimizers.muon.last_update = keep or {}


def _refused(mesh: DeviceMesh | None) -> None:
    with pytest.raises(TrainingError, match=r"soap works on whole matrices and .* say parallel.mode=ddp"):
        shared(configured(optimizer__name="soap"), mesh)


def _over_ranks(rank: int, ranks: int, folder: str) -> None:
    _muon_is_the_same_and_orthogonalises_once(ranks)
    _training_is_the_same(ranks, folder)


# One test for both: starting the processes takes longer than what they do.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("ranks", [2, 4])
def test_several_ranks_do_what_one_process_does(tmp_path, ranks):
    with Ranks(ranks) as processes:
        processes.run(_over_ranks, str(tmp_path))
    for saved in sorted(tmp_path.iterdir()):
        # A state saved by several ranks goes on in one.
        config = recipe(int(saved.name[-1]))
        reference, single = alone(config)
        train(reference, single, range(5))
        model, optimizers = alone(config)
        state = {"optimizer": optimizers.state_dict(), "model": model.state_dict()}
        dcp.load(state, checkpoint_id=saved, no_dist=True)
        optimizers.load_state_dict(state["optimizer"])
        train(model, optimizers, range(3, 5))
        for value, expected in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4)
