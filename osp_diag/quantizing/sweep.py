"""How prediction suffers as a model gets fewer bits: many settings and methods on the same tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float
from torch import nn

from osp_diag.errors import UsageError
from osp_diag.quantizing.calibration import Calibration
from osp_diag.quantizing.cases import Case, Progress
from osp_diag.quantizing.divergence import ReferencePredictions
from osp_diag.quantizing.linears import rounded_share
from osp_diag.quantizing.methods import method_named
from osp_diag.quantizing.perplexity import SequencePredictions, predictions, refuse_what_sees_ahead
from osp_diag.quantizing.results import QuantizedResult, results_dataset
from osp_diag.quantizing.setting import UNQUANTIZED, Setting
from osp_diag.quantizing.simulate import quantized, quantized_weights
from osp_diag.resampling import draws, interval, ratio
from osp_diag.sites.trace import unwrap
from osp_diag.tokens import make_batches

__all__ = ["sweep"]

RESAMPLES = 1000
"""Draws of the bootstrap over sequences."""
_PREFLIGHT_TOKENS = 8


def sweep(
    model: nn.Module,
    tokens: Any,
    cases: Sequence[Case],
    *,
    calibration: Calibration | None = None,
    measured: Sequence[QuantizedResult] = (),
    on_result: Callable[[QuantizedResult], None] | None = None,
    token_source: str = "ids in hand",
    model_fingerprint: str = "",
    blocks: str | None = None,
    batch_size: int | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> xr.Dataset:
    """Perplexity of the same tokens in each case, and the divergence from the full-precision model's
    predictions.

    The model without rounding is measured first, as what the others are compared with. Cases that differ in
    the bits of activations, keys and values alone share their weights. Intervals are of 1,000 draws of the
    sequences.

    Parameters
    ----------
    model : causal language model whose blocks osp_diag finds
    tokens : ids of shape (sequence, position), without padding
    cases : what to measure
    calibration : for methods that look at activations on a text
    measured : rows that are there already, of which those of these weights, tokens and calibration are
        taken over
    on_result : given each row when it is measured
    token_source, model_fingerprint : recorded with the results
    blocks, batch_size : as :func:`~osp_diag.quantizing.simulate.quantized` and
        :func:`~osp_diag.quantizing.perplexity.perplexity` take them
    progress : told of settings, and of layers and sequences within them

    Returns
    -------
    A Dataset with the dimension ``setting``: 16-16-16, then the cases in the order given, each once; see
    :mod:`osp_diag.quantizing.results`.

    Raises
    ------
    UsageError : no case, no calibration where a method needs it, calibration on the tokens that are
        evaluated, or keys and values that are out of reach; before any work
    TokenError, CheckpointError, SiteError : what :func:`~osp_diag.quantizing.perplexity.perplexity` and
        :func:`~osp_diag.quantizing.simulate.quantized` refuse
    """
    full = Case(Setting(UNQUANTIZED, UNQUANTIZED, UNQUANTIZED))
    if not cases:
        raise UsageError("a sweep needs at least one case, such as 4-bit weights and activations by rtn")
    wanted = list(dict.fromkeys([full, *cases]))
    _check_calibration(wanted, calibration, tokens)
    # Results compare only on the same tokens, so each row carries their fingerprint.
    base = QuantizedResult(
        weight_bits=UNQUANTIZED,
        activation_bits=UNQUANTIZED,
        negative_log_likelihood=0.0,
        tokens=len(tokens) * (tokens.shape[1] - 1),
        sequence_length=int(tokens.shape[1]),
        token_source=token_source,
        token_fingerprint=make_batches(ids=np.asarray(tokens)).fingerprint,
        model_fingerprint=model_fingerprint,
        rounded_share=rounded_share(model, blocks=blocks),
    )
    rows = _taken_over(wanted, measured, base, calibration)
    missing = [case for case in wanted if case not in rows]
    if missing:
        # Before rounding, by which the least error may become a step.
        refuse_what_sees_ahead(model, tokens)
        _preflight(model, tokens, missing, blocks)
        work = _Work(model, tokens, base, calibration, blocks, batch_size, len(wanted), progress)
        # Closed also where a row cannot be stored, so that the model has its own weights back.
        with closing(work.rows(missing, full, done=len(rows))) as measuring:
            for case, row in measuring:
                rows[case] = row
                if on_result is not None:
                    on_result(row)
    return results_dataset([rows[case] for case in wanted])


def _check_calibration(cases: Sequence[Case], calibration: Calibration | None, tokens: Any) -> None:
    calibrated = [case for case in cases if method_named(case.method).calibrated]
    if calibrated and calibration is None:
        raise UsageError(
            f"{calibrated[0].method} looks at activations on a text: give a calibration, of other tokens "
            "than those that are evaluated"
        )
    if calibrated and calibration is not None:
        calibration.refuse_overlap(np.asarray(tokens))


def _taken_over(
    cases: Sequence[Case],
    measured: Sequence[QuantizedResult],
    base: QuantizedResult,
    calibration: Calibration | None,
) -> dict[Case, QuantizedResult]:
    """Rows that need not be measured again."""
    by_key = {row.key: row for row in measured if row.model_fingerprint == base.model_fingerprint}
    rows = {}
    for case in cases:
        described = _described(base, case, calibration)
        row = by_key.get(described.key)
        # Rows of earlier versions have no divergence.
        if row and row.divergence_tokens and row.calibration_fingerprint == described.calibration_fingerprint:
            rows[case] = row
    return rows


def _described(base: QuantizedResult, case: Case, calibration: Calibration | None) -> QuantizedResult:
    row = replace(
        base,
        weight_bits=case.setting.weight_bits,
        activation_bits=case.setting.activation_bits,
        key_value_bits=case.setting.key_value_bits,
        method=case.method,
        convention=case.convention,
        seed=case.seed,
    )
    if calibration is None or not method_named(case.method).calibrated:
        return row
    return replace(row, calibration=calibration.description, calibration_fingerprint=calibration.fingerprint)


def _preflight(model: nn.Module, tokens: Any, cases: Sequence[Case], blocks: str | None) -> None:
    """What a method or the rounding of keys and values refuses it refuses here, in passes of a few tokens."""
    ids = torch.as_tensor(np.asarray(tokens))[:1, :_PREFLIGHT_TOKENS]
    device = next((p.device for p in model.parameters() if not p.is_meta), torch.device("cpu"))
    if any(case.setting.key_value_bits != UNQUANTIZED for case in cases):
        with quantized(model, Setting(16, 16, 8), blocks=blocks), torch.no_grad():
            unwrap(model)(ids.to(device))
    for rotation in dict.fromkeys(method_named(case.method).rotation for case in cases):
        # Random rotations stand in for learned ones: they ask the same of a model.
        name = {"ffn-hadamard": "ffn-hadamard", "random": "quarot-rtn", "learned": "quarot-rtn"}.get(rotation)
        if name is not None:
            with quantized_weights(model, UNQUANTIZED, method=name, blocks=blocks):
                pass


class _Work:
    """Measures cases, one after the other."""

    def __init__(
        self,
        model: nn.Module,
        tokens: Any,
        base: QuantizedResult,
        calibration: Calibration | None,
        blocks: str | None,
        batch_size: int | None,
        total: int,
        progress: Callable[[Progress], None] | None,
    ) -> None:
        self.model, self.tokens, self.base, self.calibration = model, tokens, base, calibration
        self.blocks, self.batch_size, self.total, self._progress = blocks, batch_size, total, progress
        self.done = 0

    def rows(
        self, cases: list[Case], full: Case, done: int
    ) -> Generator[tuple[Case, QuantizedResult], None, None]:
        self.done = done
        with ReferencePredictions() as reference:
            row = self._row(full, self._predictions(full, reference), reference)
            if full in cases:
                self.done += 1
                yield full, row
            for members in _with_equal_weights([case for case in cases if case != full]):
                first = members[0]
                self._tell(first, "", 0, 0)
                weights = quantized_weights(
                    self.model,
                    first.setting.weight_bits,
                    method=first.method,
                    convention=first.convention,
                    calibration=self.calibration and self.calibration.tokens,
                    seed=first.seed,
                    blocks=self.blocks,
                    progress=partial(self._tell, first, "parts"),
                )
                with weights as prepared:
                    for case in members:
                        with prepared.passes(case.setting) as simulation:
                            found = self._predictions(case, reference)
                        self.done += 1
                        yield case, self._row(case, found, reference, simulation.notes)

    def _predictions(self, case: Case, reference: ReferencePredictions) -> SequencePredictions:
        return predictions(
            self.model,
            self.tokens,
            batch_size=self.batch_size,
            known_causal=True,
            reference=reference,
            progress=partial(self._tell, case, "sequences"),
        )

    def _tell(self, case: Case, part: str, done: int, total: int) -> None:
        if self._progress is not None:
            self._progress(Progress(str(case), self.done, self.total, part, done, total))

    def _row(
        self,
        case: Case,
        found: SequencePredictions,
        reference: ReferencePredictions,
        notes: Sequence[str] = (),
    ) -> QuantizedResult:
        likelihood = _mean_and_bounds(found.surprise, found.tokens)
        divergence = _mean_and_bounds(found.divergence[: len(reference)], found.tokens)
        return replace(
            _described(self.base, case, self.calibration),
            negative_log_likelihood=likelihood[0],
            negative_log_likelihood_low=likelihood[1],
            negative_log_likelihood_high=likelihood[2],
            divergence=divergence[0],
            divergence_low=divergence[1],
            divergence_high=divergence[2],
            divergence_tokens=len(reference) * found.tokens,
            notes="; ".join(notes),
        )


def _with_equal_weights(cases: Sequence[Case]) -> list[list[Case]]:
    groups: dict[tuple[str, str, int, int], list[Case]] = {}
    for case in cases:
        key = (case.method, case.convention, case.seed, case.setting.weight_bits)
        groups.setdefault(key, []).append(case)
    return list(groups.values())


def _mean_and_bounds(totals: Float[np.ndarray, " sequence"], tokens: int) -> tuple[float, float, float]:
    """Σ over sequences of a sum over tokens, by token, and the bounds of its 95% interval."""
    if not len(totals):
        return math.nan, math.nan, math.nan
    mean = float(totals.sum()) / (len(totals) * tokens)
    if len(totals) < 2 or not np.isfinite(totals).all():
        return mean, math.nan, math.nan
    numbers = np.full(len(totals), float(tokens))
    low, high = interval(ratio(totals, numbers, draws(len(totals), RESAMPLES, seed=0)))
    return mean, float(low), float(high)
