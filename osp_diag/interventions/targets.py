"""Where an intervention applies in one model; what is not there is refused before the model runs."""

from __future__ import annotations

import torch
from jaxtyping import Bool
from torch import Tensor, nn

from osp_diag.errors import SiteError, UsageError
from osp_diag.interventions.intervention import KEYS, OF_WEIGHTS, Intervention
from osp_diag.interventions.weights import weights_of
from osp_diag.schema import (
    ATTENTION,
    CROSS_ATTENTION,
    CROSS_HEAD_SITES,
    DOWN_WEIGHT,
    MIXER_STATE,
    PROJECTION_WEIGHT,
    RESIDUAL_SITES,
    ROUTER,
    STRATA,
)
from osp_diag.sites.names import AT_THE_CALL, SiteMap, Tap
from osp_diag.wording import did_you_mean

__all__ = ["check", "is_at_call", "layers_of", "sites_at_call", "sites_to_change", "taps_of", "tokens_of"]

_STATISTICS_ONLY = (ATTENTION, CROSS_ATTENTION, *CROSS_HEAD_SITES, MIXER_STATE, ROUTER)
_AS_WIDE_AS_STREAM = (*RESIDUAL_SITES, "final_norm", "attention_contribution", "mlp_contribution")


def sites_at_call(sites: SiteMap) -> frozenset[str]:
    """Sites that are changed where the model calls attention."""
    tapped = {tap.site for tap in sites.taps}
    return frozenset(AT_THE_CALL - {ATTENTION} - tapped).intersection(sites.sites)


def is_at_call(sites: SiteMap, intervention: Intervention) -> bool:
    """Whether an intervention changes attention calls and not what passes modules."""
    return intervention.operation == KEYS or intervention.site in sites_at_call(sites)


def sites_to_change(sites: SiteMap) -> list[str]:
    """The sites whose activations an intervention can change."""
    tapped = {tap.site for tap in sites.taps if tap.side in ("input", "output")}
    there = (tapped | sites_at_call(sites)) - set(_STATISTICS_ONLY)
    return [site for site in sites.sites if site in there]


def taps_of(sites: SiteMap, intervention: Intervention) -> list[Tap]:
    """Where the hooks of an intervention go."""
    layers = layers_of(sites, intervention)
    return [
        tap
        for tap in sites.taps
        if tap.site == intervention.site and tap.side in ("input", "output") and tap.layer in layers
    ]


def layers_of(sites: SiteMap, intervention: Intervention) -> tuple[int, ...]:
    """The layers in which an intervention on activations or keys applies."""
    there = sites.attention_layers
    if intervention.operation != KEYS:
        there = sites.layers_of(intervention.site)
    return there if intervention.layers is None else intervention.layers


def tokens_of(
    intervention: Intervention, strata: Bool[Tensor, "stratum batch token"]
) -> Bool[Tensor, "batch token"]:
    """Which tokens of a pass an intervention is about, of those in each stratum of text."""
    if isinstance(intervention.tokens, str):
        return strata[STRATA.index(intervention.tokens)]
    present = strata[0]
    places = present.cumsum(dim=1) - 1
    return present & torch.isin(places, torch.tensor(intervention.tokens, device=places.device))


def check(model: nn.Module, sites: SiteMap, intervention: Intervention) -> None:
    """Refuse what the model does not have.

    Parameters
    ----------
    model : not wrapped

    Raises
    ------
    SiteError : a site or layer
    UsageError : a channel, head or weight
    """
    if intervention.operation in OF_WEIGHTS:
        weights_of(model, sites, intervention)
        return
    if intervention.operation == KEYS:
        if not sites.attention_layers:
            raise SiteError(f"{intervention}: {sites.absent.get(ATTENTION, 'the model has no attention')}")
        _check_layers(intervention, sites.attention_layers, "attention")
        return
    there = sites_to_change(sites)
    if intervention.site not in there:
        raise SiteError(f"{intervention}: {_why_not(sites, intervention.site, there)}")
    _check_layers(intervention, sites.layers_of(intervention.site), intervention.site)
    if intervention.site in ("mlp_hidden",) and len(taps_of(sites, intervention)) < len(
        layers_of(sites, intervention)
    ):
        raise SiteError(
            f"{intervention}: the hidden states of experts are not changed; change mlp_contribution"
        )
    width = _width(model, sites, intervention)
    for channel in intervention.channels or ():
        if channel < 0 or (width is not None and channel >= width):
            has = "channels count from 0" if width is None else f"has channels 0 to {width - 1}"
            raise UsageError(f"{intervention}: {intervention.site} {has}, not {channel}")


def _why_not(sites: SiteMap, site: str, there: list[str]) -> str:
    if site in sites.absent:
        return f"site {site!r} is not in this model: {sites.absent[site]}"
    if site.startswith((DOWN_WEIGHT, PROJECTION_WEIGHT)):
        return f"{site} is a weight; scale or clip its rows"
    if site in _STATISTICS_ONLY:
        return f"site {site!r} holds statistics alone and cannot be changed; there are {', '.join(there)}"
    return f"site {site!r} is not in this model; {did_you_mean(site, there)}"


def _check_layers(intervention: Intervention, layers: tuple[int, ...], what: str) -> None:
    missing = sorted(set(intervention.layers or ()) - set(layers))
    if missing:
        span = f"{layers[0]} to {layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
        if len(layers) != layers[-1] - layers[0] + 1:
            span = ", ".join(map(str, layers))
        plural = "layers" if len(layers) > 1 else "layer"
        raise SiteError(f"{intervention}: {what} has {plural} {span}, not {missing[0]}")


def _width(model: nn.Module, sites: SiteMap, intervention: Intervention) -> int | None:
    """How many channels the site has, where its modules tell before the model runs."""
    if intervention.site in _AS_WIDE_AS_STREAM:
        return sites.hidden_size
    taps = taps_of(sites, intervention)
    if not taps or taps[0].heads:
        return None
    features = "in_features" if taps[0].side == "input" else "out_features"
    return getattr(model.get_submodule(taps[0].module), features, None)
