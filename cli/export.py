"""``osp-diag export``: a trained run as a stock Hugging Face checkpoint."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated, Literal

import tyro

VERB = "export"
HELP = "make a stock Hugging Face checkpoint of a training run"

RunPath = Annotated[Path, tyro.conf.arg(metavar="RUN")]


def run(
    training_run: RunPath,
    /,
    *,
    out: Path | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
    skip_check: bool = False,
    json: bool = False,
) -> int:
    """Export the newest checkpoint of a training run for everyone else's tools.

    Embedding projections are multiplied into embedding and head, and scalar norm gains spread over the
    channels, in float64, so that the directory is an ordinary Llama that loads in plain `transformers`. Its
    logits are compared with the training model's before anything appears at --out. What has no exact
    ordinary form (a softmax with a sink, a gate) is refused with the reason.

    Args:
        training_run: the run, a folder ending in .zarr; its checkpoints are beside it.
        out: the directory to make; by default the run's name with -model in the current folder.
        dtype: of the exported weights.
        skip_check: do not compare logits.
        json: print the report as JSON.

    Examples:
        osp-diag export osp.zarr --out osp-model
        osp-diag probe osp-model --out osp-probed.zarr
    """
    from osp_diag.trainer.exporting import export_run

    report = export_run(
        training_run, out or Path(f"{training_run.stem}-model"), dtype=dtype, check=not skip_check
    )
    print(json_format.dumps(report.as_dictionary()) if json else report)
    return 0
