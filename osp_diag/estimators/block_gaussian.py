"""What the statistics of block formats read on Gaussian noise, simulated: the floors of their numbers.

From 4 sequences of 512 tokens of 4,096 channels; of INT4, whose noise grows with the number of values that
share a scale, from 2²² numbers in blocks of 64 to 16,384, and linear in the logarithm between them. A test
simulates anew.
"""

from __future__ import annotations

import math

from osp_diag.estimators.block_formats import INT4, block_format

__all__ = ["CREST_ON_NOISE", "on_gaussian_noise"]

CREST_ON_NOISE = {16: 2.110, 32: 2.366, 128: 2.834}
"""Width of a block → mean of max |x| / RMS."""

_STATISTICS = ("collateral_loss", "effective_bits", "zeroed_fraction", "scale_headroom")
_ON_NOISE = {
    "nvfp4": (0.01242, 3.394, 0.0681, 0.0),
    "mxfp4": (0.01249, 3.120, 0.0880, 0.157),
    "mxfp8": (0.00073, 5.093, 5e-6, 0.379),
    "fp8_block": (0.00071, 5.282, 5e-6, 0.0),
}
_INT4_ON_NOISE = (
    (0.0131, 3.256, 0.147, 0.0),
    (0.0147, 3.127, 0.160, 0.0),
    (0.0166, 3.017, 0.172, 0.0),
    (0.0185, 2.922, 0.183, 0.0),
    (0.0206, 2.834, 0.194, 0.0),
    (0.0227, 2.756, 0.204, 0.0),
    (0.0249, 2.689, 0.214, 0.0),
    (0.0271, 2.616, 0.224, 0.0),
    (0.0290, 2.568, 0.231, 0.0),
)
_INT4_SMALLEST = 6
"""log₂ of the width of the first entry; each next one is twice as wide."""
_INT4_G128_BITS = 3.093
"""Of tokens of many blocks; a token that is one block has the median of a skew law."""


def on_gaussian_noise(statistic: str, name: str, channels: int) -> float:
    """A statistic of tokens of Gaussian noise in a format, by the name of its output.

    Parameters
    ----------
    channels : the width of a token
    """
    entry, place = block_format(name), _STATISTICS.index(statistic)
    if entry.grid != INT4:
        return _ON_NOISE[name][place]
    if statistic == "effective_bits" and entry.width is not None and channels > entry.width:
        return _INT4_G128_BITS
    width = min(entry.width or channels, channels)
    last = len(_INT4_ON_NOISE) - 1
    position = min(max(math.log2(width) - _INT4_SMALLEST, 0.0), float(last))
    below = min(int(position), last - 1)
    low, high = _INT4_ON_NOISE[below][place], _INT4_ON_NOISE[below + 1][place]
    return low + (position - below) * (high - low)
