"""A page beside training runs: kurtosis and sinks by layer and step, loss and speed, and what to mind.

``osp-diag watch RUN --serve`` opens it. It reads runs through :class:`osp_diag.runs.following.FollowedRun`
and never writes; Dash, an optional extra, is imported only when a page is made.
"""

from __future__ import annotations

from osp_diag.figures.live._server import serve_page

__all__ = ["serve_page"]
