"""``osp-diag tasks``: what a checkpoint can do, at full precision and at few bits."""

from __future__ import annotations

import json as json_format
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from osp_diag.cli.checkpoint_options import DEFAULT_OPENING, Opening
from osp_diag.errors import UsageError
from osp_diag.quantizing.setting import CALIBRATION_TOKENS

if TYPE_CHECKING:
    from osp_diag.quantizing.tasks.results import TaskResult

VERB = "tasks"
HELP = "measure a checkpoint's accuracy on tasks at few bits, and keep it in its run"

OptionalCheckpoint = Annotated[str | None, tyro.conf.arg(metavar="CHECKPOINT")]


def run(
    checkpoint: OptionalCheckpoint = None,
    /,
    *,
    run: Path | None = None,
    tasks: tuple[str, ...] = ("ten",),
    bits: tuple[str, ...] = ("16-16-16", "4-4-4"),
    method: str = "rtn",
    convention: Literal["plain", "osp"] = "plain",
    seed: int = 0,
    calibration: str | None = None,
    calibration_tokens: int = CALIBRATION_TOKENS,
    limit: int | None = None,
    shots: int | None = None,
    include_path: Path | None = None,
    bos: Literal["auto", "yes", "no"] = "auto",
    seq_len: int | None = None,
    batch_size: int | None = None,
    opening: Opening = DEFAULT_OPENING,
    blocks: str | None = None,
    list: bool = False,
    json: bool = False,
) -> int:
    """Ask a checkpoint tasks through EleutherAI's lm-eval, as it is and rounded to few bits.

    The group `ten` is the OSP paper's ten tasks by lm-eval's own definitions, the two of ARC averaged into
    one; `osp-published` asks them as the release of OSP does. A mean with a task missing is none. With --run
    the results go into the run of that checkpoint, where the figure task_scatter finds them; what is measured
    again is replaced. Documents come from the Hugging Face hub or its cache, or lie beside the files of
    --include-path.

    Args:
        checkpoint: what to ask, as `osp-diag probe` takes it; for a training, what `osp-diag export` wrote.
        run: the run to add the results to.
        tasks: groups of --list, or tasks that lm-eval knows.
        bits: settings such as 4-4-4, bits of weights, activations, and keys and values; 16 for "as it is".
        method: rtn (round to nearest), ffn-hadamard, gptq, ffn-hadamard+gptq, quarot, quarot-rtn, spinquant,
            spinquant-rtn.
        convention: plain takes ranges from minima and maxima; osp rounds as the scripts of the OSP release.
        seed: of the random rotations of quarot and spinquant.
        calibration: text on which gptq and learned rotations look at activations: a UTF-8 file, or the text
            itself; by default a built-in public-domain text.
        calibration_tokens: how many tokens of it (the OSP release: 262,144).
        limit: ask only the first so many documents of each task, to try it out.
        shots: solved examples before each question; by default as the group or the task says.
        include_path: a folder with task files of your own, in lm-eval's format.
        bos: whether sequences begin with the beginning-of-sequence token; auto follows the tokenizer, or
            under the convention osp puts none.
        seq_len: longest sequence, of longer ones the beginning is cut off; by default as the model allows,
            and under the convention osp 2,048.
        batch_size: sequences a forward pass; by default about 1,024 tokens, 8,192 on a GPU.
        opening: how to open the checkpoint.
        blocks: path of the list of blocks, where it is not found.
        list: list the groups and their tasks instead.
        json: print as JSON.

    Examples:
        osp-diag tasks --list
        osp-diag tasks path/to/model --run run.zarr --limit 20
        osp-diag tasks osp-model --run osp.zarr --tasks osp-published --bits 16-16-16 4-4-4 --convention osp
        osp-diag tasks path/to/model --tasks colours --include-path my_tasks
        osp-diag figure task_scatter adam.zarr osp.zarr --out tasks.png
    """
    if list:
        print(json_format.dumps(_groups(), indent=2) if json else _groups_text())
        return 0
    if checkpoint is None:
        raise UsageError("name a checkpoint to ask, or --list for the groups of tasks")
    from osp_diag.cli.quantize_inputs import check_same_model
    from osp_diag.probing.checkpoint import progress_bar, working
    from osp_diag.probing.settings import TokenSettings
    from osp_diag.quantizing.calibration import Calibration
    from osp_diag.quantizing.methods import method_named
    from osp_diag.quantizing.setting import Setting
    from osp_diag.quantizing.tasks.evaluation import evaluate_tasks
    from osp_diag.quantizing.tasks.loading import load_tasks
    from osp_diag.quantizing.tasks.results import store_task_results
    from osp_diag.runs.folder import check_destination
    from osp_diag.runs.run import open_run

    settings = [Setting.read(entry) for entry in bits]
    method_named(method)
    if calibration_tokens < 1:
        raise UsageError(f"--calibration-tokens {calibration_tokens}: give 1 or more")
    holder = None if run is None else open_run(run)
    if run is not None:
        check_destination(run, resume=True)
    with working("reading tasks and documents"):
        loaded = load_tasks(tasks, include_path=include_path, shots=shots)
    opened = opening.open(checkpoint)
    if holder is not None:
        check_same_model(holder, opened)
    look = None
    if method_named(method).calibrated:
        text = TokenSettings(text=calibration, tokens=calibration_tokens, seq_len=seq_len, bos=bos)
        batches = text.batches(opened)
        look = Calibration(batches.tokens, batches.source)
    with progress_bar(f"asking {opened.name}", unit="tasks") as progress:
        results = evaluate_tasks(
            opened,
            loaded,
            settings,
            method=method,
            convention=convention,
            seed=seed,
            calibration=look,
            blocks=blocks,
            limit=limit,
            bos=bos,
            max_length=seq_len,
            batch_size=batch_size,
            progress=progress,
            # After each setting, so that little is lost of hours of work.
            after_setting=None if run is None else lambda rows: store_task_results(run, rows),
        )
    notes = (*opened.notes, *_notes(results))
    print(
        json_format.dumps(_as_json(results, notes), indent=2) if json else _text(opened.name, results, notes)
    )
    if run is not None and not json:
        print(f"\nstored in {run}   (osp-diag figure task_scatter {run} --out tasks.png)")
    return 0


def _groups() -> dict[str, Any]:
    from osp_diag.quantizing.tasks.groups import GROUPS

    return {
        group.name: {"meaning": group.meaning, "tasks": [asdict(task) for task in group.tasks]}
        for group in GROUPS.values()
    }


def _groups_text() -> str:
    from osp_diag.quantizing.tasks.groups import GROUPS

    lines = []
    for group in GROUPS.values():
        lines.append(f"{group.name}: {group.meaning}")
        lines += [
            f"  {task.name:<20}{task.metric:<13}{task.shots} shots   in the mean as {task.part}"
            for task in group.tasks
        ]
    return "\n".join([*lines, "Beside these, every task that lm-eval knows, and your own (--include-path)."])


def _notes(results: Sequence[TaskResult]) -> tuple[str, ...]:
    """What the reader of these numbers has to know."""
    from osp_diag.quantizing.results import partial_rounding
    from osp_diag.quantizing.tasks.groups import GROUPS
    from osp_diag.quantizing.tasks.results import task_dataset

    notes = []
    cut = {row.task: row.truncated for row in results if row.truncated}
    if cut:
        said = ", ".join(f"{count:,} of {task}" for task, count in cut.items())
        notes.append(
            f"of requests longer than {results[0].max_length:,} tokens the beginning was cut off: {said}"
        )
    notes += dict.fromkeys(row.notes for row in results if row.notes)
    notes += dict.fromkeys(f"calibrated on {row.calibration}" for row in results if row.calibration)
    notes += filter(None, (partial_rounding(task_dataset(results)),))
    if results[0].limit:
        notes.append(f"only the first {results[0].limit:,} documents of each task were asked")
    names = {row.task for row in results}
    if {"mmlu", "commonsense_qa"} & names:
        notes.append(
            "lm-eval asks MMLU and CommonsenseQA for the letter of an answer, the OSP paper for its text: "
            "--tasks osp-published gives the paper's numbers"
        )
    if {task.name for task in GROUPS["osp-published"].tasks} & names:
        notes.append(
            "osp-published follows the release's questions; solved examples are drawn by another generator, "
            "and generated answers are judged by lm-eval's exact_match"
        )
    return tuple(notes)


def _text(name: str, results: Sequence[TaskResult], notes: Sequence[str]) -> str:
    from osp_diag.quantizing.tasks.groups import GROUPS
    from osp_diag.quantizing.tasks.results import mean_of, settings_of

    first, settings = results[0], settings_of(results)
    tasks = dict.fromkeys(row.task for row in results)
    width = max(18, *(len(str(setting)) + 2 for setting in settings))
    lines = [
        f"{name}: accuracy in % ± standard error ({first.harness}, BOS {first.bos})",
        "  " + " " * 20 + "".join(f"{setting!s:>{width}}" for setting in settings),
    ]
    cells = {
        (row.task, setting): f"{100 * row.accuracy:.1f} ± {100 * row.standard_error:.1f}"
        for setting in settings
        for row in results
        if settings_of([row]) == [setting]
    }
    lines += [
        f"  {task:<20}" + "".join(f"{cells[task, setting]:>{width}}" for setting in settings)
        for task in tasks
    ]
    for group in GROUPS.values():
        if not tasks.keys() & {task.name for task in group.tasks}:
            continue
        means = [mean_of(results, setting, group) for setting in settings]
        values = ("none" if math.isnan(mean.value) else f"{100 * mean.value:.1f}" for mean in means)
        lines.append(f"  {'mean of ' + group.name:<20}" + "".join(f"{value:>{width}}" for value in values))
        if means[0].missing:
            lines.append(f"  no mean without {', '.join(means[0].missing)} (asked with the group's shots)")
    return "\n".join([*lines, *(f"Note: {note}" for note in notes)])


def _as_json(results: Sequence[TaskResult], notes: Sequence[str]) -> dict[str, Any]:
    from osp_diag.quantizing.tasks.groups import GROUPS
    from osp_diag.quantizing.tasks.results import mean_of, settings_of

    means = [
        asdict(setting) | {"group": group.name, "mean": _finite(mean.value), "missing": mean.missing}
        for setting in settings_of(results)
        for group in GROUPS.values()
        if (mean := mean_of(results, setting, group))
        and {row.task for row in results} & {task.name for task in group.tasks}
    ]
    rows = [{name: _finite(value) for name, value in asdict(row).items()} for row in results]
    return {"results": rows, "means": means, "notes": notes}


def _finite(value: Any) -> Any:
    """What is not finite is null, which JSON knows."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
