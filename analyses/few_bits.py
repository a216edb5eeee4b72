"""Questions asked of what runs hold at few bits: which results compare, and what one setting costs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import xarray as xr

from osp_diag.errors import StoreError
from osp_diag.quantizing.results import HOW, ROUND_TO_NEAREST, UNQUANTIZED, results_of

__all__ = ["comparable_results", "perplexity_at"]


def comparable_results(runs: Sequence[Any], scheme: str = ROUND_TO_NEAREST) -> list[xr.Dataset]:
    """Of each run the results under one scheme, all on the same tokens.

    Where the runs share several sets of tokens it is the one on which most settings were measured; of
    equals the one measured last.

    Raises
    ------
    StoreError : a run holds no results, none of this scheme, or none on tokens that all the others share
    """
    every = []
    for run in runs:
        results = results_of(run)
        chosen = results.isel(setting=results["scheme"].values == scheme)
        if not chosen.sizes["setting"]:
            known = ", ".join(dict.fromkeys(map(str, results["scheme"].values)))
            raise StoreError(
                f"the run of {run.attrs.get('model_name', 'unnamed model')} holds no results of the scheme "
                f"{scheme!r}; it has {known}"
            )
        every.append(chosen)
    counts: dict[str, int] = {}
    for results in every:
        for fingerprint in results["token_fingerprint"].values[::-1]:
            counts[str(fingerprint)] = counts.get(str(fingerprint), 0) + 1
    shared = [f for f in counts if all(f in results["token_fingerprint"].values for results in every)]
    if not shared:
        sources = dict.fromkeys(str(results["token_source"].values[-1]) for results in every)
        raise StoreError(
            f"the runs' results at few bits are on different tokens ({' / '.join(sources)}); {HOW}, with the "
            "same text and tokenizer for all"
        )
    best = max(shared, key=counts.__getitem__)
    return [results.isel(setting=results["token_fingerprint"].values == best) for results in every]


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
