"""Block formats to the bit against compressed-tensors' own scales and rounding; asking for the lens."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from compressed_tensors.quantization import QuantizationArgs, fake_quantize, preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam

from osp_diag.capture.states import suites_of
from osp_diag.errors import EstimatorError
from osp_diag.estimators import estimators_named, get_estimator
from osp_diag.estimators.block_formats import (
    BLOCK_FORMATS,
    block_format,
    block_scales,
    in_blocks,
    rounded_to_grid,
    tensor_peak_by_block,
)
from osp_diag.probing.settings import MeasurementSettings


def simulated(entry, x: torch.Tensor) -> torch.Tensor:
    """What a format makes of a matrix, put together from the functions that the estimators use."""
    blocks = in_blocks(x, entry.width, entry.rows)
    unit = 2.0 ** torch.floor(torch.log2(blocks.abs().amax(-1).clamp(min=2.0**-126)))
    peak = blocks.abs().amax(-1) / unit
    scale, _ = block_scales(entry, peak, tensor_peak_by_block(x.abs().amax().expand(len(unit)), unit), unit)
    scale = torch.where(scale > 0, scale, torch.inf)[..., None]
    values = rounded_to_grid(entry.grid, blocks / unit[..., None] / scale)
    values = torch.where(torch.isinf(scale), 0.0, values * scale.nan_to_num(posinf=0)) * unit[..., None]
    if entry.rows == 1:
        return values.reshape(x.shape)
    tiles = values.reshape(len(values), values.shape[1], entry.rows, entry.width)
    return tiles.transpose(1, 2).reshape(x.shape)


INT4_TOKEN = QuantizationArgs(num_bits=4, type="int", strategy="token", symmetric=True, dynamic=True)
THEIRS = {
    # format → (their arguments, the divisor that their rule of scales has)
    "nvfp4": (preset_name_to_scheme("NVFP4", ["Linear"]).weights, 6.0),
    "mxfp4": (preset_name_to_scheme("MXFP4", ["Linear"]).weights, 3.5),
    "mxfp8": (preset_name_to_scheme("MXFP8", ["Linear"]).weights, 224.0),
    "fp8_block": (preset_name_to_scheme("FP8_BLOCK", ["Linear"]).weights, 448.0),
    "int4_g128": (preset_name_to_scheme("W4A16", ["Linear"]).weights, 7.5),
    "int4_token": (INT4_TOKEN, 7.5),
}


def their_rounding(arguments: QuantizationArgs, x: torch.Tensor) -> torch.Tensor:
    """compressed-tensors' own scales and rounding of a matrix."""
    if arguments.block_structure:
        height, width = arguments.block_structure
        blocks = x.unflatten(0, (-1, height)).unflatten(-1, (-1, width)).transpose(1, 2).flatten(-2)
    else:
        blocks = x.unflatten(-1, (-1, arguments.group_size or x.shape[-1]))
    low, high = blocks.amin(-1), blocks.amax(-1)
    tensor = generate_gparam(x.amin(), x.amax()) if arguments.strategy == "tensor_group" else None
    scale, zero = calculate_qparams(low, high, arguments, global_scale=tensor)
    return fake_quantize(x, scale, zero, arguments, global_scale=tensor)


def matrices() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(128, 256, generator=generator)
    hot = normal.clone()
    hot[:, 5] *= 40
    massive = normal.clone()
    massive[3, 7], massive[:, 40:60], massive[9] = 3e5, 0.0, 0.0
    steps = torch.randint(-24, 25, (128, 256), generator=generator) / 4.0  # values between two of a grid
    wide = normal * 2.0 ** torch.randint(-30, 30, (128, 256), generator=generator)
    return {
        "normal": normal,
        "hot": hot,
        "massive": massive,
        "steps": steps,
        "wide": wide,
        "huge": hot * 1e34,
        "tiny": hot * 1e-30,
        "zero": torch.zeros(128, 256),
    }


@pytest.mark.parametrize("name", BLOCK_FORMATS)
def test_formats_equal_compressed_tensors_to_the_bit(name: str) -> None:
    arguments, divisor = THEIRS[name]
    for case, x in matrices().items():
        theirs = their_rounding(arguments, x)
        ours = simulated(replace(block_format(name), divisor=divisor), x)
        assert torch.equal(ours, theirs), case


def test_scales_of_the_published_rules() -> None:
    """OCP: the largest power of two up to max |x|, over that of the grid; symmetric INT4: max |x| / 7."""
    peak = torch.tensor([[1.0, 1.7499999, 1.75, 1.9999999]])
    for name, scale in (("mxfp4", 0.25), ("mxfp8", 2.0**-8)):
        found, _ = block_scales(BLOCK_FORMATS[name], peak, peak, torch.ones_like(peak))
        assert found.tolist() == [[scale] * 4]
    found, _ = block_scales(BLOCK_FORMATS["int4_g128"], peak, peak, torch.ones_like(peak))
    torch.testing.assert_close(found, peak / 7)


def test_the_family_by_name_and_at_gradients() -> None:
    names = {e.name for e in MeasurementSettings(estimators=["block_lens"]).estimator_instances()}
    activation = {"block_crest", "collateral_loss", "effective_bits", "zeroed_fraction", "scale_headroom"}
    assert names == activation | {"weight_block_lens"}
    with pytest.raises(
        EstimatorError, match="'block_lens' is a family of estimators; name one of block_crest, coll"
    ):
        get_estimator("block_lens")
    suites = suites_of("gradient:residual_post", estimators_named("block_lens"))
    assert {e.name for e in suites["activation"].estimators} == activation
    assert {
        e.name for e in suites_of("mlp_down_weight", estimators_named("block_lens"))["weight"].estimators
    } == {"weight_block_lens"}
