"""What to leave in 16 bits, within a budget: candidates by measured sensitivity, each tried and measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xarray as xr
from jaxtyping import Float, Int64
from torch import Tensor, nn

from osp_diag.errors import UsageError
from osp_diag.quantizing.divergence import ReferencePredictions
from osp_diag.quantizing.linears import BlockLinear, block_linears
from osp_diag.quantizing.methods import method_named
from osp_diag.quantizing.perplexity import SequencePredictions, predictions, refuse_what_sees_ahead
from osp_diag.quantizing.sensitivity import INPUTS, sensitivity
from osp_diag.quantizing.setting import UNQUANTIZED, Setting
from osp_diag.quantizing.simulate import quantized
from osp_diag.quantizing.spared_channels import hottest_channels
from osp_diag.resampling import draws, interval, ratio
from osp_diag.sites import SiteMap, find_sites
from osp_diag.sites.trace import unwrap

__all__ = ["BUDGET", "WORTHWHILE", "Advice", "Trial", "advise", "check_request"]

BUDGET = 0.05
"""Share of the blocks' weights that may stay in 16 bits."""
WORTHWHILE = 0.05
"""A change that saves a lesser share of the divergence is not recommended."""
RESAMPLES = 1000


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A change that was tried.

    Attributes
    ----------
    name
        in words.
    share
        of the blocks' weights that stay in 16 bits.
    damage
        with it: the rise of the negative log-likelihood over full precision, in nats by token.
    divergence
        with it: KL(full ‖ rounded) in nats by token.
    saved
        by how much the divergence is less than without it; negative where it is more.
    saved_low, saved_high
        bounds of its 95% interval, by a bootstrap over sequences, pair by pair.
    linears
        paths of the Linears that stay in 16 bits.
    channels
        path of a Linear → channels of its input that stay.
    method
        how the rest is rounded.
    notes
        what is to be said of it, one sentence each.
    """

    name: str
    share: float
    damage: float
    divergence: float
    saved: float
    saved_low: float
    saved_high: float
    linears: tuple[str, ...] = ()
    channels: Mapping[str, Int64[Tensor, " channel"]] = field(default_factory=dict)
    method: str = "rtn"
    notes: tuple[str, ...] = ()

    def helps(self, divergence: float) -> bool:
        """Whether it saves a share of the ``divergence`` that is worth it and no chance.

        By divergence, since the likelihood of the text may by chance rise when predictions get worse.
        """
        return self.saved_low > 0 and self.saved >= WORTHWHILE * divergence


@dataclass(frozen=True, kw_only=True)
class Advice:
    """What was tried against the damage of a setting.

    Attributes
    ----------
    perplexity
        at full precision.
    damage, divergence
        of the setting as it is.
    trials
        those within the budget, the one that saves most first.
    notes
        what is to be said of the setting as it is, one sentence each.
    sensitivity
        of single parts: see :func:`osp_diag.quantizing.sensitivity.sensitivity`.
    """

    setting: Setting
    convention: str
    budget: float
    perplexity: float
    damage: float
    divergence: float
    tokens: int
    trials: tuple[Trial, ...]
    notes: tuple[str, ...] = ()
    sensitivity: xr.Dataset = field(repr=False)

    @property
    def best(self) -> Trial | None:
        """The change to make; None where nothing helps."""
        return next((trial for trial in self.trials if trial.helps(self.divergence)), None)

    @property
    def best_linears(self) -> Trial | None:
        """The change to make of those that leave whole Linears, which tools can be told; None: none helps."""
        whole = (trial for trial in self.trials if trial.linears)
        return next((trial for trial in whole if trial.helps(self.divergence)), None)


def check_request(setting: Setting, budget: float, methods: Sequence[str]) -> None:
    """Refuse what :func:`advise` cannot be asked for.

    Raises
    ------
    UsageError : a setting that rounds nothing, a budget outside 0 to 1, no such method
    """
    if setting.unquantized:
        raise UsageError(f"{setting} rounds nothing, so there is nothing to advise; give bits below 16")
    if not 0 <= budget <= 1:
        raise UsageError(f"budget={budget}: give the share of the weights that may stay in 16 bits, 0 to 1")
    for name in methods:
        method_named(name)


def advise(
    model: nn.Module,
    tokens: Any,
    setting: Setting,
    *,
    calibration: Any,
    budget: float = BUDGET,
    methods: Sequence[str] = ("ffn-hadamard",),
    convention: str = "plain",
    batch_size: int = 1,
    blocks: str | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Advice:
    """Try what could be left in 16 bits, and the methods that need no budget, and measure what each saves.

    Tried are: whole Linears, those with the largest divergence by number of weights first, until the budget
    is spent; all Linears of one kind, where they fit; the hottest channels of every Linear's input, as many
    as fit; and each of ``methods`` for everything. Sensitivity and the ranking of channels come from the
    calibration tokens, what a change saves from ``tokens``.

    Parameters
    ----------
    model : causal language model
    tokens, calibration : ids of shape (sequence, position) of different texts
    setting : the bits to come down to
    budget : share of the blocks' weights that may stay in 16 bits, 0 to 1
    methods : of :data:`osp_diag.quantizing.methods.METHODS`, to try in place of rounding to nearest
    convention : of :data:`osp_diag.quantizing.conventions.CONVENTIONS`
    progress : told (what, done, of how many)

    Raises
    ------
    UsageError : a setting that rounds nothing, a budget outside 0 to 1, or no causal language model
    TokenError, CheckpointError, SiteError : as :func:`osp_diag.quantizing.simulate.quantized`
    """
    check_request(setting, budget, methods)
    model = unwrap(model)
    sites = find_sites(model, blocks=blocks)
    linears = block_linears(model, sites=sites)
    refuse_what_sees_ahead(model, tokens)

    def tell(what: str) -> Callable[[int, int], None]:
        return lambda done, total: progress(what, done, total) if progress is not None else None

    parts = sensitivity(
        model, calibration, setting, convention=convention, batch_size=batch_size, blocks=blocks,
        progress=tell("one part at a time"),
    )  # fmt: skip
    candidates = [
        *_whole_linears(linears, parts, budget),
        *_hot_channels(model, linears, setting, calibration, budget, batch_size),
        *(_Candidate(f"{method_named(name).title} for all", method=name) for name in methods),
    ]
    with ReferencePredictions() as reference:
        work = _Trials(model, sites, linears, tokens, setting, convention, calibration, reference, batch_size)
        full = predictions(model, tokens, batch_size=batch_size, known_causal=True, reference=reference)
        before, notes = work.measured(_Candidate("nothing"))
        trials = []
        for index, candidate in enumerate(candidates):
            trials.append(work.trial(candidate, full, before))
            tell("trying")(index + 1, len(candidates))
    count = len(full.surprise) * full.tokens
    return Advice(
        setting=setting,
        convention=convention,
        budget=budget,
        perplexity=float(np.exp(full.surprise.sum() / count)),
        damage=float((before.surprise - full.surprise).sum() / count),
        divergence=work.divergence(before),
        tokens=count,
        trials=tuple(sorted(trials, key=lambda trial: -trial.saved)),
        notes=notes,
        sensitivity=parts,
    )


@dataclass(frozen=True)
class _Candidate:
    name: str
    linears: tuple[BlockLinear, ...] = ()
    channels: Mapping[str, Int64[Tensor, " channel"]] = field(default_factory=dict)
    method: str = "rtn"


def _whole_linears(linears: Sequence[BlockLinear], parts: xr.Dataset, budget: float) -> list[_Candidate]:
    """Linears by what they cost alone, until the budget is spent; and all of one kind, where they fit."""
    room = budget * sum(linear.module.weight.numel() for linear in linears)
    costs = {linear.path: _cost(linear, parts) / linear.module.weight.numel() for linear in linears}
    greedy, spent = [], 0
    for linear in sorted(linears, key=lambda linear: -costs[linear.path]):
        if spent + linear.module.weight.numel() <= room and costs[linear.path] > 0:
            greedy.append(linear)
            spent += linear.module.weight.numel()
    name = f"the {len(greedy)} most sensitive Linears" if len(greedy) > 1 else "the most sensitive Linear"
    candidates = [_Candidate(name, tuple(greedy))] if greedy else []
    for role in dict.fromkeys(role for linear in linears for role in linear.roles):
        own = tuple(linear for linear in linears if role in linear.roles)
        if sum(linear.module.weight.numel() for linear in own) <= room:
            candidates.append(_Candidate(f"every {role.replace('_', ' ')} projection", own))
    for layer in dict.fromkeys(linear.layer for linear in linears):
        own = tuple(linear for linear in linears if linear.layer == layer)
        if sum(linear.module.weight.numel() for linear in own) <= room and layer in _outer(linears):
            candidates.append(_Candidate(f"every Linear of layer {layer}", own))
    return candidates


def _outer(linears: Sequence[BlockLinear]) -> tuple[int, int]:
    """The first and the last layer, which recipes often spare."""
    layers = [linear.layer for linear in linears]
    return min(layers), max(layers)


def _cost(linear: BlockLinear, parts: xr.Dataset) -> float:
    """Divergence where its weight alone is rounded, with its share of that where its input is."""
    divergence = parts["divergence"].sel(layer=linear.layer)
    there = set(map(str, parts["part"].values))
    total = 0.0
    for role in linear.roles:
        if (name := f"weights:{role}") in there:
            total += float(divergence.sel(part=name))
        for site, readers in INPUTS.items():
            if role in readers and (name := f"inputs:{site}") in there:
                total += float(divergence.sel(part=name)) / len(readers)
    return total if np.isfinite(total) else 0.0


def _hot_channels(
    model: nn.Module,
    linears: Sequence[BlockLinear],
    setting: Setting,
    calibration: Any,
    budget: float,
    batch_size: int,
) -> list[_Candidate]:
    """As many channels of every input as fit, and the powers of two below."""
    if setting.weight_bits == setting.activation_bits == UNQUANTIZED:
        return []
    total = sum(linear.module.weight.numel() for linear in linears)
    by_channel = sum(linear.module.out_features for linear in linears)
    most = int(budget * total / by_channel)
    if most < 1:
        return []
    ranked = hottest_channels(model, linears, calibration, batch_size=batch_size)
    return [
        _Candidate(
            f"the {count} hottest channels of every Linear's input" if count > 1 else
            "the hottest channel of every Linear's input",
            channels={path: order[:count] for path, order in ranked.items()},
        )
        for count in dict.fromkeys((1, most))
    ]  # fmt: skip


@dataclass(frozen=True)
class _Trials:
    """Measures candidates on the same tokens."""

    model: nn.Module
    sites: SiteMap
    linears: Sequence[BlockLinear]
    tokens: Any
    setting: Setting
    convention: str
    calibration: Any
    reference: ReferencePredictions
    batch_size: int

    def measured(self, candidate: _Candidate) -> tuple[SequencePredictions, tuple[str, ...]]:
        spared = {linear.path for linear in candidate.linears}
        only = None
        if spared:
            there = {
                (role, linear.layer)
                for linear in self.linears
                if linear.path not in spared
                for role in linear.roles
            }
            only = there | {
                (name, layer) for name in ("keys", "values") for layer in self.sites.attention_layers
            }
        rounding = quantized(
            self.model,
            self.setting,
            method=candidate.method,
            convention=self.convention,
            calibration=self.calibration if method_named(candidate.method).calibrated else None,
            only=only,
            full_precision_channels=candidate.channels or None,
            sites=self.sites,
        )
        with rounding as simulation:
            after = predictions(
                self.model,
                self.tokens,
                batch_size=self.batch_size,
                known_causal=True,
                reference=self.reference,
            )
            return after, simulation.notes

    def divergence(self, found: SequencePredictions) -> float:
        kept = len(self.reference)
        return float(found.divergence[:kept].sum() / (kept * found.tokens)) if kept else float("nan")

    def trial(self, candidate: _Candidate, full: SequencePredictions, before: SequencePredictions) -> Trial:
        after, notes = self.measured(candidate)
        kept = len(self.reference)
        numbers = np.full(kept, float(after.tokens))
        saved = ratio((before.divergence - after.divergence)[:kept], numbers, draws(kept, RESAMPLES, seed=0))
        low, high = _bounds(saved)
        return Trial(
            name=candidate.name,
            share=self._share(candidate),
            damage=float((after.surprise - full.surprise).sum() / (len(full.surprise) * full.tokens)),
            divergence=self.divergence(after),
            saved=float(saved[0]),
            saved_low=low,
            saved_high=high,
            linears=tuple(linear.path for linear in candidate.linears),
            channels=candidate.channels,
            method=candidate.method,
            notes=notes,
        )

    def _share(self, candidate: _Candidate) -> float:
        total = sum(linear.module.weight.numel() for linear in self.linears)
        whole = sum(linear.module.weight.numel() for linear in candidate.linears)
        columns = sum(
            len(candidate.channels.get(linear.path, ())) * linear.module.out_features
            for linear in self.linears
        )
        return (whole + columns) / total


def _bounds(values: Float[np.ndarray, " draw"]) -> tuple[float, float]:
    if not np.isfinite(values).all():
        return float("nan"), float("nan")
    low, high = interval(values)
    return float(low), float(high)
