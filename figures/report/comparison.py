"""How the runs of a page differ: their key numbers side by side, and the channels of each pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

from osp_diag.analyses.channels.comparison import compare_channels
from osp_diag.analyses.summary.verdict import Verdict
from osp_diag.errors import OspDiagError
from osp_diag.figures.report.tables import Table
from osp_diag.runs.run import Run
from osp_diag.wording import number

__all__ = ["Pair", "alike", "compared_pairs", "key_numbers", "others", "pairs_alike", "sentences"]

MOST_PAIRS = 3
"""Of which the channels are compared."""

NUMBERS = (
    ("OSP kurtosis", "osp_kurtosis", "mean over the hidden states, all tokens"),
    ("times its Gaussian floor", "osp_kurtosis_over_floor", "compare models of different width by this"),
    ("of its ceiling", "osp_kurtosis_of_ceiling", "share: 1 is a token with a single large channel"),
    (
        "on other tokens",
        "everyday_kurtosis",
        "OSP kurtosis of ordinary tokens: in text neither first nor delimiters",
    ),
    ("max / median", "everyday_max_median_ratio", "of block outputs on these tokens, mean over layers"),
    ("largest |x|", "largest_magnitude", "at any site"),
    ("massive activations", "massive_per_sequence", "a sequence, in the layer that has most"),
    ("sink rate", "sink_rate", "share of heads and sequences, ε = 0.3"),
    ("attention to the first token", "first_token_attention", "mean over heads and queries"),
    ("largest logit", "largest_logit", "before the softmax"),
)


@dataclass(frozen=True)
class Pair:
    """Two runs whose channels were compared, or not."""

    title: str
    verdict: str = ""
    """where they differ most: the first sentences of ``text``"""
    text: str = ""
    refused: str = ""


def key_numbers(verdicts: Sequence[Verdict], labels: Sequence[str]) -> Table:
    """A row a number, a column a run. Numbers that no run has are left out."""
    columns = [("number", ""), ("what it is", ""), *((label, "") for label in labels)]
    table = Table("key-numbers", "Key numbers", columns)
    for label, name, meaning in NUMBERS:
        values = [getattr(verdict.summary, name) for verdict in verdicts]
        if any(value is not None for value in values):
            cells = [None if value is None else float(value) for value in values]
            table.rows.append((-1, [label, meaning, *cells]))
    onsets = [_onset(verdict) for verdict in verdicts]
    if any(onset is not None for onset in onsets):
        table.rows.append((-1, ["outliers since step", "first lasting onset at a block output", *onsets]))
    return table


def _onset(verdict: Verdict) -> float | None:
    onsets = [finding for finding in verdict.findings if finding.rule == "emergence"]
    return onsets[0].value if onsets else None


def alike(runs: Sequence[Run]) -> list[list[int]]:
    """Places of runs whose models have one width and depth, by group of two or more.

    Where no two models are alike, all are one group: a reader who puts them on a page wants them compared
    (docs/decisions.md, Pages).
    """
    groups: dict[tuple[Any, Any], list[int]] = {}
    for place, run in enumerate(runs):
        shape = (run.attrs.get("hidden_size"), run.attrs.get("number_of_layers"))
        groups.setdefault(shape, []).append(place)
    larger = [group for group in groups.values() if len(group) > 1]
    return larger or [list(range(len(runs)))] if len(runs) > 1 else []


def pairs_alike(runs: Sequence[Run]) -> list[tuple[int, int]]:
    """The pairs that a page compares: of models alike, the first ones where there are many."""
    return [pair for group in alike(runs) for pair in combinations(group, 2)][:MOST_PAIRS]


def others(runs: Sequence[Run], labels: Sequence[str]) -> str:
    """Which runs are not compared with the rest, and how to do it."""
    groups = alike(runs)
    single = [labels[place] for place in range(len(runs)) if not any(place in group for group in groups)]
    if not single and len(groups) < 2:
        return ""
    subject = (
        f"{', '.join(single)} with the others" if single else "models of other width or depth with each other"
    )
    return f"Not compared: {subject}. `osp-diag compare RUN_A RUN_B` does it on normalised scales."


def sentences(runs: Sequence[Run], verdicts: Sequence[Verdict], labels: Sequence[str]) -> list[str]:
    """The one difference to know: kurtosis over the floor, which widths don't change."""
    return [
        _sentence([(verdicts[place].summary.osp_kurtosis_over_floor, labels[place]) for place in group])
        for group in alike(runs)
    ]


def _sentence(over: Sequence[tuple[float | None, str]]) -> str:
    ratios = sorted(((value, label) for value, label in over if value is not None), reverse=True)
    if len(ratios) < 2:
        names = " and ".join(label for _, label in over)
        return f"The kurtoses of {names} cannot be compared: fewer than two of them have a headline number."
    (high, highest), (low, lowest) = ratios[0], ratios[-1]
    text = f"OSP kurtosis is {number(high)} times its Gaussian floor in {highest}"
    text += f", {number(low)} times in {lowest}"
    return f"{text}: a factor of {number(high / low)}." if low > 0 else f"{text}."


def compared_pairs(runs: Sequence[Run], labels: Sequence[str]) -> list[Pair]:
    """The channels of pairs of runs, or the reason why they are not compared."""
    pairs = []
    for first, second in pairs_alike(runs):
        title = f"{labels[first]} (A) and {labels[second]} (B)"
        try:
            text = compare_channels(runs[first], runs[second]).text()
        except OspDiagError as reason:
            pairs.append(Pair(title, refused=str(reason)))
            continue
        pairs.append(Pair(title, _first_sentences(text), text))
    return pairs


def _first_sentences(text: str) -> str:
    """The verdict of a comparison, between its head and its table; lines that go on are indented."""
    lines = text.split("\n\n")[1].replace("\n  ", " ").splitlines()
    return " ".join(f"{line.rstrip('.')}." for line in lines)
