"""Probing one checkpoint: open, tokenise, run, write."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import torch
import torch.distributed as dist
import xarray as xr
from torch import nn

from osp_diag.capture.channel_weights import channel_weights
from osp_diag.capture.weight_maps import weight_maps
from osp_diag.checkpoints import Checkpoint, open_checkpoint
from osp_diag.checkpoints.opening import OpeningOptions
from osp_diag.errors import CaptureError, OspDiagError, UsageError
from osp_diag.foreign_errors import foreign_origin
from osp_diag.probing.feeding import Feeding, Progress
from osp_diag.probing.identity import model_attributes, token_attributes
from osp_diag.probing.ranks import is_distributed, is_first_rank, on_first_rank
from osp_diag.probing.saving import check_out
from osp_diag.probing.session import Probe
from osp_diag.probing.settings import (
    MeasurementOptions,
    MeasurementSettings,
    TokenOptions,
    TokenSettings,
    keyword_form,
)
from osp_diag.runs.run import Run, open_run
from osp_diag.schema import CHANNEL_WEIGHTS, MIXER_STATE, WEIGHT_MAP
from osp_diag.sites import find_sites
from osp_diag.sites.trace import unwrap
from osp_diag.terminal import printable, unfiltered
from osp_diag.tokens import TokenBatches

__all__ = [
    "OF_A_CHECKPOINT",
    "ProbeOptions",
    "joined_ranks",
    "measure_passes",
    "path_of_stack",
    "probe",
    "probe_checkpoint",
    "probe_stacks",
    "progress_bar",
    "session_of",
    "stacks_of",
    "working",
]

# Why eight groups: docs/decisions.md, Analyses.
OF_A_CHECKPOINT = MeasurementSettings(snapshot_tokens=64, token_groups=8)
"""What is measured by default where there is one model and not a training: more, because it is done once."""


class ProbeOptions(TokenOptions, MeasurementOptions, OpeningOptions, total=False):
    """The keyword form of :func:`probe`."""


@keyword_form(TokenSettings(), OF_A_CHECKPOINT, open_checkpoint)
def probe(
    source: str | Path | nn.Module,
    token_settings: TokenSettings | None = None,
    measurement_settings: MeasurementSettings | None = None,
    *,
    weights: Sequence[str] | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Unpack[ProbeOptions],
) -> Run:
    """Every outlier and sink statistic of every layer of one checkpoint.

    Parameters
    ----------
    source : Hugging Face directory or hub id, GGUF file, ``module:function``, or a module in hand
    token_settings : which tokens; see :class:`osp_diag.TokenSettings`
    measurement_settings : what to measure; see :class:`osp_diag.MeasurementSettings`
    weights : projections of which a map of |W| is recorded, see :func:`probe_checkpoint`
    out : where to write the run, a folder ending in .zarr; None keeps it in memory
    overwrite : replace a run that is already there
    progress : told after every forward pass
    options : fields of both settings, which change them (``tokens=4096``, ``sites=["residual_*"]``), and how
        to open the checkpoint (``dtype``, ``device``, ``tokenizer``, …; see :func:`osp_diag.open_checkpoint`)

    Returns
    -------
    Run : under ``torchrun`` the tokens are sharded over the ranks, rank 0 writes, all return the run

    Raises
    ------
    CheckpointError, TokenError, SiteError, StoreError, UsageError : before any long work
    TypeError : there is no such option; the message names the nearest
    """
    opening: dict[str, Any] = dict(options)
    token_settings = (token_settings or TokenSettings()).changed(opening)
    measurement_settings = (measurement_settings or OF_A_CHECKPOINT).changed(opening)
    batch_size = token_settings.batch_size
    if out is not None:
        check_out(out, overwrite=overwrite)
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: a forward pass needs 1 or more sequences")
    with joined_ranks():
        checkpoint = open_checkpoint(source, **opening)
        return probe_checkpoint(
            checkpoint,
            token_settings.batches(checkpoint),
            measurement_settings,
            batch_size=batch_size,
            weights=weights,
            progress=progress,
            out=out,
            overwrite=overwrite,
        )


@keyword_form(TokenSettings(), OF_A_CHECKPOINT, open_checkpoint)
def probe_stacks(
    source: str | Path | nn.Module,
    token_settings: TokenSettings | None = None,
    measurement_settings: MeasurementSettings | None = None,
    *,
    out: str | Path | None = None,
    overwrite: bool = False,
    **options: Unpack[ProbeOptions],
) -> dict[str, Run]:
    """:func:`probe` of every stack of one checkpoint: the encoder and the decoder of T5, a run each.

    Parameters
    ----------
    source, token_settings, measurement_settings, options : as of :func:`probe`; each stack runs the
        tokens anew
    out : where to write the run of the largest stack; those of the others lie beside it
        (:func:`path_of_stack`)

    Returns
    -------
    Name of the stack -> run, the largest first; of a model of one stack {"": run}

    Raises
    ------
    as :func:`probe`
    """
    opening: dict[str, Any] = dict(options)
    token_settings = (token_settings or TokenSettings()).changed(opening)
    settings = (measurement_settings or OF_A_CHECKPOINT).changed(opening)
    with joined_ranks():
        checkpoint = open_checkpoint(source, **opening)
        runs: dict[str, Run] = {}
        for stack in stacks_of(checkpoint.model, settings):
            runs[stack] = probe_checkpoint(
                checkpoint,
                token_settings.batches(checkpoint),
                replace(settings, stack=stack or settings.stack),
                batch_size=token_settings.batch_size,
                out=None if out is None else path_of_stack(out, stack, following=bool(runs)),
                overwrite=overwrite,
            )
    return runs


def stacks_of(model: nn.Module, settings: MeasurementSettings) -> tuple[str, ...]:
    """The stacks that a probe with these settings measures one after the other, the largest first.

    All that run; the one that is named by ``stack`` or ``blocks`` alone; ("",) where there is but one.
    """
    if settings.stack is not None or settings.blocks is not None:
        return ("",)
    sites = find_sites(model, named=settings.named_sites, example=settings.example)
    return tuple(dict.fromkeys((sites.stack, *sites.stacks)))


def path_of_stack(out: str | Path, stack: str, *, following: bool) -> Path:
    """Where the run of a stack is written: ``run.zarr`` for the first, ``run.encoder.zarr`` for others."""
    path = Path(out)
    return path.with_name(f"{path.name.removesuffix('.zarr')}.{stack}.zarr") if following else path


@keyword_form(MeasurementSettings())
def probe_checkpoint(
    checkpoint: Checkpoint,
    batches: TokenBatches,
    measurement_settings: MeasurementSettings | None = None,
    *,
    batch_size: int | None = None,
    weights: Sequence[str] | None = None,
    progress: Progress | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    step: int = 0,
    **options: Unpack[MeasurementOptions],
) -> Run:
    """Probe an opened checkpoint on tokens in hand.

    ``options`` are fields of :class:`osp_diag.MeasurementSettings`. Delimiters are the batches' own unless
    they are named, and ``token_groups`` at most as many as there are sequences.

    ``weights`` names, with ``*``, projections of which a map of |W| is kept, as ``mlp.down_proj`` or
    ``model.layers.3.*``. None stands for those that write into the residual stream in the first, middle and
    last block, or for none where only some ``sites`` are asked for; () for none.

    Ctrl-C writes what was measured until then, notes on the exception where it is, and goes on its way.
    """
    if out is not None:
        check_out(out, overwrite=overwrite)
    settings = (measurement_settings or MeasurementSettings()).changed(dict(options))
    session, feeding = session_of(checkpoint, batches, settings, batch_size=batch_size, progress=progress)
    settings = session.settings
    _write_weights(session, () if weights is None and settings.sites is not None else weights)
    if settings.snapshot_tokens and is_first_rank():
        session.write_static("snapshot", _snapshot_tokens(batches, settings.snapshot_tokens))
    try:
        measure_passes(session, feeding, checkpoint.name, batches, step)
    except KeyboardInterrupt as interruption:
        interruption.add_note(_save_part(session, feeding, len(batches), out, overwrite))
        raise
    if out is None:
        return session.run
    on_first_rank(lambda: session.save(out, overwrite=overwrite))
    return open_run(out)


def session_of(
    checkpoint: Checkpoint,
    batches: TokenBatches,
    settings: MeasurementSettings,
    *,
    batch_size: int | None,
    progress: Progress | None,
) -> tuple[Probe, Feeding]:
    """A probe in memory of an opened checkpoint, and the batches for it; nothing has run but a few tokens.

    Raises
    ------
    SiteError, CaptureError, UsageError : the sites are not found, or the batches don't fit the ranks
    """
    settings = settings.for_batches(batches)
    feeding = Feeding(
        checkpoint.model, batches, batch_size=batch_size, passes=settings.token_groups, progress=progress
    )
    attributes = {
        **model_attributes(checkpoint),
        **token_attributes(batches),
        "batch_size": feeding.batch_size,
        "ranks": dist.get_world_size() if is_distributed() else 1,
    }
    session = Probe(
        checkpoint.model,
        measurement_settings=settings,
        tokenizer=checkpoint.tokenizer,
        attributes=attributes,
        deferred=False,  # no loop goes on meanwhile
    )
    if session.site_map.states_with_cache and session.measures_site(MIXER_STATE):
        feeding.ask_for_cache()
    session.attributes["notes"] += [*checkpoint.notes, *batches.notes]
    return session, feeding


def measure_passes(session: Probe, feeding: Feeding, name: str, batches: TokenBatches, step: int) -> None:
    """Run all batches; what the model itself raises is told as such.

    Raises
    ------
    CaptureError : the model called ``name`` fails on them
    """
    try:
        session.measure(step, feeding, whole_sequences=True)
    except torch.OutOfMemoryError as error:
        raise CaptureError(
            f"{name} ran out of the device's memory at {feeding.batch_size} sequences of "
            f"{batches.sequence_length} tokens a forward pass; pass a smaller batch_size (--batch-size) or "
            "seq_len"
        ) from error
    except Exception as error:
        origin = "" if isinstance(error, OspDiagError) else foreign_origin(error)
        if not origin:
            raise
        raise CaptureError(
            f"{name} itself raised {type(error).__name__}: {error} ({origin}), on sequences of "
            f"{batches.sequence_length} tokens; a few tokens went through when its sites were found. "
            "If it takes fewer tokens at a time, pass a smaller seq_len (--seq-len)"
        ) from error


def _write_weights(session: Probe, patterns: Sequence[str] | None) -> None:
    """On every rank, because those that hold a matrix between them have to put it together."""
    model = unwrap(session.model)
    maps, notes = weight_maps(model, session.site_map, patterns)
    session.attributes["notes"] += notes
    by_channel = channel_weights(model, session.site_map) if maps else xr.Dataset()
    if is_first_rank():
        if by_channel.data_vars:
            session.write_static(CHANNEL_WEIGHTS, by_channel)
        for name, dataset in maps.items():
            session.write_static(f"{WEIGHT_MAP}/{name}", dataset)


def _save_part(
    session: Probe, feeding: Feeding, sequences: int, out: str | Path | None, overwrite: bool
) -> str:
    """Write what an interrupted probe has measured, marked as a part; says what became of it."""
    if out is None:
        return "the run was not to be written, so nothing is kept."
    if is_distributed():
        return "nothing was written: what the ranks had measured is theirs alone until they merge it."
    if not feeding.sequence_count:
        return f"no sequence was done yet, so nothing was written to {out}."
    part = f"{feeding.sequence_count} of {sequences} sequences"
    session.attributes |= {
        "tokens": feeding.token_count,
        "sequences": feeding.sequence_count,
        "interrupted": f"after {part}",
    }
    session.save(out, overwrite=overwrite)
    return f"what {part} gave is kept in {out}."


def _snapshot_tokens(batches: TokenBatches, count: int) -> xr.Dataset:
    ids = np.asarray(batches.tokens[0, :count])
    texts = np.asarray([batches.text_of(int(token)) for token in ids])
    attributes = {"long_name": "tokens of the sequence whose raw activations were kept"}
    return xr.Dataset(
        {"token_id": ("token", ids, attributes), "token_text": ("token", texts, attributes)},
        {"token": np.arange(len(ids))},
    )


@contextmanager
def joined_ranks() -> Iterator[None]:
    """Join the process group that ``torchrun`` describes in the environment, unless the caller has."""
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or dist.is_initialized():
        yield
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def progress_bar(label: str, unit: str = "sequences") -> Iterator[Progress | None]:
    """A bar on standard error while it is a terminal; None otherwise."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(file=unfiltered(sys.stderr))
    if not console.is_terminal or not is_first_rank():
        yield None
        return
    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(printable(label), total=None)
        yield lambda sequences, total: bar.update(task, completed=sequences, total=total)


@contextmanager
def working(label: str) -> Iterator[None]:
    """A sign of life on standard error, while it is a terminal, for work whose length nobody knows."""
    from rich.console import Console

    console = Console(file=unfiltered(sys.stderr))
    if console.is_terminal and is_first_rank():
        with console.status(printable(label)):
            yield
    else:
        yield
