"""The small print under a figure: everything that determines its numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from osp_diag.analyses.run_labels import run_name
from osp_diag.runs.run import Run

__all__ = ["caption"]


def _tokens(attrs: Mapping[Any, Any]) -> str:
    tokens, length = attrs.get("tokens"), attrs.get("sequence_length")
    text = f"{int(tokens):,} tokens" if tokens is not None else "tokens not recorded"
    if length is not None:
        text += f" in sequences of {int(length):,}"
    source = attrs.get("token_source")
    return f"{text} of {source}" if source else text


def _model(run: Run) -> str:
    """The name in the panels, and the model's own where it says more."""
    name, model = run_name(run), str(run.attrs.get("model_name", ""))
    plain = re.sub(r"[^a-z0-9]+", "_", name.lower())
    return name if model in ("", name, plain) else f"{name} ({model})"


def _facts(run: Run, step: int) -> dict[str, str]:
    attrs = run.attrs
    return {
        "model": _model(run),
        "protocol": f"{attrs.get('protocol', 'unknown')} protocol, BOS {attrs.get('bos', 'unknown')}",
        "tokens": _tokens(attrs),
        "step": f"step {step:,}",
        "dtype": str(attrs.get("dtype", "dtype not recorded")),
    }


def caption(
    title: str,
    runs: Sequence[Run],
    steps: Sequence[int],
    estimators: Sequence[str],
    remarks: Sequence[str] = (),
) -> str:
    """What is shown, then model, protocol, tokens, step and dtype of the runs, then estimators and remarks.

    Facts that all runs share are said once.
    """
    facts = [_facts(run, step) for run, step in zip(runs, steps, strict=True)]
    shared = [key for key in facts[0] if key != "model" and len({fact[key] for fact in facts}) == 1]
    models = [
        "; ".join([fact["model"], *(fact[key] for key in fact if key != "model" and key not in shared)])
        for fact in facts
    ]
    sides = " / ".join(dict.fromkeys(models))
    sentences = [title, f"{sides}: " + "; ".join(facts[0][key] for key in shared) if shared else sides]
    if estimators:
        word = "Estimator" if len(set(estimators)) == 1 else "Estimators"
        sentences.append(f"{word}: {', '.join(dict.fromkeys(estimators))}")
    return ". ".join(part.rstrip(".") for part in (*sentences, *remarks) if part) + "."
