"""What was trained on: single batches, and data that change for good, by what is recorded of every batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.findings import Bracket, Finding

__all__ = ["changed_batches"]


class Share(NamedTuple):
    """How a share of a batch is judged."""

    least: float
    """smallest difference from the usual that counts, whatever the spread"""
    high: str
    """what it means if it is above the usual"""
    low: str
    """and below"""


SHARES: Mapping[str, Share] = {
    "label_agreement": Share(0.02, "", "labels are not the next tokens"),
    "repeated_sequence_share": Share(0.2, "sequences are repeated: one document or few", ""),
    "commonest_token_share": Share(0.15, "one token makes up much of a batch", ""),
    "repeated_bigram_share": Share(
        0.1, "the text repeats itself", "pairs of tokens repeat less: not text like before"
    ),
    "unique_token_share": Share(
        0.1, "more different tokens: not text like before (random tokens?)", "fewer different tokens"
    ),
}
SPREADS = 8.0
"""Robust standard deviations (1.4826 · median absolute deviation) beyond which a share is unusual."""
LASTING = 5
"""Unusual steps in a row, or up to the end, from which on it is the data and not a batch."""
LOSS_SPREADS, LOSS_LEAST = 6.0, 0.5
"""A sequence of healthy text may be a list or a table. A single batch is named if its labels are wrong, or if
a share is farther off than one of its sequences can move it and its loss stands out from the ten before, by
so many robust standard deviations and so many nats."""
MOST_OF_A_BATCH = 0.5
"""Difference of a share from which on most sequences of a batch are off, whatever the loss: one token, over
and over, may be as easy as text."""
FEWEST = 8
"""Usual steps that tell what is usual."""


class _Unusual(NamedTuple):
    """A share of a batch that is unlike those before: how far off, and in words."""

    distance: float
    text: str


def changed_batches(case: Case) -> Iterator[Finding]:
    """Batches that are unlike those before them."""
    series = case.run.series
    present = [name for name in SHARES if name in series]
    if not present:
        case.not_recorded.append(
            "the batches: the run has no statistics of them (`label_agreement` and its like)"
        )
        return
    steps = series["step"].values
    unusual: dict[int, list[_Unusual]] = {}
    for name in present:
        values = series[name].values
        for place, sentence, distance in _unusual(values, SHARES[name]):
            number = f"{name} {values[place]:.3g}"
            text = f"{sentence} ({number} at step {steps[place]})" if sentence else number
            unusual.setdefault(place, []).append(_Unusual(distance, text))
    recorded = np.flatnonzero(np.isfinite(series[present[0]].values))
    stretches = _stretches(sorted(unusual), recorded)
    named = [
        stretch
        for stretch in stretches
        if _lasts(stretch, recorded)
        or any(SHARES["label_agreement"].low in one.text for one in unusual[stretch[0]])
        or _is_more_than_a_list(case, stretch, max(one.distance for row in stretch for one in unusual[row]))
    ]
    findings = [_finding(case, steps, stretch, unusual, recorded) for stretch in named]
    if not findings:
        case.ruled_out.append("no batch, and no labels, are unlike those before")
    yield from findings


def _unusual(values: np.ndarray, share: Share) -> Iterator[tuple[int, str, float]]:
    """Places beyond what was usual up to there, with how far; what is unusual does not become the usual."""
    usual: list[float] = []
    for place in np.flatnonzero(np.isfinite(values)):
        value = values[place]
        if len(usual) < FEWEST:
            fixed = 1.0 if share.low.startswith("labels") else None
            if fixed is not None and value < fixed - share.least:
                yield int(place), share.low, fixed - value
                continue
            usual.append(value)
            continue
        middle, spread = _middle_and_spread(np.array(usual[-64:]))
        distance = value - middle
        sentence = share.high if distance > 0 else share.low
        if abs(distance) > max(SPREADS * spread, share.least) and sentence:
            yield int(place), sentence, abs(distance)
        else:
            usual.append(value)


def _middle_and_spread(values: np.ndarray) -> tuple[float, float]:
    """The median, and the standard deviation of a normal law with this median absolute deviation."""
    middle = float(np.median(values))
    return middle, 1.4826 * float(np.median(np.abs(values - middle)))


def _stretches(places: list[int], recorded: np.ndarray) -> Iterator[list[int]]:
    """Runs of unusual rows; one usual row between two does not end a run."""
    order = {int(row): number for number, row in enumerate(recorded)}
    stretch: list[int] = []
    for place in places:
        if stretch and order.get(place, place) - order.get(stretch[-1], stretch[-1]) > 2:
            yield stretch
            stretch = []
        stretch.append(place)
    if stretch:
        yield stretch


def _lasts(stretch: list[int], recorded: np.ndarray) -> bool:
    return len(stretch) >= LASTING or (len(stretch) > 1 and stretch[-1] == recorded[-1])


def _is_more_than_a_list(case: Case, stretch: list[int], farthest: float) -> bool:
    """Whether most of the batch is off, or more than one sequence of it can be, and the loss stands out."""
    if farthest > MOST_OF_A_BATCH:
        return True
    sequences = case.config_at(int(case.run.series["step"][stretch[0]])).get("batch_size")
    if isinstance(sequences, int) and farthest <= 1 / sequences:
        return False
    losses = case.run.series["loss"].values
    before = losses[max(0, stretch[0] - 10) : stretch[0]]
    before = before[np.isfinite(before)]
    if len(before) < FEWEST:
        return False
    middle, spread = _middle_and_spread(before)
    off = losses[stretch] - middle  # a list that repeats itself is easier than other text
    return bool((off > max(LOSS_SPREADS * spread, LOSS_LEAST)).any())


def _finding(
    case: Case,
    steps: np.ndarray,
    stretch: list[int],
    unusual: Mapping[int, list[_Unusual]],
    recorded: np.ndarray,
) -> Finding:
    first = stretch[0]
    lasts = _lasts(stretch, recorded)
    earlier = [int(steps[row]) for row in recorded if row < first]
    ranked = unusual[first] if lasts else sorted(unusual[first], key=lambda one: -one.distance)
    sentences = tuple(dict.fromkeys(one.text for one in ranked))
    main = sentences[0].partition(" (")[0]
    count = f"{len(stretch)} batch{'es' if len(stretch) > 1 else ''}"
    losses = case.run.series["loss"].values if "loss" in case.run.series else None
    evidence = list(sentences)
    if losses is not None and first > 0 and np.isfinite(losses[first - 1 : first + 1]).all():
        evidence.append(f"training loss {losses[first - 1]:.3g} → {losses[first]:.3g}")
    return Finding(
        "data" if lasts else "batch",
        f"data from step {steps[first]} on: {main}" if lasts else f"{count} at step {steps[first]}: {main}",
        "proved",
        Bracket(earlier[-1] if earlier else None, int(steps[first])),
        tuple(evidence),
    )
