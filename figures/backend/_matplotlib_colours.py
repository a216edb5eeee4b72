"""Colours and cells in matplotlib's terms."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float
from matplotlib.colors import Colormap, ListedColormap, LogNorm, Normalize, SymLogNorm

from osp_diag.figures._colours import ColourScale, colour_table

__all__ = ["colour_map_of", "edges_of", "norm_of"]


def colour_map_of(name: str) -> Colormap:
    return ListedColormap(colour_table(name), name=name).with_extremes(bad="#ffffff")


def norm_of(scale: ColourScale) -> Normalize:
    if scale.kind == "log":
        return LogNorm(scale.low, scale.high, clip=True)
    if scale.kind == "symlog":
        return SymLogNorm(scale.threshold, vmin=scale.low, vmax=scale.high, clip=True)
    return Normalize(scale.low, scale.high, clip=True)


def edges_of(centres: Float[np.ndarray, " cell"]) -> Float[np.ndarray, " edge"]:
    if len(centres) == 1:
        return np.array([centres[0] - 0.5, centres[0] + 0.5])
    between = (centres[1:] + centres[:-1]) / 2
    return np.concatenate([[2 * centres[0] - between[0]], between, [2 * centres[-1] - between[-1]]])
