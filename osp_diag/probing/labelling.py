"""From estimator states to labelled arrays: one xarray Dataset a site, with units and definitions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.errors import EstimatorError
from osp_diag.estimators import get_estimator
from osp_diag.estimators.base import Estimator, Layout, Output, State, Suite
from osp_diag.runs.run import Run
from osp_diag.schema import STRATA

__all__ = ["label_states", "labelled_groups", "raw_states", "relabel", "token_group_states"]


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
    return _joined(parts)


def raw_states(suite: Suite, layers: Mapping[int, tuple[State, Layout]]) -> xr.Dataset:
    """The sums themselves, so that a definition added later can be computed from old runs.

    The attribute ``layout_activation`` (or ``_heads``, ``_attention``) keeps the sizes that
    :func:`relabel` needs: a list of {"layers": […], "channels": …, "heads": …}.
    """
    known = suite.coords()
    parts, sizes = [], []
    for layout, members in _by_layout(layers).items():
        state = _stacked([layers[layer][0] for layer in members])
        variables: dict[str, Any] = {}
        coordinates: dict[str, Any] = {"layer": np.asarray(members)}
        for name, spec in suite.fields(layout).items():
            variables[name] = (("layer", *spec.dims), state[name], {"combine": spec.combine})
            coordinates |= _coordinates(spec.dims, state[name].shape[1:], known)
        parts.append(xr.Dataset(variables, coordinates))
        sizes.append({"layers": members, **asdict(layout)})
    attributes = {f"layout_{suite.estimators[0].observes}": sizes}
    return _joined(parts).assign_attrs(attributes)


def labelled_groups(
    suites_at: Callable[[str], Mapping[str, Suite]],
    states: Mapping[tuple[Any, ...], State],
    layouts: Mapping[tuple[Any, ...], Layout],
    *,
    keep_raw: bool,
) -> dict[str, xr.Dataset]:
    """What a run records of one step: statistics of every site, and under ``raw/`` their sums if kept.

    Parameters
    ----------
    suites_at : the estimators of a site, by what they observe
    states, layouts : by (site, layer, what is observed)
    """
    groups: dict[str, xr.Dataset] = {}
    for site, kind in dict.fromkeys((site, kind) for site, _, kind in states):
        layers = {
            layer: (states[s, layer, k], layouts[s, layer, k])
            for s, layer, k in states
            if (s, k) == (site, kind)
        }
        suite = suites_at(site)[kind]
        path = site.replace(":", "/")
        parts = {path: label_states(suite, layers)}
        if keep_raw:
            parts[f"raw/{path}"] = raw_states(suite, layers)
        for group, dataset in parts.items():
            if group in groups:
                dataset = groups[group].merge(dataset).assign_attrs(groups[group].attrs | dataset.attrs)
            groups[group] = dataset
    return groups


def token_group_states(
    suites_at: Callable[[str], Mapping[str, Suite]],
    states: Mapping[tuple[Any, ...], State],
    layouts: Mapping[tuple[Any, ...], Layout],
    count: int,
) -> dict[str, xr.Dataset]:
    """Sums by group of batches, (layer, token_group, …), under ``token_groups/`` and the name of each site.

    Parameters
    ----------
    states : by (site, layer, what is observed, group); a group without tokens may be missing
    layouts : by (site, layer, what is observed)
    count : how many groups
    """
    found: dict[str, xr.Dataset] = {}
    for site, kind in dict.fromkeys((site, kind) for site, _, kind, _ in states):
        layers = {
            layer: (_by_group(states, (site, layer, kind), count), layouts[site, layer, kind])
            for layer in dict.fromkeys(layer for s, layer, k, _ in states if (s, k) == (site, kind))
        }
        parts = []
        for layout, members in _by_layout(layers).items():
            state = _stacked([layers[layer][0] for layer in members])
            fields = suites_at(site)[kind].fields(layout)
            coordinates: dict[str, Any] = {"layer": np.asarray(members)}
            variables: dict[str, Any] = {}
            for name, values in state.items():
                dims = fields[name].dims
                # Single precision for what is by channel: it is nearly all of the bytes.
                kept = values.astype(np.float32) if "channel" in dims else values
                variables[name] = (("layer", "token_group", *dims), kept, {"combine": fields[name].combine})
                coordinates |= _coordinates(dims, values.shape[2:], {})
            parts.append(xr.Dataset(variables, coordinates))
        found[f"token_groups/{site}"] = _joined(parts)
    return found


def _by_group(states: Mapping[tuple[Any, ...], State], key: tuple[Any, ...], count: int) -> State:
    """The states of all groups at one place on a leading axis, 0 where a group saw nothing."""
    known = [states.get((*key, group)) for group in range(count)]
    example = next(state for state in known if state is not None)
    return {
        name: np.stack([np.zeros_like(value) if state is None else state[name] for state in known])
        for name, value in example.items()
    }


def _joined(parts: list[xr.Dataset]) -> xr.Dataset:
    if len(parts) == 1:
        return parts[0]
    return xr.concat(parts, "layer", join="outer", combine_attrs="override", data_vars="all").sortby("layer")


def relabel(run: Run, site: str, estimators: Sequence[Estimator | str] | None = None) -> xr.Dataset:
    """Compute the statistics of one site anew from the raw sums that a run keeps.

    So a definition, or a version of one, that is younger than the run applies to it, as long as it needs
    no sum that the run lacks.

    Parameters
    ----------
    run : with raw sums (``keep_raw``)
    site : a name in ``run.sites``
    estimators : names or instances; None for those that the run was made with, with their parameters

    Returns
    -------
    Dataset with dimensions (step, layer, …), as ``run.at(site)``

    Raises
    ------
    EstimatorError : an estimator needs sums that the run does not keep at this site
    StoreError : the run has no such site, or no raw sums of it
    """
    raw = run.raw(site)
    groups: dict[str, list[Estimator]] = defaultdict(list)
    for estimator in _of_run(run) if estimators is None else estimators:
        chosen = get_estimator(estimator) if isinstance(estimator, str) else estimator
        if f"layout_{chosen.observes}" in raw.attrs:
            missing = sorted(set(Suite((chosen,)).fields(Layout())) - set(map(str, raw.data_vars)))
            if not missing:
                groups[chosen.observes].append(chosen)
                continue
            reason = f"it needs the sums {', '.join(missing)}"
        else:
            reason = f"it observes {chosen.observes}"
        if estimators is not None:
            raise EstimatorError(
                f"{chosen.identifier} cannot be computed at {site!r} from this run: {reason}, which the run "
                "does not keep there; probe again with this estimator"
            )
    steps = []
    for index in range(raw.sizes["step"]):
        sums = raw.isel(step=index)
        parts = [
            _relabelled(Suite(chosen), sums, raw.attrs[f"layout_{kind}"]) for kind, chosen in groups.items()
        ]
        steps.append(xr.merge(parts, combine_attrs="override", join="outer", compat="no_conflicts"))
    joined = xr.concat(steps, raw["step"], data_vars="all", coords="minimal", compat="override", join="exact")
    return run.with_texts(joined)


def _of_run(run: Run) -> list[Estimator]:
    """The estimators that a run was made with; JSON made lists of their tuples."""
    known = run.attrs.get("estimator_parameters", {})

    def parameters(name: str) -> dict[str, Any]:
        given = known.get(name, {})
        return {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}

    return [get_estimator(name, **parameters(name)) for name in run.estimators]


def _relabelled(suite: Suite, sums: xr.Dataset, sizes: Sequence[Mapping[str, Any]]) -> xr.Dataset:
    """One step's statistics from its raw sums; padding that joined layers of other sizes is cut off."""
    known = suite.coords()
    layers: dict[int, tuple[State, Layout]] = {}
    for entry in sizes:
        layout = Layout(**{key: int(value) for key, value in entry.items() if key != "layers"})
        for layer in entry["layers"]:
            state = {}
            for name, spec in suite.fields(layout).items():
                own = {dim: slice(layout.size(dim)) for dim in spec.dims if dim not in known}
                state[name] = sums[name].sel(layer=layer).isel(own).transpose(*spec.dims).values
            layers[int(layer)] = (state, layout)
    return label_states(suite, layers)
