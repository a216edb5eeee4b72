"""Grids of few bits against ``compressed-tensors``, and those of the OSP release against NumPy in float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize
from compressed_tensors.quantization.utils import calculate_qparams
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from osp_diag.errors import UsageError
from osp_diag.quantizing.conventions import OSP, PLAIN, convention_named
from osp_diag.quantizing.grid import Grid
from osp_diag.quantizing.setting import Setting

BITS = (2, 3, 4, 5, 8)
numbers = st.floats(-1e3, 1e3, width=32).map(lambda x: 0.0 if abs(x) < 1e-6 else x)
matrices = arrays.arrays(np.float32, (4, 8), elements=numbers)


@given(values=matrices, bits=st.sampled_from(BITS), symmetric=st.booleans())
def test_the_plain_grids_are_those_of_compressed_tensors_to_the_bit(values, bits, symmetric):
    rows = torch.tensor(values)
    grid = PLAIN.weights(bits) if symmetric else PLAIN.activations(bits)
    strategy = "channel" if symmetric else "token"
    arguments = QuantizationArgs(num_bits=bits, symmetric=symmetric, strategy=strategy, dynamic=not symmetric)
    low, high = rows.aminmax(dim=-1, keepdim=True)
    scale, zero = calculate_qparams(low, high, arguments)
    assert torch.equal(grid.rounded(rows), fake_quantize(rows, scale, zero, arguments))
    # A group is a row of its own.
    grouped = Grid(bits=bits, symmetric=symmetric, group_size=4)
    assert torch.equal(grouped.rounded(rows), grid.rounded(rows.reshape(8, 4)).reshape(4, 8))


def of_osp_weights(row: np.ndarray, bits: int) -> np.ndarray:
    """s · clamp(round(w/s), −2ᵇ⁻¹, 2ᵇ⁻¹ − 1) for the s with the least Σ|error|^2.4."""
    half = 2 ** (bits - 1)
    best, least = np.zeros_like(row), np.inf
    for step in range(80):
        scale = (1 - step / 100) * np.abs(row).max() / (half - 1)
        points = scale * np.clip(np.rint(row / scale), -half, half - 1)
        error = (np.abs(points - row) ** 2.4).sum()
        if error < least:
            best, least = points, error
    return best


def test_osp_clips_weights_by_a_search(monkeypatch):
    monkeypatch.setattr("osp_diag.quantizing.grid._VALUES_AT_ONCE", 100)
    weight = np.random.default_rng(0).standard_t(3, (20, 64))
    expected = np.stack([of_osp_weights(row, 4) for row in weight])
    clipped = OSP.weights(4).rounded(torch.tensor(weight)).numpy()
    np.testing.assert_allclose(clipped, expected, rtol=1e-12, atol=1e-12)
    codes = OSP.weights(4).codes(torch.tensor(weight))
    assert (codes.min(), codes.max()) == (-8, 7)


@given(values=arrays.arrays(np.float64, (3, 8), elements=numbers), bits=st.sampled_from(BITS))
@settings(max_examples=50)
def test_heads_without_0_in_their_range_span_what_is_there(values, bits):
    rounded = OSP.attention_output(bits, 4).rounded(torch.tensor(values)).numpy().reshape(6, 4)
    for row, points in zip(values.reshape(6, 4), rounded, strict=True):
        low, high = row.min(), row.max()
        step = (high - low) / (2**bits - 1)
        if step == 0:
            np.testing.assert_array_equal(points, row)
            continue
        zero = np.rint(-low / step)
        expected = step * (np.clip(np.rint(row / step) + zero, 0, 2**bits - 1) - zero)
        # Halves go to the even code, of which an odd zero point makes another.
        ties = np.isclose(np.abs(row / step - np.trunc(row / step)), 0.5, atol=1e-6)
        ties |= np.isclose(np.abs(low / step - np.trunc(low / step)), 0.5, atol=1e-6)
        np.testing.assert_allclose(points[~ties], expected[~ties], rtol=1e-9, atol=1e-9 * abs(low))


def test_rounding_passes_the_gradient_of_the_identity():
    values = torch.randn(3, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    rounded = PLAIN.activations(4).rounded_straight_through(values)
    torch.testing.assert_close(rounded, PLAIN.activations(4).rounded(values))
    rounded.square().sum().backward()
    assert torch.equal(values.grad, 2 * rounded.detach())


def test_groups_must_divide_the_channels():
    with pytest.raises(
        UsageError, match="for each group of 3 channels needs a multiple of that, and there are 8"
    ):
        Grid(bits=4, symmetric=True, group_size=3).rounded(torch.zeros(2, 8))


def test_settings_are_read_as_papers_write_them():
    assert Setting.read("4-8-16") == Setting.read("w4a8") == Setting(4, 8)
    assert Setting.read("W4A4KV4") == Setting.read("4-4-4") == Setting(4, 4, 4)
    assert str(Setting(4, 4, 16)) == "4-4-16"
    with pytest.raises(UsageError, match=r"^'4-4' is no setting; write 4-4-16 "):
        Setting.read("4-4")
    with pytest.raises(UsageError, match=r"^key_value_bits=12: give 2 to 8, or 16 for none$"):
        Setting(4, 4, 12)


def test_conventions_have_names():
    assert convention_named("osp") is OSP
    with pytest.raises(UsageError, match=r"no convention 'ops' of quantization; did you mean osp\?"):
        convention_named("ops")
