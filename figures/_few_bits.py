"""What the figures of few-bit results share: which results, and what their captions say of them."""

from __future__ import annotations

import xarray as xr

from osp_diag.analyses.few_bits import comparable_results
from osp_diag.errors import StoreError
from osp_diag.quantizing.methods import method_named
from osp_diag.quantizing.results import (
    MEASURING_ADVICE,
    PLAIN_CONVENTION,
    ROUND_TO_NEAREST,
    partial_rounding,
)
from osp_diag.runs.run import Run

__all__ = ["results_and_remark", "results_by_methods"]


def results_and_remark(runs: list[Run], method: str, convention: str) -> tuple[list[xr.Dataset], str]:
    """Of each run its results on the tokens that all share, and what these results are."""
    # Why only the same tokens compare: docs/decisions.md, Figures.
    results = comparable_results(runs, method, convention)
    words = _words(method)
    words += "" if convention == PLAIN_CONVENTION else f", in the convention {convention}"
    last = results[0].isel(setting=-1)
    remark = (
        f"Perplexity of {int(last['tokens']):,} tokens ({last['token_source'].item()}, sequences of "
        f"{int(last['sequence_length']):,}) by the checkpoint; weights and inputs of the blocks' Linears at "
        f"so many bits, {words}"
    )
    partial = [words for table in results if (words := partial_rounding(table))]
    remark = "; ".join([remark, *dict.fromkeys(partial)])
    return results, remark


def _words(method: str) -> str:
    return "round-to-nearest" if method == ROUND_TO_NEAREST else method_named(method).title


def results_by_methods(runs: list[Run], methods: list[str], convention: str) -> tuple[list[xr.Dataset], str]:
    """As :func:`results_and_remark`, of each run by each method, and what all of them are.

    Raises
    ------
    StoreError : methods were measured on different tokens
    """
    by_method = [results_and_remark(runs, name, convention) for name in methods]
    tables = [tables for tables, _ in by_method]
    fingerprints = {str(of_runs[0]["token_fingerprint"].values[0]) for of_runs in tables}
    if len(fingerprints) > 1:
        raise StoreError(
            f"{', '.join(methods)} were measured on different tokens; {MEASURING_ADVICE}, with one text for "
            "all"
        )
    if len(methods) == 1:
        return by_method[0]
    titles = ", ".join(method_named(name).title for name in methods)
    remark = by_method[0][1].replace(f", {_words(methods[0])}", f", by {titles}", 1)
    return [of_runs[index] for index in range(len(runs)) for of_runs in tables], remark
