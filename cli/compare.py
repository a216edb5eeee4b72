"""``osp-diag compare``: the channels of two runs, or of two steps of one."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import tyro

from osp_diag.errors import UsageError

VERB = "compare"
HELP = "compare the channels of two runs, or of two steps of one"

Runs = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN_A RUN_B")]


def run(
    runs: Runs,
    /,
    *,
    step: int | None = None,
    other_step: int | None = None,
    stratum: str = "all",
    sites: tuple[str, ...] = (),
    out: Path | None = None,
    json: bool = False,
) -> int:
    """Compare the channels of two runs, or of two steps of one run.

    For every site and layer: how far the sorted profiles of the channels' RMS are apart, the hottest
    channels, and the curves of how much energy the largest channels hold; which hot channels both share by
    index and which only one has; norm gains and weight rows where both runs hold them. Widths, depths and
    scales may differ: channels are taken relative to the median channel of their layer, and counted in
    shares of the width. Runs of different protocols are refused.

    Where both runs keep sums of groups of batches (`osp-diag probe` does, --token-groups), intervals and
    significance come from a bootstrap over these groups, corrected for the number of channels and layers.

    Args:
        runs: two runs, or one and --other-step.
        step: of training; each run's last one by default.
        other_step: of the second run, or the second step of a single one.
        stratum: the tokens: all, first, delimiter, rest, or a kind that the runs have (cls, patch).
        sites: only these sites; by default all that both runs measured by channel.
        out: write maps, differences, curves and distances to this file (.nc, netCDF).
        json: print distances, hot channels and notes as JSON.

    Examples:
        osp-diag compare adam.zarr osp.zarr --stratum rest
        osp-diag compare adam.zarr --step 100 --other-step 300 --sites residual_post --out early-late.nc
    """
    from osp_diag.analyses.channels.comparison import compare_channels
    from osp_diag.runs.run import open_run

    if len(runs) not in (1, 2):
        raise UsageError(f"compare takes two runs, or one and --other-step; it was given {len(runs)}")
    if len(runs) == 1 and other_step is None:
        raise UsageError(f"compare: with one run ({runs[0]}) give --other-step, or give a second run")
    _writable(out)
    opened = [open_run(path) for path in runs]
    comparison = compare_channels(
        opened[0], opened[-1], step=step, other_step=other_step, stratum=stratum, sites=sites or None
    )
    if out is not None:
        _write(comparison.netcdf(), out)
    print(json_format.dumps(comparison.as_dict(), indent=2) if json else comparison.text())
    if out is not None and not json:
        print(f"\ncomparison: {out}")
    return 0


def _writable(out: Path | None) -> None:
    """Refuse a file that cannot be written before anything is computed."""
    if out is None:
        return
    if out.suffix != ".nc":
        raise UsageError(f"--out {out}: a comparison is written as netCDF; let the name end in .nc")
    if not out.parent.is_dir():
        raise UsageError(f"--out {out}: the folder {out.parent} does not exist; make it first")


def _write(content: bytes, out: Path) -> None:
    try:
        out.write_bytes(content)
    except OSError as problem:
        raise UsageError(
            f"cannot write {out}: {problem.strerror or problem}; write elsewhere or make room"
        ) from problem
