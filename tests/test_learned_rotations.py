"""Learned rotations: orthogonal, never worse than their start, by gradients that finite differences confirm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from osp_diag.errors import TokenError, UsageError
from osp_diag.quantizing.conventions import OSP, PLAIN
from osp_diag.quantizing.hadamard import signed_hadamard
from osp_diag.quantizing.learned_rotations import cayley, learned_rotations
from osp_diag.quantizing.rotated_loss import STREAM, rotated_loss, rounded_by_step
from osp_diag.quantizing.rotations import rotated
from osp_diag.quantizing.setting import Setting
from osp_diag.quantizing.stream_structure import measure_structure
from osp_diag.sites import find_sites
from tests.tiny_checkpoints import VOCABULARY, llama

STEP = 1e-3
"""Of finite differences: Llama's norms compute in float32."""


@given(size=st.integers(1, 12), seed=st.integers(0, 99), reach=st.floats(0, 10))
def test_cayley_gives_rotations_and_its_start(size, seed, reach):
    generator = torch.Generator().manual_seed(seed)
    start, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    turn = reach * torch.randn(size, size, generator=generator, dtype=torch.float64)
    matrix = cayley(start, turn)
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-9)
    assert torch.allclose(cayley(start, turn * 0), start, atol=1e-12)


@pytest.fixture(scope="module")
def model():
    model = llama()
    # Two channels of the stream that are larger than the others on all tokens, as in trained models.
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 3] += 4
        model.lm_head.weight.mul_(20)
        for layer in model.model.layers:
            layer.input_layernorm.weight[3] = 3
    return model


@pytest.fixture(scope="module")
def ids():
    return torch.randint(VOCABULARY, (4, 24), generator=torch.Generator().manual_seed(0))


def test_they_are_rotations_that_leave_the_model_as_it_is_and_are_no_worse_than_their_start(model, ids):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    steps = []
    learned = learned_rotations(
        model, ids, rate=0.02, steps=6, tokens=72, progress=lambda *done: steps.append(done)
    )
    assert min(learned.losses) < learned.losses[0]
    assert len(learned.losses) == 7
    assert steps[-1] == (21, 21)  # three of the four sequences are 72 tokens
    assert f"from {learned.losses[0]:.4f} to {min(learned.losses):.4f} nats" in learned.notes[-1]
    for rotation in (learned.stream, *learned.values.values()):
        matrix = rotation.matrix(torch.float64)
        assert torch.allclose(matrix @ matrix.T, torch.eye(len(matrix), dtype=torch.float64), atol=1e-10)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    with torch.no_grad():
        logits = model(ids).logits
        with rotated(model, "learned", rotations=learned):
            assert torch.allclose(model(ids).logits, logits, atol=1e-4)


def test_what_cannot_be_learned_is_refused(model, ids):
    with pytest.raises(UsageError, match="setting=4-16-16, steps=8, rate=0.003: learning rotations needs"):
        learned_rotations(model, ids, setting=Setting(4, 16, 16))
    with pytest.raises(UsageError, match="sequences of 2 or more tokens"):
        learned_rotations(model, ids[:, :1])
    with pytest.raises(TokenError, match=r"not of shape \(96,\)"):
        learned_rotations(model, ids.flatten())


def test_the_gradient_is_that_of_the_loss(monkeypatch, ids):
    """In place of rounding something smooth, whose loss has the derivatives that finite differences see."""

    def bent(grid, values):
        return values + 0.2 * torch.sin(3 * values)

    monkeypatch.setattr("osp_diag.quantizing.rotated_loss.rounded_by_step", bent)
    model = llama().double()
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(50)
        model.lm_head.weight.mul_(20)
    sites = find_sites(model)
    structure = measure_structure(model, sites)
    starts = {STREAM: structure.width, 0: structure.values[0].width, 1: structure.values[1].width}
    generator = torch.Generator().manual_seed(0)
    starts = {key: signed_hadamard(size, generator).matrix(torch.float64) for key, size in starts.items()}
    options = {"setting": Setting(16, 4, 4), "convention": OSP}
    with rotated_loss(model, ids[:2], sites, structure, **options) as loss:
        _, gradients = loss.of(starts)
        for key, start in starts.items():
            direction = torch.randn(start.shape, generator=generator, dtype=torch.float64)
            ahead, back = (
                loss.of(starts | {key: start + step * direction}, gradients=False)[0] for step in (STEP, -STEP)
            )
            slope = float((gradients[key] * direction).sum())
            assert (ahead - back) / 2 / STEP == pytest.approx(slope, rel=0.02)


@given(seed=st.integers(0, 99), grid=st.sampled_from([PLAIN.activations(4), OSP.attention_output(3, 4)]))
def test_rounding_by_step_rounds_and_its_gradient_sees_the_range(seed, grid):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(3, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    rounded = rounded_by_step(grid, values)
    assert torch.allclose(rounded, grid.rounded(values.detach()), atol=1e-12)
    errors = (rounded - values).detach()
    # Errors grow with the values, so the gradient along the values is what they are rounded to.
    (slope,) = torch.autograd.grad((rounded * errors).sum(), values)
    along = float((slope * values.detach()).sum())
    assert along == pytest.approx(float((rounded.detach() * errors).sum()), abs=1e-9)
