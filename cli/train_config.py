"""From the options of ``osp-diag train`` to a configuration."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from osp_diag.errors import UsageError

if TYPE_CHECKING:
    from osp_diag.trainer.config import TrainConfig

__all__ = ["training_config"]


def training_config(
    preset: str | None,
    file: Path | None,
    recipe: str | None,
    changes: Sequence[str],
    *,
    start: Path | None = None,
) -> TrainConfig:
    """The preset or file, or else the configuration of the checkpoint ``start``, under the recipe, changed.

    Raises
    ------
    UsageError : neither or both of preset and file, or a change that cannot be read
    """
    from osp_diag.trainer.config import from_dictionary
    from osp_diag.trainer.config_values import with_changes
    from osp_diag.trainer.presets import PRESETS, with_recipe
    from osp_diag.trainer.presets import preset as preset_by_name
    from osp_diag.trainer.starting import checkpoint_at

    if preset is None and file is None and start is not None:
        config = checkpoint_at(start).config
    elif (preset is None) == (file is None):
        raise UsageError(
            f"say what to train: a preset ({', '.join(PRESETS)}), or --config FILE, and not both"
        )
    else:
        config = preset_by_name(preset) if preset is not None else from_dictionary(_read_object(file))  # type: ignore[arg-type]
    if recipe is not None:
        config = with_recipe(config, recipe)
    return with_changes(config, dict(_change(entry) for entry in changes))


def _change(entry: str) -> tuple[str, str]:
    key, separator, value = entry.partition("=")
    if not separator or not key:
        raise UsageError(
            f"--set {entry!r}: write KEY=VALUE, such as optimizer.lr=1e-3; a preset comes before the options"
        )
    return key.strip(), value.strip()


def _read_object(file: Path) -> dict[str, object]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(f"--config {file} is not JSON: {error}") from error
    if not isinstance(values, dict):
        raise UsageError(
            f'--config {file} has to be an object of dotted keys, such as {{"optimizer.lr": 0.001}}'
        )
    return values
