"""One self-contained page on a run or several: the verdict first, then what it rests on.

>>> from osp_diag.figures.report import write_report
>>> write_report(["adam.zarr", "osp.zarr"], "report.html")           # doctest: +SKIP

The figures on it are those of the registry; each says in its own file how it stands there.
"""

from __future__ import annotations

from osp_diag.figures.report.build import Report, build_report, check_out, write_report

__all__ = ["Report", "build_report", "check_out", "write_report"]
