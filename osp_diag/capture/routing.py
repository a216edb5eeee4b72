"""What a mixture's router chose, in the form in which it is measured: a number for each token and expert."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from osp_diag.estimators.base import Layout, State, Suite
from osp_diag.estimators.routing import RoutingObservation

__all__ = ["by_expert", "measure_routing"]


def by_expert(
    experts: Int[Tensor, "token slot"], peaks: Float[Tensor, "token slot"], count: int
) -> dict[str, Float[Tensor, "token expert"]]:
    """``choice``: 1 where a token was sent to an expert; ``peaks``: the largest |y| that it gave, else −Inf.

    Parameters
    ----------
    experts, peaks : the chosen experts of each token, and max |y| of each
    count : of all experts
    """
    shape, index = (experts.shape[0], count), experts.long()
    nothing = torch.full(shape, -torch.inf, device=peaks.device)
    return {
        "choice": torch.zeros(shape, device=peaks.device).scatter(1, index, 1.0),
        "peaks": nothing.scatter_reduce(1, index, peaks.float(), "amax", include_self=True),
    }


def measure_routing(
    suite: Suite,
    kind: str,
    values: Float[Tensor, "batch token expert"],
    strata: Float[Tensor, "stratum batch token"],
    stratum_names: tuple[str, ...],
) -> tuple[Layout, State]:
    """Measure values of one kind: ``logits``, ``probabilities``, ``choice`` or ``peaks``."""
    if kind == "probabilities":
        kind, values = "logits", values.float().log()
    elif kind == "choice":
        values = (values != 0).float()
    observation = RoutingObservation(strata, values.shape[-1], stratum_names=stratum_names, **{kind: values})
    return observation.layout, suite.measure(observation)
