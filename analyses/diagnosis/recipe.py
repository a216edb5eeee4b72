"""What was so from the first step: parts of OSP that are missing, by the failures that the paper names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from osp_diag.analyses.diagnosis.case import Case
from osp_diag.analyses.diagnosis.findings import Bracket, Finding, Place

__all__ = ["RECIPE", "missing_parts"]

RECIPE: Mapping[str, tuple[str, tuple[Any, ...], str, str]] = {
    "optimizer.name": (
        "optimizer_routing", ("muon", "muon_only"), "AdamW moves the hidden matrices",
        "its scaling by coordinate prefers single channels (Park et al. 2025, section 3.1)",
    ),
    "model.norm": (
        "norm_gain", ("ssnorm", "srmsnorm"), "norms have a gain per channel",
        "gains amplify single channels; SSNorm has one scalar (section 3.2)",
    ),
    "optimizer.route": (
        "optimizer_routing", ({},), "parameters are moved by other optimizers than in OSP",
        "Muon moves all matrices but embedding and head (section 3.3)",
    ),
    "model.tie_embeddings": (
        "optimizer_routing", (False,), "the head is tied to the embedding",
        "one matrix then serves both, and both projections (section 3.3)",
    ),
    "model.embedding_projection": (
        "projections", (True,), "no embedding projections",
        "the embedding's outliers reach the residual stream (section 3.3)",
    ),
}  # fmt: skip
"""Key → family, values of OSP, what another value is, why the paper has the part."""
ORTHOGONAL = 0.05
"""Orthogonality error up to which projections count as orthogonal at the start; drawn orthogonal: 1e-6."""


def missing_parts(case: Case) -> Iterator[Finding]:
    """Parts of OSP that a run with outliers does without, and projections not orthogonal at the start."""
    yield from _orthogonality(case)
    if not case.is_raised or case.against is not None:
        return
    config = case.config_at(1)
    named = {finding.family for finding in case.findings if finding.bracket and finding.bracket.good is None}
    for key, (family, values, cause, reason) in RECIPE.items():
        if key in config and config[key] not in values and family not in named:
            yield Finding(
                family, cause, "consistent with", Bracket(None, 1),
                (f"the configuration has {key}={config[key]} from the start: {reason}",),
            )  # fmt: skip


def _orthogonality(case: Case) -> Iterator[Finding]:
    group = "weights:embedding_projection"
    if group not in case.run.beside or not len(case.run.steps) or case.run.steps[0] > 0:
        return
    data = case.run[group]
    name = "embedding_projection_orthogonality_error"
    if name not in data:
        return
    errors = data[name].isel(step=0)
    dimension = errors.dims[0]
    wrong = errors.values > ORTHOGONAL
    if np.any(wrong):
        names = tuple(
            f"{'model.' if 'un' not in str(label) else ''}{label}.weight"
            for label in errors[dimension].values[wrong]
        )
        yield Finding(
            "projections",
            "projections are not orthogonal at the start",
            "proved",
            Bracket(None, 1),
            (f"orthogonality error {float(errors.max()):.3g} at step 0; drawn orthogonal, they have 1e-6",),
            Place(names),
        )
