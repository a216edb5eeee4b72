"""Starting from a checkpoint's weights under another configuration, and what has to begin anew for it."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from osp_diag.errors import StoreError, TrainingError, UsageError
from osp_diag.runs.folder import check_destination
from osp_diag.runs.format import jsonable
from osp_diag.runs.run import open_run
from osp_diag.trainer.checkpoint import (
    NAME,
    TrainingCheckpoint,
    folder_of,
    identity_of,
    latest,
    read_checkpoint,
)
from osp_diag.trainer.config import ModelConfig, TrainConfig
from osp_diag.trainer.config_values import as_recorded, differences
from osp_diag.trainer.data import TrainingData
from osp_diag.trainer.divergence import Watch
from osp_diag.trainer.folding import (
    EMBEDDING,
    EMBEDDING_PROJECTION,
    HEAD,
    HEAD_PROJECTION,
    folded_embedding,
)
from osp_diag.trainer.optimizers import Optimizers

__all__ = [
    "Origin",
    "check_segment",
    "checkpoint_at",
    "converted_weights",
    "is_segment_of",
    "start_from",
]

MODEL, OPTIMIZER = "model.", "optimizer."


@dataclass(frozen=True)
class Origin:
    """Where a training began, as its run records it under ``parent``.

    Attributes
    ----------
    run : name of the run whose checkpoint it was
    checkpoint : name of the checkpoint's folder
    step : updates that its weights had
    changes : ``key: before → now`` of the configuration
    config_before : the values that were changed, by dotted key
    converted : what became of weights that the new model holds otherwise, a sentence each
    reset : what begins anew, an entry each
    """

    run: str
    checkpoint: str
    step: int
    changes: tuple[str, ...]
    config_before: dict[str, Any]
    converted: tuple[str, ...]
    reset: tuple[str, ...]


def checkpoint_at(path: str | os.PathLike[str]) -> TrainingCheckpoint:
    """The checkpoint that a path names: its folder, or the newest of a run or of a run's checkpoints.

    Raises
    ------
    TrainingError : there is none
    """
    folder = Path(path)
    if NAME.fullmatch(folder.name) and folder.is_dir():
        return read_checkpoint(folder)
    checkpoints = folder_of(folder) if folder.suffix == ".zarr" else folder
    newest = latest(checkpoints)
    if newest is None:
        raise TrainingError(
            f"there is no training checkpoint at {path}; give a folder such as "
            "osp.checkpoints/step-00000100, or a run (osp.zarr) for its newest one"
        )
    return newest


def check_segment(out: Path, origin: TrainingCheckpoint | None, *, resume: bool, overwrite: bool) -> None:
    """Refuse, before any work, a run that cannot go on as a new segment from a checkpoint.

    Raises
    ------
    UsageError : no checkpoint was given, or one of another run
    StoreError : there is no run at ``out`` that could be written
    TrainingError : the run or its checkpoints reach further, and ``overwrite`` does not allow to drop that
    """
    if origin is None or resume:
        raise UsageError("a new segment begins from a checkpoint: give it (--from), and leave --resume out")
    if origin.path.parent.absolute() != folder_of(out).absolute():
        raise UsageError(
            f"{origin.path} is no checkpoint of {out}, whose are in {folder_of(out)}; give one of those, or "
            "another --out for a run of its own"
        )
    check_destination(out, resume=True)
    run = open_run(out)
    series = run.series["step"].values
    last = max([*run.steps[-1:].tolist(), *series[-1:].tolist()])
    newest = latest(folder_of(out))
    last = max(last, origin.step if newest is None else newest.step)
    if last > origin.step and not overwrite:
        raise TrainingError(
            f"{out} reaches step {last}, beyond step {origin.step} of {origin.path.name}; --overwrite drops "
            "what lies beyond, or give another --out for a run of its own"
        )


def is_segment_of(out: Path, checkpoint: TrainingCheckpoint, config: TrainConfig) -> bool:
    """Whether the run's last segment is of ``config`` and began from this checkpoint."""
    if not out.exists():
        return False
    try:
        last = open_run(out).segments[-1]
    except StoreError:  # nothing is recorded yet
        return False
    return last.after_step == checkpoint.step and last.attributes.get("config") == jsonable(
        identity_of(config)
    )


@torch.no_grad()
def start_from(
    checkpoint: TrainingCheckpoint,
    model: nn.Module,
    optimizers: Optimizers,
    watch: Watch,
    data: TrainingData,
    config: TrainConfig,
    *,
    forget: Collection[str] = (),
) -> Origin:
    """Give a new training the weights of a checkpoint, and of everything else what fits it.

    Weights that the new model holds otherwise are converted (:func:`converted_weights`). The state of a
    parameter's optimizer is taken over where the same optimizer moves the same parameter, whose weights were
    not converted. Every rank reads all tensors.

    Parameters
    ----------
    model : unwrapped, with weights of its own, sharded or not
    forget : parameters whose optimizer state begins anew in any case
    config : the new one; its ``steps`` count from the checkpoint's training on

    Raises
    ------
    UsageError : ``steps`` is not beyond the checkpoint
    TrainingError : the checkpoint is damaged, or of a model of other sizes
    """
    if config.steps <= checkpoint.step:
        raise UsageError(
            f"steps={config.steps} is not beyond step {checkpoint.step} of {checkpoint.path}, from which "
            f"steps go on counting; give --set steps={2 * checkpoint.step} or more"
        )
    tensors = checkpoint.tensors()
    weights = {name.removeprefix(MODEL): value for name, value in tensors.items() if name.startswith(MODEL)}
    own = model.state_dict()
    shapes = {name: tuple(value.shape) for name, value in own.items()}
    weights, converted, renewed = converted_weights(weights, checkpoint.config.model, config.model, shapes)
    for name, value in weights.items():
        own[name].copy_(_placed(value, own[name]))
    reset = [f"weights: {name}" for name in shapes if name not in weights]
    reset += _take_state(tensors, optimizers, renewed | set(forget))
    reset += _take_position(checkpoint, watch, data, tensors)
    before = checkpoint.config
    return Origin(
        run=checkpoint.path.parent.stem,
        checkpoint=checkpoint.path.name,
        step=checkpoint.step,
        changes=tuple(differences(before, config)),
        config_before=_changed_values(before, config),
        converted=tuple(converted),
        reset=tuple(reset),
    )


def _changed_values(before: TrainConfig, now: TrainConfig) -> dict[str, Any]:
    old, new = as_recorded(before), as_recorded(now)
    return {key: value for key, value in old.items() if new[key] != value}


def converted_weights(
    weights: Mapping[str, Tensor],
    before: ModelConfig,
    now: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
) -> tuple[dict[str, Tensor], list[str], set[str]]:
    """Weights for a model of another configuration: (what fits, sentences, changed names).

    * projections that are gone are multiplied into embedding and head, in float64: the same function;
      projections that are new are identities: the same function
    * a scalar gain that becomes one a channel stands in all channels: the same function; gains that become
      one are replaced by their root mean square, √(mean γ²): another function
    * of a shared matrix that becomes two, both begin as it was: the same function

    What the new model has beyond that is left to its own initial values.

    Parameters
    ----------
    weights : of the old model by name
    shapes : of the new model's weights by name

    Raises
    ------
    TrainingError : a weight has another size, by name; or two matrices would have to become a shared one
    """
    if now.tie_embeddings and not before.tie_embeddings:
        raise TrainingError(
            "the checkpoint cannot begin such a model: its head and its embedding are two matrices, and "
            "model.tie_embeddings=true has one for both; start with model.tie_embeddings=false"
        )
    result, sentences = dict(weights), []
    if before.embedding_projection and not now.embedding_projection:
        embedding, head = folded_embedding(result)
        result |= {EMBEDDING: embedding.float(), HEAD: head.float()}
        for name in (EMBEDDING_PROJECTION, HEAD_PROJECTION):
            del result[name]
        sentences.append("embedding projections are multiplied into embedding and head")
    if now.embedding_projection and not before.embedding_projection:
        result |= {name: torch.eye(now.hidden_size) for name in (EMBEDDING_PROJECTION, HEAD_PROJECTION)}
        sentences.append("embedding projections begin as identities")
    spread, averaged = [], []
    for name, value in list(result.items()):
        shape = shapes.get(name)
        if name.endswith("norm.weight") and shape is not None and tuple(value.shape) != shape:
            if value.numel() == 1:
                result[name] = value.reshape(1).expand(shape).clone()
                spread.append(name)
            elif shape == (1,):
                result[name] = value.double().square().mean().sqrt().float().reshape(1)
                averaged.append(name)
    if spread:
        sentences.append(f"{len(spread)} scalar gains stand in every channel")
    if averaged:
        sentences.append(f"{len(averaged)} vectors of gains became their root mean square: another function")
    gone = sorted(name for name in result if name not in shapes)
    if gone:
        sentences.append(f"dropped, another function: {', '.join(gone)}")
    result = {name: value for name, value in result.items() if name in shapes}
    _check_sizes(result, shapes)
    changed = {name for name, value in result.items() if value is not weights.get(name)}
    return result, sentences, changed


def _check_sizes(weights: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    problems = [
        f"{name} is {tuple(value.shape)} and not {shapes[name]}"
        for name, value in weights.items()
        if tuple(value.shape) != shapes[name]
    ]
    if problems or not weights:
        more = f", and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise TrainingError(
            "the checkpoint is of a model of other sizes: "
            f"{', '.join(problems[:3]) or 'no weight fits'}{more}; "
            "start with the sizes that it was trained with"
        )


def _take_state(tensors: Mapping[str, Tensor], optimizers: Optimizers, renewed: set[str]) -> list[str]:
    """Load what fits of the optimizers' state; what does not, by optimizer and parameter."""
    state, reset = optimizers.state_dict(), []
    for owner, parameters in state.items():
        for name, entries in parameters.items():
            saved = {key: tensors.get(f"{OPTIMIZER}{owner}.{name}.{key}") for key in entries}
            fits = name not in renewed and all(
                value is not None and value.shape == entries[key].shape for key, value in saved.items()
            )
            if fits:
                parameters[name] = {
                    key: _placed(value, entries[key]) for key, value in saved.items() if value is not None
                }
            elif entries:
                reset.append(f"{owner}: {name}")
    optimizers.load_state_dict(state)
    return reset


def _take_position(
    checkpoint: TrainingCheckpoint, watch: Watch, data: TrainingData, tensors: Mapping[str, Tensor]
) -> list[str]:
    """Go on in the data, and with the losses that spikes are judged by; what of it begins anew."""
    reset = []
    losses = {name: tensors.get(f"watch.{name}") for name in watch.state_dict()}
    present = {name: value for name, value in losses.items() if value is not None}
    if all(name in present and present[name].shape == own.shape for name, own in watch.state_dict().items()):
        watch.load_state_dict(present)
    else:
        reset.append("divergence: the window of losses")
    try:
        data.load_state_dict(checkpoint.data)
    except (TrainingError, KeyError, TypeError, ValueError) as error:
        reset.append(f"data: begin at their first token ({str(error).split(';')[0].split('. ')[0]})")
    return reset


def _placed(value: Tensor, like: Tensor) -> Tensor:
    """A whole tensor as ``like`` is: on its device, and this rank's part of it."""
    value = value.to(like.device, like.dtype)
    return distribute_tensor(value, like.device_mesh, like.placements) if isinstance(like, DTensor) else value
