"""Asking a checkpoint tasks under several settings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from osp_diag.checkpoints.checkpoint import Checkpoint
from osp_diag.errors import UsageError
from osp_diag.quantizing.calibration import Calibration
from osp_diag.quantizing.conventions import convention_named
from osp_diag.quantizing.linears import rounded_share
from osp_diag.quantizing.methods import method_named
from osp_diag.quantizing.perplexity import refuse_what_sees_ahead
from osp_diag.quantizing.setting import UNQUANTIZED, Setting
from osp_diag.quantizing.simulate import quantized
from osp_diag.quantizing.tasks.loading import LoadedTask, harness_version, load_tasks, quiet_harness
from osp_diag.quantizing.tasks.results import TaskResult

__all__ = ["evaluate_tasks"]

_SHOT_SEED = 1234
"""lm-eval's own: which solved examples stand before a question."""
_BOOTSTRAPS = 1000
"""Resamples behind the standard error of a metric that has no formula for it."""


def evaluate_tasks(
    checkpoint: Checkpoint,
    tasks: Sequence[str] | Sequence[LoadedTask] = ("ten",),
    settings: Sequence[Setting] = (Setting(16, 16, 16), Setting(4, 4, 4)),
    *,
    method: str = "rtn",
    convention: str = "plain",
    seed: int = 0,
    calibration: Calibration | None = None,
    blocks: str | None = None,
    limit: int | None = None,
    shots: int | None = None,
    include_path: str | Path | None = None,
    bos: str = "auto",
    max_length: int | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
    after_setting: Callable[[list[TaskResult]], None] | None = None,
) -> list[TaskResult]:
    """The accuracy on each task under each setting.

    Questions, and the solved examples before them, are the same under every setting.

    Parameters
    ----------
    checkpoint : with its tokenizer; any dtype and device
    tasks : names that lm-eval knows or of our groups, or what
        :func:`~osp_diag.quantizing.tasks.loading.load_tasks` gave
    settings : bits of weights, activations, keys and values
    method, convention, seed, blocks : as :func:`~osp_diag.quantizing.simulate.quantized` takes them
    calibration : the text of methods that look at activations
    limit : ask only the first so many documents of each task (of a task made of several, of each of these)
    shots, include_path : as :func:`~osp_diag.quantizing.tasks.loading.load_tasks` takes them
    bos : whether sequences begin with the beginning-of-sequence token: ``no``, ``yes``, ``auto`` as the
        convention says, or else as the tokenizer does
    max_length : longest sequence; None: as the convention and the checkpoint allow. Of longer ones the
        beginning is cut off, and counted
    batch_size : sequences a forward pass; None: about 1,024 tokens, 8,192 on a GPU
    progress : is told (tasks done, tasks in all)
    after_setting : is handed the results of each setting as soon as they are there

    Raises
    ------
    UsageError : what :func:`~osp_diag.quantizing.tasks.loading.load_tasks` refuses, no setting, a limit below
        1, a model that is not causal, keys and values out of reach, no calibration where a method needs one
    TokenError : no tokenizer, or no such token
    """
    settings = list(dict.fromkeys(settings))
    if not settings:
        raise UsageError("name at least one setting, such as 4-4-4 for 4 bits everywhere")
    if limit is not None and limit < 1:
        raise UsageError(f"limit={limit}: ask 1 document or more of each task")
    _check_way(settings, method, convention, calibration)
    bos, max_length = _as_convention(checkpoint, convention, bos, max_length)
    loaded = _loaded(tasks, include_path, shots)
    from osp_diag.quantizing.tasks.language_model import CheckpointModel  # which imports lm-eval

    language_model = CheckpointModel(checkpoint, bos=bos, max_length=max_length, batch_size=batch_size)
    refuse_what_sees_ahead(checkpoint.model, np.array([[0, 1, 2, 3]]) % (checkpoint.vocabulary_size or 4))
    _refuse_out_of_reach(checkpoint, settings, convention, blocks)
    results: list[TaskResult] = []
    for number, setting in enumerate(settings):
        labels: dict[str, Any] = {
            **dict(zip(("weight_bits", "activation_bits", "key_value_bits"), setting.bits, strict=True)),
            "bos": "yes" if language_model.opening else "no",
            "limit": limit or 0,
        }
        rows = []
        with ExitStack() as undo:
            undo.enter_context(checkpoint.evaluation())
            if not setting.unquantized:
                simulation = undo.enter_context(
                    quantized(
                        checkpoint.model,
                        setting,
                        method=method,
                        convention=convention,
                        seed=seed,
                        calibration=None if calibration is None else calibration.tokens,
                        blocks=blocks,
                    )
                )
                labels |= _labels(method, convention, seed, calibration)
                labels |= {
                    "notes": "; ".join(simulation.notes),
                    "rounded_share": rounded_share(checkpoint.model, blocks=blocks),
                }
            for place, entry in enumerate(loaded, start=1):
                rows.append(_asked(language_model, entry, limit, labels))
                if progress is not None:
                    progress(number * len(loaded) + place, len(settings) * len(loaded))
        results += rows
        if after_setting is not None:
            after_setting(rows)
    return results


def _check_way(
    settings: Sequence[Setting], method: str, convention: str, calibration: Calibration | None
) -> None:
    way = method_named(method)
    convention_named(convention)
    if way.calibrated and calibration is None and not all(setting.unquantized for setting in settings):
        raise UsageError(f"{method} looks at activations on a text: give a calibration")


def _as_convention(
    checkpoint: Checkpoint, convention: str, bos: str, max_length: int | None
) -> tuple[str, int | None]:
    """(BOS, longest sequence) as the convention has them where nothing else is said; at 16 bits, too."""
    rules = convention_named(convention)
    if max_length is None and rules.sequence_length is not None:
        max_length = min(rules.sequence_length, checkpoint.max_length or rules.sequence_length)
    return ("no" if bos == "auto" and not rules.opening_tokens else bos), max_length


def _refuse_out_of_reach(
    checkpoint: Checkpoint, settings: Sequence[Setting], convention: str, blocks: str | None
) -> None:
    """Enter each setting once, but for its weights, so that hours of work are not lost at the second."""
    for setting in settings:
        if not setting.unquantized:
            light = replace(setting, weight_bits=UNQUANTIZED)
            with quantized(checkpoint.model, light, convention=convention, blocks=blocks):
                pass


def _labels(method: str, convention: str, seed: int, calibration: Calibration | None) -> dict[str, Any]:
    """How a model is rounded; the seed of a method that draws nothing is 0, whatever was given."""
    way = method_named(method)
    return {
        "method": method,
        "convention": convention,
        "seed": seed if way.seeded else 0,
        "calibration": calibration.description if way.calibrated and calibration else "",
    }


def _loaded(
    tasks: Sequence[str] | Sequence[LoadedTask], include_path: str | Path | None, shots: int | None
) -> list[LoadedTask]:
    ready = [task for task in tasks if isinstance(task, LoadedTask)]
    names = [task for task in tasks if isinstance(task, str)]
    return ready + (load_tasks(names, include_path=include_path, shots=shots) if names or not ready else [])


def _asked(model: Any, entry: LoadedTask, limit: int | None, labels: dict[str, Any]) -> TaskResult:
    """One task under the setting that is in force."""
    from lm_eval import evaluate

    for leaf in entry.tree["tasks"].values():
        leaf.set_fewshot_seed(_SHOT_SEED)  # each time, so that all settings are asked the same
    before = model.truncated
    with quiet_harness():
        answer = evaluate(model, entry.tree, limit=limit, bootstrap_iters=_BOOTSTRAPS, log_samples=False)
    task, checkpoint = entry.task, model.checkpoint
    values = answer["results"][task.name]
    metric = f"{task.metric},{task.filter}"
    if metric not in values:
        raise UsageError(
            f"lm-eval {harness_version()} reports no {metric} of the task {task.name!r}, but "
            f"{', '.join(name for name in values if ',' in name)}"
        )
    error = values.get(f"{task.metric}_stderr,{task.filter}")
    return TaskResult(
        **labels,
        task=task.name,
        accuracy=float(values[metric]),
        standard_error=float(error) if isinstance(error, int | float) else float("nan"),
        documents=sum(int(answer["n-samples"][name]["effective"]) for name in entry.tree["tasks"]),
        metric=metric.removesuffix(",none"),
        shots=task.shots,
        task_version=str(answer["versions"].get(task.name, "")),
        harness=f"lm_eval {harness_version()}",
        max_length=model.max_length or 0,
        truncated=model.truncated - before,
        dtype=checkpoint.dtype,
        model_fingerprint=checkpoint.fingerprint,
    )
