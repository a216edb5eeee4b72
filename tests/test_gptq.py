"""GPTQ against the textbook's optimal brain quantization, and what it is for: less error at each output."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from osp_diag.errors import CheckpointError, TokenError, UsageError
from osp_diag.quantizing.gptq import gptq_rounded, gptq_weights
from osp_diag.quantizing.grid import Grid
from osp_diag.quantizing.linears import block_linears
from osp_diag.quantizing.rotations import rotated
from tests.families import FAMILIES
from tests.tiny_checkpoints import VOCABULARY, llama

GRID = Grid(bits=4, symmetric=True)


def brain_quantized(
    weight: np.ndarray, hessian: np.ndarray, scales: np.ndarray, damping: float
) -> np.ndarray:
    """One column at a time: its error over all that follow, then itself out of the inverse Hessian.

    Of the formulas of Frantar & Alistarh 2022 (Optimal Brain Compression), with the columns in order.
    """
    w, columns = weight.copy(), weight.shape[1]
    dead = np.diag(hessian) == 0
    damped = hessian + np.diag(np.where(dead, np.diag(hessian).mean(), 0))
    inverse = np.linalg.inv(damped + damping * np.diag(hessian).mean() * np.eye(columns))
    rounded = np.empty_like(w)
    for j in range(columns):
        rounded[:, j] = scales * np.clip(np.rint(w[:, j] / scales), -8, 7)
        error = (w[:, j] - rounded[:, j]) / inverse[j, j]
        w[:, j + 1 :] -= error[:, None] * inverse[j, j + 1 :]
        inverse -= np.outer(inverse[:, j], inverse[j]) / inverse[j, j]
    return rounded


@given(
    seed=st.integers(0, 2**20), columns=st.integers(1, 24), at_once=st.sampled_from([1, 4, 128]),
    dead=st.booleans(),
)  # fmt: skip
def test_it_is_optimal_brain_quantization_in_order(seed, columns, at_once, dead):
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((40, columns)) @ rng.standard_normal((columns, columns))
    inputs[:, 0] *= not dead
    weight, hessian = rng.standard_normal((5, columns)), inputs.T @ inputs
    scales = np.abs(weight).max(1) / 7.5
    if not hessian.any():
        return
    rounded, note = gptq_rounded(torch.tensor(weight), torch.tensor(hessian), GRID, columns_at_once=at_once)
    expected = brain_quantized(weight, hessian, scales, 0.01)
    np.testing.assert_allclose(rounded.numpy(), expected, rtol=0, atol=1e-9)
    assert note == ""


def test_a_hessian_that_float32_cannot_factor_takes_float64_and_a_worse_one_more_damping():
    inputs = torch.randn(3, 64, generator=torch.Generator().manual_seed(0)) * 1e-3
    inputs[0, 5] = 1e4  # of rank 3, with one channel that outweighs all
    hessian = inputs.T @ inputs
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(1))
    rounded, note = gptq_rounded(weight, hessian, GRID, damping=1e-9)
    assert torch.isfinite(rounded).all()
    assert note == ""
    indefinite = torch.diag(torch.tensor([1.0, 1.0, -0.15]))
    _, note = gptq_rounded(weight[:, :3], indefinite, GRID)
    assert note == "damping 1"
    rounded, note = gptq_rounded(weight[:, :3], torch.diag(torch.tensor([1.0, 1.0, -1.0])), GRID)
    assert note == "rounded to nearest, since its Hessian cannot be inverted"
    assert torch.equal(rounded, GRID.rounded(weight[:, :3]))
    assert gptq_rounded(weight, hessian * torch.nan, GRID)[1] == (
        "rounded to nearest, since its inputs are not finite"
    )
    assert gptq_rounded(weight, hessian * 0, GRID)[1] == (
        "rounded to nearest, since no calibration token came to it"
    )


def inputs_of(model, paths, ids) -> dict[str, torch.Tensor]:
    """What comes to each Linear in one pass."""
    inputs: dict[str, torch.Tensor] = {}
    handles = [
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, path=path: inputs.__setitem__(path, args[0].flatten(0, -2).double())
        )
        for path in paths
    ]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return inputs


@pytest.mark.parametrize("rotation", ["none", "ffn-hadamard"])
def test_every_linear_has_less_error_than_rounded_to_nearest_for_the_inputs_that_reach_it(rotation):
    model = llama()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(VOCABULARY, (8, 48), generator=generator)
    # Correlated channels: where there are none, GPTQ has nothing to gain.
    table = model.model.embed_tokens.weight
    table.data = torch.randn(VOCABULARY, 4, generator=generator) @ torch.randn(4, 16, generator=generator)
    steps = []
    with rotated(model, rotation):
        linears = block_linears(model)
        paths = [linear.path for linear in linears]
        before = {path: model.get_submodule(path).weight for path in paths}
        result = gptq_weights(
            model, linears, GRID, ids, batch_size=3, progress=lambda *done: steps.append(done)
        )
        assert {path: model.get_submodule(path).weight for path in paths} == before  # the very same
        weights = {path: weight.detach() for path, weight in before.items()}
        for path in paths:
            model.get_submodule(path).weight = torch.nn.Parameter(result.weights[path])
        inputs = inputs_of(model, paths, ids)  # of each Linear, behind earlier ones that are rounded
        for path in paths:
            model.get_submodule(path).weight = before[path]
    assert steps == [(1, 2), (2, 2)]
    assert result.notes == ()
    assert result.weights.keys() == set(paths)
    for path, weight in weights.items():
        hessian = inputs[path].T @ inputs[path]
        errors = [
            float(torch.einsum("rc,cd,rd->", difference, hessian, difference))
            for difference in ((weight - w).double() for w in (result.weights[path], GRID.rounded(weight)))
        ]
        assert errors[0] < errors[1], path
        # On the grid of the row, all of it.
        scales = GRID.scales(weight)
        assert torch.allclose(GRID.rounded(result.weights[path], scales), result.weights[path])


def test_only_the_chosen_linears_are_rounded_and_models_with_masks_of_their_own_are_calibrated():
    model = FAMILIES["gemma3"].build() if "gemma3" in FAMILIES else FAMILIES["qwen2"].build()
    ids = torch.randint(3, 96, (3, 12), generator=torch.Generator().manual_seed(0))
    chosen = [linear for linear in block_linears(model) if "down" in linear.roles and linear.layer == 0]
    result = gptq_weights(model, chosen, GRID, ids)
    assert list(result.weights) == [linear.path for linear in chosen]


def test_what_cannot_be_calibrated_is_refused():
    model = llama()
    linears = block_linears(model)
    with pytest.raises(UsageError, match=r"damping=0, columns_at_once=128: damping lies above 0"):
        gptq_weights(model, linears, GRID, torch.zeros(1, 8, dtype=torch.long), damping=0)
    with pytest.raises(UsageError, match="GPTQ rounds each row on one grid, not groups of 4"):
        gptq_weights(model, linears, Grid(bits=4, symmetric=True, group_size=4), torch.zeros(1, 8).long())
    with pytest.raises(TokenError, match=r"calibration takes token ids of shape \(sequence, position\)"):
        gptq_weights(model, linears, GRID, torch.zeros(0, 8, dtype=torch.long))
    with pytest.raises(TokenError):
        gptq_weights(model, linears, GRID, torch.full((1, 8), VOCABULARY))
    model.model.layers[0].register_forward_hook(lambda module, args, out: out * torch.rand(()))
    with pytest.raises(CheckpointError, match="cannot be calibrated one after the other"):
        gptq_weights(model, linears, GRID, torch.zeros(1, 8, dtype=torch.long))
