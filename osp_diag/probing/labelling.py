"""From estimator states to labelled arrays: one xarray Dataset a site, with units and definitions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.estimators.base import STRATA, Estimator, Layout, Output, State, Suite

__all__ = ["label_states", "raw_states"]


def _coordinates(
    output_dims: tuple[str, ...], shape: tuple[int, ...], given: Mapping[str, Any]
) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for dim, size in zip(output_dims, shape, strict=True):
        if dim in given:
            found[dim] = np.asarray(given[dim])
        elif dim == "stratum":
            found[dim] = np.asarray(STRATA)
        else:
            found[dim] = np.arange(size)
    return found


def _attributes(estimator: Estimator, output: Output) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "estimator": estimator.identifier,
        "units": output.unit,
        "long_name": estimator.title,
        "definition": output.definition or estimator.formula,
        "source": "; ".join(source.citation for source in estimator.sources),
    }
    if output.floor is not None:
        attributes["floor"] = float(output.floor)
    if output.ceiling is not None:
        attributes["ceiling"] = float(output.ceiling)
    return attributes


def _stacked(states: list[State]) -> State:
    return {name: np.stack([np.asarray(state[name]) for state in states]) for name in states[0]}


def _by_layout(layers: Mapping[int, tuple[State, Layout]]) -> dict[Layout, list[int]]:
    """Layers of equal sizes together: some models change the number of heads or the width on the way."""
    groups: dict[Layout, list[int]] = defaultdict(list)
    for layer in sorted(layers):
        groups[layers[layer][1]].append(layer)
    return groups


def label_states(suite: Suite, layers: Mapping[int, tuple[State, Layout]]) -> xr.Dataset:
    """Finalise the states of all layers of one site at once.

    Parameters
    ----------
    suite : the estimators that the states belong to
    layers : layer → (state as NumPy arrays, its layout)

    Returns
    -------
    Dataset with the leading dimension ``layer``; layers of other sizes are joined with NaN outside.
    """
    parts = []
    for layout, members in _by_layout(layers).items():
        state = _stacked([layers[layer][0] for layer in members])
        variables: dict[str, Any] = {}
        coordinates: dict[str, Any] = {"layer": np.asarray(members)}
        for estimator in suite.estimators:
            with np.errstate(invalid="ignore", divide="ignore"):
                outputs = estimator.finalise(state, layout)
            for name, output in outputs.items():
                values = np.asarray(output.values)
                variables[name] = (("layer", *output.dims), values, _attributes(estimator, output))
                coordinates |= _coordinates(output.dims, values.shape[1:], output.coords)
        parts.append(xr.Dataset(variables, coordinates))
    if len(parts) == 1:
        return parts[0]
    return xr.concat(parts, "layer", join="outer", combine_attrs="override", data_vars="all").sortby("layer")


def raw_states(suite: Suite, layers: Mapping[int, tuple[State, Layout]]) -> xr.Dataset:
    """The sums themselves, so that a definition added later can be computed from old runs."""
    known = suite.coords()
    parts = []
    for layout, members in _by_layout(layers).items():
        state = _stacked([layers[layer][0] for layer in members])
        variables: dict[str, Any] = {}
        coordinates: dict[str, Any] = {"layer": np.asarray(members)}
        for name, spec in suite.fields(layout).items():
            variables[name] = (("layer", *spec.dims), state[name], {"combine": spec.combine})
            coordinates |= _coordinates(spec.dims, state[name].shape[1:], known)
        parts.append(xr.Dataset(variables, coordinates))
    if len(parts) == 1:
        return parts[0]
    return xr.concat(parts, "layer", join="outer", combine_attrs="override", data_vars="all").sortby("layer")
