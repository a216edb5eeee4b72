"""From estimator states to labelled arrays: one xarray Dataset a site, with units and definitions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.errors import EstimatorError
from osp_diag.estimators import get_estimator
from osp_diag.estimators.base import Estimator, Layout, Output, State, Suite
from osp_diag.runs.declared import DeclaredGroup, GroupStep, ProbedStep
from osp_diag.runs.run import Run
from osp_diag.schema import STRATA, group_path

__all__ = ["StepLabels", "label_states", "labelled_groups", "raw_states", "relabel", "token_group_states"]

Layers = Mapping[int, tuple[State | None, Layout]]
"""Layer → its state as NumPy arrays, and the sizes that it has; None for a layer that did not run."""


def _coordinates(
    dims: tuple[str, ...], shape: tuple[int, ...], labels: Mapping[str, Any], strata: tuple[str, ...]
) -> dict[str, Any]:
    coordinates: dict[str, Any] = {}
    for dim, size in zip(dims, shape, strict=True):
        if dim in labels:
            coordinates[dim] = np.asarray(labels[dim])
        elif dim == "stratum":
            coordinates[dim] = np.asarray(strata)
        else:
            coordinates[dim] = np.arange(size)
    return coordinates


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


@dataclass(frozen=True, eq=False)
class _Stack:
    """The states of some layers of one layout, the layer first."""

    suite: Suite
    layout: Layout
    sums: State
    """of a layer that did not run, the sums of nothing"""
    ran: np.ndarray

    @classmethod
    def of(cls, suite: Suite, layers: Layers, members: Sequence[int], layout: Layout) -> _Stack:
        states = [layers[layer][0] for layer in members]
        ran = np.array([state is not None for state in states])
        if ran.all():
            names = list(states[0] or {})
            sums = {name: np.stack([np.asarray((state or {})[name]) for state in states]) for name in names}
            return cls(suite, layout, sums, ran)
        nothing = {
            name: np.full(suite.shape(spec, layout), spec.identity)
            for name, spec in suite.fields(layout).items()
        }
        known = [nothing if state is None else state for state in states]
        sums = {name: np.stack([np.asarray(state[name]) for state in known]) for name in nothing}
        return cls(suite, layout, sums, ran)

    def outputs(self) -> Iterator[tuple[Estimator, str, Output]]:
        """Every number with the estimator that it is from; NaN where the layer did not run."""
        for estimator in self.suite.estimators:
            with np.errstate(invalid="ignore", divide="ignore"):
                outputs = estimator.finalise(self.sums, self.layout)
            for name, output in outputs.items():
                yield estimator, name, replace(output, values=self._where_it_ran(output.values))

    def raw(self, name: str) -> np.ndarray:
        """A sum of all layers; NaN where the layer did not run."""
        return self._where_it_ran(self.sums[name])

    def _where_it_ran(self, values: Any) -> np.ndarray:
        array = np.asarray(values)
        if self.ran.all() or array.dtype.kind != "f":
            return array
        return np.where(self.ran.reshape(-1, *[1] * (array.ndim - 1)), array, array.dtype.type(np.nan))


def _by_layout(layers: Mapping[int, tuple[Any, Layout]]) -> dict[Layout, list[int]]:
    """Layers of equal sizes together: some models change the number of heads or the width on the way."""
    groups: dict[Layout, list[int]] = defaultdict(list)
    for layer in sorted(layers):
        groups[layers[layer][1]].append(layer)
    return groups


def label_states(suite: Suite, layers: Layers) -> xr.Dataset:
    """Finalise the states of all layers of one site at once.

    Parameters
    ----------
    suite : the estimators that the states belong to
    layers : layer → (state as NumPy arrays, or None if the layer did not run; its layout)

    Returns
    -------
    Dataset with the leading dimension ``layer``; layers of other sizes are joined with NaN outside, and
    a layer that did not run is NaN.
    """
    parts = []
    for layout, members in _by_layout(layers).items():
        variables: dict[str, Any] = {}
        coordinates: dict[str, Any] = {"layer": np.asarray(members)}
        for estimator, name, output in _Stack.of(suite, layers, members, layout).outputs():
            values = np.asarray(output.values)
            variables[name] = (("layer", *output.dims), values, _attributes(estimator, output))
            coordinates |= _coordinates(output.dims, values.shape[1:], output.coords, layout.strata)
        parts.append(xr.Dataset(variables, coordinates))
    return _joined(parts)


def raw_states(suite: Suite, layers: Layers) -> xr.Dataset:
    """The sums themselves, so that a definition added later can be computed from old runs.

    The attribute ``layout_activation`` (or ``_heads``, ``_attention``) keeps the sizes that
    :func:`relabel` needs: a list of {"layers": […], "channels": …, "heads": …}.
    """
    fixed_labels = suite.coords()
    parts, sizes = [], []
    for layout, members in _by_layout(layers).items():
        stack = _Stack.of(suite, layers, members, layout)
        variables: dict[str, Any] = {}
        coordinates: dict[str, Any] = {"layer": np.asarray(members)}
        for name, spec in suite.fields(layout).items():
            variables[name] = (("layer", *spec.dims), stack.raw(name), {"combine": spec.combine})
            coordinates |= _coordinates(spec.dims, stack.sums[name].shape[1:], fixed_labels, layout.strata)
        parts.append(xr.Dataset(variables, coordinates))
        # Strata are a coordinate of the sums themselves.
        sizes.append({"layers": members, **{n: v for n, v in asdict(layout).items() if n != "strata"}})
    attributes = {f"layout_{suite.estimators[0].observes}": sizes}
    return _joined(parts).assign_attrs(attributes)


@dataclass(frozen=True, eq=False)
class _DeclaredSite:
    """The labels of a site's groups."""

    structure: tuple[Any, ...]
    """What they follow from: estimators, layers and sizes."""
    groups: Mapping[str, DeclaredGroup]
    """Group → labels, by which a further step is plain arrays; empty where layers have to be joined."""


class StepLabels:
    """Labels of a run's sites, declared at the first step and again where a site's structure has changed.

    Why once: docs/decisions.md, Runs.

    A site's layers are those of the first step that has it, or of the run that is resumed.

    Parameters
    ----------
    recorded_layers : the layers that a run has already at a site; None where it has none
    """

    def __init__(self, recorded_layers: Callable[[str], Sequence[int] | None] = lambda site: None) -> None:
        self._sites: dict[str, _DeclaredSite] = {}
        self._recorded_layers = recorded_layers
        self._layers: dict[str, frozenset[int]] = {}
        self._layouts: dict[tuple[str, str], dict[int, Layout]] = {}

    def layers(self, site: str) -> list[int]:
        """The layers that the run has at a site, of which something was labelled."""
        return sorted(self._layers[site])

    def settled(
        self, site: str, kinds: Mapping[str, Layers], idle: Collection[int], left_out: dict[str, str]
    ) -> dict[str, Layers]:
        """What was measured, in just the layers that the run has at ``site``.

        A layer that did not run is None. One that runs for the first time after the run's layers were
        settled has no room there: it is left out, and ``left_out`` says so.

        Parameters
        ----------
        idle : layers of the site whose block did not run in this step
        """
        measured = {layer for layers in kinds.values() for layer in layers}
        if site not in self._layers:
            recorded = self._recorded_layers(site)
            self._layers[site] = frozenset(measured.union(idle) if recorded is None else recorded)
        for layer in sorted(measured - self._layers[site]):
            left_out[f"{site} of layer {layer}"] = (
                "it ran for the first time when the run's layers were settled, so the run has no room for it"
            )
        return {kind: self._settled(site, kind, layers) for kind, layers in kinds.items()}

    def _settled(self, site: str, kind: str, layers: Layers) -> Layers:
        """The layers of one kind, those that did not run with the sizes they had, or else a neighbour's."""
        layouts = self._layouts.setdefault((site, kind), {})
        layouts |= {layer: layout for layer, (_, layout) in layers.items()}
        whole: dict[int, tuple[State | None, Layout]] = {}
        for layer in sorted(self._layers[site]):
            if layer in layers:
                whole[layer] = layers[layer]
                continue
            neighbour = layers[min(layers, key=lambda other: abs(other - layer))][1]
            whole[layer] = (None, replace(layouts.get(layer, neighbour), tokens=neighbour.tokens))
        return whole

    def groups(
        self, site: str, suites: Mapping[str, Suite], kinds: Mapping[str, Layers], *, keep_raw: bool
    ) -> dict[str, GroupStep | xr.Dataset]:
        """What one step has at ``site``: its statistics, and under ``raw/`` their sums if they are kept.

        Parameters
        ----------
        suites : the estimators, by what they observe
        kinds : what is observed → the layers in which it was
        """
        structure = _structure(suites, kinds, keep_raw)
        previous = self._sites.get(site)
        if previous is not None and previous.structure == structure and previous.groups:
            arrays = _site_arrays(suites, kinds, previous.groups)
            if arrays is not None:
                return {group: GroupStep(previous.groups[group], values) for group, values in arrays.items()}
        parts = _site_parts(site, suites, kinds, keep_raw)
        datasets = {group: _merged(of_group) for group, of_group in parts.items()}
        if not _are_plain(kinds, parts, datasets):
            return dict(datasets)
        declared = {group: DeclaredGroup.of(dataset) for group, dataset in datasets.items()}
        self._sites[site] = _DeclaredSite(structure, declared)
        return {
            group: GroupStep(
                labels, {name: datasets[group].variables[name].values for name in labels.variables}
            )
            for group, labels in declared.items()
        }


def labelled_groups(
    suites_at: Callable[[str], Mapping[str, Suite]],
    states: Mapping[tuple[Any, ...], State],
    layouts: Mapping[tuple[Any, ...], Layout],
    *,
    keep_raw: bool,
    labels: StepLabels,
    idle: Mapping[str, Collection[int]] | None = None,
    left_out: dict[str, str] | None = None,
) -> ProbedStep:
    """What a run records of one step: statistics of every site, and under ``raw/`` their sums if kept.

    Parameters
    ----------
    suites_at : the estimators of a site, by what they observe
    states, layouts : by (site, layer, what is observed)
    labels : of the steps before, which are used again
    idle : site → its layers whose block did not run in this step; they are NaN
    left_out : is told what was measured and cannot be recorded, and why
    """
    sites: dict[str, dict[str, dict[int, tuple[State | None, Layout]]]] = {}
    for key, state in states.items():
        site, layer, kind = key
        sites.setdefault(site, {}).setdefault(kind, {})[layer] = (state, layouts[key])
    groups: dict[str, GroupStep | xr.Dataset] = {}
    left_out = {} if left_out is None else left_out
    for site, kinds in sites.items():
        settled = labels.settled(site, kinds, (idle or {}).get(site, ()), left_out)
        groups |= labels.groups(site, suites_at(site), settled, keep_raw=keep_raw)
    return ProbedStep(groups)


def _structure(suites: Mapping[str, Suite], kinds: Mapping[str, Layers], keep_raw: bool) -> tuple[Any, ...]:
    """Everything that the labels of a site follow from."""
    observed = (
        (
            kind,
            tuple(estimator.identifier for estimator in suites[kind].estimators),
            tuple((layer, layout) for layer, (_, layout) in sorted(layers.items(), key=lambda item: item[0])),
        )
        for kind, layers in kinds.items()
    )
    return (keep_raw, *observed)


def _site_parts(
    site: str, suites: Mapping[str, Suite], kinds: Mapping[str, Layers], keep_raw: bool
) -> dict[str, list[xr.Dataset]]:
    """The site's groups, of each a Dataset for everything that is observed there."""
    path = group_path(site)
    parts = {path: [label_states(suites[kind], layers) for kind, layers in kinds.items()]}
    if keep_raw:
        parts[f"raw/{path}"] = [raw_states(suites[kind], layers) for kind, layers in kinds.items()]
    return parts


def _merged(parts: Sequence[xr.Dataset]) -> xr.Dataset:
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merge(part).assign_attrs(merged.attrs | part.attrs)
    return merged


def _are_plain(
    kinds: Mapping[str, Layers],
    parts: Mapping[str, Sequence[xr.Dataset]],
    datasets: Mapping[str, xr.Dataset],
) -> bool:
    """Whether the arrays of a site are what its estimators give, with nothing padded where layers differ."""
    if any(len(_by_layout(layers)) > 1 for layers in kinds.values()):
        return False
    return all(
        part.coords[name].equals(datasets[group].coords[name])
        for group, of_group in parts.items()
        for part in of_group
        if part is not datasets[group]
        for name in part.coords
    )


def _site_arrays(
    suites: Mapping[str, Suite], kinds: Mapping[str, Layers], declared: Mapping[str, DeclaredGroup]
) -> dict[str, dict[str, np.ndarray]] | None:
    """The numbers of one further step by group and variable; None if they do not fit what is declared."""
    statistics, *raw = declared
    arrays: dict[str, dict[str, np.ndarray]] = {group: {} for group in declared}
    for kind, layers in kinds.items():
        members = sorted(layers)
        layout = layers[members[0]][1]
        stack = _Stack.of(suites[kind], layers, members, layout)
        for _, name, output in stack.outputs():
            arrays[statistics][name] = np.asarray(output.values)
            if not _has_labels(output, name, declared[statistics]):
                return None
        for group in raw:
            arrays[group] |= {name: stack.raw(name) for name in suites[kind].fields(layout)}
    for group, labels in declared.items():
        if arrays[group].keys() != labels.variables.keys():
            return None
        if not all(variable.fits(arrays[group][name]) for name, variable in labels.variables.items()):
            return None
    return arrays


def _has_labels(output: Output, name: str, declared: DeclaredGroup) -> bool:
    """Whether a number still has the dimensions, and the coordinates of its own, that were declared."""
    variable = declared.variables.get(name)
    if variable is None or variable.dims != ("layer", *output.dims):
        return False
    # Coordinates may follow from the data: a histogram's edges, say.
    coordinates = ((labels, declared.labels(dim)) for dim, labels in output.coords.items())
    return all(previous is not None and np.array_equal(labels, previous) for labels, previous in coordinates)


def token_group_states(
    suites_at: Callable[[str], Mapping[str, Suite]],
    states: Mapping[tuple[Any, ...], State],
    layouts: Mapping[tuple[Any, ...], Layout],
    count: int,
    labels: StepLabels,
) -> dict[str, xr.Dataset]:
    """Sums by group of batches, (layer, token_group, …), under ``token_groups/`` and the name of each site.

    Parameters
    ----------
    states : by (site, layer, what is observed, group); a group without tokens may be missing
    layouts : by (site, layer, what is observed)
    count : how many groups
    labels : of the same step, which know a site's layers: one that did not run is NaN
    """
    groups: dict[str, xr.Dataset] = {}
    for site, kind in dict.fromkeys((site, kind) for site, _, kind, _ in states):
        layers = {
            layer: (_by_group(states, (site, layer, kind), count), layouts[site, layer, kind])
            for layer in dict.fromkeys(layer for s, layer, k, _ in states if (s, k) == (site, kind))
        }
        parts = []
        for layout, members in _by_layout(layers).items():
            states_here = [layers[layer][0] for layer in members]
            state = {name: np.stack([own[name] for own in states_here]) for name in states_here[0]}
            fields = suites_at(site)[kind].fields(layout)
            coordinates: dict[str, Any] = {"layer": np.asarray(members)}
            variables: dict[str, Any] = {}
            for name, values in state.items():
                dims = fields[name].dims
                # Single precision for what is by channel: it is nearly all of the bytes.
                stored = values.astype(np.float32) if "channel" in dims else values
                variables[name] = (("layer", "token_group", *dims), stored, {"combine": fields[name].combine})
                coordinates |= _coordinates(dims, values.shape[2:], {}, layout.strata)
            parts.append(xr.Dataset(variables, coordinates))
        groups[f"token_groups/{site}"] = _joined(parts).reindex(layer=labels.layers(site))
    return groups


def _by_group(states: Mapping[tuple[Any, ...], State], key: tuple[Any, ...], count: int) -> State:
    """The states of all groups at one place on a leading axis, 0 where a group saw nothing."""
    of_groups = [states.get((*key, group)) for group in range(count)]
    example = next(state for state in of_groups if state is not None)
    return {
        name: np.stack([np.zeros_like(value) if state is None else state[name] for state in of_groups])
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
        instance = get_estimator(estimator) if isinstance(estimator, str) else estimator
        if f"layout_{instance.observes}" in raw.attrs:
            missing = sorted(set(Suite((instance,)).fields(Layout())) - set(map(str, raw.data_vars)))
            if not missing:
                groups[instance.observes].append(instance)
                continue
            reason = f"it needs the sums {', '.join(missing)}"
        else:
            reason = f"it observes {instance.observes}"
        if estimators is not None:
            raise EstimatorError(
                f"{instance.identifier} cannot be computed at {site!r} from this run: {reason}, which the "
                "run does not keep there; probe again with this estimator"
            )
    steps = []
    for index in range(raw.sizes["step"]):
        sums = raw.isel(step=index)
        parts = [
            _relabelled(Suite(members), sums, raw.attrs[f"layout_{kind}"]) for kind, members in groups.items()
        ]
        steps.append(xr.merge(parts, combine_attrs="override", join="outer", compat="no_conflicts"))
    joined = xr.concat(steps, raw["step"], data_vars="all", coords="minimal", compat="override", join="exact")
    return run.with_texts(joined)


def _of_run(run: Run) -> list[Estimator]:
    """The estimators that a run was made with; JSON made lists of their tuples."""
    by_name = {**run.attrs.get("later_estimators", {}), **run.attrs.get("estimator_parameters", {})}

    def parameters(name: str) -> dict[str, Any]:
        recorded = by_name.get(name, {})
        return {key: tuple(value) if isinstance(value, list) else value for key, value in recorded.items()}

    return [get_estimator(name, **parameters(name)) for name in run.estimators]


def _relabelled(suite: Suite, sums: xr.Dataset, sizes: Sequence[Mapping[str, Any]]) -> xr.Dataset:
    """One step's statistics from its raw sums; padding that joined layers of other sizes is cut off."""
    fixed_labels = suite.coords()
    strata = tuple(map(str, sums["stratum"].values)) if "stratum" in sums.coords else STRATA
    layers: dict[int, tuple[State | None, Layout]] = {}
    for entry in sizes:
        numbers = {key: int(value) for key, value in entry.items() if key != "layers"}
        layout = Layout(**numbers, strata=strata)
        for layer in entry["layers"]:
            state = {}
            for name, spec in suite.fields(layout).items():
                extent = {dim: slice(layout.size(dim)) for dim in spec.dims if dim not in fixed_labels}
                state[name] = sums[name].sel(layer=layer).isel(extent).transpose(*spec.dims).values
            ran = not all(np.isnan(values).all() for values in state.values())
            layers[int(layer)] = (state if ran else None, layout)
    return label_states(suite, layers)
