"""Which part of a model few bits hurt: one part rounded at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import xarray as xr
from jaxtyping import Float, Int64
from torch import Tensor, nn

from osp_diag.checkpoints.checkpoint import evaluation_mode
from osp_diag.errors import UsageError
from osp_diag.quantizing.block_passes import BlockPasses, calibration_ids
from osp_diag.quantizing.divergence import surprise_and_divergence_of
from osp_diag.quantizing.key_values import KEYS, VALUES
from osp_diag.quantizing.linears import OTHER, ROLES, BlockLinear, block_linears
from osp_diag.quantizing.perplexity import refuse_what_sees_ahead
from osp_diag.quantizing.setting import UNQUANTIZED, Setting
from osp_diag.quantizing.simulate import quantized
from osp_diag.sites import SiteMap, find_sites
from osp_diag.sites.trace import unwrap

__all__ = ["INPUTS", "Part", "parts_of", "parts_of_role", "sensitivity"]

INPUTS = {
    "attention_input": ("query", "key", "value"),
    "attention_output": ("attention_output",),
    "mlp_input": ("gate", "up"),
    "mlp_hidden": ("down",),
    OTHER: (OTHER,),
}
"""Site → the Linears that read it."""


@dataclass(frozen=True)
class Part:
    """What is rounded alone.

    Attributes
    ----------
    name
        ``weights:down``, ``inputs:mlp_hidden``, ``keys``, ``values``.
    roles
        of the Linears, or keys or values.
    kind
        ``weights``, ``inputs`` or ``key_values``.
    """

    name: str
    roles: tuple[str, ...]
    kind: str

    def setting(self, setting: Setting) -> Setting:
        """The bits of this part alone."""
        return Setting(
            setting.weight_bits if self.kind == "weights" else UNQUANTIZED,
            setting.activation_bits if self.kind == "inputs" else UNQUANTIZED,
            setting.key_value_bits if self.kind == "key_values" else UNQUANTIZED,
        )


def parts_of_role(role: str) -> tuple[str, ...]:
    """The parts that the weight and the input of a Linear of this role belong to."""
    return (f"weights:{role}", *(f"inputs:{site}" for site, readers in INPUTS.items() if role in readers))


def parts_of(linears: Sequence[BlockLinear], sites: SiteMap, setting: Setting) -> list[Part]:
    """The parts of a model that a setting rounds."""
    there = {role for linear in linears for role in linear.roles}
    parts = []
    if setting.weight_bits != UNQUANTIZED:
        parts += [Part(f"weights:{role}", (role,), "weights") for role in (*ROLES, OTHER) if role in there]
    if setting.activation_bits != UNQUANTIZED:
        for site, roles in INPUTS.items():
            own = tuple(role for role in roles if role in there)
            parts += [Part(f"inputs:{site}", own, "inputs")] if own else []
    if setting.key_value_bits != UNQUANTIZED and sites.attention_layers:
        parts += [Part(name, (name,), "key_values") for name in (KEYS, VALUES)]
    return parts


def sensitivity(
    model: nn.Module,
    tokens: Any,
    setting: Setting,
    *,
    convention: str = "plain",
    by_layer: bool = True,
    batch_size: int = 1,
    blocks: str | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> xr.Dataset:
    """What each part costs if it alone is rounded to nearest, in all layers and in each.

    Effects of single parts do not add up: the sum over layers may be more or less than that of all layers.

    Parameters
    ----------
    model : causal language model
    tokens : ids of shape (sequence, position), without padding
    setting : bits; what stays at 16 is no part
    convention : of :data:`osp_diag.quantizing.conventions.CONVENTIONS`
    by_layer : measure each layer apart, too, which takes as many passes as there are parts and layers; a
        pass begins at the layer, from the full-precision state before it
    batch_size : sequences a pass
    progress : told (measurements done, measurements in all)

    Returns
    -------
    ``damage`` (part, layer), the rise of the negative log-likelihood in nats, and ``divergence`` (part,
    layer), KL(full ‖ rounded); ``damage_all_layers`` and ``divergence_all_layers`` (part). A layer without
    the part is NaN.

    Raises
    ------
    UsageError : a setting without rounding, or no causal language model
    TokenError, CheckpointError, SiteError : as :func:`osp_diag.quantizing.simulate.quantized`
    """
    if setting.unquantized:
        raise UsageError(f"{setting} rounds nothing, so there is no sensitivity to it; give bits below 16")
    model = unwrap(model)
    sites = find_sites(model, blocks=blocks)
    linears = block_linears(model, sites=sites)
    refuse_what_sees_ahead(model, tokens)
    ids = calibration_ids(model, tokens)
    layers = sites.number_of_layers
    parts = parts_of(linears, sites, setting)
    there = {(role, linear.layer) for linear in linears for role in linear.roles}
    there |= {(name, layer) for name in (KEYS, VALUES) for layer in sites.attention_layers}
    total = len(parts) * (1 + (layers if by_layer else 0))
    shape = (len(parts), layers)
    values = {name: np.full(shape, np.nan) for name in ("damage", "divergence")}
    overall = {name: np.full(len(parts), np.nan) for name in ("damage", "divergence")}
    done = 0
    with evaluation_mode(model), torch.no_grad():
        work = _Passes(model, ids, sites, convention, batch_size, blocks)
        for row, part in enumerate(parts):
            for layer in (None, *(range(layers) if by_layer else ())):
                only = {pair for pair in there if pair[0] in part.roles and layer in (None, pair[1])}
                if only:
                    damage, divergence = work.effect(part.setting(setting), only, layer or 0)
                    for name, number in (("damage", damage), ("divergence", divergence)):
                        if layer is None:
                            overall[name][row] = number
                        else:
                            values[name][row, layer] = number
                done += 1
                if progress is not None:
                    progress(done, total)
    definitions = {
        "damage": "rise of the negative log-likelihood by token where this part alone is rounded",
        "divergence": "mean KL(full ‖ rounded) by token where this part alone is rounded",
    }
    variables = {
        **{
            name: (("part", "layer"), array, {"units": "nat", "definition": definitions[name]})
            for name, array in values.items()
        },
        **{
            f"{name}_all_layers": (
                "part",
                array,
                {"units": "nat", "definition": f"{definitions[name]}, in every layer"},
            )
            for name, array in overall.items()
        },
    }
    return xr.Dataset(
        variables,
        coords={"part": [part.name for part in parts], "layer": np.arange(layers)},
        attrs={
            "setting": str(setting),
            "convention": convention,
            "method": "rtn",
            "tokens": int(ids.shape[0] * (ids.shape[1] - 1)),
            "negative_log_likelihood": work.likelihood,
        },
    )


class _Passes:
    """Passes that begin at the layer that is rounded."""

    def __init__(
        self,
        model: nn.Module,
        ids: Int64[Tensor, "sequence position"],
        sites: SiteMap,
        convention: str,
        batch_size: int,
        blocks: str | None,
    ) -> None:
        self.model, self.sites, self.convention = model, sites, convention
        self.passes = BlockPasses(model, ids, batch_size=batch_size, blocks=blocks)
        self.states: list[list[Tensor]] = []
        self.logits: list[Tensor] = []
        likelihoods = []
        for batch, state in zip(self.passes.batches, self.passes.first_states(), strict=True):
            own = [state]
            for layer in range(len(self.passes.blocks)):
                own.append(self.passes.run(layer, own[-1]))
            logits = self.passes.rest(batch, own[-1])
            likelihoods.append(_surprise(logits, batch))
            self.states.append(own[:-1])
            self.logits.append(logits)
        self.count = sum(batch.shape[0] * (batch.shape[1] - 1) for batch in self.passes.batches)
        self.likelihood = sum(likelihoods) / self.count

    def effect(self, setting: Setting, only: set[tuple[str, int]], first: int) -> tuple[float, float]:
        """(rise of the negative log-likelihood, divergence) with ``only`` rounded, from a layer on."""
        with quantized(self.model, setting, convention=self.convention, only=only, sites=self.sites):
            last = [self._after(states[first], first) for states in self.states]
        surprise, divergence = 0.0, 0.0
        # Nothing behind the blocks is rounded.
        for batch, state, reference in zip(self.passes.batches, last, self.logits, strict=True):
            logits = self.passes.rest(batch, state)
            for full, rounded, tokens in zip(reference, logits, batch, strict=True):
                parts = surprise_and_divergence_of(full[:-1], rounded[:-1], tokens[1:])
                surprise, divergence = surprise + parts[0], divergence + parts[1]
        return surprise / self.count - self.likelihood, divergence / self.count

    def _after(self, state: Tensor, first: int) -> Tensor:
        """The state behind the last block, of the one before block ``first``."""
        for layer in range(first, len(self.passes.blocks)):
            state = self.passes.run(layer, state)
        return state


def _surprise(logits: Float[Tensor, "sequence position vocabulary"], ids: Tensor) -> float:
    """Σ −log p of the tokens behind the first of each sequence, in nats."""
    total = 0.0
    for of_sequence, targets in zip(logits, ids, strict=True):
        chosen = of_sequence[:-1].double().log_softmax(-1).gather(-1, targets[1:, None])
        total -= float(chosen.sum())
    return total
