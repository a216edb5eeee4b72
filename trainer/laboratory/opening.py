"""Which laboratory a run has: ours, or that of another loop's checkpoints."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path

from osp_diag.errors import UsageError
from osp_diag.probing.series import CHECKPOINTS
from osp_diag.probing.settings import OpeningSettings, TokenSettings
from osp_diag.runs.run import Run
from osp_diag.schema import CHECKPOINT_FOLDER
from osp_diag.trainer.laboratory.foreign import ForeignLaboratory
from osp_diag.trainer.laboratory.laboratory import TrainingLaboratory, is_own

__all__ = ["laboratory"]


def laboratory(
    run: Run,
    progress: Callable[[str, int, int], None] | None = None,
    *,
    checkpoints: str | os.PathLike[str] | None = None,
    tokens: TokenSettings | None = None,
    opening: OpeningSettings | None = None,
) -> TrainingLaboratory | ForeignLaboratory | None:
    """What reads the checkpoints of a run; None where none are known.

    Parameters
    ----------
    progress : told (what, done, in all) while something takes long
    checkpoints : the directory of another loop's checkpoints; None: those beside a run of our trainer, those
        that a run of several checkpoints names, or where a callback says that they lie
    tokens, opening : of another loop's run: what its models are run on (None: the run's own tokens), and how
        they are opened

    Raises
    ------
    UsageError : the directory holds no checkpoints, or the run is of our trainer, whose lie beside it
    """
    if is_own(run):
        if checkpoints is not None or tokens is not None or opening is not None:
            raise UsageError(
                f"{run.path} is a run of osp-diag train, whose checkpoints lie beside it and whose "
                "configuration says tokens and device; leave --checkpoints, tokens and how to open out"
            )
        return TrainingLaboratory(run, progress)
    names_them = isinstance(run.attrs.get(CHECKPOINTS), Mapping) or CHECKPOINT_FOLDER in run.attrs
    if checkpoints is None and not names_them:
        return None
    directory = None if checkpoints is None else Path(checkpoints).expanduser()
    return ForeignLaboratory(run, directory, tokens=tokens, opening=opening, progress=progress)
