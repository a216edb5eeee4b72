"""What interventions do to a model's loss, its predictions and every statistic."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, Protocol, Unpack

import torch
from torch import nn

from osp_diag.checkpoints import Checkpoint, open_checkpoint
from osp_diag.checkpoints.checkpoint import evaluation_mode
from osp_diag.checkpoints.opening import OpeningOptions
from osp_diag.errors import UsageError
from osp_diag.interventions.arms import UNTOUCHED, Arm
from osp_diag.interventions.effects import Effects, effects_of
from osp_diag.interventions.hooks_engine import HooksEngine
from osp_diag.interventions.intervention import Intervention
from osp_diag.interventions.means import with_means
from osp_diag.interventions.notation import read_intervention
from osp_diag.interventions.predictions import divergence, logits_of, surprise
from osp_diag.interventions.targets import check, taps_of
from osp_diag.probing.feeding import Feeding, Progress
from osp_diag.probing.identity import model_attributes, token_attributes
from osp_diag.probing.ranks import is_distributed
from osp_diag.probing.session import Probe
from osp_diag.probing.settings import (
    MeasurementOptions,
    MeasurementSettings,
    TokenOptions,
    TokenSettings,
    keyword_form,
)
from osp_diag.quantizing.perplexity import refuse_what_sees_ahead
from osp_diag.resampling import FEW_SEQUENCES
from osp_diag.schema import ATTENTION, HIDDEN_STATES
from osp_diag.sites.trace import unwrap
from osp_diag.tokens import TokenBatches

__all__ = ["OF_AN_INTERVENTION", "EngineName", "intervene", "intervene_on_checkpoint"]

OF_AN_INTERVENTION = MeasurementSettings(sites=(*HIDDEN_STATES, ATTENTION))
"""What is measured by default: each sequence's sums are held apart, and those of all sites are large."""
EngineName = Literal["hooks", "nnsight"]
TOGETHER = "all together"


class InterveneOptions(TokenOptions, MeasurementOptions, OpeningOptions, total=False):
    """The keyword form of :func:`intervene`."""


class Engine(Protocol):
    """What runs a model under interventions."""

    def running(self, interventions: Sequence[Intervention]) -> Any:
        """A context; it yields what to call in the model's place."""

    def close(self) -> None:
        """Leave no trace on the model."""


@keyword_form(TokenSettings(), OF_AN_INTERVENTION, open_checkpoint)
def intervene(
    source: str | Path | nn.Module,
    interventions: Sequence[Intervention | str],
    token_settings: TokenSettings | None = None,
    measurement_settings: MeasurementSettings | None = None,
    *,
    engine: EngineName = "hooks",
    together: bool = False,
    resamples: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Unpack[InterveneOptions],
) -> Effects:
    """What each of some interventions does to a causal language model, on the same tokens.

    The difference of loss, the divergence of the predictions and the difference of every statistic, each with
    a 95% interval by a bootstrap over sequences (percentiles of ``resamples`` draws; the two models are
    resampled together).

    Parameters
    ----------
    source : Hugging Face directory or hub id, GGUF file, ``module:function``, or a module in hand
    interventions : as objects, or written as ``"zero residual_post:11:507@first"``
        (:data:`osp_diag.interventions.notation.FORMS`)
    token_settings : which tokens; see :class:`osp_diag.TokenSettings`
    measurement_settings : what to measure; see :class:`osp_diag.MeasurementSettings`. By default hidden
        states and attention
    engine : ``"hooks"``, or ``"nnsight"`` for models of transformers
    together : also all of them at once
    resamples, seed : of the bootstrap
    progress : told after every sequence
    options : fields of both settings, which change them, and how to open the checkpoint

    Raises
    ------
    SiteError, UsageError : a site, layer, channel, head, weight or option that there is not, before the model
        runs
    CheckpointError, TokenError : the model or the tokens cannot be had
    """
    changes = [_read(one) for one in interventions]
    _check_options(changes, resamples)
    opening: dict[str, Any] = dict(options)
    tokens = (token_settings or TokenSettings()).changed(opening)
    settings = (measurement_settings or OF_AN_INTERVENTION).changed(opening)
    if tokens.protocol != "sequence":
        raise UsageError(
            f"protocol={tokens.protocol!r}: a loss is of real sequences, where tokens have a context"
        )
    checkpoint = open_checkpoint(source, **opening)
    return intervene_on_checkpoint(
        checkpoint,
        tokens.batches(checkpoint),
        changes,
        settings,
        engine=engine,
        together=together,
        resamples=resamples,
        seed=seed,
        progress=progress,
    )


def intervene_on_checkpoint(
    checkpoint: Checkpoint,
    batches: TokenBatches,
    interventions: Sequence[Intervention],
    measurement_settings: MeasurementSettings | None = None,
    *,
    engine: EngineName = "hooks",
    together: bool = False,
    resamples: int = 200,
    seed: int = 0,
    progress: Progress | None = None,
) -> Effects:
    """:func:`intervene` on an opened checkpoint and tokens in hand."""
    _check_options(interventions, resamples)
    settings = replace(measurement_settings or OF_AN_INTERVENTION, snapshot_tokens=0, token_groups=0)
    settings = settings.for_batches(batches)
    model = unwrap(checkpoint.model)
    probe = Probe(model, measurement_settings=settings, tokenizer=checkpoint.tokenizer, deferred=False)
    for intervention in interventions:
        check(model, probe.site_map, intervention)
    try:
        refuse_what_sees_ahead(model, batches.tokens)
    except UsageError as error:
        raise UsageError(f"an intervention is judged by next-token predictions: {error}") from None
    with evaluation_mode(model), torch.no_grad():
        feeding = Feeding(model, batches, batch_size=1)
        delimiters = probe.delimiter_ids
        measured = with_means(model, probe.site_map, interventions, feeding, delimiter_ids=delimiters)
        changes = {str(one): [one] for one in measured}
        if together:
            changes[TOGETHER] = measured
        unmeasured = {name: _unmeasured(probe, change, engine) for name, change in changes.items()}
        arms = _run(probe, batches, changes, unmeasured, engine, progress)
    notes = [
        *checkpoint.notes,
        *batches.notes,
        *probe.site_map.notes,
        *_notes(probe, unmeasured, batches),
    ]
    attributes = {
        **model_attributes(checkpoint),
        **token_attributes(batches),
        "engine": engine,
        "resamples": resamples,
        "seed": seed,
        "notes": notes,
    }
    return effects_of(arms, resamples=resamples, seed=seed, attributes=attributes)


def _read(one: Intervention | str) -> Intervention:
    if isinstance(one, Intervention):
        return one
    operation, _, text = one.strip().partition(" ")
    return read_intervention(operation, text.strip())


def _check_options(interventions: Sequence[Intervention], resamples: int) -> None:
    if not interventions:
        raise UsageError("no intervention is named, so that there is nothing to compare")
    names = [str(one) for one in interventions]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UsageError(f"{twice} is named twice")
    if resamples < 0:
        raise UsageError(f"resamples={resamples}: a bootstrap takes 0 draws (no intervals) or more")
    if is_distributed():
        raise UsageError("interventions are measured by one process; run it without torchrun")


def _run(
    probe: Probe,
    batches: TokenBatches,
    changes: Mapping[str, Sequence[Intervention]],
    unmeasured: Mapping[str, frozenset[tuple[str, int]]],
    engine: EngineName,
    progress: Progress | None,
) -> dict[str, Arm]:
    """Every sequence under every change, the untouched model (of the empty name) first."""
    arms = {name: Arm() for name in (UNTOUCHED, *changes)}
    runner = _engine(engine, probe)
    count = len(batches.tokens)
    try:
        for index, arguments in enumerate(Feeding(probe.model, batches, batch_size=1)):
            ids = torch.as_tensor(batches.tokens[index : index + 1])
            present = torch.as_tensor(batches.attention_mask[index]).bool()
            with probe.collect() as collector:
                untouched = logits_of(probe.model(**arguments))
            arms[UNTOUCHED].add(collector, surprise(untouched, ids, present), (0.0, int(present.sum())))
            for name, change in changes.items():
                with runner.running(change) as forward, probe.collect() as collector:
                    logits = logits_of(forward(**arguments))
                arms[name].add(
                    collector,
                    surprise(logits, ids, present),
                    divergence(untouched, logits, present),
                    without=unmeasured[name],
                )
            if progress is not None:
                progress(index + 1, count)
    finally:
        runner.close()
    return arms


def _engine(name: EngineName, probe: Probe) -> Engine:
    arguments = (unwrap(probe.model), probe.site_map, probe.delimiter_ids)
    if name == "hooks":
        return HooksEngine(*arguments)
    if name != "nnsight":
        raise UsageError(f"engine {name!r} is unknown; there are hooks and nnsight")
    from osp_diag.interventions.nnsight_engine import NnsightEngine

    return NnsightEngine(*arguments)


def _unmeasured(
    probe: Probe, change: Sequence[Intervention], engine: EngineName
) -> frozenset[tuple[str, int]]:
    """(site, layer) that the probe sees before it is changed.

    nnsight changes what a module is called with after the hooks before its call.
    """
    if engine == "hooks":
        return frozenset()
    return frozenset(
        (tap.site, tap.layer)
        for one in change
        for changed in taps_of(probe.site_map, one)
        for tap in probe.site_map.taps
        if changed.side == "input"
        and (tap.module, tap.side, tap.argument) == (changed.module, changed.side, changed.argument)
    )


def _notes(
    probe: Probe, unmeasured: Mapping[str, frozenset[tuple[str, int]]], batches: TokenBatches
) -> list[str]:
    notes = []
    count = len(batches.tokens)
    if count < FEW_SEQUENCES:
        notes.append(
            f"intervals from {count} sequences are too narrow: take {FEW_SEQUENCES} or more (more tokens, or "
            "shorter sequences)"
        )
    for name, sites in unmeasured.items():
        if any(probe.measures_site(site) for site, _ in sites):
            places = ", ".join(f"{site} of layer {layer}" for site, layer in sorted(sites))
            notes.append(
                f"{name}: nnsight changes {places} after the probe has read it, so that its own statistics "
                "are missing; the hooks have them"
            )
    return notes
