"""Whether monitor and diagnosis were right about one training."""

from __future__ import annotations

import json
import re
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from benchmarks.planted_faults.answers import (
    Finding,
    alerts_by_step,
    diagnosis_of,
    experiments_of,
    kurtosis_by_step,
)
from benchmarks.planted_faults.faults import HEALTHY, Cause
from benchmarks.planted_faults.training import Job
from osp_diag.monitoring.limits import LOSS_RISE
from osp_diag.runs.run import Run, open_run
from osp_diag.trainer.checkpoint import folder_of
from osp_diag.trainer.config import TrainConfig

__all__ = [
    "DEVELOPMENT_PRESET",
    "DEVELOPMENT_SEED",
    "OUTCOMES",
    "RAISED",
    "group_of",
    "score",
    "score_one",
    "score_path",
]

DEVELOPMENT_SEED, DEVELOPMENT_PRESET = 0, "tiny"
OF_CAUSES = (
    "family_right",
    "bracket_right",
    "place_right",
    "index_right",
    "cause_right",
    "remedy_verified",
)
OUTCOMES = (*OF_CAUSES, "remedy_heals", "experiments_right")
"""Of a training with a fault; None where there is nothing to be right about."""

RAISED = 1.25
"""Kurtosis was raised if its largest value after the onset is so many times that of the healthy training."""

OF_THE_RECIPE = {
    "osp": (),
    "muon_embproj": ("norm_gain",),
    "adam": ("optimizer_routing", "norm_gain", "projections"),
}
"""Families that may be named of a healthy training too: in these the recipe is not OSP."""


def score_path(job: Job) -> Path:
    """The file that holds a training's score."""
    return job.run.with_suffix(".score.json")


def score_one(
    job: Job, *, diagnosed: bool = True, verify: int = 0, experiment: int = 0, discard: bool = False
) -> dict[str, Any]:
    """Ask monitor and diagnosis of a finished training, score them, and keep the score.

    Parameters
    ----------
    diagnosed : ask the diagnosis; or else the monitor alone
    verify : steps for which the diagnosis tries each remedy; 0: none
    experiment : steps for which the seventh question, asked by itself, puts back parts of the recipe in
        faults from the start; 0: it is not asked
    discard : delete its checkpoints then, if no other training goes on from them
    """
    started = time.perf_counter()
    run, base = open_run(job.run), open_run(job.base.run)
    findings, regression, seconds, named = None, None, None, None
    if diagnosed:
        # What begins with the first step has no healthy past; code that is at fault is still there.
        against = job.base.run if job.fault.begins == "start" else None
        with job.fault.silent.code():
            findings, regression = diagnosis_of(job.run, against, verify)
        seconds = time.perf_counter() - started
    if experiment and job.fault.begins == "start":
        with job.fault.silent.code():
            named = experiments_of(job.run, experiment)
    scored = score(
        job,
        alerts_by_step(run),
        findings,
        kurtosis_by_step(run),
        kurtosis_by_step(base),
        _losses(base),
        named,
    )
    ended = json.loads(job.record.read_text(encoding="utf-8"))["ended"]
    scored |= {"held_out_loss": _last_loss(run), "healthy_held_out_loss": _last_loss(base)}
    scored |= {
        "ended": ended,
        "regression": regression,
        "diagnosis_seconds": seconds,
        "seconds": time.perf_counter() - started,
    }
    score_path(job).write_text(json.dumps(scored, indent=1), encoding="utf-8")
    if discard and job != job.base:
        shutil.rmtree(folder_of(job.run))
    return scored


def _losses(run: Run) -> dict[int, float]:
    """Probed step → held-out loss."""
    losses = run.series["held_out_loss"].dropna("step")
    return {int(step): float(value) for step, value in zip(losses["step"], losses, strict=True)}


def _last_loss(run: Run) -> float | None:
    losses = run.series["held_out_loss"].dropna("step") if "held_out_loss" in run.series else []
    return float(losses[-1]) if len(losses) else None


def group_of(job: Job) -> str:
    """What the rules knew of it: ``development``, or in which way it is held out."""
    if job.setting.preset != DEVELOPMENT_PRESET:
        return f"held out: preset {job.setting.preset}"
    if not job.fault.is_development:
        return "held out: faults"
    return "development" if job.seed == DEVELOPMENT_SEED else "held out: seeds"


def score(
    job: Job,
    alerts: Mapping[int, Sequence[str]],
    findings: Sequence[Finding] | None,
    kurtosis: Mapping[int, float],
    healthy_kurtosis: Mapping[int, float],
    healthy_losses: Mapping[int, float],
    experiments: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Hold what was said of a training against what was planted.

    Parameters
    ----------
    alerts : probed step → rules, as :func:`~benchmarks.planted_faults.answers.alerts_by_step`
    findings : of the diagnosis; None: it was not asked
    kurtosis, healthy_kurtosis : probed step → mean over hidden states, of it and of its base
    healthy_losses : probed step → held-out loss of its base
    experiments : families that the seventh question names by itself; None: it was not asked

    Returns
    -------
    for JSON: ``noticed_after`` steps from the onset to the first alert, or None; ``false_alerts`` before it;
    and what :func:`judged` gives of the findings
    """
    fault, onset = job.fault, job.onset
    late = {step: value for step, value in kurtosis.items() if step > onset}
    usual = max((value for step, value in healthy_kurtosis.items() if step > onset), default=None)
    families = {cause.family for cause in fault.causes}
    largest = max(late.values(), default=None)
    after = sorted(step for step in alerts if step > onset)
    expected = fault.family == HEALTHY and fault.raises_kurtosis  # Adam's outliers are no false alarm
    return {
        "fault": job.name,
        "seed": job.seed,
        "preset": job.setting.preset,
        "group": group_of(job),
        "begins": fault.begins,
        "family": fault.family,
        "is_declared": fault.is_declared,
        "kurtosis": largest,
        "healthy_kurtosis": usual,
        "raised": bool(fault.causes) and bool(late) and largest > RAISED * (usual or 0.0),
        "noticed_after": after[0] - onset if after and fault.causes else None,
        "alerts": {str(step): list(rules) for step, rules in alerts.items()},
        "false_alerts": 0 if expected else sum(len(rules) for step, rules in alerts.items() if step <= onset),
        "experiments": experiments,
        **({} if findings is None else judged(findings, job)),
        "remedy_heals": _heals(findings or (), families, usual or 0.0, healthy_losses),
        "experiments_right": None if experiments is None else bool(families.intersection(experiments[:1])),
    }


def _heals(
    findings: Sequence[Finding], families: set[str], usual: float, healthy_losses: Mapping[int, float]
) -> bool | None:
    """Whether a remedy of a right finding leads back to the kurtosis and the loss of the healthy training."""
    ends = [finding.remedied for finding in findings if finding.family in families and finding.remedied]
    ends = [end for end in ends if end[0] in healthy_losses]
    if not ends:
        return None
    return any(
        kurtosis <= RAISED * usual and loss <= healthy_losses[step] + LOSS_RISE
        for step, kurtosis, loss in ends
    )


def judged(findings: Sequence[Finding], job: Job) -> dict[str, Any]:
    """Which of family, place, cause and remedy the findings have right.

    Of a fault with n causes the first n families that are named count, in the order of the findings. A fault
    of no place has None for ``place``, one of a whole matrix None for ``index``. ``wrong_families`` are those
    named that are neither the fault's nor its recipe's.
    """
    fault, config = job.fault, job.healthy_config()
    own = OF_THE_RECIPE[fault.recipe]
    truths = {cause.family for cause in fault.causes}
    named = list(dict.fromkeys(f.family for f in findings if f.family in truths or f.family not in own))
    first = named[: len(truths)]
    parts = [_of_cause(cause, findings, first, config, job) for cause in fault.causes]

    def all_of(key: str) -> bool | None:
        values = [part[key] for part in parts if part[key] is not None]
        return all(values) if values else None

    return {
        "named": named,
        **{key: all_of(key) for key in OF_CAUSES},
        "causes_named": sum(part["family_right"] for part in parts),
        "causes": len(parts),
        "wrong_families": [family for family in named if family not in truths],
        "findings": [vars(finding) for finding in findings],
    }


@dataclass(frozen=True)
class _Place:
    patterns: tuple[str, ...]
    site: str | None = None
    layer: int | None = None
    indices: tuple[int, ...] = ()


def _place(cause: Cause, config: TrainConfig, seed: int) -> _Place:
    if cause.edit is None:
        return _Place(cause.parameters)
    spot, edit = cause.edit.spot(config, seed), cause.edit
    indices: tuple[int, ...] = () if edit.axis == "all" else (spot.index,)
    if edit.axis == "head":  # itself, or one of its rows
        width = config.model.head_size
        indices += tuple(range(spot.index * width, (spot.index + 1) * width))
    return _Place((spot.parameter,), edit.site, spot.layer, indices)


def _of_cause(
    cause: Cause, findings: Sequence[Finding], families: Sequence[str], config: TrainConfig, job: Job
) -> dict[str, bool | None]:
    mine = [finding for finding in findings if finding.family == cause.family and finding.family in families]
    place = _place(cause, config, job.seed)
    placed = [finding for finding in mine if _is_at(finding, place)]
    has_words = [
        finding for finding in mine if all(re.search(word, finding.cause.lower()) for word in cause.words)
    ]
    remedies = [finding.remedy_verified for finding in mine if finding.remedy_verified is not None]
    return {
        "family_right": bool(mine),
        "bracket_right": any(_is_in_time(finding, job) for finding in mine),
        "place_right": bool(placed) if place.patterns else None,
        "index_right": any(f.indices and set(f.indices) <= set(place.indices) for f in placed)
        if place.indices
        else None,
        "cause_right": bool(has_words),
        "remedy_verified": any(remedies) if remedies else None,
    }


def _is_in_time(finding: Finding, job: Job) -> bool:
    """The onset is within the bracket; what began with the first step was there from the start."""
    if finding.by_step is None:
        return False
    if job.fault.begins == "start":
        return not finding.after_step
    return finding.after_step is not None and finding.after_step <= job.onset < finding.by_step


def _is_at(finding: Finding, place: _Place) -> bool:
    """By its parameters, all of which have to be the fault's, or else by site and layer."""
    if finding.parameters:
        return all(
            any(fnmatchcase(name, pattern) for pattern in place.patterns) for name in finding.parameters
        )
    return place.site is not None and (finding.site, finding.layer) == (place.site, place.layer)
