"""Hadamard matrices: orthogonal at every size, and the quick product is that of the dense matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.linalg import hadamard as scipy_hadamard

from osp_diag.errors import UsageError
from osp_diag.quantizing.hadamard import core_matrix, hadamard, signed_hadamard


@given(size=st.integers(1, 160), seed=st.integers(0, 5))
def test_every_size_is_orthogonal_and_the_quick_product_is_the_dense_one(size, seed):
    generator = torch.Generator().manual_seed(seed)
    of_size = signed_hadamard(size, generator)
    values = torch.randn(2, 3, size, generator=generator, dtype=torch.float64)
    block = np.ones((1, 1))
    for factor in of_size.hadamard.factors:
        block = np.kron(block, core_matrix(factor))
    blocks = size // of_size.hadamard.order
    dense = np.kron(np.eye(blocks), block / np.sqrt(len(block))) * of_size.signs.numpy()[:, None]
    np.testing.assert_allclose(dense @ dense.T, np.eye(size), atol=1e-12)
    np.testing.assert_allclose(of_size.apply(values).numpy(), values.numpy() @ dense, atol=1e-12)
    back = of_size.hadamard.undo(of_size.hadamard.apply(values))
    np.testing.assert_allclose(back.numpy(), values.numpy(), atol=1e-12)
    np.testing.assert_allclose(of_size.apply(values).norm(dim=-1), values.norm(dim=-1), rtol=1e-12)


@pytest.mark.parametrize(
    ("size", "description"),
    [
        (1, "Hadamard 1"), (64, "Hadamard 64"), (576, "Hadamard 576"), (1536, "Hadamard 1536"),
        (5504, "Hadamard 5504"), (11008, "Hadamard 11008"), (14336, "Hadamard 14336"), (896, "Hadamard 896"),
        (4864, "Hadamard 4864"), (432, "Hadamard 432"), (80, "Hadamard 80"), (48, "Hadamard 48"),
        (92, "block Hadamard 4 of 92"), (50, "block Hadamard 2 of 50"),
        (21, "block Hadamard 1 of 21"),
    ],
)  # fmt: skip
def test_sizes_of_models_have_full_matrices_and_others_say_their_blocks(size, description):
    of_size = hadamard(size)
    assert of_size.description == description
    spike = torch.zeros(size)
    spike[size // 2] = 1.0
    spread = of_size.apply(spike).abs()
    expected = of_size.order**-0.5
    assert torch.allclose(spread[spread > 0], torch.tensor(expected))
    assert int((spread > 0).sum()) == of_size.order


@pytest.mark.parametrize("order", [12, 20, 28, 36, 52, 344])  # Paley I and II, of primes and prime powers
def test_paley_matrices_are_hadamard_matrices(order):
    matrix = core_matrix(order).astype(int)
    assert set(np.unique(matrix)) == {-1, 1}
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order, dtype=int))


def test_powers_of_two_are_sylvesters():
    np.testing.assert_array_equal(core_matrix(64), scipy_hadamard(64))
    dense = torch.from_numpy(scipy_hadamard(1024)).double() / 32
    assert torch.allclose(hadamard(1024).matrix(torch.float64), dense, atol=1e-12)


def test_half_precision_is_computed_in_float32():
    values = torch.randn(4, 576, generator=torch.Generator().manual_seed(0)).bfloat16()
    product = hadamard(576).apply(values)
    assert product.dtype == torch.bfloat16
    assert torch.equal(product, hadamard(576).apply(values.float()).bfloat16())


def test_what_cannot_be_multiplied_is_refused():
    with pytest.raises(UsageError, match=r"rows of 63 channels cannot be multiplied by a Hadamard 64"):
        hadamard(64).apply(torch.zeros(2, 63))
    with pytest.raises(UsageError, match="size=0: a Hadamard matrix has 1 or more rows"):
        hadamard(0)
    with pytest.raises(UsageError, match="no Hadamard matrix of order 92"):
        core_matrix(92)
