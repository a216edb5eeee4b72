"""What to do about a finding: from which checkpoint to go on, and under which configuration."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.conditions import family_of
from osp_diag.analyses.diagnosis.findings import Finding, Remedy
from osp_diag.analyses.diagnosis.recipe import RECIPE

__all__ = ["with_remedy"]

CODE = {
    "weight_edit": "find what writes into the weights there; the weights before it are whole",
    "function": "put back the code or the constant that the weights were trained with",
    "data": "look at the data from that step on; skip what is wrong there",
    "batch": "a single batch passes; to leave such steps out set divergence.spike and divergence.policy=skip",
    "precision": "keep the weights in float32",
    "learning_rate": "find what sets the rate of the optimizers beside the schedule",
    "weight_decay": "find what sets the decay of the optimizers beside the configuration",
    "optimizer_routing": "find what rerouted the parameters beside the configuration",
    "norm_gain": "find what writes into the gains there; the weights before it are whole",
    "projections": "draw the projections orthogonal, as the trainer does",
    "clipping": "clip gradients again",
}
"""Family → what to do where the configuration is not the cause."""


def with_remedy(case: Case, finding: Finding) -> Finding:
    """The finding with what to do: the values before it, from the last checkpoint before it."""
    if finding.bracket is None:
        return finding
    changes = _values_before(case, finding)
    steps = case.config_at(finding.bracket.bad).get("steps")
    start = case.checkpoint_up_to(finding.bracket.good)
    name = case.run.path.stem if case.run.path is not None else "run"
    settings = " ".join(f"{key}={_typed(value)}" for key, value in changes.items())
    if start is not None:
        # A checkpoint of an earlier segment may have been meant to end where it is.
        if steps is not None and start.config.get("steps") != steps:
            settings = f"{settings} steps={steps}".strip()
        text = f"go on from {start.path.name}, before it"
        mend = CODE.get(finding.family, "mend the cause first")
        text += f", with {settings}" if settings else f": {mend}"
        command = f"osp-diag train --from {start.path}"
        command += f" --set {settings}" if settings else ""
        command += f" --out {name}-mended.zarr"
        remedy = Remedy(text, command if case.trains else "", start.step, changes)
    elif settings:
        remedy = Remedy(f"train again with --set {settings}", "", None, changes)
    else:
        remedy = Remedy(CODE.get(finding.family, "mend the cause, and train again"))
    return replace(finding, remedy=remedy)


def _values_before(case: Case, finding: Finding) -> dict[str, Any]:
    """What the configuration had before, or the good run or OSP has, of the finding's family."""
    bracket = finding.bracket
    assert bracket is not None
    now = case.config_at(bracket.bad)
    if bracket.good is not None:
        earlier = case.checkpoint_up_to(bracket.good)
        before = earlier.config if earlier is not None else case.config_at(bracket.good)
    elif case.against is not None:
        config = case.against.attrs.get("config")
        before = config if isinstance(config, dict) else {}
    else:
        before = {key: values[0] for key, (_, values, _, _) in RECIPE.items()}
    return {
        key: value
        for key, value in before.items()
        if key in now and now[key] != value and family_of(key) == finding.family
    }


def _typed(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return ",".join(f"{key}:{entry}" for key, entry in value.items()) or "''"
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value)
