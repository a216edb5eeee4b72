"""Results at few bits that runs hold: which of them compare, and what one setting costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import xarray as xr

from osp_diag.errors import StoreError
from osp_diag.quantizing.results import MEASURING_ADVICE, ROUND_TO_NEAREST, UNQUANTIZED, results_of
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run

__all__ = ["comparable_results", "perplexity_at"]


def comparable_results(runs: Sequence[Run], scheme: str = ROUND_TO_NEAREST) -> list[xr.Dataset]:
    """Of each run the results under one scheme, all on the same tokens.

    Where the runs share several sets of tokens it is the one on which most settings were measured; of
    equals the one measured last.

    Raises
    ------
    StoreError : a run holds no results, none of this scheme, or none on tokens that all the others share
    """
    tables = []
    for run in runs:
        results = results_of(run)
        table = results.isel(setting=results["scheme"].values == scheme)
        if not table.sizes["setting"]:
            schemes = ", ".join(dict.fromkeys(map(str, results["scheme"].values)))
            raise StoreError(
                f"the run of {model_name(run.attrs)} holds no results of the scheme {scheme!r}; it has "
                f"{schemes}"
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


def perplexity_at(
    results: xr.Dataset, weight_bits: int, activation_bits: int, key_value_bits: int = UNQUANTIZED
) -> float:
    """The perplexity of one setting; NaN where it was not measured."""
    at = (
        (results["weight_bits"].values == weight_bits)
        & (results["activation_bits"].values == activation_bits)
        & (results["key_value_bits"].values == key_value_bits)
    )
    return float(results["perplexity"].values[at][-1]) if at.any() else math.nan
