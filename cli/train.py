"""``osp-diag train``: pre-training with the probes on."""

from __future__ import annotations

import json as json_format
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

import tyro

from osp_diag.errors import UsageError

if TYPE_CHECKING:
    from osp_diag.runs.run import Run
    from osp_diag.trainer.config import TrainConfig

VERB = "train"
HELP = "pre-train a model with the probes on: OSP, Adam, or anything between"

PresetName = Annotated[str | None, tyro.conf.arg(metavar="[PRESET]")]
Changes = tyro.conf.UseAppendAction[tuple[tuple[str, ...], ...]]
Loggers = tyro.conf.UseAppendAction[tuple[str, ...]]


class Start(NamedTuple):
    """From which weights a training begins."""

    checkpoint: Path | None
    segment: bool
    """whether the run of the checkpoint goes on"""


def run(
    name: PresetName = None,
    /,
    *,
    preset: str | None = None,
    config: Path | None = None,
    recipe: str | None = None,
    ablation: Literal["paper"] | None = None,
    seeds: tuple[int, ...] = (),
    at_a_time: int | None = None,
    set: Changes = (),
    out: Path | None = None,
    from_: Annotated[Path | None, tyro.conf.arg(name="from")] = None,
    continue_as: Path | None = None,
    resume: bool = False,
    overwrite: bool = False,
    log: Loggers = (),
    show: bool = False,
    json: bool = False,
) -> int:
    """Pre-train a model, and see at every probed step where outliers and attention sinks emerge.

    PRESET is tiny (a laptop's CPU, two minutes), small (one GPU, minutes), osp_1_4b (the paper's own
    numbers), 3b, 7b, or `module:function` returning a TrainConfig. All of them are full OSP; --recipe gives
    another row of the paper's ablation, --ablation paper all six and the table that compares them.
    Checkpoints are kept beside the run. Under `torchrun --module osp_diag train ...` the ranks share the
    work.

    Args:
        name: the run to begin from.
        preset: the same, as an option.
        config: a JSON file of dotted keys and values, instead of a preset.
        recipe: adam, muon_only, muon, muon_ssnorm, muon_embproj, osp, or another file of
            osp_diag/trainer/recipes.
        ablation: train all six recipes and compare them; --out is then a folder.
        seeds: with --ablation, further seeds of adam and osp.
        at_a_time: with --ablation, how many runs at once; by default what memory (or cores) allow.
        set: KEY=VALUE, such as optimizer.lr=1e-3, one or several; may be repeated. --show prints all keys.
        out: the run to write, a folder ending in .zarr; by default the recipe's name in runs/.
        from_: begin from the weights of a checkpoint (osp.checkpoints/step-00000100, or a run for its newest)
            and what fits of its optimizer state, under its configuration with the changes of --set, or under
            another preset. The new run knows its parent.
        continue_as: with --from: the run that the checkpoint belongs to, which goes on as a new segment.
        resume: go on from the newest checkpoint.
        overwrite: replace an earlier run and its checkpoints.
        log: also send scalars to trackio, wandb or tensorboard; may be repeated.
        show: print the configuration and which parameters go to which optimizer, and stop.
        json: print the result as JSON, with the monitor's findings.

    Examples:
        osp-diag train tiny --out osp.zarr
        osp-diag train tiny --recipe adam --set steps=800 --out adam.zarr
        osp-diag train small --set data.source=jsonl data.path='corpus/*.jsonl' --out run.zarr
        osp-diag train --from osp.zarr --set steps=600 optimizer.lr=1e-3 --out lower.zarr
        osp-diag train --ablation paper --preset tiny --out ablation
    """
    from osp_diag.cli.train_config import training_config

    training = training_config(name or preset, config, recipe, tuple(chain.from_iterable(set)), start=from_)
    if continue_as is not None and (from_ is None or out is not None):
        raise UsageError("--continue-as RUN goes on from a checkpoint of that run: give --from, and no --out")
    if ablation is not None:
        from osp_diag.cli.train_ablation import run_ablation

        if recipe is not None or log or from_ is not None:
            raise UsageError("--ablation trains every recipe: leave --recipe, --log and --from out")
        folder = out or Path("ablation")
        return run_ablation(
            training,
            folder,
            seeds=seeds,
            at_a_time=at_a_time,
            resume=resume,
            overwrite=overwrite,
            as_json=json,
        )
    if seeds or at_a_time is not None:
        raise UsageError("--seeds and --at-a-time belong to --ablation")
    if show:
        return _show(training)
    if from_ is not None and out is None and continue_as is None:
        raise UsageError("--from begins a new run: say where with --out, or go on with --continue-as RUN")
    start = Start(from_, segment=continue_as is not None)
    return _train(
        training, continue_as or out, start, resume=resume, overwrite=overwrite, loggers=log, as_json=json
    )


def _show(config: TrainConfig) -> int:
    import torch

    from osp_diag.trainer.config_values import as_dictionary
    from osp_diag.trainer.model import Llama
    from osp_diag.trainer.optimizers import route

    for key, value in as_dictionary(config).items():
        print(f"{key} = {value}")
    with torch.device("meta"):
        routing = route(Llama(config.model), config)
    print("", routing.table(), *(f"note: {warning}" for warning in routing.warnings), sep="\n")
    return 0


def _train(
    config: TrainConfig,
    out: Path | None,
    start: Start,
    *,
    resume: bool,
    overwrite: bool,
    loggers: tuple[str, ...],
    as_json: bool,
) -> int:
    from osp_diag.cli.train_progress import shown_progress
    from osp_diag.trainer.loop import train

    if out is None:
        out = Path("runs") / f"{config.name}.zarr"
        out.parent.mkdir(exist_ok=True)
    with shown_progress() as (progress, announce):
        run = train(
            config,
            out,
            resume=resume,
            overwrite=overwrite,
            start=start.checkpoint,
            segment=start.segment,
            loggers=loggers,
            progress=progress,
            announce=announce,
        )
    _report(run, out, as_json)
    return 0


def _report(run: Run, out: Path, as_json: bool) -> None:
    from osp_diag.cli.train_progress import numbers_at_end, outcome

    if as_json:
        print(json_format.dumps({"run": str(out), **outcome(run)}))
        return
    print("  ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in numbers_at_end(run).items()))
    print(f"run: {out}")
    print(f"next: osp-diag figure kurtosis_dynamics {out} --out kurtosis.png")
    print(f"      osp-diag export {out} --out model")
