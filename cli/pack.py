"""``osp-diag pack``: a run as one file, and back."""

from __future__ import annotations

import json as json_format
from pathlib import Path
from typing import Annotated

import tyro

from osp_diag.errors import UsageError

VERB = "pack"
HELP = "make one file of a run, or a folder of such a file"

RunPath = Annotated[Path, tyro.conf.arg(metavar="RUN")]


def run(
    packed_run: RunPath,
    /,
    *,
    out: Path | None = None,
    unpack: bool = False,
    overwrite: bool = False,
    json: bool = False,
) -> int:
    """Make one file of a run, which is thousands of small ones: to send it, or to keep it.

    `report`, `figure`, `compare`, `osp_diag.open_run` and whatever else reads runs take the file as they
    take the folder. A training or `quantize` writes to a run, for which it has to be unpacked again: --unpack
    gives the folder back, every file to the byte. What is packed, or unpacked, stays as it is.

    Args:
        packed_run: the run, a folder ending in .zarr; with --unpack the file.
        out: what to write; by default RUN.zip, and with --unpack the name without .zip.
        unpack: make the folder of a packed run.
        overwrite: replace the file that is there.
        json: print the result as JSON.

    Examples:
        osp-diag pack run.zarr
        osp-diag report run.zarr.zip --out report.html
        osp-diag pack run.zarr.zip --unpack --out run.zarr
    """
    from osp_diag.runs import packed

    if unpack and overwrite:
        raise UsageError("pack: --unpack makes a new folder and replaces none; give another --out")
    written = packed.unpack(packed_run, out) if unpack else packed.pack(packed_run, out, overwrite=overwrite)
    files = [file for file in written.rglob("*") if file.is_file()] if unpack else [written]
    size = sum(file.stat().st_size for file in files)
    if json:
        print(json_format.dumps({"out": str(written), "files": len(files), "bytes": size}))
    else:
        print(f"run: {written} ({len(files):,} file{'s' if len(files) != 1 else ''}, {size / 1e6:.1f} MB)")
    return 0
