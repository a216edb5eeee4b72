"""How a figure stands in the report and in the gallery. Its module says so in ``REPORT`` and ``GALLERY``.

Both may be left out: such a figure comes last in the report, under its own title, and the gallery draws it
of made-up runs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

__all__ = ["ADAM_AND_OSP", "ADAM_MIDWAY", "SIX_RECIPES", "SMOLLM2", "SMOLLM2_LENS", "InGallery", "InReport"]

SIX_RECIPES = ("adam", "muon_only", "muon", "muon_ssnorm", "muon_embproj", "osp")
ADAM_AND_OSP = ("adam", "osp")
SMOLLM2 = ("smollm2",)
ADAM_MIDWAY = ("adam_midway",)
SMOLLM2_LENS = ("smollm2_lens",)
"""The gallery's runs; docs/gallery.md has the commands that make them."""


@dataclass(frozen=True)
class InReport:
    """A figure on the page that ``osp-diag report`` makes."""

    heading: str = ""
    """the question that it answers; the figure's own title if empty"""
    place: float = math.inf
    """its order on the page; equal places in the order of names"""
    fewest_steps: int = 1
    """the fewest probed steps that make sense of it"""
    most_steps: int | None = None
    """Longer runs are thinned evenly to so many steps, where the figure takes its time for each."""
    pairs: bool = False
    """drawn of two runs, and so of every pair"""
    raw_activations: bool = False
    """drawn of raw activations, which a run holds once, of its first probed step"""
    diagnosis: bool = False
    """drawn of a diagnosis, among whose words it stands; ``prepare`` takes ``diagnoses``"""
    linked_charts: bool = False
    """not drawn, since the page's linked charts show it already"""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """as ``prepare`` takes them"""


@dataclass(frozen=True)
class InGallery:
    """A figure in docs/gallery.md."""

    runs: tuple[str, ...] = ()
    """of the gallery's runs; made-up ones if empty"""
    see: str = ""
    """what to see in it"""
    place: float = math.inf
    """its order on the page: the OSP paper's figures by number, then ours; equal places by name"""
    options: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))
    """as ``prepare`` takes them"""
    width: str | None = None
    """the figure's own if None"""
