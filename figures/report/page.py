"""The template, and what goes into it as it is: style, scripts, the plotting library."""

from __future__ import annotations

import math
from importlib.resources import files
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from osp_diag.analyses.diagnosis.text import OUTCOMES, title_of, what_is_named, what_rose
from osp_diag.figures.report.tables import cell_text

__all__ = ["render_diagnosis", "render_page"]

WORDS = {
    "broken": ("✖", "broken"),
    "raised": ("▲", "raised"),
    "clear": ("✓", "clear"),
    "unknown": ("?", "not measured"),
}
SCRIPTS = (
    "state.js",
    "themes.js",
    "plots.js",
    "explorer.js",
    "heads.js",
    "figures.js",
    "tables.js",
    "main.js",
)


def render_page(**context: Any) -> str:
    """The page of ``page.html.jinja``; everything in ``context`` is escaped unless it is markup already."""
    template = _environment().get_template("page.html.jinja")
    scripts = [_static(name) for name in SCRIPTS]
    return template.render(
        words=WORDS, style=_static("report.css"), plotly=_plotly(), scripts=scripts, **context
    )


def render_diagnosis(**context: Any) -> str:
    """The page of ``diagnosis.html.jinja``."""
    template = _environment().get_template("diagnosis.html.jinja")
    return template.render(style=_static("report.css"), plotly=_plotly(), **context)


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("osp_diag.figures.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["cell"] = cell_text
    environment.filters["in_full"] = _in_full
    words = {"title_of": title_of, "what_is_named": what_is_named, "what_rose": what_rose}
    environment.globals |= words | {"outcomes": OUTCOMES}
    environment.filters["count"] = lambda value: f"{value:,}"
    return environment


def _in_full(value: float) -> str:
    """What a number is sorted by and saved as; empty if it is none."""
    return f"{value:.6g}" if math.isfinite(value) else ""


def _static(name: str) -> Markup:
    """A file of this package, which goes into the page as it is."""
    return Markup((files("osp_diag.figures.report") / "static" / name).read_text(encoding="utf-8"))


def _plotly() -> Markup:
    """The plotting library, as the installed package brings it; why inside: docs/decisions.md, Pages."""
    from plotly.offline import get_plotlyjs

    return Markup(get_plotlyjs())
