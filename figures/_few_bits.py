"""What the figures of few-bit results share: which results, and what their captions say of them."""

from __future__ import annotations

import xarray as xr

from osp_diag.analyses.few_bits import comparable_results
from osp_diag.quantizing.methods import method_named
from osp_diag.quantizing.results import PLAIN_CONVENTION, ROUND_TO_NEAREST, partial_rounding
from osp_diag.runs.run import Run

__all__ = ["results_and_remark"]


def results_and_remark(runs: list[Run], method: str, convention: str) -> tuple[list[xr.Dataset], str]:
    """Of each run its results on the tokens that all share, and what these results are."""
    # Why only the same tokens compare: docs/decisions.md, Figures.
    results = comparable_results(runs, method, convention)
    words = "round-to-nearest" if method == ROUND_TO_NEAREST else method_named(method).title
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
