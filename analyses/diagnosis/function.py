"""Question 2: is the same function computed with the weights?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.findings import Bracket, Finding
from osp_diag.laboratory import CheckpointState, FunctionRecord

__all__ = ["changed_function"]

FAMILY_OF = {"norms": "norm_gain", "norm_scale": "norm_gain"}
WORDS = {
    "rotary_base": "base of the rotary frequencies (RoPE)",
    "mask": "attention mask",
    "attention": "kind of attention",
    "norm_epsilon": "epsilon of the norms",
    "norms": "kind of norm",
    "norm_scale": "constant of the norms",
}
EXACT = 2e-5
"""Difference of two losses up to which float32 on one kind of device computed the same; seen: 0 to 1e-6."""
OTHERWISE = 5e-3
"""The same of bfloat16, or of a run that was trained on another device."""
MOST = 8
"""Checkpoints whose loss is computed again; a forward pass each."""
MOST_OF_ANOTHER_LOOP = 3
"""The same where each is a model to be opened, and all tokens of a probe are run."""
KURTOSIS_ALIKE = 0.02
"""Of 1 or of the kurtosis, whichever is more: a probe within a loop may have run in bfloat16."""


def changed_function(case: Case) -> Iterator[Finding]:
    """Constants that changed between checkpoints, and losses that today's code does not reproduce."""
    if case.laboratory is None:
        return
    recorded = [state for state in case.checkpoints if state.function]
    if not recorded:
        case.not_recorded.append(
            "the function that the weights are of: no checkpoint holds its constants and loss"
            if case.trains
            else "the function that the weights are of: no probe of the run is of a checkpoint's step"
        )
        return
    findings = list(_constants(case, recorded))
    records = _records(case, recorded)
    if case.trains:
        findings += _losses(case, recorded, records, explained=bool(findings))
        if not findings:
            case.ruled_out.append("the function of the weights is the one that their checkpoints recorded")
    else:
        findings += _probes(case, records)
    yield from findings


def _constants(case: Case, recorded: list[CheckpointState]) -> Iterator[Finding]:
    pairs = [(Bracket(a.step, b.step), a, b) for a, b in pairwise(recorded)]
    if case.its_laboratory is not None:
        good = [state for state in case.its_laboratory.checkpoints if state.function]
        if good:
            pairs.insert(0, (Bracket(None, recorded[0].step), good[0], recorded[0]))
    for bracket, one, two in pairs:
        old, new = _of(one), _of(two)
        for key, now in new.items():
            before = old.get(key)
            if key in old and before != now:
                yield Finding(
                    FAMILY_OF.get(key, "function"),
                    f"{WORDS.get(key, key)}: {_brief(before)} → {_brief(now)}",
                    "proved",
                    bracket,
                    (f"read off the model that was built, at {one.path.name} and {two.path.name}",),
                )


def _of(state: CheckpointState) -> Mapping[str, Any]:
    constants = (state.function or {}).get("constants")
    return constants if isinstance(constants, Mapping) else {}


def _brief(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _records(case: Case, recorded: list[CheckpointState]) -> list[FunctionRecord]:
    """What some of the checkpoints give today, the first and the last among them."""
    assert case.laboratory is not None
    steps = [state.step for state in recorded]
    most = MOST if case.trains else MOST_OF_ANOTHER_LOOP
    if len(steps) > most:
        chosen = {round(place * (len(steps) - 1) / (most - 1)) for place in range(most)}
        steps = [step for place, step in enumerate(steps) if place in chosen]
    return case.laboratory.functions(steps)


def _probes(case: Case, records: list[FunctionRecord]) -> Iterator[Finding]:
    """The kurtosis that a run's probes recorded beside that of today's code, on the same tokens."""
    wrong = [
        record
        for record in records
        if not abs(record.now - record.recorded) <= KURTOSIS_ALIKE * max(1.0, abs(record.recorded))
    ]
    right = [record.step for record in records if record not in wrong]
    if not records:
        return
    if not wrong:
        steps = ", ".join(map(str, right))
        case.ruled_out.append(
            f"today's code gives the kurtosis that was probed at steps {steps}, to {KURTOSIS_ALIKE:.0%}"
        )
        return
    one = wrong[0]
    text = (
        f"at step {one.step} {one.quantity} was {one.recorded:.4g}, and is {one.now:.4g} under "
        "today's code on the same tokens"
    )
    before = [step for step in right if step < one.step]
    if not before:
        case.not_recorded.append(
            f"whether the function changed: {text}, and no earlier checkpoint is reproduced, so that the run "
            "may have been probed in another precision"
        )
        return
    cause = "another function was computed with these weights than today's code computes"
    where = f"reproduced: steps {', '.join(map(str, right))}"
    yield Finding("function", cause, "measured", Bracket(before[-1], one.step), (text, where))


def _losses(
    case: Case, recorded: list[CheckpointState], records: list[FunctionRecord], *, explained: bool
) -> list[Finding]:
    steps = [state.step for state in recorded]
    tolerance = EXACT if case.computes_exactly(steps[-1]) else OTHERWISE
    wrong = [r for r in records if not abs(r.now - r.recorded) <= tolerance * max(1.0, r.recorded)]
    if not wrong or explained:
        return []
    right = [record.step for record in records if record not in wrong]
    before = [step for step in right if step < wrong[0].step]
    text = (
        f"the weights of step {wrong[0].step} have a loss of {wrong[0].now:.6g} under today's code, and "
        f"had {wrong[0].recorded:.6g}; up to {tolerance:g} is rounding"
    )
    where = (
        f"reproduced: steps {', '.join(map(str, right))}" if right else "no checkpoint's loss is reproduced"
    )
    return [
        Finding(
            "function",
            "another function was computed with these weights than today's code computes",
            "proved",
            Bracket(before[-1] if before else None, wrong[0].step),
            (text, where),
        )
    ]
