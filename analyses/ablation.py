"""The ablation of Outlier-Safe Pre-Training (Park et al. 2025, Table 2) from finished runs, as one table."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import xarray as xr

from osp_diag.analyses.ablation_text import as_markdown, as_text
from osp_diag.analyses.few_bits import perplexity_at, results_by
from osp_diag.analyses.recipes import config_of, recipe_labels
from osp_diag.analyses.summary.numbers import sink_rate_at
from osp_diag.errors import StoreError, UsageError
from osp_diag.estimators.token_kurtosis import gaussian_floor
from osp_diag.quantizing.results import (
    FEW_BITS,
    MAXIMUM_SITES,
    OSP_CONVENTION,
    PLAIN_CONVENTION,
    ROUND_TO_NEAREST,
    UNQUANTIZED,
    notation,
)
from osp_diag.quantizing.tables import TABLES
from osp_diag.runs.headline import hidden_states
from osp_diag.runs.run import Run
from osp_diag.schema import HIDDEN_STATES, PROTOCOLS, SINK_EPSILON, SINK_POSITION, STRATA

if TYPE_CHECKING:
    from osp_diag.quantizing.exported import CheckpointMeasurements

__all__ = ["ablation_table", "as_markdown", "as_text"]

FINAL_SHARE = 0.02
"""Share of the recorded losses whose mean is the final one: a single batch is too noisy."""

EXPORTED, LAST_PROBE = "exported checkpoint", "last probe of the run"

_COORDINATES: dict[str, tuple[str, ...]] = {
    "protocol": PROTOCOLS,
    "stratum": STRATA,
    "reduction": ("mean", "largest"),
    "site": MAXIMUM_SITES,
    "precision": ("full", notation(*FEW_BITS)),
    "ffn_hadamard": tuple(TABLES[2].methods.values()),
    "bits": tuple(map(str, TABLES[2].settings)),
}
_COLUMNS: dict[str, tuple[tuple[str, ...], str]] = {
    "osp_kurtosis": (
        ("protocol", "stratum", "reduction"),
        "osp_excess_kurtosis/1 of hidden states: embedding, outputs of all blocks but the last, final norm",
    ),
    "osp_kurtosis_over_floor": (
        ("protocol", "stratum", "reduction"),
        "osp_kurtosis / floor: 1 is what random noise scores",
    ),
    "floor": ((), "osp_excess_kurtosis of Gaussian noise of the model's width"),
    "ceiling": ((), "osp_excess_kurtosis of a token with one non-zero channel, d − 3"),
    "max_median_ratio": (
        ("stratum", "reduction"),
        "max_j |x_j| / median_j |x_j| of a token of a block's output",
    ),
    "absolute_maximum": (("site", "reduction"), "largest |x| of all tokens and channels"),
    "sink_rate": (
        ("reduction",),
        "share of sequences and heads whose first token gets more than ε of all attention (Gu et al. 2025)",
    ),
    "loss": ((), f"training loss, mean of the last {FINAL_SHARE:.0%} of its records, nats"),
    "held_out_loss": ((), "loss of the run's own held-out tokens, its last record, nats"),
    "perplexity": (("precision",), "of the held-out tokens, by the exported checkpoint"),
    "paper_perplexity": (
        ("ffn_hadamard", "bits"),
        "of the held-out tokens at bits of weights, activations, keys and values, rounded to nearest as "
        "the OSP release's scripts do; without and with a Hadamard rotation of the FFN's hidden state",
    ),
    "tokens_per_second": ((), "of training, median of its records"),
}


@dataclass
class _Row:
    """One recipe: its values, and why others are absent."""

    values: dict[str, Any] = field(default_factory=dict)
    coordinates: dict[str, Any] = field(default_factory=dict)
    absent: list[str] = field(default_factory=list)


def ablation_table(
    runs: Mapping[str, Run], checkpoints: Mapping[str, CheckpointMeasurements], tokens: int
) -> xr.Dataset:
    """What recipes did to outliers, sinks, loss and 4-bit perplexity, a row a recipe.

    Activations are those of the exported checkpoint where it was measured: on real sequences, and as the
    released OSP script feeds them (protocol ``osp-published``). A run without one gives its last probe
    instead, and lacks what only a checkpoint can tell. Which of the two it was is in the coordinate
    ``measured_on``.

    Parameters
    ----------
    runs : any key → the run of a finished training, whose attribute ``config`` says the recipe
    checkpoints : the same keys → what :func:`osp_diag.quantizing.exported.measure_checkpoint` measured on the
        same tokens for all; keys may be missing
    tokens : how many tokens those were

    Returns
    -------
    A Dataset with the dimension ``recipe`` (the paper's order and names, then others) and, of each variable,
    the attribute ``definition``. ``reduction`` is the mean over layers (for the kurtosis, over hidden states)
    and the largest of them. A value that could not be had is NaN; the coordinate ``absent`` says why.

    Raises
    ------
    UsageError : no run, or a checkpoint of no run
    StoreError : a run that does not say its recipe
    """
    foreign = [key for key in checkpoints if key not in runs]
    if not runs or foreign:
        raise UsageError(
            f"ablation_table: there is no run named {', '.join(foreign)}; the runs are {', '.join(runs)}"
            if foreign
            else "ablation_table needs at least one run"
        )
    configs = {key: config_of(run) for key, run in runs.items()}
    labels = recipe_labels(configs)
    rows = {label: _row(runs[key], configs[key], checkpoints.get(key)) for key, label in labels.items()}
    return _table(rows, list(labels), tokens)


def _row(run: Run, config: Mapping[str, Any], checkpoint: CheckpointMeasurements | None) -> _Row:
    row = _Row()
    _training(row, run, config)
    if checkpoint is None:
        attention = str(config.get("model.attention", "softmax"))
        reason = (
            "no exported checkpoint was given"
            if attention == "softmax"
            else f"attention with {attention.replace('_', ' ')} cannot be exported to a Hugging Face Llama"
        )
        row.absent.append(f"{reason}, so perplexity and the osp-published protocol were not measured")
        _activations(row, run)
        row.coordinates["measured_on"] = LAST_PROBE
        return row
    row.coordinates["measured_on"] = EXPORTED
    _activations(row, checkpoint.sequence)
    _kurtosis(row, checkpoint.published)
    plain = results_by(checkpoint.few_bits, ROUND_TO_NEAREST, PLAIN_CONVENTION)
    if plain is not None:
        perplexities = [perplexity_at(plain, *bits) for bits in ((UNQUANTIZED, UNQUANTIZED), FEW_BITS)]
        row.values["perplexity"] = xr.DataArray(perplexities, {"precision": list(_COORDINATES["precision"])})
    row.values["paper_perplexity"] = xr.DataArray(
        [_paper_line(checkpoint.few_bits, method) for method in TABLES[2].methods],
        {name: list(_COORDINATES[name]) for name in ("ffn_hadamard", "bits")},
        ("ffn_hadamard", "bits"),
    )
    return row


def _paper_line(few_bits: xr.Dataset, method: str) -> list[float]:
    results = results_by(few_bits, method, OSP_CONVENTION)
    if results is None:
        return [math.nan] * len(TABLES[2].settings)
    return [perplexity_at(results, *setting.bits) for setting in TABLES[2].settings]


# -- training --------------------------------------------------------------------------------------------


def _training(row: _Row, run: Run, config: Mapping[str, Any]) -> None:
    series = run.series
    records = {}
    for name in ("loss", "held_out_loss", "tokens_per_second"):
        values = series[name].values if name in series else np.empty(0)
        finite = values[~np.isnan(values)]
        if finite.size:
            records[name] = finite
        elif name != "held_out_loss":
            row.absent.append(f"the run holds no series {name}")
    if "loss" in records:
        row.values["loss"] = float(records["loss"][-math.ceil(FINAL_SHARE * records["loss"].size) :].mean())
    if "held_out_loss" in records:
        row.values["held_out_loss"] = float(records["held_out_loss"][-1])
    if "tokens_per_second" in records:
        row.values["tokens_per_second"] = float(np.median(records["tokens_per_second"]))
    steps = [int(part[-1]) for part in (run.steps, series["step"].values) if len(part)]
    row.coordinates |= {"seed": int(config.get("seed", -1)), "step": max(steps, default=0)}


# -- activations -----------------------------------------------------------------------------------------


def _activations(row: _Row, run: Run) -> None:
    """What the last step of a run on real sequences says of its activations and its attention."""
    _kurtosis(row, run)
    row.coordinates["sequence_length"] = int(run.attrs.get("sequence_length", 0))
    # Of each stratum the mean over layers, with the largest layer beside it.
    ratio = _at(row, run, "residual_post", "max_median_ratio")
    if ratio is not None:
        row.values["max_median_ratio"] = _reduced(ratio, "layer")
    maxima = {site: _at(row, run, site, "absolute_maximum") for site in MAXIMUM_SITES}
    parts = [
        _reduced(values.sel(stratum="all", drop=True), "layer").assign_coords(site=site)
        for site, values in maxima.items()
        if values is not None
    ]
    if parts:
        row.values["absolute_maximum"] = xr.concat(parts, "site")
    sinks = _at(row, run, "attention", "sink_rate")
    if sinks is not None:
        rate = sink_rate_at(sinks)
        if rate is None:
            row.absent.append(f"the sink rate was not measured at ε = {SINK_EPSILON:g}")
        else:
            row.values["sink_rate"] = _reduced(rate.mean("head"), "layer")


def _kurtosis(row: _Row, run: Run) -> None:
    protocol, width = str(run.attrs.get("protocol")), int(run.attrs["hidden_size"])
    sites = {site: run.at(site).isel(step=-1) for site in HIDDEN_STATES if site in run.sites}
    states, problem = hidden_states(sites, run.declared_absent)
    # Why a mean with a part missing is none: docs/decisions.md, The house.
    if not states:
        row.absent.append(problem)
        return
    parts = [state.drop_vars(["layer", "step"], errors="ignore").load() for state in states]
    kurtosis = _reduced(xr.concat(parts, "state"), "state").assign_coords(protocol=protocol)
    other_protocols = row.values.get("osp_kurtosis")
    row.values["osp_kurtosis"] = (
        kurtosis.expand_dims("protocol")
        if other_protocols is None
        else xr.concat([other_protocols, kurtosis], "protocol")
    )
    # 1 is what Gaussian noise of this width scores: docs/decisions.md, Estimators.
    floor = gaussian_floor(width)
    row.values["osp_kurtosis_over_floor"] = row.values["osp_kurtosis"] / floor
    row.values |= {"floor": floor, "ceiling": float(width - 3)}


def _at(row: _Row, run: Run, site: str, name: str) -> xr.DataArray | None:
    """A statistic at the run's last step; None, and a remark, where it has none."""
    try:
        values: xr.DataArray = run.at(site)[name].isel(step=-1).load()
    except (StoreError, KeyError) as problem:
        reason = problem if isinstance(problem, StoreError) else f"{name} was not measured at {site}"
        row.absent.append(str(reason))
        return None
    return values.drop_vars("step", errors="ignore")


def _reduced(values: xr.DataArray, dim: str) -> xr.DataArray:
    """Mean over ``dim``, and the largest along it."""
    return xr.concat([values.mean(dim), values.max(dim)], "reduction").assign_coords(
        reduction=list(_COORDINATES["reduction"])
    )


# -- the table -------------------------------------------------------------------------------------------


def _table(rows: Mapping[str, _Row], keys: list[str], tokens: int) -> xr.Dataset:
    coordinates = {name: list(labels) for name, labels in _COORDINATES.items()}
    variables = {}
    for name, (dims, definition) in _COLUMNS.items():
        blank = xr.DataArray(np.nan, {dim: coordinates[dim] for dim in dims}, dims)
        cells = [_cell(row.values.get(name), blank) for row in rows.values()]
        variables[name] = xr.concat(cells, "recipe").assign_attrs(definition=definition)
    table = xr.Dataset(variables, coords={"recipe": list(rows), "run": ("recipe", keys)})
    for name in ("seed", "step", "sequence_length", "measured_on"):
        entries = [row.coordinates.get(name) for row in rows.values()]
        table = table.assign_coords({name: ("recipe", entries)})
    table = table.assign_coords(absent=("recipe", ["; ".join(row.absent) for row in rows.values()]))
    table = table.assign_coords(epsilon=SINK_EPSILON, sink_position=SINK_POSITION)
    table.attrs = {
        "title": "Ablation of Outlier-Safe Pre-Training",
        "source": "Park et al. 2025, Outlier-Safe Pre-Training, Table 2; https://arxiv.org/abs/2506.19697",
        "tokens": tokens,
        "quantization": (
            f"{notation(*FEW_BITS)}: round to nearest, every Linear of the blocks; weights "
            "symmetric per output channel, activations asymmetric per token, ranges from minimum and maximum"
        ),
    }
    return table


def _cell(value: Any, blank: xr.DataArray) -> xr.DataArray:
    """One recipe's entry of a column, NaN where a part of it is missing."""
    if isinstance(value, xr.DataArray):
        return value.astype(np.float64).reindex_like(blank).transpose(*blank.dims).drop_attrs()
    return blank if value is None else blank.copy(data=np.full(blank.shape, value))
