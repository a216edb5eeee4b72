"""Probing one checkpoint: open, tokenise, run, write."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xarray as xr
from torch import nn

from osp_diag.capture.channel_weights import channel_weights
from osp_diag.capture.weight_maps import weight_maps
from osp_diag.checkpoints import Checkpoint, open_checkpoint
from osp_diag.errors import CaptureError, UsageError
from osp_diag.estimators.base import Estimator
from osp_diag.probing.asked import checked_token_groups, instances
from osp_diag.probing.feeding import Feeding, Progress
from osp_diag.probing.identity import model_attributes, token_attributes
from osp_diag.probing.ranks import is_distributed, is_first_rank, on_first_rank
from osp_diag.probing.saving import check_out
from osp_diag.probing.session import Probe
from osp_diag.runs.run import Run, open_run
from osp_diag.schema import CHANNEL_WEIGHTS, WEIGHT_MAP
from osp_diag.sites.trace import unwrap
from osp_diag.tokens import TokenBatches, make_batches

__all__ = ["TOKEN_GROUPS", "joined_ranks", "probe", "probe_checkpoint", "progress_bar", "working"]

TOKEN_GROUPS = 8
"""Groups of batches whose sums are kept apart by default."""


def probe(
    source: str | Path | nn.Module,
    *,
    text: str | Path | None = None,
    dataset: str | None = None,
    tokens: int = 8192,
    seq_len: int | None = None,
    batch_size: int | None = None,
    protocol: str = "sequence",
    bos: str = "auto",
    sites: Sequence[str] | None = None,
    estimators: Sequence[str | Estimator] | None = None,
    blocks: str | None = None,
    named_sites: Mapping[str, str] | None = None,
    weights: Sequence[str] | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    keep_raw: bool = True,
    snapshot_tokens: int = 64,
    token_groups: int = TOKEN_GROUPS,
    tokenizer: Any = None,
    dtype: str = "auto",
    device: str = "auto",
    device_map: Any = None,
    compile: bool | str = "auto",
    trust_remote_code: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress | None = None,
) -> Run:
    """Every outlier and sink statistic of every layer of one checkpoint.

    Parameters
    ----------
    source : Hugging Face directory or hub id, GGUF file, ``module:function``, or a module in hand
    text, dataset : a UTF-8 file (or the text itself) or a Hugging Face dataset; neither: the built-in text
    tokens : how many tokens to run
    seq_len : tokens a sequence; None: 512, or the model's maximum if that is less
    batch_size : sequences a forward pass; None: about 1,024 tokens, 8,192 on a GPU
    protocol : "sequence", or "osp-published" (every token its own sequence, as the released OSP script does)
    bos : "auto" (the tokenizer's convention), "yes" or "no"
    sites, estimators, blocks, named_sites, keep_raw, compile : see :class:`osp_diag.Probe`
    out : where to write the run, a folder ending in .zarr; None keeps it in memory
    snapshot_tokens : positions of the first sequence whose raw activations are kept for pictures
    token_groups : so many groups of batches whose channel sums are kept apart, so that a comparison can tell
        what is significant; 0: none
    weights : projections whose |W| is kept for pictures, see :func:`probe_checkpoint`

    Returns
    -------
    Run : under ``torchrun`` the tokens are sharded over the ranks, rank 0 writes, all return the run

    Raises
    ------
    CheckpointError, TokenError, SiteError, StoreError, UsageError : before any long work
    """
    if out is not None:
        check_out(out, overwrite=overwrite)
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: a forward pass needs 1 or more sequences")
    chosen = instances(estimators)  # a misspelt name is refused before a model is opened
    with joined_ranks():
        checkpoint = open_checkpoint(
            source,
            dtype=dtype,
            device=device,
            device_map=device_map,
            trust_remote_code=trust_remote_code,
            allow_nonfinite=allow_nonfinite,
            tokenizer=tokenizer,
        )
        batches = make_batches(
            checkpoint.tokenizer,
            text=text,
            dataset=dataset,
            tokens=tokens,
            seq_len=seq_len,
            protocol=protocol,
            bos=bos,
            max_length=checkpoint.max_length,
            vocabulary_size=checkpoint.vocabulary_size,
        )
        return probe_checkpoint(
            checkpoint,
            batches,
            batch_size=batch_size,
            progress=progress,
            out=out,
            overwrite=overwrite,
            sites=sites,
            estimators=chosen,
            blocks=blocks,
            named_sites=named_sites,
            weights=weights,
            keep_raw=keep_raw,
            snapshot_tokens=snapshot_tokens,
            token_groups=token_groups,
            compile=compile,
        )


def probe_checkpoint(
    checkpoint: Checkpoint,
    batches: TokenBatches,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
    out: str | Path | None = None,
    overwrite: bool = False,
    step: int = 0,
    weights: Sequence[str] | None = None,
    token_groups: int = 0,
    **options: Any,
) -> Run:
    """Probe an opened checkpoint on tokens in hand; ``options`` are those of :class:`osp_diag.Probe`.

    ``weights`` names, with ``*``, projections of which a map of |W| is kept, as ``mlp.down_proj`` or
    ``model.layers.3.*``. None stands for those that write into the residual stream in the first, middle and
    last block, or for none where only some ``sites`` are asked for; () for none. ``token_groups`` are at most
    as many as there are sequences.

    Ctrl-C writes what was measured until then, notes on the exception where it is, and goes on its way.
    """
    if out is not None:
        check_out(out, overwrite=overwrite)
    groups = min(checked_token_groups(token_groups), len(batches.tokens))
    token_groups = groups if groups > 1 else 0
    feeding = Feeding(
        checkpoint.model, batches, batch_size=batch_size, passes=token_groups, progress=progress
    )
    attributes = {
        **model_attributes(checkpoint),
        **token_attributes(batches),
        "batch_size": feeding.batch_size,
        "ranks": dist.get_world_size() if is_distributed() else 1,
    }
    known = {"delimiter_ids": batches.delimiter_ids, "tokenizer": checkpoint.tokenizer}
    options = {**known, "deferred": False, **options}  # no loop goes on meanwhile
    session = Probe(checkpoint.model, attributes=attributes, token_groups=token_groups, **options)
    session.attributes["notes"] += [*checkpoint.notes, *batches.notes]
    _keep_weights(session, () if weights is None and options.get("sites") is not None else weights)
    if session.snapshot_tokens and is_first_rank():
        session.write_static("snapshot", _snapshot_tokens(batches, session.snapshot_tokens))
    try:
        session.measure(step, feeding)
    except KeyboardInterrupt as interruption:
        interruption.add_note(_keep_part(session, feeding, len(batches), out, overwrite))
        raise
    except torch.OutOfMemoryError as error:
        raise CaptureError(
            f"{checkpoint.name} ran out of the device's memory at {feeding.batch_size} sequences of "
            f"{batches.sequence_length} tokens a forward pass; pass a smaller batch_size (--batch-size) or "
            "seq_len"
        ) from error
    if out is None:
        return session.run
    on_first_rank(lambda: session.save(out, overwrite=overwrite))
    return open_run(out)


def _keep_weights(session: Probe, patterns: Sequence[str] | None) -> None:
    """On every rank, because those that hold a matrix between them have to put it together."""
    model = unwrap(session.model)
    maps, problems = weight_maps(model, session.site_map, patterns)
    session.attributes["notes"] += problems
    by_channel = channel_weights(model, session.site_map) if maps else xr.Dataset()
    if is_first_rank():
        if by_channel.data_vars:
            session.write_static(CHANNEL_WEIGHTS, by_channel)
        for name, dataset in maps.items():
            session.write_static(f"{WEIGHT_MAP}/{name}", dataset)


def _keep_part(
    session: Probe, feeding: Feeding, sequences: int, out: str | Path | None, overwrite: bool
) -> str:
    """Write what an interrupted probe has measured, marked as a part; says what became of it."""
    if out is None:
        return "the run was not to be written, so nothing is kept."
    if is_distributed():
        return "nothing was written: what the ranks had measured is theirs alone until they merge it."
    if not feeding.done:
        return f"no sequence was done yet, so nothing was written to {out}."
    part = f"{feeding.done} of {sequences} sequences"
    session.attributes |= {
        "tokens": feeding.tokens_done,
        "sequences": feeding.done,
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

    console = Console(stderr=True)
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
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


@contextmanager
def working(label: str) -> Iterator[None]:
    """A sign of life on standard error, while it is a terminal, for work whose length nobody knows."""
    from rich.console import Console

    console = Console(stderr=True)
    if console.is_terminal and is_first_rank():
        with console.status(label):
            yield
    else:
        yield
