"""Finding and naming the sites of a model nobody here has seen.

The names load on first use: :mod:`osp_diag.sites.names` knows no framework, :func:`find_sites` needs torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from osp_diag.lazy import lazy_names

if TYPE_CHECKING:
    from osp_diag.sites.names import SiteMap, Tap, matches
    from osp_diag.sites.resolve import find_sites

__all__ = ["SiteMap", "Tap", "find_sites", "matches"]

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "SiteMap": "osp_diag.sites.names",
        "Tap": "osp_diag.sites.names",
        "find_sites": "osp_diag.sites.resolve",
        "matches": "osp_diag.sites.names",
    },
)
