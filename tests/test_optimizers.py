"""The optimizers of a run as one: steps, rates, records, state, and the libraries behind them."""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from osp_diag.errors import TrainingError, UsageError
from osp_diag.trainer.model import Llama
from osp_diag.trainer.optimizers import Muon, Optimizers, build_optimizer
from tests.test_optimizer_routing import configured

NAMES = ["adamw", "muon", "muon_only", "soap", "shampoo"]


def made(seed: int = 0, **changes) -> tuple[nn.Module, Optimizers]:
    config = configured(optimizer__newton_schulz_dtype="float32", **changes)
    torch.manual_seed(seed)
    model = Llama(config.model)
    return model, build_optimizer(model, config)


def train(
    model: nn.Module, optimizers: Optimizers, steps: range, skip: torch.Tensor | None = None
) -> list[float]:
    losses = []
    for step in steps:
        ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(step))
        ids = ids.to(next(model.parameters()).device)
        loss = model(ids[:, :-1], labels=ids[:, 1:]).loss
        loss.backward()
        optimizers.set_learning_rate(1 / (1 + step))
        optimizers.step(skip=skip)
        optimizers.zero_grad()
        losses.append(loss.item())
    return losses


def same(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.parameters(), right.parameters(), strict=True)
    return all(torch.equal(first, second) for first, second in pairs)


@pytest.mark.parametrize("name", ["adamw", "muon", "muon_only"])
def test_steps_are_those_of_the_optimizers_themselves(name):
    model, optimizers = made(optimizer__name=name, optimizer__embedding_lr="0.01")
    other = copy.deepcopy(model)
    train(model, optimizers, range(4))
    named = dict(other.named_parameters())
    separate: list[torch.optim.Optimizer] = []
    for entry in optimizers.routing.routes:
        options = {"lr": entry.lr, "weight_decay": entry.weight_decay}
        if entry.optimizer == "muon":
            separate.append(Muon([named[entry.name]], dtype="float32", **options))
        else:
            separate.append(torch.optim.AdamW([named[entry.name]], betas=(0.9, 0.95), **options))
    for step in range(4):
        ids = torch.randint(0, 40, (2, 9), generator=torch.Generator().manual_seed(step))
        other(ids[:, :-1], labels=ids[:, 1:]).loss.backward()
        for entry, optimizer in zip(optimizers.routing.routes, separate, strict=True):
            optimizer.param_groups[0]["lr"] = entry.lr / (1 + step)
            optimizer.step()
            optimizer.zero_grad()
    for mine, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_is_the_same_to_the_bit(name, tmp_path):
    model, optimizers = made(optimizer__name=name)
    train(model, optimizers, range(12))
    dcp.save(
        {"model": model.state_dict(), "optimizer": optimizers.state_dict()},
        checkpoint_id=tmp_path,
        no_dist=True,
    )
    train(model, optimizers, range(12, 24))

    resumed, again = made(1, optimizer__name=name)
    state = {"model": resumed.state_dict(), "optimizer": again.state_dict()}
    dcp.load(state, checkpoint_id=tmp_path, no_dist=True)
    again.load_state_dict(state["optimizer"])
    train(resumed, again, range(12, 24))
    assert same(model, resumed)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_of_no_steps_starts_afresh(name):
    model, optimizers = made(optimizer__name=name)
    other, again = made(optimizer__name=name)
    again.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    train(model, optimizers, range(3))
    train(other, again, range(3))
    assert same(model, other)


@pytest.mark.parametrize("name", NAMES)
def test_a_skipped_step_changes_nothing(name):
    model, optimizers = made(optimizer__name=name)
    train(model, optimizers, range(3), torch.tensor(False))
    before, state = copy.deepcopy(model), copy.deepcopy(optimizers.state_dict())
    for value in model.parameters():
        value.grad = torch.full_like(value, torch.nan)
    optimizers.step(skip=torch.tensor(True))
    optimizers.zero_grad()
    assert same(model, before)
    for part, parameters in optimizers.state_dict().items():
        for parameter, tensors in parameters.items():
            for key, value in tensors.items():
                if key != "group_step":
                    assert torch.equal(value, state[part][parameter][key]), (parameter, key)


@pytest.mark.parametrize("name", ["adamw", "muon", "muon_only"])
def test_not_skipping_is_the_plain_step(name):
    model, optimizers = made(optimizer__name=name)
    other, plain = made(optimizer__name=name)
    train(model, optimizers, range(4), torch.tensor(False))
    train(other, plain, range(4))
    assert same(model, other)


def test_without_fused_kernels(monkeypatch):
    monkeypatch.setattr("osp_diag.trainer.optimizers.adamw.FUSED_DEVICES", ())
    test_a_skipped_step_changes_nothing("adamw")
    test_not_skipping_is_the_plain_step("adamw")
    model, optimizers = made(optimizer__name="adamw")
    assert optimizers.adamw is not None
    assert not optimizers.adamw.defaults["fused"]
    train(model, optimizers, range(3))
    other, again = made(optimizer__name="adamw")
    other.load_state_dict(model.state_dict())
    again.load_state_dict(copy.deepcopy(optimizers.state_dict()))
    train(model, optimizers, range(3, 6))
    train(other, again, range(3, 6))
    assert same(model, other)


@pytest.mark.parametrize("name", NAMES)
def test_update_rms_is_of_what_moved(name):
    model, optimizers = made(optimizer__name=name, optimizer__weight_decay="0.1")
    train(model, optimizers, range(2))
    assert optimizers.update_rms() == {}
    optimizers.record_updates(True)
    before = {key: value.detach().double() for key, value in model.named_parameters()}
    train(model, optimizers, range(1, 2))
    found = optimizers.update_rms()
    assert set(found) == set(optimizers.groups)
    for group, members in optimizers.groups.items():
        updates = []
        for parameter, value in members:
            entry = optimizers.routing.of(parameter)
            lr = entry.lr / 2
            updates.append(
                (before[parameter] * (1 - lr * entry.weight_decay) - value.detach()).flatten() / lr
            )
        expected = torch.cat(updates).square().mean().sqrt()
        assert found[group].item() == pytest.approx(expected.item(), rel=2e-3)
    optimizers.record_updates(False)
    train(model, optimizers, range(1, 2))
    assert optimizers.update_rms() == {}


def test_rates_are_factors_of_the_peak():
    _, optimizers = made(optimizer__embedding_lr="0.5")
    optimizers.set_learning_rate(0.25)
    optimizers.set_learning_rate(0.5)
    rates = {name: {group["lr"] for group in each.param_groups} for name, each in optimizers.each.items()}
    assert rates == {"muon": {1e-3}, "adamw": {0.25}}


def test_muon_keeps_half_of_adamws_state():
    model, adamw = made(optimizer__name="adamw")
    _, muon = made(optimizer__name="muon_only")
    entries = sum(value.numel() for value in model.parameters())
    assert muon.state_bytes == 4 * entries
    assert adamw.state_bytes == 8 * entries + 4 * len(list(model.parameters()))


@pytest.mark.parametrize("name", ["soap", "shampoo"])
def test_second_order_learns(name):
    pytest.importorskip("pytorch_optimizer")
    model, optimizers = made(optimizer__name=name, optimizer__lr="0.01")
    ids = torch.randint(0, 40, (4, 17), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30):
        loss = model(ids[:, :-1], labels=ids[:, 1:]).loss
        loss.backward()
        optimizers.step()
        optimizers.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("name", ["adamw", "muon", "muon_only"])
def test_a_step_does_not_wait_for_the_gpu(name):
    config = configured(optimizer__name=name)
    model = Llama(config.model).to("cuda")
    optimizers = build_optimizer(model, config)
    optimizers.record_updates(True)
    skip = torch.tensor(False, device="cuda")
    train(model, optimizers, range(1), skip)
    for value in model.parameters():
        value.grad = torch.ones_like(value)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizers.set_learning_rate(0.5)
        optimizers.step(skip=skip)
        optimizers.update_rms()
        optimizers.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    if name != "adamw":
        assert optimizers.muon is not None
        assert optimizers.muon.newton_schulz_dtype == torch.bfloat16


# Refusals


def test_a_foreign_state_is_refused():
    _, optimizers = made()
    _, other = made(optimizer__name="adamw")
    with pytest.raises(TrainingError, match=r"another run's: adamw: .* is not of this run \(\d+ such diff"):
        optimizers.load_state_dict(other.state_dict())
    state = copy.deepcopy(optimizers.state_dict())
    state["muon"]["unembedding_projection.weight"]["momentum_buffer"] = torch.zeros(2, 2)
    with pytest.raises(TrainingError, match=r"unembedding_projection.* has shape \(2, 2\), not \(16, 16\)"):
        optimizers.load_state_dict(state)


def test_a_missing_library_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(UsageError, match=r"soap comes with .* pip install 'osp-diag\[second-order\]'"):
        made(optimizer__name="soap")
