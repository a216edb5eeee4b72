"""Pictures of a few figures against baselines: what numbers cannot tell, such as a panel in the wrong place.

Text is left out, because its shape depends on the build of FreeType, and panels stand where no text moves
them; what remains is lines, cells and surfaces in their grid. After a change that is meant to be seen, renew
the baselines and look at them:

    OSP_DIAG_RENEW_BASELINES=1 python -m pytest tests/test_figure_images.py
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from matplotlib.testing.compare import compare_images
from matplotlib.text import Text

from osp_diag.figures._registry import figure_module
from osp_diag.figures.backend import load_backend
from osp_diag.figures.styles import Style, load_style
from tests.gallery import gallery

BASELINES = Path(__file__).parent / "baseline_images"
RENEW = os.environ.get("OSP_DIAG_RENEW_BASELINES", "") not in ("", "0")
TOLERANCE = 9.0
"""Root mean square of the difference of 8-bit values."""

COMPARED = (
    ("kurtosis_dynamics", "two-column"),
    ("kurtosis_dynamics", "one-column"),
    ("sink_map", "two-column"),
    ("weight_surface", "two-column"),
    ("ablation_table", "one-column"),
)


def picture(name: str, width: str, path: Path, dataset: xr.Dataset | None = None, **settings) -> Path:
    """A small picture without text, in which nothing depends on a font."""
    paper = load_style("paper")
    style: Style = replace(paper, matplotlib={**paper.matplotlib, "savefig.dpi": 60, **settings})
    dataset = gallery().load(name) if dataset is None else dataset
    canvas = figure_module(name).draw(dataset, load_backend("matplotlib"), style=style, width=width)
    figure = canvas.finish(dataset)
    figure.set_layout_engine("none")
    for text in figure.findobj(Text):
        text.set_alpha(0)
    canvas.save(path, {"title": "", "caption": ""})
    return path


def difference(expected: Path, drawn: Path) -> float:
    found = compare_images(str(expected), str(drawn), tol=-1, in_decorator=True)
    return 0.0 if found is None else float(found["rms"])


@pytest.mark.parametrize(("name", "width"), COMPARED)
def test_a_figure_looks_as_it_did(name, width, tmp_path):
    baseline = BASELINES / f"{name}-{width}.png"
    if RENEW:
        picture(name, width, baseline)
    drawn = picture(name, width, tmp_path / baseline.name)
    assert difference(baseline, drawn) < TOLERANCE, f"compare {drawn} with {baseline}"


def test_another_build_of_freetype_is_no_difference(tmp_path):
    """Letters without hinting, a little wider and higher."""
    other = {"text.hinting": "no_hinting", "font.size": 8.15, "axes.labelsize": 8.15, "xtick.labelsize": 7.1}
    for name, width in COMPARED:
        drawn = picture(name, width, tmp_path / f"{name}-{width}.png", **other)
        assert difference(BASELINES / drawn.name, drawn) < TOLERANCE


def test_other_data_are_a_difference(tmp_path):
    """What a picture has to show is more than the tolerance."""
    loaded = gallery().load
    table = loaded("ablation_table")
    turned = table.assign(value=(table["value"].dims, table["value"].values[::-1]))
    sinks = loaded("sink_map")
    moved = sinks.assign(sink_rate=sinks["sink_rate"].roll(layer=3))
    for dataset, (name, width) in ((turned, COMPARED[4]), (moved, COMPARED[2])):
        drawn = picture(name, width, tmp_path / f"{name}-{width}.png", dataset)
        assert difference(BASELINES / drawn.name, drawn) > 2 * TOLERANCE


def test_a_style_of_the_users_own_is_a_difference(tmp_path):
    from osp_diag import figures

    paper = load_style("paper")
    own = replace(
        paper, name="own", run_colours=("#000000", "#cc3311"), share_map="grayC", widths={"page": 4.0}
    )
    data = gallery().load("sink_map")
    figure = figures.draw("sink_map", data, style=own, width="page", out=tmp_path / "own.png")
    assert figure.get_figwidth() == 4.0
    colours = figure.axes[0].images[0].get_cmap()(np.linspace(0, 1, 5))[:, :3]
    np.testing.assert_allclose(colours, np.repeat(colours[:, :1], 3, axis=1), atol=0.02)  # greys
    lines = figures.draw("kurtosis_dynamics", gallery().load("kurtosis_dynamics").isel(run=[0, 5]), style=own,
                         width="page")  # fmt: skip
    assert {line.get_color() for line in lines.axes[0].lines[2:]} == {"#000000", "#cc3311"}
