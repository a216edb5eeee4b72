"""|W| of chosen projections, small enough to keep in a run: figures never touch a model."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase

import numpy as np
import xarray as xr
from torch import nn

from osp_diag.capture.down_projection import projection_weight, weights_at_hand
from osp_diag.errors import UsageError
from osp_diag.max_pooling import bin_starts, max_pool
from osp_diag.sites.names import SiteMap
from osp_diag.sites.stack import is_linear
from osp_diag.wording import did_you_mean

__all__ = ["MAP_SIDE", "weight_maps"]

MAP_SIDE = 128
"""Cells along each side of a map at most: more than a surface in print shows, 64 KiB a matrix."""

DEFAULT_SITES = ("attention_output", "mlp_hidden")
"""The projections that read these write into the residual stream, whose hot channels they make."""

_MAP, _ROW, _COLUMN = (
    {"units": "1", "long_name": long_name, "definition": definition}
    for long_name, definition in (
        ("largest |W| of a cell", "max |W_ij| over the rows i and columns j of a cell"),
        ("largest |W| of a row", "max_j |W_ij| of output channel i"),
        ("largest |W| of a column", "max_i |W_ij| of input channel j"),
    )
)
_FIRST = {"units": "channel", "definition": "first channel of a cell; it ends before that of the next cell"}


# Why maxima of 128 cells a side, and these projections: docs/decisions.md, Figures.
def weight_maps(
    model: nn.Module, site_map: SiteMap, patterns: Sequence[str] | None = None
) -> tuple[dict[str, xr.Dataset], list[str]]:
    """Maps of |W| of the blocks' projections, and why some could not be read.

    Neighbouring channels are joined by their maximum, so that a single large weight keeps its height.
    Weights that are NaN or Inf are left out.

    Parameters
    ----------
    model : not wrapped
    site_map : what :func:`osp_diag.sites.find_sites` found in it
    patterns : names with ``*``: of a module as a whole (``model.layers.3.mlp.down_proj``), within its block
        (``mlp.*``) or at its end (``down_proj``). None: the projections that write into the residual
        stream, of the first, middle and last block

    Returns
    -------
    Path within the block -> Dataset with ``weight`` (layer, output_cell, input_cell), at most 128 cells a
    side, whose channels begin at ``first_output_channel`` and ``first_input_channel``; and exactly, for
    every channel, ``row_maximum`` (layer, output_channel) and ``column_maximum`` (layer, input_channel).

    Raises
    ------
    UsageError : a pattern that matches no projection
    """
    projections = _projections(model, site_map)
    selection = (
        _default_projections(site_map) & projections.keys()
        if patterns is None
        else _matching_projections(projections, patterns)
    )
    parts: dict[str, list[xr.Dataset]] = {}
    problems = []
    for name, layer in sorted(selection):
        matrix = _matrix(projections[name, layer][1])
        if isinstance(matrix, str):
            problems.append(f"no map of {projections[name, layer][0]}: {matrix}")
        else:
            parts.setdefault(name, []).append(_pooled(matrix).expand_dims(layer=[layer]))
    # Blocks of different widths are padded with NaN.
    return {name: xr.concat(layers, "layer", join="outer") for name, layers in parts.items()}, problems


def _projections(model: nn.Module, site_map: SiteMap) -> dict[tuple[str, int], tuple[str, nn.Module]]:
    """(path within the block, layer) -> (whole path, module)."""
    return {
        (name, layer): (path, module)
        for layer, block in enumerate(site_map.block_paths)
        for part in site_map.members.get(block, (block,))
        for path, module in model.get_submodule(part).named_modules(prefix=part)
        if is_linear(module) and (name := site_map.within_block(layer, path))
    }


def _default_projections(site_map: SiteMap) -> set[tuple[str, int]]:
    last = site_map.number_of_layers - 1
    layers = {0, last // 2, last}
    return {
        (site_map.within_block(tap.layer, tap.module) or tap.module, tap.layer)
        for tap in site_map.taps
        if tap.site in DEFAULT_SITES and tap.side == "input" and tap.layer in layers
    }


def _matching_projections(
    projections: dict[tuple[str, int], tuple[str, nn.Module]], patterns: Sequence[str]
) -> set[tuple[str, int]]:
    names = {key: (path, key[0], key[0].rpartition(".")[2]) for key, (path, _) in projections.items()}
    selection: set[tuple[str, int]] = set()
    for pattern in patterns:
        matches = {key for key, forms in names.items() if any(fnmatchcase(form, pattern) for form in forms)}
        if not matches:
            suggestions = list(dict.fromkeys(form for forms in names.values() for form in reversed(forms)))
            raise UsageError(
                f"weights={pattern!r} matches no projection of the blocks; "
                + did_you_mean(pattern, suggestions, "'*' stands for anything")
            )
        selection |= matches
    return selection


def _matrix(module: nn.Module) -> np.ndarray | str:
    """|W| as (output channel, input channel) on the host; text that says why not."""
    with weights_at_hand(module):
        whole = projection_weight(module)
        if isinstance(whole, str):
            return whole
        values = whole.abs().float().cpu().numpy()
    if "conv1d" in type(module).__name__.lower():
        values = values.T
    return np.where(np.isfinite(values), values, np.nan)


def _pooled(values: np.ndarray) -> xr.Dataset:
    rows, columns = values.shape
    pooled = max_pool(max_pool(values, 0, MAP_SIDE), 1, MAP_SIDE)
    return xr.Dataset(
        {
            "weight": (("output_cell", "input_cell"), pooled, _MAP),
            "row_maximum": (("output_channel",), np.fmax.reduce(values, axis=1), _ROW),
            "column_maximum": (("input_channel",), np.fmax.reduce(values, axis=0), _COLUMN),
            "first_output_channel": (("output_cell",), bin_starts(rows, MAP_SIDE), _FIRST),
            "first_input_channel": (("input_cell",), bin_starts(columns, MAP_SIDE), _FIRST),
        },
        coords={"output_channel": np.arange(rows), "input_channel": np.arange(columns)},
    )
