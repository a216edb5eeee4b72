"""Question 3: did the recorded configuration, or what the optimizers hold, change?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.findings import Bracket, Finding, Place
from osp_diag.laboratory import CheckpointState
from osp_diag.schema import PARENT
from osp_diag.wording import change, listed

__all__ = ["changed_conditions", "family_of"]

FAMILY_OF: Mapping[str, str] = {
    "optimizer.name": "optimizer_routing",
    "optimizer.route": "optimizer_routing",
    "model.tie_embeddings": "optimizer_routing",
    "optimizer.lr": "learning_rate",
    "optimizer.embedding_lr": "learning_rate",
    "schedule.": "learning_rate",
    "optimizer.weight_decay": "weight_decay",
    "optimizer.gradient_clip": "clipping",
    "model.norm": "norm_gain",
    "model.norm_scale": "norm_gain",
    "model.embedding_projection": "projections",
    "data.": "data",
    "batch_size": "data",
    "dtype": "precision",
    "optimizer.newton_schulz": "precision",
    "optimizer.": "optimizer_routing",
    "model.": "function",
}
"""Beginning of a dotted key → family of what it changes; the first that fits."""

WORDS: Mapping[str, str] = {
    "optimizer.lr": "learning rate",
    "optimizer.embedding_lr": "learning rate of the embedding",
    "optimizer.weight_decay": "weight decay",
    "optimizer.gradient_clip": "clipping of gradients",
    "model.norm": "gains of the norms",
    "model.embedding_projection": "embedding projections",
    "model.rope_theta": "base of the rotary frequencies (RoPE)",
    "model.tie_embeddings": "tying of the head to the embedding",
    "schedule.warmup": "warm-up",
    "dtype": "type of the weights",
    "batch_size": "batch size",
    "optimizer.states_since": "step since which the optimizer's states exist",
}
OF_THE_WORK = ("name", "seed", "data.seed", "steps", "probe.", "log_every", "sketch_every", "monitor.")
"""Keys whose change explains nothing: what is drawn, how long, and what is looked at."""

NAMES = {"adamw": "AdamW", "muon": "Muon", "soap": "SOAP", "shampoo": "Shampoo"}
ROLES = {
    "hidden": "hidden matrices",
    "embedding_projection": "embedding projections",
    "embedding": "the embedding",
    "head": "the head",
    "vector": "gains and scalars",
}


def family_of(key: str) -> str | None:
    """The family of what a dotted key changes; None of one that decides no number."""
    if key.startswith(OF_THE_WORK):
        return None
    return next((family for start, family in FAMILY_OF.items() if key.startswith(start)), None)


def changed_conditions(case: Case) -> Iterator[Finding]:
    """Every difference of configuration and owner: between segments, checkpoints, and to the good run."""
    brackets: list[tuple[Bracket, Mapping[str, Any], Mapping[str, Any]]] = []
    segments = case.run.segments
    for before, after in pairwise(segments):
        bracket = Bracket(after.after_step, after.after_step + 1)
        brackets.append((bracket, _config(before.attributes), _config(after.attributes)))
    known = {bracket.good for bracket, _, _ in brackets}
    for one, two in case.pairs:
        if not any(good is not None and one.step <= good < two.step for good in known):
            brackets.append((Bracket(one.step, two.step), one.config, two.config))
    own = _config(case.run.attrs)
    if case.against is not None:
        brackets.append((Bracket(None, 1), _config(case.against.attrs), own))
    findings = [finding for bracket, old, new in brackets for finding in _of_config(case, bracket, old, new)]
    findings += [*_of_parent(case), *_silent_owners(case)]
    yield from findings
    if not own and not any(state.config for state in case.checkpoints):
        case.not_recorded.append("the configuration: the run has no attribute `config`")
        return
    nothing = "nothing else" if findings else "nothing that decides a number"
    parameters = "other parameters" if findings else "parameters"
    are_compared = len(case.checkpoints) > 1 and any(state.owners for state in case.checkpoints)
    owners = f", nor did {parameters} move to another optimizer" if are_compared else ""
    if own or len(case.checkpoints) > 1:
        case.ruled_out.append(f"{nothing} changed in {_compared(case)}{owners}")


def _compared(case: Case) -> str:
    """Where configurations stand."""
    files = dict.fromkeys(file for state in case.checkpoints for file in state.origins.values())
    return f"what the checkpoints say ({listed(list(files))})" if files else "the recorded configuration"


def _config(attributes: Mapping[Any, Any]) -> Mapping[str, Any]:
    config = attributes.get("config")
    return config if isinstance(config, Mapping) else {}


def _of_config(
    case: Case, bracket: Bracket, old: Mapping[str, Any], new: Mapping[str, Any]
) -> Iterator[Finding]:
    if not old or not new:
        return
    changed = {
        key: (old[key], value)
        for key, value in new.items()
        if key in old and old[key] != value and family_of(key) is not None
    }
    routing = [key for key in changed if key in ("optimizer.name", "optimizer.route")]
    moved = list(_moved(case, bracket, [f"{key}: {_of(changed[key])}" for key in routing])) if routing else []
    yield from moved
    for key, values in changed.items():
        if moved and key in routing:
            continue
        yield Finding(
            family_of(key) or "function",
            _cause(key, *values),
            "proved",
            bracket,
            (f"{_source(case, key, bracket)} says {key}: {_of(values)}" + _other(case, bracket),),
            _place(case, key, bracket),
        )


def _source(case: Case, key: str, bracket: Bracket) -> str:
    after = case.checkpoint_after(bracket.good if bracket.good is not None else -1)
    origin = None if after is None else after.origins.get(key)
    return "the configuration" if after is None or origin is None else f"{origin} at {after.path.name}"


def _other(case: Case, bracket: Bracket) -> str:
    return " (before: the good run's)" if bracket.good is None and case.against is not None else ""


def _of(values: tuple[Any, Any]) -> str:
    return change(*values)


def _cause(key: str, before: Any, now: Any) -> str:
    words = WORDS.get(key, key)
    numbers = all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in (before, now))
    if numbers and key.endswith(("lr", "weight_decay")) and before:
        return (
            f"{words} × {now / before:g} ({before:g} → {now:g})"
            if now
            else f"no {words} any more ({before:g} → 0)"
        )
    if key == "model.norm":
        kinds = {
            "rmsnorm": "a gain per channel (RMSNorm)",
            "ssnorm": "one scalar gain (SSNorm)",
            "srmsnorm": "no gain",
        }
        return f"norm gains: {kinds.get(now, now)} in place of {kinds.get(before, before)}"
    if key == "model.embedding_projection":
        return "embedding projections were added" if now else "no embedding projections"
    if key == "model.tie_embeddings":
        return "the head is tied to the embedding" if now else "the head is tied to the embedding no more"
    if key == "schedule.warmup" and not now:
        return "no warm-up"
    if key == "optimizer.gradient_clip" and now is None:
        return "no clipping of gradients"
    return f"{words}: {change(before, now)}"


def _place(case: Case, key: str, bracket: Bracket) -> Place:
    """The parameters that a key is about."""
    state = case.checkpoint_up_to(bracket.good) or (case.checkpoints[0] if case.checkpoints else None)
    if state is None:
        return Place()
    roles = {
        "model.embedding_projection": ("embedding_projection",),
        "model.tie_embeddings": ("embedding", "head"),
    }.get(key, ())
    names = [name for name, role in state.roles.items() if role in roles]
    if key.startswith("model.norm"):
        names = [name for name in state.shapes if name.endswith("norm.weight")]
    return Place(tuple(names))


def _moved(case: Case, bracket: Bracket, lines: list[str]) -> Iterator[Finding]:
    """Which parameters another optimizer moves since a configuration named another."""
    after = case.checkpoint_after(bracket.good if bracket.good is not None else -1)
    before = case.checkpoint_up_to(bracket.good)
    if bracket.good is None and case.its_laboratory is not None and case.its_laboratory.checkpoints:
        before = case.its_laboratory.checkpoints[0]
    if before is None or after is None:
        return
    evidence = tuple(f"the configuration says {line}" for line in lines)
    yield from _changed_owners(before.owners, after, bracket, evidence)


def _changed_owners(
    before: Mapping[str, str], after: CheckpointState, bracket: Bracket, evidence: tuple[str, ...]
) -> Iterator[Finding]:
    groups: dict[tuple[str, str, str], list[str]] = {}
    for name, owner in after.owners.items():
        was = before.get(name)
        if was is not None and was != owner:
            role = after.roles.get(name, "hidden")
            role = "outer" if role in ("embedding", "head") else role
            groups.setdefault((was, owner, role), []).append(name)
    for (was, owner, role), names in groups.items():
        if role == "vector" and len(groups) > 1:
            continue
        words = " and ".join(dict.fromkeys(ROLES[after.roles.get(name, "hidden")] for name in names))
        state = (
            f"checkpoint {after.path.name} holds {NAMES.get(owner, owner)}'s state of {len(names)} of them"
        )
        yield Finding(
            "optimizer_routing",
            f"{NAMES.get(owner, owner)} moves {words}, not {NAMES.get(was, was)}",
            "proved",
            bracket,
            (*evidence, state),
            Place(tuple(names)),
        )


def _silent_owners(case: Case) -> Iterator[Finding]:
    """Owners that are not those of the configuration."""
    before: CheckpointState | None = None
    for state in case.checkpoints:
        wrong = {
            name for name, owner in state.owners.items() if state.configured_owners.get(name, owner) != owner
        }
        if wrong:
            bracket = Bracket(None if before is None else before.step, state.step)
            expected = {name: state.configured_owners[name] for name in wrong}
            evidence = ("the configuration sends them elsewhere: something else rerouted them",)
            yield from _changed_owners(expected, state, bracket, evidence)
            return
        before = state


def _of_parent(case: Case) -> Iterator[Finding]:
    """What was changed when the run began from another run's checkpoint."""
    parent = case.run.attrs.get(PARENT)
    if not isinstance(parent, Mapping):
        return
    step = int(parent.get("step", 0))
    before = parent.get("config_before")
    if isinstance(before, Mapping):
        yield from _of_config(case, Bracket(step, step + 1), before, _config(case.run.segments[0].attributes))
