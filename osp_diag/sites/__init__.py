"""Finding and naming the sites of a model nobody here has seen."""

from osp_diag.sites.names import ATTENTION, DEFAULT_SITES, HEAD_SITES, SITES, SiteMap, Tap, matches
from osp_diag.sites.resolve import find_sites

__all__ = ["ATTENTION", "DEFAULT_SITES", "HEAD_SITES", "SITES", "SiteMap", "Tap", "find_sites", "matches"]
