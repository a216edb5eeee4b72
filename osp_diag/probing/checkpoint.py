"""Probing one checkpoint: open, tokenise, run, write."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import xarray as xr
from torch import nn

from osp_diag.checkpoints import Checkpoint, open_checkpoint
from osp_diag.errors import UsageError
from osp_diag.estimators.base import Estimator
from osp_diag.probing.ranks import is_distributed, is_first_rank
from osp_diag.probing.session import Probe
from osp_diag.run import Run
from osp_diag.tokens import TokenBatches, make_batches

__all__ = ["joined_ranks", "probe", "probe_checkpoint", "progress_bar"]

Progress = Callable[[int, int], None]
"""(sequences done, sequences in all)"""


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
    out: str | Path | None = None,
    overwrite: bool = False,
    keep_raw: bool = True,
    snapshot_tokens: int = 64,
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
    out : where to write the run; None keeps it in memory
    snapshot_tokens : positions of the first sequence whose raw activations are kept for pictures

    Returns
    -------
    Run : under ``torchrun`` the tokens are sharded over the ranks, rank 0 writes, all return the run

    Raises
    ------
    CheckpointError, TokenError, SiteError, StoreError, UsageError : before any long work
    """
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
            sites=sites,
            estimators=estimators,
            blocks=blocks,
            named_sites=named_sites,
            overwrite=overwrite,
            keep_raw=keep_raw,
            snapshot_tokens=snapshot_tokens,
            compile=compile,
        )


def probe_checkpoint(
    checkpoint: Checkpoint,
    batches: TokenBatches,
    *,
    batch_size: int | None = None,
    progress: Progress | None = None,
    step: int = 0,
    **options: Any,
) -> Run:
    """Probe an opened checkpoint on tokens in hand; ``options`` are those of :class:`osp_diag.Probe`."""
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size={batch_size}: a forward pass needs 1 or more sequences")
    size = batch_size or _batch_size(checkpoint.model, batches.sequence_length)
    attributes = {
        **checkpoint_attributes(checkpoint),
        **token_attributes(batches),
        "batch_size": size,
        "ranks": dist.get_world_size() if is_distributed() else 1,
        "command": " ".join(sys.argv),
        "notes": [*checkpoint.notes, *batches.notes],
    }
    session = Probe(checkpoint.model, delimiter_ids=batches.delimiter_ids, attributes=attributes, **options)
    with session:
        if session.snapshot_tokens and is_first_rank():
            session.write_static("snapshot", _snapshot_tokens(batches, session.snapshot_tokens))
        mine = _shard(batches)
        session.measure(step, _feeding(checkpoint.model, batches, mine, size, progress))
        if is_distributed():
            session.close()
            dist.barrier()
        return session.run


def checkpoint_attributes(checkpoint: Checkpoint) -> dict[str, Any]:
    """What identifies the model in a run."""
    return {
        "model_name": checkpoint.name,
        "model_fingerprint": checkpoint.fingerprint,
        "architecture": checkpoint.architecture,
        "tokenizer": type(checkpoint.tokenizer).__name__ if checkpoint.tokenizer is not None else "none",
    }


def token_attributes(batches: TokenBatches) -> dict[str, Any]:
    """What identifies the tokens in a run."""
    return {
        "token_source": batches.source,
        "token_fingerprint": batches.fingerprint,
        "protocol": batches.protocol,
        "bos": batches.bos,
        "sequence_length": batches.sequence_length,
        "tokens": int(batches.attention_mask.sum()),
        "sequences": len(batches.tokens),
    }


def _batch_size(model: nn.Module, sequence_length: int) -> int:
    """Sequences a pass: a GPU wants many tokens at once, a CPU what its caches hold."""
    tokens = 8192 if _input_device(model).type == "cuda" else 1024
    return max(1, tokens // sequence_length)


def _snapshot_tokens(batches: TokenBatches, count: int) -> xr.Dataset:
    ids = np.asarray(batches.tokens[0, :count])
    texts = np.asarray([batches.text_of(int(token)) for token in ids])
    attributes = {"long_name": "tokens of the sequence whose raw activations were kept"}
    return xr.Dataset(
        {"token_id": ("token", ids, attributes), "token_text": ("token", texts, attributes)},
        {"token": np.arange(len(ids))},
    )


def _shard(batches: TokenBatches) -> np.ndarray:
    """The sequences that this rank runs: every n-th, so that all ranks run equally many, give or take one."""
    everything = np.arange(len(batches.tokens))
    if not is_distributed():
        return everything
    return everything[dist.get_rank() :: dist.get_world_size()]


def _feeding(
    model: nn.Module, batches: TokenBatches, mine: np.ndarray, size: int, progress: Progress | None
) -> Iterator[Mapping[str, Any]]:
    device = _input_device(model)
    padded = not bool(np.all(batches.attention_mask))
    for start in range(0, len(mine), size):
        chosen = mine[start : start + size]
        batch: dict[str, Any] = {"input_ids": torch.as_tensor(batches.tokens[chosen], device=device)}
        if padded:
            batch["attention_mask"] = torch.as_tensor(batches.attention_mask[chosen], device=device)
        if _takes_cache(model):
            batch["use_cache"] = False
        yield batch
        if progress is not None:
            progress(min(start + size, len(mine)), len(mine))


def _takes_cache(model: nn.Module) -> bool:
    return hasattr(getattr(model, "config", None), "use_cache")


def _input_device(model: nn.Module) -> torch.device:
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(embeddings, "weight", None)
    return weight.device if weight is not None else next(model.parameters()).device


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
def progress_bar(label: str) -> Iterator[Progress | None]:
    """A bar on standard error while it is a terminal; None otherwise."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_terminal or not is_first_rank():
        yield None
        return
    columns = (
        TextColumn(label),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("sequences"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task(label, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
