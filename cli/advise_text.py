"""What ``osp-diag advise`` prints: where few bits hurt, what was tried against it, and what to do."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.cli.quantize_text import aligned
from osp_diag.quantizing.advice import WORTHWHILE, Advice, Trial
from osp_diag.quantizing.methods import method_named
from osp_diag.quantizing.results import perplexity_of
from osp_diag.wording import listed, number

__all__ = ["as_dictionary", "as_text"]


def as_text(
    advice: Advice, errors: xr.Dataset, spared: xr.Dataset, name: str, source: str, notes: Sequence[str]
) -> str:
    """Lines for a terminal.

    Parameters
    ----------
    errors, spared : what :func:`~osp_diag.quantizing.layer_errors.layer_errors` and
        :func:`~osp_diag.quantizing.spared_channels.spared_channels` measured
    name, source : of the model, and of the evaluated tokens
    notes : one sentence each
    """
    opening = (
        f"{name} at {advice.setting}, rounded to nearest, convention {advice.convention}: perplexity "
        f"{number(advice.perplexity)} becomes {number(_perplexity(advice, advice.damage))}, KL to 16-16-16 "
        f"{number(advice.divergence)} nat ({advice.tokens:,} tokens, {source})"
    )
    own = dict.fromkeys([*advice.notes, *(f"{t.name}: {note}" for t in advice.trials for note in t.notes)])
    lines = [
        opening,
        "",
        *_where(advice.sensitivity, errors, spared),
        "",
        *_tried(advice),
        "",
        _verdict(advice),
    ]
    return "\n".join([*lines, *(f"Note: {note}" for note in (*own, *notes))])


def _perplexity(advice: Advice, damage: float) -> float:
    return perplexity_of(math.log(advice.perplexity) + damage)


def _where(parts: xr.Dataset, errors: xr.Dataset, spared: xr.Dataset) -> list[str]:
    """The parts that cost most, the layers in which the error grows, and who carries it."""
    overall = parts["divergence_all_layers"]
    order = np.argsort(-np.nan_to_num(overall.values, nan=-np.inf))[:3]
    lines = ["Rounded alone, cost most (KL, nat; in brackets the layer that costs most):"]
    lines.append(", ".join(_part(parts, str(overall["part"].values[index])) for index in order))
    relative, local = errors["relative_error"].values, errors["local_error"].values
    worst = int(np.argmax(local))
    lines.append(
        f"Error of block outputs: {number(relative[-1])} of their square after the last layer; rounding adds "
        f"most in layer {worst} ({number(local[worst])})."
    )
    shares = errors["error_by_channel"].values[-1]
    channels = np.argsort(-shares)[:3]
    at = errors["error_by_position"].values[-1]
    lines.append(
        "There, of the squared error, "
        + ", ".join(f"channel {channel} carries {shares[channel]:.0%}" for channel in channels)
        + f"; the first token errs by {number(at[0])}, the others by {number(float(at[1:].mean()))}."
    )
    curve = zip(spared["channels"].values, spared["divergence"].values, spared["share"].values, strict=True)
    points = [f"{number(value)} with {int(k)} ({share:.0%} of the weights)" for k, value, share in curve]
    lines.append(f"KL with the hottest channels of every input in 16 bits: {', '.join(points)}.")
    return lines


def _part(parts: xr.Dataset, name: str) -> str:
    row = parts.sel(part=name)
    values = row["divergence"].values
    layer = f" ({int(row['layer'].values[np.nanargmax(values)])})" if np.isfinite(values).any() else ""
    return f"{name} {number(float(row['divergence_all_layers']))}{layer}"


def _tried(advice: Advice) -> list[str]:
    if not advice.trials:
        return [f"Nothing fits within {advice.budget:.1%} of the blocks' weights, so nothing was tried."]
    rows = [["left in 16 bits", "weights", "perplexity", "KL", "saved", "95% interval"]]
    rows += [
        [
            trial.name,
            f"{trial.share:.1%}",
            number(_perplexity(advice, trial.damage)),
            f"{number(trial.divergence)} nat",
            *_saved(trial, advice.divergence),
        ]
        for trial in advice.trials
    ]
    return [f"Tried, within {advice.budget:.1%} of the blocks' weights:", *aligned(rows)]


def _saved(trial: Trial, divergence: float) -> list[str]:
    if not divergence > 0:
        return ["", ""]
    low, high = trial.saved_low / divergence, trial.saved_high / divergence
    interval = f"{low:.0%} to {high:.0%}" if math.isfinite(low) and math.isfinite(high) else ""
    return [f"{trial.saved / divergence:.0%}", interval]


def _verdict(advice: Advice) -> str:
    best = advice.best
    if best is None:
        return (
            f"Nothing helps: no change that was tried saves {WORTHWHILE:.0%} of the divergence beyond "
            "chance. Take more bits, a larger --budget, or other --methods."
        )
    effect = (
        f"KL {number(advice.divergence)} becomes {number(best.divergence)} nat, perplexity "
        f"{number(_perplexity(advice, advice.damage))} becomes {number(_perplexity(advice, best.damage))}"
    )
    if best.method != "rtn":
        return f"Do: {method_named(best.method).title}. {effect}, with nothing in 16 bits."
    listing = f" ({listed(best.linears, most=8)})" if best.linears else ""
    return f"Keep in 16 bits: {best.name}{listing}. {effect}."


def as_dictionary(
    advice: Advice, errors: xr.Dataset, spared: xr.Dataset, notes: Sequence[str]
) -> dict[str, Any]:
    """Plain values that JSON knows; what is not finite is null."""
    best = advice.best
    return {
        "setting": str(advice.setting),
        "convention": advice.convention,
        "budget": advice.budget,
        "tokens": advice.tokens,
        "perplexity": advice.perplexity,
        "damage": _plain(advice.damage),
        "divergence": _plain(advice.divergence),
        "advice": None if best is None else best.name,
        "trials": [_trial(trial, advice) for trial in advice.trials],
        "sensitivity": _table(advice.sensitivity),
        "layer_errors": _table(errors),
        "spared_channels": _table(spared),
        "notes": [*advice.notes, *notes],
    }


def _trial(trial: Trial, advice: Advice) -> dict[str, Any]:
    return {
        "name": trial.name,
        "method": trial.method,
        "helps": trial.helps(advice.divergence),
        "share": trial.share,
        **{
            name: _plain(getattr(trial, name))
            for name in ("damage", "divergence", "saved", "saved_low", "saved_high")
        },
        "linears": list(trial.linears),
        "channels": {path: channels.tolist() for path, channels in trial.channels.items()},
        "notes": list(trial.notes),
    }


def _table(dataset: xr.Dataset) -> dict[str, Any]:
    variables = {**dataset.coords, **dataset.data_vars}
    return {str(name): _plain(values.values.tolist()) for name, values in variables.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
