"""``osp-diag diagnose``: when outliers rose, where, why, and what to do."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import tyro

from osp_diag.cli.checkpoint_options import DEFAULT_OPENING, DEFAULT_TOKENS, Opening, Tokens, check_tokens
from osp_diag.errors import UsageError

VERB = "diagnose"
HELP = "say when outliers or the loss rose, where, why, and what to do"

RunPath = Annotated[Path, tyro.conf.arg(metavar="RUN")]


def run(
    path: RunPath,
    /,
    *,
    against: Path | None = None,
    checkpoints: Path | None = None,
    replay: int | None = None,
    verify: int = 0,
    out: Path | None = None,
    json: bool = False,
    token_settings: Tokens = DEFAULT_TOKENS,
    opening: Opening = DEFAULT_OPENING,
) -> int:
    """Find out what went wrong in a training, from its run and the checkpoints beside it.

    Asked in this order: when; whether configuration, optimizers, function, batches, precision or weights
    changed; a replay from the last good checkpoint; where, and who wrote it; and with --replay, if nothing is
    proved by then, short trainings with a part of the recipe put back, each beside a control. Every finding
    is proved, measured, or consistent with what is recorded. The run is only read.

    Of a run of another loop (osp_diag.Probe, a callback, several checkpoints probed) the checkpoints are read
    that it names or that lie in --checkpoints: checkpoint-500 and so on, or files step-500.ckpt. What needs
    its data or its code (batches, replays, remedies) is named as missing.

    Args:
        path: the run of a training.
        against: a good run; what it has otherwise counts as right.
        checkpoints: the directory with the checkpoints of another loop; by default where its run says.
        replay: steps that may be trained again for it; by default a replay that takes seconds, 0 for none.
        verify: try every remedy for so many steps from before the onset.
        out: write a page with this diagnosis and its figures (.html, one file that needs no network), or the
            diagnosis as it is (.json), for `osp-diag report --diagnosis`.
        json: print the diagnosis as JSON.
        token_settings: of another loop's run, which tokens its models are run on, where an edit is undone or
            the function is asked about; by default the run's own, if they are of the built-in text.
        opening: how its checkpoints are opened.

    Examples:
        osp-diag diagnose osp.zarr
        osp-diag diagnose osp.zarr --against healthy.zarr
        osp-diag diagnose probe.zarr --checkpoints output_dir
        osp-diag diagnose osp.zarr --replay 30 --verify 30 --out diagnosis.html
        osp-diag diagnose osp.zarr --replay 30 --verify 30 --out diagnosis.json
    """
    from osp_diag.analyses import diagnose
    from osp_diag.cli.train_progress import shown_steps
    from osp_diag.runs.run import open_run
    from osp_diag.trainer.laboratory import laboratory

    if out is not None:
        _check_out(out)
    check_tokens(token_settings)
    opened = open_run(path)
    good = None if against is None else open_run(against)
    with shown_steps() as progress:
        diagnosis = diagnose(
            opened,
            laboratory(
                opened,
                progress,
                checkpoints=checkpoints,
                tokens=None if token_settings == DEFAULT_TOKENS else token_settings,
                opening=None if opening == DEFAULT_OPENING else opening,
            ),
            against=good,
            its_laboratory=None if good is None else laboratory(good),
            replay=replay,
            verify=verify,
        )
    if out is not None and out.suffix == ".json":
        from osp_diag.analyses.diagnosis.saved import save_diagnosis

        save_diagnosis(diagnosis, out)
    elif out is not None:
        from osp_diag.figures.report.diagnosis_page import write_diagnosis

        write_diagnosis(opened, diagnosis, out)
    print(json_format.dumps(diagnosis.as_dict()) if json else str(diagnosis))
    return 0


def _check_out(out: Path) -> None:
    """Refuse, before any work, a file that cannot be written."""
    from osp_diag.figures.report import check_out

    if out.suffix != ".json":
        check_out(out)
    elif out.is_dir() or not out.parent.is_dir():
        lack = f"{out} is a folder" if out.is_dir() else f"the folder {out.parent} does not exist"
        raise UsageError(f"diagnose: --out {out}: {lack}; give a file in a folder that is there")
