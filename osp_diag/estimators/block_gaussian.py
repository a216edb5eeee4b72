"""What the statistics of block formats read on Gaussian noise, simulated: the floors of their numbers."""

from __future__ import annotations
from osp_diag.estimators.block_formats import block_format

def on_gaussian_noise(statistic: str, name: str, channels: int) -> float:
    return 0.0
