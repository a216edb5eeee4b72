"""The effects of interventions, as labelled data and as text."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.interventions.arms import UNTOUCHED, Arm
from osp_diag.interventions.bootstrap import resampled
from osp_diag.resampling import BOUNDS, draws, interval, ratio
from osp_diag.schema import KURTOSIS, SINK_EPSILON, SINK_POSITION, group_path, in_site_order
from osp_diag.wording import number

__all__ = ["Effects", "effects_of"]

_LOSS = {"units": "nats/token", "long_name": "loss", "definition": "mean of −log p(x_t | x_<t)"}
_KL = {
    "units": "nats/token",
    "long_name": "divergence of the predictions",
    "definition": "mean over positions of KL(p ‖ q) of the next token, p of the untouched model",
}
_AVERAGED = ("layer", "head", "key_value_head")
_INTERVAL = "95% interval, percentiles of a bootstrap over sequences"


@dataclass(frozen=True)
class Effects:
    """What interventions changed.

    Attributes
    ----------
    tree : the root has ``loss`` of the untouched model; by ``intervention`` ``loss_change`` and ``kl``;
        and by (intervention, statistic) ``change``, with ``untouched`` (statistic), of the mean over layers
        and heads. Below, a group a site has the statistics of the untouched model by layer, head and stratum
        under their own names, and beside each ``NAME_change`` (intervention, layer …). To each change belongs
        a ``…_interval`` (…, bound). Units and definitions are attributes
    """

    tree: xr.DataTree

    @property
    def interventions(self) -> list[str]:
        """Their names, as the command line writes them."""
        return [str(name) for name in self.tree.to_dataset()["intervention"].values]

    def rows(self) -> list[dict[str, Any]]:
        """One dictionary an intervention, for JSON; what is not finite is None."""
        root = self.tree.to_dataset()
        rows = []
        for name in self.interventions:
            one = root.sel(intervention=name)
            rows.append(
                {
                    "intervention": name,
                    "untouched_loss": _plain(root["loss"]),
                    "loss_change": _with_interval(one, "loss_change"),
                    "kl": _with_interval(one, "kl"),
                    "statistics": [
                        {
                            "statistic": str(statistic),
                            "untouched": _plain(root["untouched"].sel(statistic=statistic)),
                            **_with_interval(one.sel(statistic=statistic), "change"),
                        }
                        for statistic in root["statistic"].values
                    ],
                    "notes": list(self.tree.attrs.get("notes", ())),
                }
            )
        return rows

    def table(self) -> xr.Dataset:
        """The root alone, as a netCDF file can hold it: attributes that are no text are written as JSON."""
        root = self.tree.to_dataset()
        root.attrs = {
            name: value if isinstance(value, (str, int, float)) else json.dumps(value, default=str)
            for name, value in root.attrs.items()
            if not isinstance(value, bool)
        }
        return root

    def __str__(self) -> str:
        return self.text()

    def text(self) -> str:
        """A table of the interventions, and the statistics that people quote under each."""
        root, attributes = self.tree.to_dataset(), self.tree.attrs
        lines = [
            f"{attributes.get('model_name', 'model')}: loss {float(root['loss']):.4f} nats/token untouched, "
            f"{attributes.get('tokens', 0):,} tokens; change [95% interval over sequences]",
        ]
        for name in self.interventions:
            one = root.sel(intervention=name)
            lines += [
                f"{name}",
                f"  loss {_change(one, 'loss_change')}, KL {_change(one, 'kl', signed=False)} nats/token",
            ]
            for statistic in _quoted(root):
                of_statistic = one.sel(statistic=statistic)
                before = number(float(root["untouched"].sel(statistic=statistic)))
                lines.append(f"  {statistic}: {before}, change {_change(of_statistic, 'change')}")
        return "\n".join([*lines, *(f"Note: {note}" for note in attributes.get("notes", ()))])


def _quoted(root: xr.Dataset) -> list[str]:
    """The statistics in the text: kurtosis and the largest token of the stream, and sinks."""
    sinks = f"attention/sink_rate[epsilon={SINK_EPSILON:g},sink_position={SINK_POSITION}]"
    beginnings = (f"residual_post/{KURTOSIS}@", "residual_post/token_peak@", sinks)
    names = [str(name) for name in root["statistic"].values if str(name).startswith(beginnings)]
    return [name for name in names if not name.endswith(("@all", "@delimiter"))]


def _plain(value: Any) -> float | None:
    return float(value) if np.isfinite(float(value)) else None


def _with_interval(dataset: xr.Dataset, name: str) -> dict[str, float | None]:
    bounds = dataset[f"{name}_interval"]
    return {"change" if name != "kl" else "value": _plain(dataset[name])} | {
        bound: _plain(bounds.sel(bound=bound)) for bound in BOUNDS
    }


def _change(dataset: xr.Dataset, name: str, *, signed: bool = True) -> str:
    def written(value: float) -> str:
        return f"{'+' if signed and value > 0 else ''}{number(value)}"

    low, high = (float(dataset[f"{name}_interval"].sel(bound=bound)) for bound in BOUNDS)
    text = written(float(dataset[name]))
    return text if np.isnan(low) else f"{text} [{written(low)}, {written(high)}]"


def effects_of(
    arms: Mapping[str, Arm], *, resamples: int, seed: int, attributes: Mapping[str, Any]
) -> Effects:
    """The numbers and intervals of what was measured.

    Parameters
    ----------
    arms : name of the intervention → its sums, the untouched model under the empty name
    resamples, seed : of the bootstrap, whose draws are the same for all arms
    attributes : of the tree
    """
    names = [name for name in arms if name != UNTOUCHED]
    taken = draws(len(arms[UNTOUCHED].states), resamples if len(arms[UNTOUCHED].states) > 1 else 0, seed)
    losses = {name: ratio(*_columns(arm.surprises), taken) for name, arm in arms.items()}
    divergences = {name: ratio(*_columns(arms[name].divergences), taken) for name in names}
    changes = np.stack([losses[name] - losses[UNTOUCHED] for name in names], axis=1)
    of_kl = np.stack([divergences[name] for name in names], axis=1)
    variables: dict[str, Any] = {"loss": ((), losses[UNTOUCHED][0], _LOSS)}
    of_change = _LOSS | {"long_name": "change of the loss"}
    variables |= _labelled("loss_change", ("intervention",), changes, of_change)
    variables |= _labelled("kl", ("intervention",), of_kl, _KL)
    groups: dict[str, xr.Dataset] = {}
    flat: dict[str, list[Any]] = defaultdict(list)
    for site in in_site_order(dict.fromkeys(key[0] for key in arms[UNTOUCHED].layouts)):
        untouched = _of_site(arms[UNTOUCHED], site, taken)
        others = {name: _of_site(arms[name], site, taken).reindex_like(untouched) for name in names}
        by_arm = {UNTOUCHED: untouched, **others}
        groups[group_path(site)] = _site_effects(by_arm, names)
        _add_means(flat, site, by_arm)
    coordinates = {"intervention": names, "bound": list(BOUNDS), "statistic": flat["statistic"]}
    unit = ("statistic", flat["units"], {"long_name": "units of the statistic"})
    root = xr.Dataset(variables | _means(flat), {**coordinates, "unit": unit})
    tree = xr.DataTree.from_dict({"/": root, **{f"/{path}": data for path, data in groups.items()}})
    tree.attrs |= dict(attributes)
    return Effects(tree)


def _columns(pairs: list[tuple[float, int]]) -> tuple[np.ndarray, np.ndarray]:
    totals, numbers = np.asarray(pairs, dtype=np.float64).T
    return totals, numbers


def _labelled(
    name: str, dims: tuple[str, ...], values: np.ndarray, attributes: Mapping[str, Any]
) -> dict[str, Any]:
    """The number of the first draw, and the interval of the others."""
    bounds = np.moveaxis(interval(values), 0, -1)
    of_bounds = {**attributes, "long_name": f"{attributes.get('long_name', name)}: {_INTERVAL}"}
    return {
        name: (dims, values[0], dict(attributes)),
        f"{name}_interval": ((*dims, "bound"), bounds, of_bounds),
    }


def _of_site(arm: Arm, site: str, taken: np.ndarray) -> xr.Dataset:
    """All statistics of a site, (draw, layer, …)."""
    by_kind = []
    for (place, kind), suite in arm.suites.items():
        if place != site:
            continue
        keys = sorted(key for key in arm.layouts if (key[0], key[2]) == (site, kind))
        layers = [
            resampled(
                suite, key, [states[key] for states in arm.states], arm.layouts[key], taken
            ).expand_dims(layer=[key[1]])
            for key in keys
        ]
        by_kind.append(xr.concat(layers, "layer", join="outer"))
    whole = xr.merge(by_kind, compat="override", join="outer") if by_kind else xr.Dataset()
    return whole.transpose("draw", "layer", ...) if by_kind else whole


def _values(by_arm: Mapping[str, xr.Dataset], name: str) -> np.ndarray:
    """(draw, arm, layer, …) of one statistic, the untouched model first; NaN where an arm has it not."""
    first = by_arm[UNTOUCHED][name]
    nothing = np.full(first.shape, np.nan)
    arrays = [dataset[name].values if name in dataset else nothing for dataset in by_arm.values()]
    return np.stack(arrays, axis=1)


def _site_effects(by_arm: Mapping[str, xr.Dataset], names: list[str]) -> xr.Dataset:
    untouched = by_arm[UNTOUCHED]
    variables: dict[Any, Any] = dict(untouched.isel(draw=0, drop=True).data_vars)
    for name, of_draws in untouched.data_vars.items():
        values = _values(by_arm, str(name))
        dims = ("intervention", *(str(dim) for dim in of_draws.dims[1:]))
        attributes = {key: of_draws.attrs[key] for key in ("units", "definition") if key in of_draws.attrs}
        attributes["long_name"] = f"change of {name}"
        variables |= _labelled(f"{name}_change", dims, values[:, 1:] - values[:, :1], attributes)
    coordinates = {name: untouched[name] for name in untouched.coords if name != "draw"}
    return xr.Dataset(variables, {**coordinates, "intervention": names, "bound": list(BOUNDS)})


def _add_means(flat: dict[str, list[Any]], site: str, by_arm: Mapping[str, xr.Dataset]) -> None:
    """The mean over layers and heads of every statistic, in every draw: entries of the long list."""
    for name, of_draws in by_arm[UNTOUCHED].data_vars.items():
        dims = [str(dim) for dim in of_draws.dims[1:]]
        values = _values(by_arm, str(name))
        over = tuple(axis for axis, dim in enumerate(dims, start=2) if dim in _AVERAGED)
        # Where a layer has none of the tokens, the others are averaged.
        counted = np.isfinite(values)
        with np.errstate(invalid="ignore"):
            means = np.where(counted, values, 0).sum(over) / counted.sum(over)
        rest = [dim for dim in dims if dim not in _AVERAGED]
        places = itertools.product(*(of_draws[dim].values.tolist() for dim in rest))
        columns = means.reshape(*means.shape[:2], -1)
        for index, place in enumerate(places):
            flat["statistic"].append(_label(f"{site}/{name}", dict(zip(rest, place, strict=True))))
            flat["values"].append(columns[..., index])
            flat["units"].append(str(of_draws.attrs.get("units", "")))


def _label(name: str, place: dict[str, Any]) -> str:
    stratum = f"@{place.pop('stratum')}" if "stratum" in place else ""
    others = [
        f"{dim}={value:g}" if isinstance(value, float) else f"{dim}={value}" for dim, value in place.items()
    ]
    return f"{name}[{','.join(others)}]{stratum}" if others else f"{name}{stratum}"


def _means(flat: Mapping[str, list[Any]]) -> dict[str, Any]:
    values = np.stack(flat["values"], axis=1)  # (draw, statistic, arm)
    changes = np.moveaxis(values[:, :, 1:] - values[:, :, :1], 2, 1)
    attributes = {
        "long_name": "change of a statistic's mean over layers and heads",
        "definition": "under the intervention minus untouched, on the same tokens",
        "units": "those of the statistic, see `unit`",
    }
    variables = _labelled("change", ("intervention", "statistic"), changes, attributes)
    before = {**attributes, "long_name": "a statistic's mean over layers and heads, untouched"}
    before["definition"] = "of the untouched model"
    variables["untouched"] = (("statistic",), values[0, :, 0], before)
    return variables
