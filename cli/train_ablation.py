"""``osp-diag train --ablation``: six recipes trained, exported, compared in a table and a figure."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osp_diag.errors import TrainingError, UsageError

if TYPE_CHECKING:
    import numpy as np

    from osp_diag.trainer.config import TrainConfig

__all__ = ["held_out_tokens", "run_ablation"]

SEEDED_RECIPES = ("adam", "osp")
"""The ends of the scale, of which further seeds show how much is chance."""

PERPLEXITY_TOKENS = 65_536


def run_ablation(
    config: TrainConfig,
    folder: Path,
    *,
    seeds: tuple[int, ...],
    at_a_time: int | None,
    resume: bool,
    overwrite: bool,
    as_json: bool,
) -> int:
    """Train all rows of Table 2 into ``folder``, then write ``table.md``, ``table.nc`` and the figure.

    Each run also gets its perplexities at few bits, so that figures can be drawn of them.

    Raises
    ------
    UsageError : the folder holds something already, without ``resume`` and without ``overwrite``
    """
    from osp_diag import figures
    from osp_diag.analyses.ablation import ablation_table, as_markdown, as_text
    from osp_diag.quantizing.exported import measure_checkpoint
    from osp_diag.quantizing.results import store_results
    from osp_diag.runs.run import open_run
    from osp_diag.trainer.ablation import train_all

    if at_a_time is not None and at_a_time < 1:
        raise UsageError(f"--at-a-time {at_a_time}: give 1 or more")
    if folder.exists() and any(folder.iterdir()) and not (resume or overwrite):
        raise UsageError(f"{folder} is not empty; give --resume to go on, --overwrite, or another --out")
    # Why a process for each recipe, and a table of exported checkpoints: docs/decisions.md, Training.
    configs = _configs(config, seeds)
    tokens = held_out_tokens(config)
    paths = train_all(
        configs,
        folder,
        at_a_time=at_a_time,
        resume=resume,
        announce=lambda line: print(line, file=sys.stderr),
    )
    print("comparing: export, both protocols, perplexity at few bits", file=sys.stderr)
    checkpoints = {}
    for name, model in _export_models(paths, folder / "models").items():
        checkpoints[name] = measure_checkpoint(model, tokens)
        store_results(paths[name], checkpoints[name].few_bits)
    runs = {name: open_run(path) for name, path in paths.items()}
    table = ablation_table(runs, checkpoints, int(tokens.size))
    table.to_netcdf(folder / "table.nc")
    (folder / "table.md").write_text(as_markdown(table) + "\n", encoding="utf-8")
    pictured = [path for name, path in paths.items() if name in configs and "seed" not in name]
    figures.draw("kurtosis_dynamics", pictured, out=folder / "kurtosis_dynamics.png")
    if as_json:
        print(json.dumps(table.to_dict(), default=str))
    else:
        print(as_text(table))
        print(f"table: {folder / 'table.md'}\nfigure: {folder / 'kurtosis_dynamics.png'}")
    return 0


def _configs(config: TrainConfig, seeds: tuple[int, ...]) -> dict[str, TrainConfig]:
    from osp_diag.trainer.config_values import with_changes
    from osp_diag.trainer.presets import ablation

    configs = dict(ablation(config))
    for seed in seeds:
        for name in SEEDED_RECIPES:
            changes = {"seed": seed, "data.seed": seed}
            configs[f"{name}_seed_{seed}"] = with_changes(configs[name], changes)
    return configs


def held_out_tokens(config: TrainConfig, tokens: int = PERPLEXITY_TOKENS) -> np.ndarray[Any, Any]:
    """Held-out sequences for perplexity; asking for them first shows bad data before hours of training."""
    import numpy as np

    from osp_diag.trainer.data import open_data

    data = open_data(config.data, batch_size=config.batch_size, vocabulary_size=config.model.vocabulary_size)
    batches = data.validation_batches(max(1, tokens // config.data.sequence_length))
    return np.concatenate([batch.input_ids.numpy() for batch in batches])


def _export_models(paths: Mapping[str, Path], folder: Path) -> dict[str, Path]:
    """Stock checkpoints of the runs that have an exact stock form."""
    import shutil

    from osp_diag.trainer.exporting import export_run

    models = {}
    for name, path in paths.items():
        out = folder / name
        if out.exists():
            shutil.rmtree(out)
        out.parent.mkdir(parents=True, exist_ok=True)
        try:
            export_run(path, out)
        except TrainingError as error:
            print(f"{name} is not exported: {error}", file=sys.stderr)
            continue
        models[name] = out
    return models
