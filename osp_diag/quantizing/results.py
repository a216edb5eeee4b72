"""What a model is worth at few bits, as a run holds it: a table in the group ``quantization``.

A row is one method, convention, setting and seed on one set of tokens. Rows are added to a run after it was
written, by ``osp-diag quantize`` or by the ablation; what is measured again takes the place of the earlier
row, and all rows of a run are of one set of weights.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.errors import StoreError
from osp_diag.quantizing.measurements import run_writer
from osp_diag.quantizing.setting import UNQUANTIZED, notation
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run, open_run
from osp_diag.schema import QUANTIZATION

__all__ = [
    "FEW_BITS",
    "HELD_OUT",
    "MAXIMUM_SITES",
    "MEASURING_ADVICE",
    "OSP_CONVENTION",
    "PLAIN_CONVENTION",
    "ROUND_TO_NEAREST",
    "UNQUANTIZED",
    "QuantizedResult",
    "ResultsWriter",
    "notation",
    "partial_rounding",
    "perplexity_of",
    "result_rows",
    "results_dataset",
    "results_of",
    "store_results",
]

ROUND_TO_NEAREST = "rtn"
"""The method that does nothing else."""
PLAIN_CONVENTION, OSP_CONVENTION = "plain", "osp"
HELD_OUT = "held-out tokens of the training"
"""What the tokens are called that a training of ours did not see."""

WHOLLY_ROUNDED = 0.99
"""Share of the blocks' matrices from which on nothing is said of the rest: routers, small tables."""

FEW_BITS = (4, 4)
"""Bits of weights and activations in the paper's Table 2."""
MAXIMUM_SITES = ("residual_post", "mlp_hidden")
"""Where the ablation looks for the largest activation."""
MEASURING_ADVICE = "measure with `osp-diag quantize CHECKPOINT --run RUN`"


@dataclass(frozen=True, kw_only=True)
class QuantizedResult:
    """How well a model predicts tokens under one setting."""

    weight_bits: int
    activation_bits: int
    key_value_bits: int = UNQUANTIZED
    method: str = ROUND_TO_NEAREST
    convention: str = PLAIN_CONVENTION
    seed: int = 0
    negative_log_likelihood: float
    negative_log_likelihood_low: float = math.nan
    negative_log_likelihood_high: float = math.nan
    divergence: float = math.nan
    divergence_low: float = math.nan
    divergence_high: float = math.nan
    divergence_tokens: int = 0
    tokens: int
    sequence_length: int
    token_source: str
    token_fingerprint: str
    model_fingerprint: str = ""
    rounded_share: float = math.nan
    calibration: str = ""
    calibration_fingerprint: str = ""
    notes: str = ""

    @property
    def key(self) -> tuple[Any, ...]:
        """What makes two rows the same; 16-16-16 is the same by every method."""
        bits = (self.weight_bits, self.activation_bits, self.key_value_bits)
        way = ("", "", 0) if bits == (UNQUANTIZED,) * 3 else (self.method, self.convention, self.seed)
        return (*way, *bits, self.token_fingerprint)


_DEFINITIONS = {
    "weight_bits": ("bit", "of the weights of the blocks' Linears; 16: as they are"),
    "activation_bits": ("bit", "of the inputs of the blocks' Linears; 16: as they are"),
    "key_value_bits": ("bit", "of the keys and values that attention reads; 16: as they are"),
    "method": ("", "how the model is rotated and its weights are rounded"),
    "convention": ("", "which grids there are: plain, or as the OSP release's scripts"),
    "seed": ("", "of the random numbers of rotations"),
    "scheme": ("", "method and convention in one, by which earlier versions choose rows"),
    "negative_log_likelihood": ("nat", "−1/N Σ log p(x_t | x_<t) over the predicted tokens"),
    "negative_log_likelihood_low": ("nat", "2.5% quantile of a bootstrap over sequences"),
    "negative_log_likelihood_high": ("nat", "97.5% quantile of a bootstrap over sequences"),
    "perplexity": ("1", "exp of negative_log_likelihood"),
    "perplexity_low": ("1", "exp of negative_log_likelihood_low"),
    "perplexity_high": ("1", "exp of negative_log_likelihood_high"),
    "divergence": (
        "nat",
        "mean over predicted tokens of KL(full precision ‖ quantized), next-token distributions",
    ),
    "divergence_low": ("nat", "2.5% quantile of a bootstrap over sequences"),
    "divergence_high": ("nat", "97.5% quantile of a bootstrap over sequences"),
    "divergence_tokens": (
        "token",
        "over how many predicted tokens, of the first sequences, divergence is taken",
    ),
    "tokens": ("token", "how many were predicted: all but the first of each sequence"),
    "sequence_length": ("token", "of the sequences; the context of a token is its own sequence"),
    "token_source": ("", "where the tokens come from"),
    "token_fingerprint": ("", "results on equal fingerprints are on the same tokens"),
    "model_fingerprint": ("", "of the parameters before quantization"),
    "rounded_share": (
        "1",
        "share of the numbers in the blocks' matrices that are of Linears, which alone are rounded; experts "
        "stacked in one parameter are not. NaN: not recorded",
    ),
    "calibration": ("", "what a method looked at activations on; empty where it did not"),
    "calibration_fingerprint": ("", "equal ones are the same tokens"),
    "notes": ("", "what is to be said of a row"),
}


def results_dataset(results: Sequence[QuantizedResult]) -> xr.Dataset:
    """A Dataset with the dimension ``setting`` and, of each variable, units and definition."""
    columns: dict[str, list[Any]] = {
        field.name: [getattr(result, field.name) for result in results] for field in fields(QuantizedResult)
    }
    columns["scheme"] = [_scheme(result) for result in results]
    for bound in ("", "_low", "_high"):
        likelihoods = columns[f"negative_log_likelihood{bound}"]
        columns[f"perplexity{bound}"] = [perplexity_of(value) for value in likelihoods]
    variables = {
        name: ("setting", np.asarray(columns[name]), {"units": unit, "definition": definition})
        for name, (unit, definition) in _DEFINITIONS.items()
    }
    return xr.Dataset(variables, attrs={"title": "Prediction at few bits"})


def _scheme(result: QuantizedResult) -> str:
    if (result.method, result.convention) == (ROUND_TO_NEAREST, PLAIN_CONVENTION):
        return "round-to-nearest"
    return f"{result.method}, {result.convention}"


def perplexity_of(negative_log_likelihood: float) -> float:
    """exp of the mean negative log-likelihood; infinite where that is too large for a float."""
    try:
        return math.exp(negative_log_likelihood)
    except OverflowError:
        return math.inf


def partial_rounding(results: xr.Dataset) -> str:
    """What is to be said of results for which much of the model was not rounded; empty where all was.

    Their setting, as W4A4, is then of that part alone.
    """
    shares = results["rounded_share"].values if "rounded_share" in results else np.empty(0)
    share = float(np.nanmin(shares)) if np.isfinite(shares).any() else 1.0
    if share > WHOLLY_ROUNDED:
        return ""
    return (
        f"only {share:.0%} of the blocks' matrices are in Linears and rounded; the rest (experts stacked "
        "in one parameter) stays as it is, so that a setting such as W4A4 is of that part alone"
    )


def results_of(run: Run) -> xr.Dataset:
    """The results that a run holds, as :func:`results_dataset` makes them.

    Raises
    ------
    StoreError : the run holds none
    """
    if QUANTIZATION not in run.tree.children:
        raise StoreError(
            f"the run of {model_name(run.attrs)} holds no results at few bits; {MEASURING_ADVICE}"
        )
    # Rows of earlier versions lack what was recorded later: they were rounded to nearest, plainly.
    return results_dataset(result_rows(run[QUANTIZATION].load()))


def store_results(path: str | os.PathLike[str], results: xr.Dataset) -> None:
    """Add results to the run at ``path``; what it has already of the same key is replaced.

    Results of other weights go: a training that was exported earlier has moved on.

    Raises
    ------
    StoreError : no run is there, or another process writes it
    """
    with ResultsWriter(path) as writer:
        writer.add(*result_rows(results))


class ResultsWriter:
    """Adds results to the run at ``path``, each written when it is added, as :func:`store_results` does.

    Raises
    ------
    StoreError : no run is there, or another process writes it
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        run = open_run(path)
        held = result_rows(results_of(run)) if QUANTIZATION in run.tree.children else []
        self._rows = {row.key: row for row in held}
        self._writer = run_writer(path)

    def __enter__(self) -> ResultsWriter:
        self._writer.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._writer.__exit__(*error)

    def add(self, *rows: QuantizedResult) -> None:
        """Write rows of one set of weights."""
        # Why rows of one set of weights: docs/decisions.md, Figures.
        models = {row.model_fingerprint for row in rows}
        self._rows = {key: row for key, row in self._rows.items() if row.model_fingerprint in models}
        self._rows |= {row.key: row for row in rows}
        results = results_dataset(list(self._rows.values()))
        self._writer.write_static(QUANTIZATION, results, replace=True)


def result_rows(results: xr.Dataset) -> list[QuantizedResult]:
    """The rows of a table, also of one that an earlier version wrote."""
    names = [field.name for field in fields(QuantizedResult) if field.name in results]
    columns = [results[name].values.tolist() for name in names]
    return [QuantizedResult(**dict(zip(names, row, strict=True))) for row in zip(*columns, strict=True)]
