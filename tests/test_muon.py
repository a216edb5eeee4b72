"""Muon: Newton-Schulz, one device, against torch.optim.Muon and against OSP's published form in NumPy."""

from __future__ import annotations

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from osp_diag.errors import TrainingError
from osp_diag.trainer.optimizers import Muon
from osp_diag.trainer.optimizers.muon import update_scale
from osp_diag.trainer.optimizers.newton_schulz import (
    COEFFICIENTS,
    multiplies_bfloat16,
    newton_schulz,
    newton_schulz_dtype,
)

SHAPES = [(8, 8), (8, 8), (24, 8), (8, 24), (24, 8), (5, 3), (1, 7)]


def parameters(shapes=SHAPES, seed: int = 0) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator) * 0.1) for shape in shapes]


def set_gradients(moved: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1000 + step)
    for value in moved:
        value.grad = torch.randn(value.shape, generator=generator)


def walk(optimizer: torch.optim.Optimizer, moved: list[nn.Parameter], steps: int, **options) -> None:
    for step in range(steps):
        set_gradients(moved, step)
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / (2 * steps))
        optimizer.step(**options)


def by_svd(matrix: np.ndarray, steps: int) -> np.ndarray:
    """What the quintic does to the singular values, done to the singular values, in float64."""
    left, values, right = np.linalg.svd(matrix, full_matrices=False)
    values = values / np.linalg.norm(values)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        values = a * values + b * values**3 + c * values**5
    return left * values @ right


@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 12),
    count=st.integers(1, 3),
    steps=st.integers(1, 5),
    seed=st.integers(0, 99),
)
def test_newton_schulz_acts_on_singular_values(rows, columns, count, steps, seed):
    stack = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(seed))
    expected = np.stack([by_svd(matrix.double().numpy(), steps) for matrix in stack])
    np.testing.assert_allclose(newton_schulz(stack, steps=steps).numpy(), expected, atol=2e-4)


def test_newton_schulz_is_close_to_orthogonal_and_keeps_zeros():
    stack = torch.randn(3, 16, 48, generator=torch.Generator().manual_seed(0))
    stack[1] = 0
    values = torch.linalg.svdvals(newton_schulz(stack))
    assert ((values[[0, 2]] > 0.6) & (values[[0, 2]] < 1.3)).all()
    assert not newton_schulz(stack)[1].any()


def test_newton_schulz_of_a_tall_matrix_is_that_of_the_wide_one_transposed():
    stack = torch.randn(2, 20, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(newton_schulz(stack), newton_schulz(stack.mT).mT)


def test_newton_schulz_compiles_in_one_graph():
    compiled = torch.compile(newton_schulz, backend="eager", fullgraph=True)
    stack = torch.randn(2, 6, 9)
    torch.testing.assert_close(
        compiled(stack, dtype=torch.bfloat16), newton_schulz(stack, dtype=torch.bfloat16)
    )


def test_the_dtype_follows_the_device(monkeypatch):
    cpu = torch.device("cpu")
    assert newton_schulz_dtype(cpu, "float32") == torch.float32
    assert newton_schulz_dtype(cpu, "bfloat16") == torch.bfloat16
    for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda: False, raising=False)
    assert newton_schulz_dtype(cpu) == torch.float32
    assert Muon(parameters()).newton_schulz_dtype == torch.float32
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True, raising=False)
    assert newton_schulz_dtype(cpu) == torch.bfloat16
    assert not multiplies_bfloat16(torch.device("meta"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert newton_schulz_dtype(torch.device("cuda")) == torch.float32
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert newton_schulz_dtype(torch.device("cuda")) == torch.bfloat16


# Against torch.optim.Muon


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("form", ["torch", "osp"])
def test_many_steps_equal_torch_in_float32(monkeypatch, nesterov, form):
    # torch iterates in bfloat16 always; its code is run as it is, with that one conversion exchanged.
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda value: value.clone())
    ours, theirs = parameters(), parameters()
    common = {"weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    walk(Muon(ours, dtype="float32", form=form, **common), ours, 60)
    walk(torch.optim.Muon(theirs, adjust_lr_fn="match_rms_adamw", **common), theirs, 60)
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)


def test_many_steps_stay_near_torch_in_bfloat16():
    ours, theirs, start = parameters(), parameters(), parameters()
    walk(Muon(ours, weight_decay=0.1, dtype="bfloat16"), ours, 30)
    reference = torch.optim.Muon(theirs, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    walk(reference, theirs, 30)
    for mine, other, first in zip(ours, theirs, start, strict=True):
        assert (mine - other).norm() < 0.02 * (other - first).norm()


def test_the_state_is_torchs():
    ours, theirs = parameters(), parameters()
    mine, reference = Muon(ours), torch.optim.Muon(theirs)
    walk(mine, ours, 3)
    walk(reference, theirs, 3)
    for key, state in reference.state_dict()["state"].items():
        torch.testing.assert_close(mine.state_dict()["state"][key], state)


def test_chunks_change_nothing(monkeypatch):
    whole, cut = parameters(), parameters()
    walk(Muon(whole, dtype="float32"), whole, 3)
    monkeypatch.setattr("osp_diag.trainer.optimizers.muon.CHUNK_ELEMENTS", 1)
    walk(Muon(cut, dtype="float32"), cut, 3)
    for mine, other in zip(cut, whole, strict=True):
        torch.testing.assert_close(mine, other)


# OSP's form


def published(
    value: np.ndarray, gradients: list[np.ndarray], lr: float, decay: float, beta: float
) -> np.ndarray:
    """OSP's optimization.py in NumPy and float64, without its decay of vectors."""
    trace = np.zeros_like(value)
    for gradient in gradients:
        trace = gradient + beta * trace
        direction = gradient + beta * trace
        norm = np.linalg.norm(direction) + 1e-8
        update = by_svd(direction, 5) if value.ndim == 2 else direction / norm
        value = value - lr * (0.2 * update * max(value.shape or (1,)) ** 0.5 + decay * value)
    return value


@pytest.mark.parametrize("shape", [(6, 6), (10, 4), (4, 10), (7,), (1,), ()])
def test_osp_form_is_the_published_one(shape):
    [value], lr, beta = parameters([shape]), 0.03, 0.9
    decay = 0.1 if len(shape) == 2 else 0.0
    start, gradients = value.detach().double().numpy(), []
    optimizer = Muon([value], lr=lr, weight_decay=decay, momentum=beta, form="osp", dtype="float32")
    for step in range(20):
        set_gradients([value], step)
        gradients.append(value.grad.double().numpy())
        optimizer.step()
    np.testing.assert_allclose(
        value.detach().numpy(), published(start, gradients, lr, decay, beta), rtol=1e-3, atol=1e-4
    )


def test_vectors_move_by_a_fifth_of_the_learning_rate():
    vector, scalar = parameters([(50,), ()])
    before = vector.detach().clone(), scalar.detach().clone()
    optimizer = Muon([vector, scalar], lr=0.1)
    walk(optimizer, [vector, scalar], 1)
    torch.testing.assert_close((vector - before[0]).square().mean().sqrt(), torch.tensor(0.02 * 0.2))
    torch.testing.assert_close((scalar - before[1]).abs(), torch.tensor(0.02 * 0.2))
    assert update_scale(()) == update_scale((1,)) == 0.2


# Records, skipping, refusals


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_recorded_update_is_what_the_parameter_did(dtype):
    moved = parameters([*SHAPES, (6,), ()])
    optimizer = Muon(moved, lr=0.02, dtype=dtype)
    set_gradients(moved, 0)
    optimizer.step()
    assert optimizer.last_update == {}
    optimizer.recording = True
    before = [value.detach().double() for value in moved]
    set_gradients(moved, 1)
    optimizer.step()
    for value, old in zip(moved, before, strict=True):
        update = (old - value.detach().double()) / 0.02
        row, column = optimizer.last_update[value]
        torch.testing.assert_close(row.double().sum(), update.square().sum(), rtol=1e-4, atol=0)
        if value.ndim == 2:
            torch.testing.assert_close(row.double(), update.square().sum(1), rtol=1e-3, atol=1e-6)
            torch.testing.assert_close(column.double(), update.square().sum(0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("form", ["torch", "osp"])
def test_a_skipped_step_changes_no_bit(form):
    moved, other = parameters([*SHAPES, (6,), ()]), parameters([*SHAPES, (6,), ()])
    optimizer, plain = (Muon(some, weight_decay=0.1, form=form, dtype="float32") for some in (moved, other))
    walk(optimizer, moved, 2, skip=torch.tensor(False))
    walk(plain, other, 2)
    for value in moved:
        value.grad = torch.full_like(value, torch.nan)
    optimizer.step(skip=torch.tensor(True))
    walk(optimizer, moved, 2, skip=torch.tensor(False))
    walk(plain, other, 2)
    for mine, expected in zip(moved, other, strict=True):
        assert torch.equal(mine, expected)
        assert torch.equal(optimizer.momentum_buffer(mine), plain.momentum_buffer(expected))


def test_parameters_without_gradient_stay():
    moved = parameters()
    set_gradients(moved, 0)
    moved[1].grad = None
    before = moved[1].detach().clone()
    optimizer = Muon(moved, weight_decay=0.1)
    optimizer.step()
    assert torch.equal(moved[1], before)
    assert optimizer.orthogonalised == len(moved) - 1


def test_a_closure_is_asked_with_gradients_on():
    moved = parameters([(3, 3)])

    def closure() -> float:
        loss = moved[0].square().sum()
        loss.backward()
        return float(loss.detach())

    assert Muon(moved).step(closure) > 0


def test_tensors_of_three_dimensions_are_refused_by_name():
    with pytest.raises(TrainingError, match=r"experts.weight has shape \(2, 3, 4\); Muon moves matrices"):
        Muon([("experts.weight", nn.Parameter(torch.zeros(2, 3, 4)))])


class TestTorchsContract:
    """What schedulers, wrappers and checkpoints of others expect of any optimizer."""

    def walked(self) -> tuple[Muon, list[nn.Parameter]]:
        moved = parameters()
        optimizer = Muon(moved, lr=0.02, weight_decay=0.1, momentum=0.8, form="osp", dtype="float32")
        walk(optimizer, moved, 3)
        return optimizer, moved

    def assert_goes_on_as(self, optimizer: torch.optim.Optimizer, whole: Muon) -> None:
        """Both have made the same three steps; they make the next two."""
        both = (optimizer, whole)
        parts = [
            [value for group in one.param_groups for value in group["params"]] for one in (optimizer, whole)
        ]
        assert not set(parts[0]) & set(parts[1])
        for one, moved in zip(both, parts, strict=True):
            for step in (3, 4):
                set_gradients(moved, step)
                one.step()
        for value, other in zip(*parts, strict=True):
            assert torch.equal(value, other)

    def test_a_copy_and_a_pickle_go_on_alike(self) -> None:
        for again in (copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))):
            optimizer, _ = self.walked()
            self.assert_goes_on_as(again(optimizer), optimizer)

    def test_a_state_dict_takes_everything_along(self) -> None:
        optimizer, moved = self.walked()
        file = io.BytesIO()
        torch.save(optimizer.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        other = Muon([nn.Parameter(value.detach().clone()) for value in moved], lr=1.0)
        other.load_state_dict(state)
        assert other.state_dict()["param_groups"] == state["param_groups"]
        self.assert_goes_on_as(other, optimizer)

    def test_a_state_dict_from_before_groups_had_them_keeps_the_optimizers_own(self) -> None:
        optimizer, moved = self.walked()
        state = copy.deepcopy(optimizer.state_dict())
        for group in state["param_groups"]:
            for name in ("momentum", "nesterov", "steps", "form", "dtype"):
                del group[name]
        values = [nn.Parameter(value.detach().clone()) for value in moved]
        other = Muon(values, momentum=0.8, form="osp", dtype="float32")
        other.load_state_dict(state)
        self.assert_goes_on_as(other, optimizer)

    def test_a_group_that_comes_later_moves_by_its_own_numbers(self) -> None:
        first, later = (nn.Parameter(torch.ones(3, 4)) for _ in range(2))
        alone = nn.Parameter(torch.ones(3, 4))
        optimizer = Muon([first], lr=0.02)
        optimizer.add_param_group({"params": [later], "lr": 0.5, "momentum": 0.5, "nesterov": False})
        moved = [first, later, alone]
        reference = Muon([alone], lr=0.5, momentum=0.5, nesterov=False)
        for _ in range(2):
            set_gradients(moved[1:], 0)
            alone.grad = later.grad.clone()
            optimizer.step()
            reference.step()
        assert torch.equal(later, alone)
        assert torch.equal(first, torch.ones(3, 4))

    def test_a_group_that_cannot_be_moved_is_refused_and_not_kept(self) -> None:
        optimizer = Muon(parameters())
        with pytest.raises(TrainingError, match=r"parameter 0 has shape \(2, 2, 2\)"):
            optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2, 2))]})
        assert len(optimizer.param_groups) == 1

    def test_a_schedule_may_turn_the_momentum(self) -> None:
        optimizer, moved = self.walked()
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=4, base_momentum=0.5)
        set_gradients(moved, 0)
        optimizer.step()
        schedule.step()
        assert 0.5 < optimizer.param_groups[0]["momentum"] < 0.95
