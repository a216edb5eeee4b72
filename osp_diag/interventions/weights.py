"""Weights that are other ones for a while, and afterwards the same to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from jaxtyping import Float
from torch import Tensor, nn

from osp_diag.capture.down_projection import whole_weight
from osp_diag.errors import UsageError
from osp_diag.interventions.intervention import Intervention
from osp_diag.schema import DOWN_WEIGHT, PROJECTION_WEIGHT
from osp_diag.sites.names import SiteMap, Tap
from osp_diag.sites.stack import is_norm
from osp_diag.wording import did_you_mean, listed

__all__ = ["clip_row_norms", "edited_weights", "weights_of"]

_CONSTANT = 1e-3
"""How far what a norm adds to its gains may differ between channels, in units of 1."""


def weights_of(model: nn.Module, sites: SiteMap, intervention: Intervention) -> dict[str, nn.Parameter]:
    """Name → parameter, of those that an intervention on weights changes.

    Raises
    ------
    UsageError : no parameter, layer, row or column of that name or number; a weight that is packed,
        quantised or sharded; gains of what is no norm
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    taps = [tap for tap in sites.taps if tap.site == intervention.site and tap.side == "weight"]
    if taps:
        names = _of_taps(intervention, taps, parameters)
    elif intervention.site == DOWN_WEIGHT or intervention.site.startswith(PROJECTION_WEIGHT):
        there = [site for site in sites.sites if site.startswith((DOWN_WEIGHT, PROJECTION_WEIGHT))]
        raise UsageError(f"{intervention}: {did_you_mean(intervention.site, there)}")
    else:
        names = _matching(intervention, sites, parameters)
    for name in names:
        _check(model, name, parameters[name], intervention)
    return {name: parameters[name] for name in names}


def _of_taps(intervention: Intervention, taps: list[Tap], parameters: dict[str, nn.Parameter]) -> list[str]:
    modules = {tap.layer: tap.module for tap in taps}
    missing = set(intervention.layers or ()) - modules.keys()
    if missing:
        raise UsageError(
            f"{intervention}: {intervention.site} has layers {listed(list(map(str, sorted(modules))))}, "
            f"not {min(missing)}"
        )
    chosen = [tap for tap in taps if intervention.layers is None or tap.layer in intervention.layers]
    names = [f"{tap.module}.weight" for tap in chosen]
    for tap, name in zip(chosen, names, strict=True):
        if name not in parameters or tap.fused is not None:
            raise UsageError(
                f"{intervention}: the matrix of layer {tap.layer} is no parameter of its own in "
                f"{tap.module}; name the parameter that holds it, and its rows"
            )
    return names


def _matching(intervention: Intervention, sites: SiteMap, parameters: dict[str, nn.Parameter]) -> list[str]:
    names = [name for name in parameters if fnmatchcase(name, intervention.site)]
    if not names:
        raise UsageError(
            f"{intervention}: no parameter of the model is called {intervention.site!r}; "
            f"{did_you_mean(intervention.site, parameters)}"
        )
    if intervention.layers is None:
        return names
    names = [
        name
        for name in names
        if any(
            0 <= layer < sites.number_of_layers
            and sites.within_block(layer, name.rpartition(".")[0]) is not None
            for layer in intervention.layers
        )
    ]
    if not names:
        raise UsageError(
            f"{intervention}: no parameter called {intervention.site!r} is in these layers; the model has "
            f"layers 0 to {sites.number_of_layers - 1}"
        )
    return names


def _check(model: nn.Module, name: str, parameter: nn.Parameter, intervention: Intervention) -> None:
    whole = whole_weight(parameter)
    if isinstance(whole, str) or hasattr(parameter, "full_tensor"):
        reason = whole if isinstance(whole, str) else "it is sharded over ranks"
        raise UsageError(f"{intervention}: {name} cannot be changed: {reason}")
    if intervention.operation == "replace_gain":
        module = model.get_submodule(name.rpartition(".")[0])
        if parameter.ndim != 1 or not is_norm(module):
            raise UsageError(f"{intervention}: {name} holds no gains of a norm")
        _constant_of(module, name, parameter, intervention)
        return
    if parameter.ndim != 2:
        raise UsageError(
            f"{intervention}: {name} is of shape {tuple(parameter.shape)}, which has not rows and columns"
        )
    rows = _rows(model, name, parameter)
    axis = 1 if intervention.operation == "scale_columns" else 0
    for number in intervention.channels or ():
        if not 0 <= number < rows.shape[axis]:
            what = "columns" if axis else "rows"
            raise UsageError(f"{intervention}: {name} has {what} 0 to {rows.shape[axis] - 1}, not {number}")


def _rows(model: nn.Module, name: str, weight: Tensor) -> Float[Tensor, "row column"]:
    """The matrix as a view whose rows are output channels (of an embedding, token ids)."""
    module = model.get_submodule(name.rpartition(".")[0])
    return weight.T if type(module).__name__.lower() == "conv1d" else weight


def _constant_of(module: nn.Module, name: str, parameter: Tensor, intervention: Intervention) -> float:
    """What the norm adds to its gains before it multiplies: 1 in Gemma's, 0 elsewhere.

    Told by what it makes of a vector of +1 and −1, whose mean is 0 and whose root mean square is 1.
    """
    if not bool(torch.isfinite(parameter).all()):
        raise UsageError(
            f"{intervention}: {name} has NaN or Inf, so that its gains are not known; name another norm, or "
            "take a checkpoint from before it"
        )
    if parameter.numel() == 1:
        return 0.0
    probe = torch.ones(1, 1, parameter.numel(), dtype=parameter.dtype, device=parameter.device)
    probe[..., 1::2] = -1
    if parameter.numel() % 2:
        probe[..., -1] = 0
    with torch.no_grad():
        gains = (module(probe) - module(-probe)).double() / 2 * probe.double()
    scale = (probe.double() ** 2).mean().sqrt()
    difference = (gains * scale - parameter.detach().double()).flatten()[: parameter.numel() // 2 * 2]
    constant = round(float(difference.median()))
    size = max(1.0, float(parameter.detach().abs().max()))
    if not bool(
        ((difference - constant).abs() <= max(_CONSTANT, 2**-6 * (parameter.element_size() < 4)) * size).all()
    ):
        raise UsageError(
            f"{intervention}: {type(module).__name__} does not multiply by {name} channel by channel, so "
            "that it is not known what its gains are"
        )
    return float(constant)


@contextmanager
def edited_weights(model: nn.Module, sites: SiteMap, interventions: Sequence[Intervention]) -> Iterator[None]:
    """Within, the weights are those that the interventions make, one after the other.

    Afterwards the same tensors hold the same bits, also if the block raises. A weight that several modules
    share (a tied head) changes for all of them.

    Raises
    ------
    UsageError : as :func:`weights_of`, before anything is changed
    """
    plan = [(i, weights_of(model, sites, i)) for i in interventions]
    before: dict[int, tuple[nn.Parameter, Tensor]] = {}
    try:
        with torch.no_grad():
            for intervention, parameters in plan:
                for name, parameter in parameters.items():
                    before.setdefault(id(parameter), (parameter, parameter.detach().clone()))
                    _edit(model, name, parameter, intervention)
        yield
    finally:
        with torch.no_grad():
            for parameter, value in before.values():
                parameter.copy_(value)


def _edit(model: nn.Module, name: str, parameter: nn.Parameter, intervention: Intervention) -> None:
    if intervention.operation == "replace_gain":
        module = model.get_submodule(name.rpartition(".")[0])
        constant = _constant_of(module, name, parameter, intervention)
        gains = parameter.double() + constant
        gain = gains.square().mean().sqrt() if intervention.value is None else intervention.number
        parameter.fill_(float(gain) - constant)
        return
    rows = _rows(model, name, parameter)
    chosen = slice(None) if intervention.channels is None else list(intervention.channels)
    if intervention.operation == "scale_rows":
        rows[chosen] *= intervention.number
    elif intervention.operation == "scale_columns":
        rows[:, chosen] *= intervention.number
    else:
        clip_row_norms(rows, 1.0 if intervention.value is None else intervention.number, chosen)


def clip_row_norms(
    rows: Float[Tensor, "row column"], medians: float = 1.0, chosen: slice | list[int] = slice(None)
) -> None:
    """Scale the ``chosen`` rows that are longer than ``medians`` · the median row down to that, in place."""
    norms = rows.double().norm(dim=1)
    limit = medians * norms.median()
    factor = torch.where(norms > limit, limit / norms, 1.0)
    rows[chosen] = (rows[chosen].double() * factor[chosen, None]).to(rows.dtype)
