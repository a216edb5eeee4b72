"""Question 4: were weights changed by something else than a step of training?"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import xarray as xr

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.findings import Bracket, Confidence, Finding, Place
from osp_diag.laboratory import CheckpointState, WeightPart
from osp_diag.schema import WEIGHT_SKETCH

__all__ = ["edited_weights"]

TIMES_USUAL = 6.0
"""Times the largest move of the same parameter in its usual steps from which on a step's move is none of
training. Eight projections tell the size of a move to a factor of about 1.5 either way."""
USUAL_STEPS = 40
FEWEST = 6
LEAST_MOVE = 0.03
"""Share of its own norm that an edited parameter moves at least."""
FEW = 0.15
"""Share of the parameters that may move so at once: beyond it a rate or the step's rule changed."""
ROW_FACTOR = 2.0
"""Ratio of a row's change to the median row's from which on checkpoints tell an edit; healthy: up to 1.8."""
TIMES_HISTORY = 3.0
"""The same against the pair of checkpoints before."""
WHOLE_FACTOR = 1.8
"""The same of a whole parameter's norm, of loops without sketches; seen in healthy trainings: 1.35."""
SCALED, BEYOND_GROWTH = 0.9, 4.0
"""Of other loops: cosine of a row before and after from which on it was scaled, and the ratio of one that
turned from which on no growth explains it; seen in healthy trainings: 2.3 at a cosine of 0.5."""
ZERO = 1e-5
"""A row's ratio below which it has become zero."""
HALF_A_HEAD = 0.5
OF_HEADS = ("q_proj", "k_proj", "v_proj", ".query.", ".key.", ".value.")
"""In names of matrices whose rows are those of heads."""
BLOCKS = ("layers", "layer", "h", "blocks", "block")
"""What the list of blocks is called in names of parameters."""


@dataclass(frozen=True)
class _Edit:
    parameter: str
    bracket: Bracket
    evidence: tuple[str, ...]


def edited_weights(case: Case) -> Iterator[Finding]:
    """Parameters that jumped at one step, and rows that did between checkpoints; each is undone once."""
    edits: dict[str, _Edit] = {}
    explained = False
    for edit in (*_jumps(case), *_rows(case)):
        if case.explains(edit.parameter, edit.bracket):
            explained = True
        else:
            edits.setdefault(edit.parameter, edit)
    findings = [_finding(case, edit) for edit in edits.values()]
    if case.logged(WEIGHT_SKETCH) is None and len(case.pairs) < 2:
        case.not_recorded.append(
            "edits of weights: no weight sketch and fewer than two checkpoints"
            if not case.pairs
            else "edits of weights: no weight sketch and two checkpoints alone, and a third is needed to "
            "know what is usual between two"
        )
    elif not findings:
        case.ruled_out.append(
            "weights moved unlike before only where a finding above can be the reason; edits of weights are "
            "not told apart from it"
            if explained
            else "no weights changed otherwise than by steps of training"
            + (_since_the_second(case) if case.logged(WEIGHT_SKETCH) is None else "")
        )
    yield from findings


def _since_the_second(case: Case) -> str:
    """Of the first two checkpoints there is nothing before them that they could be compared with."""
    return f" after the checkpoint of step {case.checkpoints[1].step}"


def _jumps(case: Case) -> Iterator[_Edit]:
    """Parameters whose projections jump in a step in which nearly all others move as usual."""
    sketch = case.logged(WEIGHT_SKETCH)
    if sketch is None:
        return
    rates = _rates(case, sketch["step"].values)
    steps, names = sketch["step"].values, sketch["parameter"].values
    moves = _moves(sketch)
    rated = np.isfinite(moves) & (rates[:, None] > 0)
    usual = np.divide(moves, rates[:, None], out=np.full(moves.shape, np.nan), where=rated)
    for row in range(1, len(steps)):
        if not np.isfinite(moves[row]).any() or not rates[row] > 0:
            continue
        history = usual[max(0, row - USUAL_STEPS) : row]
        counts = np.isfinite(history).sum(axis=0)
        known = counts >= FEWEST
        if not known.any():
            continue
        largest = np.nanmax(np.where(np.isfinite(history), history, 0.0), axis=0)
        factor = np.divide(usual[row], largest, out=np.zeros_like(largest), where=largest > 0)
        jumped = known & (factor > TIMES_USUAL) & (moves[row] > LEAST_MOVE)
        if not jumped.any() or jumped.sum() > max(1, FEW * known.sum()):
            continue
        for place in np.flatnonzero(jumped):
            text = (
                f"at step {steps[row]} it moved by {moves[row][place]:.3g} of its norm, "
                f"{factor[place]:.0f} times as far as in any usual step"
            )
            norm = sketch["norm"].values[:, place]
            text += f"; norm {norm[row - 1]:.4g} → {norm[row]:.4g}"
            yield _Edit(str(names[place]), Bracket(int(steps[row - 1]), int(steps[row])), (text,))
            usual[row, place] = np.nan  # an edit does not become the usual


def _moves(sketch: xr.Dataset) -> np.ndarray:
    """‖ΔW‖ / ‖W‖ of each step and parameter, estimated from the projections: their mean square is ‖ΔW‖²."""
    projections = sketch["projection"].transpose("step", "parameter", "direction").values.astype(float)
    norms = sketch["norm"].values.astype(float)
    moved = np.full(norms.shape, np.nan)
    moved[1:] = np.sqrt(np.mean(np.diff(projections, axis=0) ** 2, axis=2))
    before = np.vstack([np.full(norms.shape[1], np.nan), norms[:-1]])
    # Of a parameter that begins at zero no share can be told.
    return np.divide(moved, before, out=np.full(norms.shape, np.nan), where=before > 0)


def _rates(case: Case, steps: np.ndarray) -> np.ndarray:
    series = case.run.series
    if "learning_rate" not in series:
        return np.ones(len(steps))
    rates = series["learning_rate"].reindex(step=steps).values
    return np.where(np.isfinite(rates), rates, 0.0)


def _rows(case: Case) -> Iterator[_Edit]:
    """Rows or columns that changed between two checkpoints unlike the others, and unlike before; of other
    loops, which have no sketches, whole parameters too."""
    before: dict[str, xr.Dataset] = {}
    for one, two in case.pairs:
        table = case.changes(one, two)
        now = {str(name): table.sel(parameter=name) for name in table["parameter"].values}
        for name, change in now.items():
            if name not in before or not _is_comparable(one, two, name):
                continue
            sentence = _part_unlike(case, two, name, change, before[name])
            if not sentence and not case.trains:
                sentence = _whole_unlike(change, before[name])
            if sentence:
                text = f"between the checkpoints of steps {one.step} and {two.step} {sentence}"
                yield _Edit(name, Bracket(one.step, two.step), (text,))
        before = now


def _is_comparable(one: CheckpointState, two: CheckpointState, name: str) -> bool:
    """Whether the same optimizer moves it, in the same shape."""
    is_owned_alike = name not in one.owners or one.owners[name] == two.owners.get(name)
    return is_owned_alike and one.shapes.get(name) == two.shapes.get(name)


def _part_unlike(case: Case, two: CheckpointState, name: str, change: xr.Dataset, before: xr.Dataset) -> str:
    deviation, history = (
        max(float(part["row_deviation"]), float(part["column_deviation"])) for part in (change, before)
    )
    shape = two.shapes[name] or (1,)
    waits = two.roles.get(name) in ("embedding", "head") or (len(shape) < 2 and not case.trains)
    few = float(change["rows_beyond"]) <= max(1.0, 0.02 * shape[0]) or not waits
    is_unlike = deviation > max(math.log(ROW_FACTOR), TIMES_HISTORY * history)
    if not is_unlike or not few or not (case.trains or _is_no_growth(change, deviation)):
        return ""
    return (
        f"a row or column changed {math.exp(deviation):.1f}-fold against the others; between those before, "
        f"at most {math.exp(history):.2f}-fold"
    )


def _whole_unlike(change: xr.Dataset, before: xr.Dataset) -> str:
    now, history = (abs(math.log(max(float(part["norm_ratio"]), 1e-12))) for part in (change, before))
    if not now > max(math.log(WHOLE_FACTOR), TIMES_HISTORY * history):
        return ""
    return f"its norm changed {math.exp(now):.2f}-fold; between those before, {math.exp(history):.2f}-fold"


def _is_no_growth(row: xr.Dataset, deviation: float) -> bool:
    """Of loops whose steps cannot be made again: whether the row was scaled, or changed beyond all growth.

    Between checkpoints that lie far apart, a row of an outlier channel grows by itself, and turns.
    """
    axis = "row" if float(row["row_deviation"]) >= float(row["column_deviation"]) else "column"
    return deviation > math.log(BEYOND_GROWTH) or float(row[f"{axis}_cosine"]) > SCALED


def _finding(case: Case, edit: _Edit) -> Finding:
    one = case.checkpoint_up_to(edit.bracket.good)
    two = case.checkpoint_after(one.step) if one is not None else None
    module = _module(edit.parameter)
    family = "norm_gain" if edit.parameter.endswith("norm.weight") else "weight_edit"
    if one is None or two is None or case.laboratory is None:
        place = Place((edit.parameter,), layer=_layer(edit.parameter))
        return Finding(family, f"{module} changed at once", "proved", edit.bracket, edit.evidence, place)
    part, words, place = _part(case, one, two, edit)
    at_one_step = edit.bracket.bad - (edit.bracket.good or 0) <= 1
    confidence: Confidence = "proved" if at_one_step else "measured"
    undone = case.laboratory.reverted(two.step, one.step, part)
    evidence = edit.evidence if undone is None else (*edit.evidence, undone.sentence)
    return Finding(family, words, confidence, edit.bracket, evidence, place)


def _part(
    case: Case, one: CheckpointState, two: CheckpointState, edit: _Edit
) -> tuple[WeightPart, str, Place]:
    """Which part of the parameter it is: rows, a head, columns, or all of it."""
    assert case.laboratory is not None
    name, module, layer = edit.parameter, _module(edit.parameter), _layer(edit.parameter)
    row = case.changes(one, two).sel(parameter=name)
    rows, columns = float(row["row_deviation"]), float(row["column_deviation"])
    whole = abs(math.log(max(float(row["norm_ratio"]), 1e-12)))
    vector = len(two.shapes.get(name, ())) < 2
    if whole > max(rows, columns) and whole > math.log(1.3):
        ratio = float(row["norm_ratio"])
        return WeightPart(name, "all"), f"all of {module} × {ratio:.3g}", Place((name,), layer=layer)
    axis = "row" if rows >= columns else "column"
    indices, ratio = case.laboratory.changed_part(one.step, two.step, name, axis)
    head = _head(name, axis, indices, two.head_size)
    if head is not None:
        rows_of_head = tuple(range(head * two.head_size, (head + 1) * two.head_size))
        words = f"head {head} of {module} × about {ratio:.3g}"
        return WeightPart(name, "row", rows_of_head), words, Place((name,), layer=layer, head=head, row=None)
    top = int(row[axis])
    ratio = float(row[f"{axis}_ratio"])
    kind = "channel" if vector else axis
    factor = f"× about {ratio:.3g}" if ratio > ZERO else "became zero"
    words = f"{kind} {top} of {module} {factor}"
    place = Place(
        (name,),
        layer=layer,
        row=top if kind == "row" else None,
        column=top if kind == "column" else None,
        channel=top if vector else None,
    )
    return WeightPart(name, axis, (top,)), words, place


def _head(name: str, axis: str, indices: tuple[int, ...], size: int) -> int | None:
    """The head that most of the rows are in, if they are most of a head."""
    if axis != "row" or size < 1 or not any(part in name for part in OF_HEADS):
        return None
    heads, counts = np.unique(np.array(indices) // size, return_counts=True)
    best = int(counts.argmax())
    within = counts[best] >= HALF_A_HEAD * size and counts[best] >= HALF_A_HEAD * len(indices)
    return int(heads[best]) if within else None


def _module(parameter: str) -> str:
    module = parameter.removesuffix(".weight").rpartition(".")[2]
    layer = _layer(parameter)
    return module if layer is None else f"{module} of layer {layer}"


def _layer(parameter: str) -> int | None:
    parts = parameter.split(".")
    numbers = [part for before, part in pairwise(parts) if before in BLOCKS]
    return int(numbers[0]) if numbers and numbers[0].isdigit() else None
