"""What few bits cost, as a summary says it: one setting, and the method that loses least."""

from __future__ import annotations

import math
from typing import Any

from osp_diag.quantizing.methods import method_named
from osp_diag.quantizing.results import (
    FEW_BITS,
    ROUND_TO_NEAREST,
    UNQUANTIZED,
    QuantizedResult,
    result_rows,
    results_of,
)
from osp_diag.runs.run import Run
from osp_diag.schema import QUANTIZATION
from osp_diag.wording import number

__all__ = ["few_bits", "few_bits_sentence"]


def few_bits(run: Run, step: int) -> dict[str, Any]:
    """The field ``few_bits`` of a summary: what weights and activations of 4 bits cost.

    Results are of the last weights, so of an earlier step nothing is said; nor where no result at 4 bits and
    none without rounding are on the same tokens. Of several settings, conventions and seeds it is the row
    measured last with keys and values as they are, rounded to nearest, if there is one.
    """
    if QUANTIZATION not in run.tree.children or step != int(run.steps[-1]):
        return {}
    rows = result_rows(results_of(run))
    full = {row.token_fingerprint: row for row in rows if _bits(row) == (UNQUANTIZED,) * 3}
    few = [row for row in rows if _bits(row)[:2] == FEW_BITS and row.token_fingerprint in full]
    if not few:
        return {}
    few.reverse()  # of equals max() takes the first
    row = max(few, key=lambda row: (row.key_value_bits == UNQUANTIZED, row.method == ROUND_TO_NEAREST))
    alike = [
        other
        for other in few
        if (_bits(other), other.token_fingerprint) == (_bits(row), row.token_fingerprint)
    ]
    least = min(alike, key=lambda other: other.negative_log_likelihood)
    without = full[row.token_fingerprint].negative_log_likelihood
    return {
        "few_bits": {
            "setting": "-".join(map(str, _bits(row))),
            "method": row.method,
            "convention": row.convention,
            "ratio": _ratio(row, without),
            "divergence": row.divergence if math.isfinite(row.divergence) else None,
            "least_method": least.method,
            "least_convention": least.convention,
            "least_ratio": _ratio(least, without),
        }
    }


def _bits(row: QuantizedResult) -> tuple[int, int, int]:
    return row.weight_bits, row.activation_bits, row.key_value_bits


def _ratio(row: QuantizedResult, full: float) -> float:
    return math.exp(min(row.negative_log_likelihood - full, 700.0))


def few_bits_sentence(cost: dict[str, Any]) -> str:
    """``At 4-4-16 (RTN, plain) perplexity is 2.31 times that at 16-16-16, KL 0.83 nat; …``."""
    way = f"{method_named(cost['method']).title}, {cost['convention']}"
    text = f"At {cost['setting']} ({way}) perplexity is {number(cost['ratio'])} times that at 16-16-16"
    if cost["divergence"] is not None:
        text += f", KL {number(cost['divergence'])} nat"
    least = (cost["least_method"], cost["least_convention"])
    if least != (cost["method"], cost["convention"]):
        title = method_named(cost["least_method"]).title
        text += f"; least by {title}, {cost['least_convention']}: {number(cost['least_ratio'])} times"
    return text
