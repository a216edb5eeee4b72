"""What a diagnosis says: findings with their confidence, what was ruled out, and what was not recorded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from osp_diag.laboratory import Fork

__all__ = ["CONFIDENCES", "FAMILIES", "Bracket", "Confidence", "Diagnosis", "Finding", "Place", "Remedy"]

Confidence = Literal["proved", "measured", "consistent with"]
CONFIDENCES: Mapping[Confidence, str] = {
    "proved": "a difference to the bit, an owner, a configuration or a check of the function says so",
    "measured": "a counterfactual, beside its control and the loss",
    "consistent with": "nothing recorded contradicts it, and nothing proves it",
}
"""Best first; below the last, no cause is named."""

FAMILIES: Mapping[str, str] = {
    "optimizer_routing": "which optimizer moves which parameters",
    "learning_rate": "learning rate or its schedule",
    "weight_decay": "weight decay",
    "clipping": "clipping of gradients",
    "weight_edit": "weights changed by something else than a step",
    "norm_gain": "gains of the norms",
    "projections": "embedding projections",
    "function": "what is computed with the weights",
    "data": "what is trained on, from some step on",
    "batch": "single batches",
    "precision": "the type in which weights are kept or multiplied",
}
"""Of causes, in words."""


class Bracket(NamedTuple):
    """Between which steps something began; ``good`` is None where it was so from the first step."""

    good: int | None
    bad: int

    def __str__(self) -> str:
        return (
            f"from step {self.bad} on" if self.good is None else f"between steps {self.good} and {self.bad}"
        )


@dataclass(frozen=True)
class Place:
    """Where a cause sits; None and empty where it has no such place."""

    parameter: tuple[str, ...] = ()
    site: str | None = None
    layer: int | None = None
    row: int | None = None
    column: int | None = None
    channel: int | None = None
    head: int | None = None


@dataclass(frozen=True)
class Remedy:
    """What to do, as it can be typed.

    Attributes
    ----------
    text : a sentence
    command : the command line; empty where there is none
    start : step of the checkpoint before the onset, from which it goes on
    changes : of the configuration, by dotted key
    verified : whether a fork with it did what it should; None: it was not tried
    outcome : what happened, in a sentence
    fork : the training that tried it; None: there was none
    """

    text: str
    command: str = ""
    start: int | None = None
    changes: Mapping[str, Any] = field(default_factory=dict)
    verified: bool | None = None
    outcome: str = ""
    fork: Fork | None = None


@dataclass(frozen=True)
class Finding:
    """One cause, or one change that may be one.

    Attributes
    ----------
    family : one of :data:`FAMILIES`
    cause : in a few words
    confidence : one of :data:`CONFIDENCES`
    bracket : when it began
    evidence : what was seen, a sentence each
    place : where it sits
    remedy : what to do
    """

    family: str
    cause: str
    confidence: Confidence
    bracket: Bracket | None
    evidence: tuple[str, ...]
    place: Place = Place()
    remedy: Remedy | None = None


@dataclass(frozen=True)
class Diagnosis:
    """The answers to the seven questions, of one run.

    Attributes
    ----------
    run : what it is called
    regression : what rose, a sentence each; empty: nothing did, and findings are changes without a regression
    compared : what was asked whether it rose: kurtosis, held-out loss; what has fewer than two probes is not
    bracket : last good and first bad probe; None without a regression
    checkpoints : the last one before the bracket's end, and the first one after it
    findings : all of them, the best proved first
    where : where channels are largest, and who writes them: never causes
    ruled_out : what was looked at and is as it was
    not_recorded : what could not be asked, with what would have to be recorded
    """

    run: str
    regression: tuple[str, ...]
    compared: tuple[str, ...]
    bracket: Bracket | None
    checkpoints: tuple[int | None, int | None]
    findings: tuple[Finding, ...]
    where: tuple[str, ...]
    ruled_out: tuple[str, ...]
    not_recorded: tuple[str, ...]

    def __str__(self) -> str:
        from osp_diag.analyses.diagnosis.text import diagnosis_as_text

        return diagnosis_as_text(self)

    def as_dict(self) -> dict[str, Any]:
        """For JSON; confidences and families come with their meaning."""
        return asdict(self) | {"confidences": dict(CONFIDENCES), "families": dict(FAMILIES)}
