"""The means that interventions put in the place of activations."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from osp_diag.checkpoints.checkpoint import evaluation_mode
from osp_diag.errors import CaptureError
from osp_diag.interventions.editing import Editing
from osp_diag.interventions.intervention import Intervention
from osp_diag.interventions.targets import check
from osp_diag.sites.names import SiteMap
from osp_diag.sites.trace import unwrap

__all__ = ["with_means"]


def with_means(
    model: nn.Module,
    sites: SiteMap,
    interventions: Sequence[Intervention],
    batches: Iterable[Mapping[str, Any]],
    *,
    delimiter_ids: Sequence[int] = (),
) -> list[Intervention]:
    """The interventions, those to the mean with the means of the untouched model.

    The mean of a channel (of one head) of a layer is over the tokens that the intervention names, in all
    batches: 1/N Σ x, in float64.

    Parameters
    ----------
    batches : keyword arguments of the model, run once if any mean is to be measured
    model, sites, interventions, delimiter_ids : as of :func:`osp_diag.interventions.intervened`

    Raises
    ------
    CaptureError : none of the tokens that are meant is in the batches
    """
    model = unwrap(model)
    unknown = [i for i in interventions if i.operation == "mean" and i.value is None]
    if not unknown:
        return list(interventions)
    for intervention in unknown:
        check(model, sites, intervention)
    sums: dict[tuple[int, int], Tensor] = {}
    counts: dict[tuple[int, int], int] = {}

    def add(intervention: Intervention, layer: int, x: Tensor, chosen: Tensor) -> Tensor:
        place = id(intervention), layer
        tokens = x.movedim(-2, 1)[chosen].double()
        sums[place] = sums.get(place, 0) + tokens.sum(0)
        counts[place] = counts.get(place, 0) + len(tokens)
        return x

    with evaluation_mode(model), torch.no_grad(), Editing(model, sites, unknown, delimiter_ids, add):
        for batch in batches:
            model(**batch)
    return [_with_mean(i, sums, counts) if i in unknown else i for i in interventions]


def _with_mean(
    intervention: Intervention, sums: Mapping[tuple[int, int], Tensor], counts: Mapping[tuple[int, int], int]
) -> Intervention:
    means: dict[int, Tensor] = {}
    for (key, layer), total in sums.items():
        if key != id(intervention):
            continue
        if not counts[key, layer]:
            raise CaptureError(
                f"{intervention}: none of these tokens is in the sequences, so that there is no mean"
            )
        mean = total / counts[key, layer]
        if mean.ndim > 1 and intervention.heads is not None:
            mean = mean[list(intervention.heads)]
        means[layer] = mean if intervention.channels is None else mean[..., list(intervention.channels)]
    return replace(intervention, value=means)
