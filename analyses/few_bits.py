"""Results at few bits that runs hold: which of them compare, and what one setting costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import xarray as xr
from jaxtyping import Bool

from osp_diag.errors import StoreError
from osp_diag.quantizing.results import (
    MEASURING_ADVICE,
    PLAIN_CONVENTION,
    ROUND_TO_NEAREST,
    UNQUANTIZED,
    results_of,
)
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run

__all__ = ["comparable_results", "perplexity_at", "results_by"]


def comparable_results(
    runs: Sequence[Run], method: str = ROUND_TO_NEAREST, convention: str = PLAIN_CONVENTION
) -> list[xr.Dataset]:
    """Of each run the results by one method in one convention, and that without rounding, on the same tokens.

    Where the runs share several sets of tokens it is the one on which most settings were measured; of
    equals the one measured last.

    Raises
    ------
    StoreError : a run holds no results, none by this method, or none on tokens that all the others share
    """
    tables = []
    for run in runs:
        results = results_of(run)
        table = results_by(results, method, convention)
        if table is None:
            pairs = zip(results["method"].values, results["convention"].values, strict=True)
            ways = ", ".join(dict.fromkeys(f"{name} in {rules}" for name, rules in pairs))
            raise StoreError(
                f"the run of {model_name(run.attrs)} holds no results of {method} in the convention "
                f"{convention}; it has {ways}"
            )
        tables.append(table)
    # Why only equal tokens compare: docs/decisions.md, Figures. The latest come first: of equal counts max()
    # takes the first.
    counts: dict[str, int] = {}
    for results in tables:
        for fingerprint in results["token_fingerprint"].values[::-1]:
            counts[str(fingerprint)] = counts.get(str(fingerprint), 0) + 1
    shared = [
        fingerprint
        for fingerprint in counts
        if all(fingerprint in results["token_fingerprint"].values for results in tables)
    ]
    if not shared:
        sources = dict.fromkeys(str(results["token_source"].values[-1]) for results in tables)
        raise StoreError(
            f"the runs' results at few bits are on different tokens ({' / '.join(sources)}); "
            f"{MEASURING_ADVICE}, with the same text and tokenizer for all"
        )
    best = max(shared, key=counts.__getitem__)
    return [results.isel(setting=results["token_fingerprint"].values == best) for results in tables]


def results_by(results: xr.Dataset, method: str, convention: str) -> xr.Dataset | None:
    """The rows of one method in one convention, and that without rounding; None where it has none."""
    chosen = (results["method"].values == method) & (results["convention"].values == convention)
    if not chosen.any():
        return None
    # Without rounding all methods are one.
    return results.isel(setting=chosen | _at(results, UNQUANTIZED, UNQUANTIZED, UNQUANTIZED))


def perplexity_at(
    results: xr.Dataset, weight_bits: int, activation_bits: int, key_value_bits: int = UNQUANTIZED
) -> float:
    """The perplexity of one setting, of several seeds the median; NaN where it was not measured.

    Parameters
    ----------
    results : by one method, as :func:`comparable_results` gives them
    """
    at = _at(results, weight_bits, activation_bits, key_value_bits)
    return float(np.median(results["perplexity"].values[at])) if at.any() else math.nan


def _at(
    results: xr.Dataset, weight_bits: int, activation_bits: int, key_value_bits: int
) -> Bool[np.ndarray, " setting"]:
    return (
        (results["weight_bits"].values == weight_bits)
        & (results["activation_bits"].values == activation_bits)
        & (results["key_value_bits"].values == key_value_bits)
    )
