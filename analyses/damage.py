"""Which statistic of a model at full precision predicts what few bits do to it.

Every statistic of a run is reduced to one number a checkpoint; a rank correlation over checkpoints then says
how well it orders their damage. Ranks, since damage spans orders of magnitude and no law between the two is
assumed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import xarray as xr
from jaxtyping import Float
from scipy.stats import rankdata

from osp_diag.errors import StoreError, UsageError
from osp_diag.quantizing.results import UNQUANTIZED, notation, results_of
from osp_diag.resampling import interval
from osp_diag.runs.headline import headline_kurtosis
from osp_diag.runs.run import Run
from osp_diag.runs.steps import at_step, step_of
from osp_diag.schema import SINK_EPSILON, SINK_POSITION

__all__ = ["HEADLINE", "damage_table", "rank_correlations", "statistics_of"]

HEADLINE = "osp_excess_kurtosis of hidden states"
"""The headline number: no mean over the layers of one site, so it has a name of its own."""
FEWEST_CHECKPOINTS = 5
"""With fewer, chance orders them as damage does once in 24 times."""

_SELECTED: Mapping[str, object] = {"epsilon": SINK_EPSILON, "sink_position": SINK_POSITION}
_POOLED = ("layer", "head", "key_value_head")
_LABELLED = ("stratum", "block_format", "block_width")
_STRATA = ("all", "rest", "patch")
"""Everything, and ordinary tokens: first tokens and delimiters are in ``all``."""
_NO_STATISTIC = frozenset(
    {"channel", "row", "position", "expert", "columns", "tokens", "token id", "token ids"}
)
"""Units of places and of bare counts, which say how much was measured and where."""


def statistics_of(run: Run) -> dict[str, float]:
    """Every statistic of a run's last step as one number: its mean over layers and heads, and the largest.

    Of what is measured by stratum of tokens all of them and ordinary ones, of block formats each format.
    Statistics by channel, bin or position are left out: they have no one number.

    Returns
    -------
    ``"residual_post osp_excess_kurtosis [rest] mean"`` → value; NaN where a layer's is.
    """
    step = step_of(run)
    numbers = {HEADLINE: headline_kurtosis(run).get("all", np.nan)}
    for site in run.sites:
        for name, values in at_step(run.at(site), step).data_vars.items():
            if values.attrs.get("units") in _NO_STATISTIC or not np.issubdtype(values.dtype, np.number):
                continue
            for label, part in _parts(values):
                words = " ".join(filter(None, (site, str(name), label)))
                numbers[f"{words} mean"] = float(part.mean(skipna=False))
                if part.size > 1:
                    numbers[f"{words} largest"] = float(part.max(skipna=False))
    return numbers


def _parts(values: xr.DataArray) -> Iterator[tuple[str, xr.DataArray]]:
    """The labels by which a statistic is taken apart, with what is left to pool."""
    for dimension, label in _SELECTED.items():
        if dimension in values.dims:
            values = values.sel({dimension: label})
    labelled = [name for name in _LABELLED if name in values.dims]
    if set(values.dims) - set(labelled) - set(_POOLED):
        return
    if not labelled:
        yield "", values
        return
    for position in np.ndindex(*(values.sizes[name] for name in labelled)):
        part = values.isel(dict(zip(labelled, position, strict=True)))
        if "stratum" in labelled and part["stratum"].item() not in _STRATA:
            continue
        yield f"[{', '.join(str(part[name].item()) for name in labelled)}]", part


def damage_table(runs: Mapping[str, Run], lineages: Mapping[str, str] | None = None) -> xr.Dataset:
    """Statistics and damage of checkpoints, each of which has a run with results at few bits.

    Parameters
    ----------
    runs : name of the checkpoint → its run, of a probe, into which ``osp-diag quantize --run`` wrote
    lineages : name → the training that it comes from, if several come from one; by default all are their own

    Returns
    -------
    ``value`` (checkpoint, statistic); ``damage`` (checkpoint, setting), the rise of the negative
    log-likelihood in nats by token, which is the logarithm of the ratio of perplexities; ``divergence``
    (checkpoint, setting); ``perplexity`` (checkpoint), at full precision. What a checkpoint lacks is NaN.
    Of random rotations with several seeds it is the median.

    Raises
    ------
    UsageError : no run
    StoreError : a run without results at few bits
    """
    if not runs:
        raise UsageError("damage_table needs at least one run with results at few bits")
    numbers = {name: statistics_of(run) for name, run in runs.items()}
    results = {name: _results(name, run) for name, run in runs.items()}
    statistics = list(dict.fromkeys(label for row in numbers.values() for label in row))
    settings = list(dict.fromkeys(label for row in results.values() for label in row if label))
    checkpoints = list(runs)

    def column(index: int) -> np.ndarray:
        rows = [[results[name].get(s, (np.nan,) * 2)[index] for s in settings] for name in checkpoints]
        return np.asarray(rows, dtype=np.float64)

    full = {name: results[name][""][0] for name in checkpoints}
    base = np.asarray([full[name] for name in checkpoints])[:, None]
    where = ("checkpoint", "setting")
    return xr.Dataset(
        {
            "value": (
                ("checkpoint", "statistic"),
                [[numbers[name].get(label, np.nan) for label in statistics] for name in checkpoints],
                {"definition": "of the checkpoint at full precision; units are the statistic's own"},
            ),
            "damage": (
                where,
                column(0) - base,
                {"units": "nat", "definition": "log(PPL few bits / PPL full)"},
            ),
            "divergence": (where, column(1), {"units": "nat", "definition": "mean KL(full ‖ few bits)"}),
            "perplexity": (
                "checkpoint",
                np.exp(base[:, 0]),
                {"units": "1", "definition": "at full precision"},
            ),
        },
        coords={
            "checkpoint": checkpoints,
            "statistic": statistics,
            "setting": settings,
            "lineage": ("checkpoint", [(lineages or {}).get(name, name) for name in checkpoints]),
        },
        attrs={"title": "Statistics at full precision and damage at few bits"},
    )


def _results(name: str, run: Run) -> dict[str, tuple[float, float]]:
    """Setting → (negative log-likelihood, divergence); without rounding under the empty name."""
    table = results_of(run)
    rows: dict[str, list[tuple[float, float]]] = {}
    for index in range(table.sizes["setting"]):
        row = table.isel(setting=index)
        bits = tuple(int(row[f"{part}_bits"]) for part in ("weight", "activation", "key_value"))
        full = bits == (UNQUANTIZED,) * 3
        label = "" if full else f"{notation(*bits)} {row['method'].item()}, {row['convention'].item()}"
        numbers = (float(row["negative_log_likelihood"]), float(row["divergence"]))
        rows.setdefault(label, []).append(numbers)
    if "" not in rows:
        raise StoreError(
            f"the run of {name} holds results at few bits, but none without rounding (16-16-16), from which "
            "damage is counted; measure again with `osp-diag quantize CHECKPOINT --run RUN`"
        )
    # Seeds of random rotations: the one in the middle.
    return {label: sorted(seeds)[(len(seeds) - 1) // 2] for label, seeds in rows.items()}


def rank_correlations(
    table: xr.Dataset, *, outcome: str = "damage", resamples: int = 1000, seed: int = 0
) -> xr.Dataset:
    """Spearman's ρ of each statistic with the damage of each setting, over checkpoints.

    ρ is Pearson's correlation of ranks, equal values sharing theirs. Its interval is a bootstrap over
    lineages, since checkpoints of one training are no independent evidence. A statistic that is equal for all
    checkpoints, or missing for one, has none.

    Parameters
    ----------
    table : of :func:`damage_table`
    outcome : ``damage`` or ``divergence``

    Returns
    -------
    ``correlation``, ``low`` and ``high`` (statistic, setting), ``checkpoints`` (setting): how many had the
    damage.

    Raises
    ------
    UsageError : fewer than five checkpoints
    """
    if table.sizes["checkpoint"] < FEWEST_CHECKPOINTS:
        raise UsageError(
            f"rank correlations of {table.sizes['checkpoint']} checkpoints say nothing; give "
            f"{FEWEST_CHECKPOINTS} or more"
        )
    shape = (table.sizes["statistic"], table.sizes["setting"])
    arrays = {name: np.full(shape, np.nan) for name in ("correlation", "low", "high")}
    counts = np.zeros(shape[1], dtype=np.int64)
    for column in range(shape[1]):
        outcomes = table[outcome].values[:, column]
        there = np.isfinite(outcomes)
        counts[column] = there.sum()
        if counts[column] < FEWEST_CHECKPOINTS:
            continue
        values, lineages = table["value"].values[there], table["lineage"].values[there]
        drawn = _draws_of_groups(lineages, resamples, seed)
        # All statistics share the draws: differences between them are not those of the draws.
        correlations = np.stack([_spearman(values[rows], outcomes[there][rows]) for rows in drawn])
        arrays["correlation"][:, column] = correlations[0]
        arrays["low"][:, column], arrays["high"][:, column] = _bounds(correlations)
    dims = ("statistic", "setting")
    definition = f"Spearman's rank correlation with {outcome}, over checkpoints"
    dataset = xr.Dataset(
        {name: (dims, values, {"units": "1", "definition": definition}) for name, values in arrays.items()},
        coords={name: table[name].values for name in dims},
    )
    dataset["checkpoints"] = ("setting", counts, {"definition": "how many the correlation is over"})
    return dataset


def _draws_of_groups(lineages: np.ndarray, resamples: int, seed: int) -> list[np.ndarray]:
    """Rows of checkpoints: all of them first, then those of lineages drawn with replacement."""
    generator = np.random.default_rng(seed)
    members = [np.flatnonzero(lineages == name) for name in dict.fromkeys(lineages)]
    chosen = generator.integers(0, len(members), (resamples, len(members)))
    return [np.arange(len(lineages)), *(np.concatenate([members[i] for i in row]) for row in chosen)]


def _bounds(correlations: Float[np.ndarray, "draw statistic"]) -> Float[np.ndarray, "2 statistic"]:
    """Draws in which a statistic or the outcome does not vary have no correlation and count for none."""
    defined = np.isfinite(correlations[1:]).sum(0)
    bounds = np.full((2, correlations.shape[1]), np.nan)
    enough = defined >= 0.9 * (len(correlations) - 1)
    for index in np.flatnonzero(enough & np.isfinite(correlations[0])):
        column = correlations[:, index]
        bounds[:, index] = interval(column[np.isfinite(column)])
    return bounds


def _spearman(
    values: Float[np.ndarray, "checkpoint statistic"], outcomes: Float[np.ndarray, " checkpoint"]
) -> Float[np.ndarray, " statistic"]:
    missing = ~np.isfinite(values).all(0)
    ranks = rankdata(np.where(missing, 0.0, values), axis=0)
    ranks -= ranks.mean(0)
    other = rankdata(outcomes)
    other -= other.mean()
    norms = np.sqrt((ranks**2).sum(0) * (other**2).sum())
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(norms > 0, other @ ranks / norms, np.nan)
