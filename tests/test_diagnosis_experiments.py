"""The seventh question judges parts put back by the spread of their own controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.experiments import experiments, has_helped
from osp_diag.laboratory import CheckpointState, Counterfactual, Fork
from osp_diag.runs.run import Run
from tests.growing_runs import ATTRIBUTES, groups

PARTS = {"optimizer.name": "adamw", "model.norm": "rmsnorm", "model.embedding_projection": False}
AS_OSP = {"optimizer.route": {}, "model.tie_embeddings": False}


class MadeUp:
    """A laboratory in which a training ends as ``ends`` says: key put back → (kurtosis, loss) by order."""

    missing: tuple[str, ...] = ()

    def __init__(self, ends: Mapping[str, Sequence[tuple[float, float]]]) -> None:
        self.ends = ends
        self.checkpoints = [
            CheckpointState(10, Path("step-00000010"), PARTS | AS_OSP, {}, {}, {}, 32, {}, None)
        ]

    def edited(self, step: int, edit: str) -> Counterfactual:
        return Counterfactual(edit, step, 1.0, 6.0, 1.0, 6.0)

    def fork(self, start: int, until: int, label: str, changes: Mapping[str, Any], *, order: int = 0) -> Fork:
        (key,) = changes
        return self._ended(key, label, (f"optimizer state: {key}",), order)

    def control(self, start: int, until: int, label: str, reset: Sequence[str], *, order: int = 0) -> Fork:
        return self._ended("control", label, tuple(reset), order)

    def _ended(self, key: str, label: str, reset: tuple[str, ...], order: int) -> Fork:
        kurtosis, loss = self.ends[key][order]
        return Fork(label, {}, (10, 40), (5.0, kurtosis), (6.0, loss), reset)


def named(**ends: Sequence[tuple[float, float]]) -> list[str]:
    usual = {"control": [(8.0, 5.9), (9.0, 5.8)], **{key: [(8.5, 5.9), (8.5, 5.8)] for key in PARTS}}
    given = {next(key for key in (*PARTS, "control") if key.endswith(end)): of for end, of in ends.items()}
    probed = [(step, groups([200.0, 200.0])) for step in (10, 20, 30, 40)]
    case = Case(Run.in_memory(probed, {}, ATTRIBUTES), MadeUp(usual | given), is_raised=True)  # type: ignore[arg-type]
    findings = list(experiments(case, 30))
    assert len(findings) + sum("put back" in text or "trained from" in text for text in case.ruled_out) == 3
    return [finding.family for finding in findings]


GONE, HALVED = [(0.01, 5.9), (0.02, 5.8)], [(4.0, 5.9), (4.5, 5.8)]


@pytest.mark.parametrize(
    ("ends", "families"),
    [
        pytest.param({}, [], id="nothing helps"),
        pytest.param(
            {"name": HALVED, "projection": GONE}, ["projections", "optimizer_routing"], id="strongest first"
        ),
        pytest.param({"norm": [(4.0, 6.9), (4.5, 7.0)]}, [], id="what unlearns is no remedy"),
        pytest.param(
            {"name": HALVED, "control": [(3.0, 5.9), (12.0, 5.8)]}, [], id="controls that differ as much"
        ),
        pytest.param({"name": [(float("nan"), 9.0)] * 2}, [], id="one that diverged"),
    ],
)
def test_a_part_is_named_that_differs_from_its_controls_by_more_than_they_do(
    ends: Mapping[str, Any], families: list[str]
) -> None:
    assert named(**ends) == families


NAN = float("nan")


@pytest.mark.parametrize(
    ("kurtosis", "loss", "was", "run_loss", "helped"),
    [
        ((5.0, 5.2), 6.0, 40.0, 6.0, True),
        ((5.0, 20.0), 6.0, 40.0, 6.0, True),  # half of the rise is gone
        ((5.0, 39.0), 6.0, 40.0, 6.0, False),  # as without it
        ((5.0, 5.2), 6.2, 40.0, 6.0, False),  # at the loss's cost
        ((5.0, 5.1), 6.0, 5.0, 6.0, None),  # nothing had risen
        ((5.0, 5.1), 5.5, 5.0, 6.0, True),  # the loss had
        ((0.03, 0.2), 6.0, 0.03, 6.0, None),  # noise
        ((5.0, NAN), 6.0, 40.0, 6.0, False),
        ((5.0, 5.2), 6.0, NAN, 6.0, True),
        ((NAN, NAN), 5.5, NAN, 6.0, True),  # kurtosis was not measured
    ],
)
def test_a_remedy_has_helped_where_it_takes_back_what_rose(kurtosis, loss, was, run_loss, helped):
    probed = [(step, groups([200.0, 200.0])) for step in (10, 20)]
    case = Case(Run.in_memory(probed, {}, ATTRIBUTES), None)
    fork = Fork("a remedy", {}, (10, 40), kurtosis, (6.0, loss), ())
    assert has_helped(case, fork, was, run_loss) is helped
