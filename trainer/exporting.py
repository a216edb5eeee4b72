"""From a training run to a stock checkpoint: finds the newest state, its tokenizer and its numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from osp_diag.errors import TrainingError
from osp_diag.runs.headline import headline
from osp_diag.runs.run import Run, open_run
from osp_diag.trainer.checkpoint import TrainingCheckpoint, folder_of, latest
from osp_diag.trainer.config import DataConfig
from osp_diag.trainer.config_values import as_recorded
from osp_diag.trainer.data.tokenizing import open_tokenizer
from osp_diag.trainer.export import ExportReport, export
from osp_diag.trainer.model import Llama

__all__ = ["export_checkpoint", "export_run", "trained_model"]

_LAYER = re.compile(r"model\.model\.layers\.(\d+)\.")


def export_run(
    run: str | Path, out: str | Path, *, dtype: str = "float32", check: bool = True
) -> ExportReport:
    """Export the newest checkpoint of a training run; see :func:`osp_diag.trainer.export.export`.

    Raises
    ------
    TrainingError : the run has no checkpoint, or no exact stock form
    """
    return export_checkpoint(_newest(run), out, run=open_run(run), dtype=dtype, check=check)


def export_checkpoint(
    checkpoint: TrainingCheckpoint,
    out: str | Path,
    *,
    run: Run | None = None,
    dtype: str = "float32",
    check: bool = True,
) -> ExportReport:
    """Export any checkpoint of a training; its card has the last numbers of ``run``, if that is given.

    Raises
    ------
    TrainingError : it has no exact stock form
    """
    return export(
        trained_model(checkpoint).state_dict(),
        checkpoint.config.model,
        Path(out),
        tokenizer=_tokenizer(checkpoint.config.data),
        card={} if run is None else _card(checkpoint, run),
        dtype=dtype,
        check=check,
    )


def _tokenizer(config: DataConfig) -> Any:
    """The run's tokenizer; None where it trained on ids that came without one."""
    came_without = config.source == "tokens" and config.tokenizer is None
    return None if came_without else open_tokenizer(config.tokenizer)


def trained_model(checkpoint: TrainingCheckpoint) -> Llama:
    """The model of a checkpoint, on the CPU in float32.

    Raises
    ------
    TrainingError : it cannot be read, or holds other tensors than its configuration describes
    """
    _check_described(checkpoint)
    model = Llama(checkpoint.config.model)
    checkpoint.load({"model": model.state_dict()})
    return model.eval()


def _check_described(checkpoint: TrainingCheckpoint) -> None:
    """Hold what the configuration declares against the tensors that are there, before any of it is made."""
    config, sizes = checkpoint.config.model, checkpoint.sizes()
    layers = {match[1] for match in map(_LAYER.match, sizes) if match}
    described: Mapping[str, tuple[int, ...]] = {}
    if len(layers) == config.layers:  # else making the layers, even without memory, could take for ever
        with torch.device("meta"):
            described = {f"model.{name}": tuple(t.shape) for name, t in Llama(config).state_dict().items()}
        differing = [name for name, shape in described.items() if sizes.get(name) != shape]
        if not differing:
            return
        name = differing[0]
        problem = f"of {name} the configuration makes {described[name]}, and the file has {sizes.get(name)}"
    else:
        problem = f"its configuration has {config.layers:,} layers, and the file {len(layers):,}"
    raise TrainingError(f"{checkpoint.path} is damaged: {problem}; delete it to take the one before")


def _newest(run: str | Path) -> TrainingCheckpoint:
    checkpoint = latest(folder_of(run))
    if checkpoint is None:
        raise TrainingError(
            f"there is no checkpoint of {run} (it would be in {folder_of(run)}); train with "
            "`osp-diag train`, and keep both folders together"
        )
    return checkpoint


def _card(checkpoint: TrainingCheckpoint, run: Run) -> dict[str, Any]:
    """What the model card says: the recipe, and the numbers of the last probed step."""
    series = run.series
    losses = {
        name: float(series[name].dropna("step")[-1])
        for name in ("loss", "held_out_loss")
        if name in series and series[name].notnull().any()
    }
    return {
        "recipe": checkpoint.config.name,
        "steps": checkpoint.step,
        "tokens": checkpoint.step * checkpoint.config.tokens_per_step,
        "training_data": run.attrs.get("training_data", ""),
        "config": as_recorded(checkpoint.config),
        "statistics": {**losses, **headline(run)},
    }
