"""Figures as files: every format, captions, odd input, and what is said when something cannot be drawn."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from osp_diag import figures
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures._registry import default_width, figure_module, in_report
from osp_diag.figures.backend import load_backend, none
from osp_diag.figures.styles import load_style
from tests.synthetic_diagnoses import diagnosis_options
from tests.synthetic_runs import OUTLIER_FREE, Plan, synthetic_run, with_attrs, without, write_run

FIGURES = tuple(figures.names())
OF_TWO = tuple(name for name in FIGURES if in_report(name).pairs)
"""Figures that take two runs, or two steps of one."""


@pytest.fixture(scope="module")
def run():
    return synthetic_run(every_estimator=True)


@pytest.fixture(scope="module")
def clean():
    return synthetic_run(OUTLIER_FREE, every_estimator=True)


@pytest.fixture(scope="module")
def smallest():
    return synthetic_run(layers=1, emergence_layer=0, sink_head=(0, 0), heads=1, key_value_heads=1,
                         channels=8, massive_channels=(1, 2), tokens=2, sequences=1,
                         every_estimator=True)  # fmt: skip


def data(name: str, runs, **options) -> xr.Dataset:
    return figures.draw(name, runs, backend="none", **diagnosis_options(name, runs) | options)


# -- every figure, every format --------------------------------------------------------------------------


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_draws_with_matplotlib(name, run, clean, tmp_path):
    """Drawn once and saved in every format, since most of the time is the layout."""
    prepared, style, width = data(name, [run, clean]), load_style("paper"), default_width(name)
    canvas = figure_module(name).draw(prepared, load_backend("matplotlib"), style=style, width=width)
    canvas.caption(prepared.attrs["caption"])
    metadata = {key: prepared.attrs[key] for key in ("title", "caption")}
    canvas.save(tmp_path / "figure.png", metadata)
    content = (tmp_path / "figure.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert b"Description" in content
    assert canvas.finish(prepared).get_figwidth() == pytest.approx(style.widths[width])
    canvas.figure.set_layout_engine("none")  # it has been found
    canvas.save(tmp_path / "figure.pdf", metadata)
    content = (tmp_path / "figure.pdf").read_bytes()
    assert b"/Subject" in content
    assert b"/Type3" not in content  # fonttype 42
    canvas.save(tmp_path / "figure.svg", metadata)
    content = (tmp_path / "figure.svg").read_bytes()
    assert b"<dc:description>" in content
    assert b"made-up-60M" in content


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_suffix_says_the_format(suffix, run, tmp_path):
    figures.draw("sink_map", run, out=tmp_path / f"figure.{suffix}")
    begins = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}[suffix]
    assert (tmp_path / f"figure.{suffix}").read_bytes().startswith(begins)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_is_a_page_that_needs_no_network(name, run, clean, tmp_path):
    out = tmp_path / "figure.html"
    figures.draw(name, [run, clean], out=out, **diagnosis_options(name, [run, clean]))
    page = out.read_text(encoding="utf-8")
    assert not re.search(r"<script[^>]+src=", page)
    assert not re.search(r"<link[^>]+href=", page)
    assert not re.search(r"@import|MathJax\.js", page)
    assert re.search(r'<meta name="description" content="[^"]*made-up-60M', page)


@pytest.mark.parametrize("name", FIGURES)
def test_every_figure_states_what_determines_its_numbers(name, run, clean):
    said = data(name, [run, clean]).attrs["caption"]
    for fact in (
        "made-up-60M",
        "made-up-osp-60M",
        "sequence protocol",
        "BOS no",
        "72 tokens",
        "step 0",
        "float32",
    ):
        assert fact in said, fact
    assert said.count("sequence protocol") == 1


def test_captions_keep_apart_what_differs():
    said = data("depth_profile", [synthetic_run(), synthetic_run(protocol="osp-published")])
    assert list(said["run"].values) == ["made-up-60M, sequence", "made-up-60M, osp-published"]
    assert "made-up-60M; sequence protocol, BOS no; 72 tokens in sequences of 24" in said.attrs["caption"]
    assert "made-up-60M; osp-published protocol, BOS no; 72 tokens in sequences of 1" in said.attrs["caption"]
    steps = data("depth_profile", [synthetic_run(steps=(0,)), synthetic_run(steps=(0, 9))])
    assert list(steps["run"].values) == ["made-up-60M, step 0", "made-up-60M, step 9"]
    twins = data("sink_map", [synthetic_run(), synthetic_run()])
    assert list(twins["run"].values) == ["made-up-60M, run 1", "made-up-60M, run 2"]


def test_odd_token_texts_and_names_are_drawn_as_they_are(tmp_path):
    odd = with_attrs(synthetic_run(tokens=12), model_name="<b>a$b$ \u9ce5")
    figures.draw("fig2", odd, out=tmp_path / "odd.png")
    figures.draw("fig2", odd, out=tmp_path / "odd.html")
    page = figures.draw("fig2", odd, backend="plotly").to_plotly_json()["layout"]
    assert page["scene"]["yaxis"]["ticktext"][0] == "\u2039s\u203a"
    title = figures.draw("sink_map", odd, backend="plotly").layout.annotations[0].text
    assert title.startswith("<b>&lt;b&gt;a$b$")


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.parametrize("backend", ["matplotlib", "plotly"])
def test_the_smallest_run_can_be_drawn(name, backend, smallest):
    runs = [smallest, smallest] if name in OF_TWO else smallest
    canvas = figures.draw(name, runs, backend=backend, **diagnosis_options(name, runs))
    canvas.to_json() if backend == "plotly" else canvas.canvas.draw()


@pytest.mark.parametrize("backend", ["matplotlib", "plotly"])
def test_the_primitives_that_no_figure_uses_yet(backend):
    canvas = load_backend(backend).canvas(1, 1, width=3.35, height=2, style=load_style("paper"))
    panel = canvas.panel(0, 0, x_scale="log", y_scale="log")
    x = np.array([1.0, 2.0, 4.0])
    panel.line(x, x, label="line", colour="#112233", lower=x / 2, upper=x * 2)
    panel.scatter(x, x, label="points", colour="#332211")
    panel.annotate(2.0, 2.0, "here")
    panel.ticks("x", [1.0, 4.0], ["one", "a long one"])
    panel.limits("y", 0.5, 8.0)
    canvas.legend(panel)
    figure = canvas.finish(xr.Dataset())
    figure.to_json() if backend == "plotly" else figure.canvas.draw()


def test_a_style_can_be_swapped_and_leaves_no_trace(run):
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    style = dataclasses.replace(load_style("paper"), widths={"poster": 20.0})
    figure = figures.draw("sink_map", run, style=style, width="poster")
    assert figure.get_figwidth() == 20.0
    assert dict(mpl.rcParams) == before
    assert load_style("paper").matplotlib["pdf.fonttype"] == 42


def test_from_a_run_on_disk(tmp_path):
    path = write_run(tmp_path / "run.zarr", Plan(steps=(0, 10), every_estimator=True))
    on_disk, in_memory = data("depth_profile", path), data("depth_profile", synthetic_run(steps=(0, 10)))
    np.testing.assert_allclose(on_disk["kurtosis"], in_memory["kurtosis"], rtol=1e-6)
    for name in FIGURES:
        data(name, [str(path)])


# -- bad input -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("depth_profil", {}, r"no figure is named 'depth_profil'; did you mean depth_profile"),
        ("xyz", {}, r"no figure is named 'xyz'; there are ablation_table, activation_surface"),
        ("sink_map", {"out": "map.jpg"}, r"'map.jpg': its suffix has to be .png, .pdf or .svg .* or .html"),
        (
            "sink_map",
            {"out": "map.html", "backend": "matplotlib"},
            r"written by the plotly backend, not by matplotlib",
        ),
        ("sink_map", {"out": "nowhere/map.png"}, r"the folder nowhere does not exist; make it first"),
        (
            "sink_map",
            {"backend": "bokeh"},
            r"no figure backend is named 'bokeh'; there are matplotlib, plotly, none",
        ),
        ("sink_map", {"style": "papr"}, r"no figure style is named 'papr'; did you mean paper"),
        ("sink_map", {"width": "wide"}, r"has no width 'wide'; it has one-column, two-column"),
        ("sink_map", {"epsilom": 0.3}, r"sink_map has no option 'epsilom'; did you mean epsilon"),
        ("sink_map", {"epsilon": "high"}, r"takes for epsilon a number, not 'high'"),
        ("fig2", {"layer": 2.5}, r"takes for layer a whole number or several or none, not 2.5"),
        ("fig2", {"layer": 40}, r"the snapshot of made-up-60M has no layer 40; it has 0, 1, 2, 3, 4, 5"),
        ("fig2", {"z_scale": "log"}, r"z_scale is own or shared, not 'log'"),
        ("fig2", {"channels": 1}, r"at least 2 channels and 2 tokens"),
        (
            "fig2",
            {"sites": "query_post_rope"},
            r"'query_post_rope' has the dimensions .*give a site with channels",
        ),
        ("fig2", {"sites": "residual_pre"}, r"holds no snapshot of 'residual_pre'"),
        ("fig5", {"head": 9}, r"has no head 9; it has 0, 1, 2, 3"),
        ("fig5", {"rope": "mid"}, r"rope is post or pre, not 'mid'"),
        ("fig5", {"colours": "cubic"}, r"colours is one of linear, log, symlog, not 'cubic'"),
        ("channel_map", {"statistic": "osp_excess_kurtosis"}, r"osp_excess_kurtosis has no channels"),
        ("channel_map", {"stratum": "last"}, r"no stratum is named 'last'"),
        ("channel_map", {"pixels": 0}, r"pixels must be at least 1"),
        ("depth_profile", {"step": 7}, r"the run of made-up-60M has no step 7; the nearest are 0"),
        ("depth_profile", {"arrange": "stacked"}, r"arrange is side-by-side or overlaid, not 'stacked'"),
        ("depth_profile", {"estimator": "median_magnitude"}, r"median_magnitude has no strata"),
    ],
)
def test_bad_requests_are_refused_with_what_to_do(name, options, message, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UsageError if "snapshot of 'residual_pre'" not in message else StoreError, match=message
    ):
        figures.draw(name, run, **options)
    assert not list(tmp_path.iterdir())


def test_runs_that_lack_what_a_figure_draws(run):
    with pytest.raises(
        StoreError, match=r"sink_map needs the site 'attention'.*\(absent: the blocks have no attention\)"
    ):
        data("sink_map", synthetic_run(attention=False))
    with pytest.raises(
        StoreError, match=r"draws raw activations, and the run of made-up-60M holds no snapshot of"
    ):
        data("fig2", synthetic_run(snapshots=False))
    with pytest.raises(
        StoreError, match=r"needs top_magnitude at 'residual_post'.*probe again with the estimator"
    ):
        data("depth_profile", without(run, ["residual_post/top_magnitude"]))
    with pytest.raises(StoreError, match=r"has one token only .*protocol `sequence`"):
        data("fig2", synthetic_run(tokens=1))
    with pytest.raises(StoreError, match=r"nowhere\.zarr"):
        data("sink_map", "nowhere.zarr")
    with pytest.raises(UsageError, match=r"needs at least one run"):
        data("sink_map", [])
    with pytest.raises(UsageError, match=r"drawn from runs .*, not from int"):
        data("sink_map", 3)
    with pytest.raises(UsageError, match=r"holds no data|returns data and writes no file"):
        none.canvas(1, 1).save(Path("x.png"), {})


def test_a_file_that_cannot_be_written(run, tmp_path):
    (tmp_path / "taken.png").mkdir()
    with pytest.raises(UsageError, match=r"cannot write .*taken\.png: Is a directory"):
        figures.draw("sink_map", run, out=tmp_path / "taken.png")


# -- the verb --------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_verb_draws_and_says_where(tmp_path, capsys):
    from osp_diag.cli.main import main

    path = write_run(tmp_path / "run.zarr")
    out = tmp_path / "surface.svg"
    words = [
        "figure",
        "fig2",
        str(path),
        "--out",
        str(out),
        "--option",
        "layer=4",
        "--option",
        "z_scale=shared",
    ]
    assert main(words) == 0
    assert capsys.readouterr().out == f"figure: {out}\n"
    assert "layer 4, first sequence" in out.read_text()
    assert main(["figure", "sink_map", str(path), str(path), "--out", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {
        "figure": "sink_map",
        "out": str(out),
        "runs": [str(path)] * 2,
    }
    assert main(["figure", "sink_map", str(path), "--out", str(out), "--option", "layer"]) == 2
    assert "--option 'layer': write KEY=VALUE, for example layer=20" in capsys.readouterr().err
    assert main(["figure", "sink_maps", str(path)]) == 2
    assert "did you mean sink_map?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("20", 20),
        ("0.3", 0.3),
        ("none", None),
        ("True", True),
        ("own", "own"),
        ("a,b", ("a", "b")),
        ("(1, 2)", (1, 2)),
    ],
)
def test_options_are_read_as_what_they_look_like(text, value):
    from osp_diag.cli.figure import _parsed

    assert _parsed(f"key={text}") == ("key", value)


@pytest.mark.slow
def test_drawing_from_disk_loads_no_model_library(tmp_path):
    path = write_run(tmp_path / "run.zarr")
    code = (
        "import sys; from osp_diag import figures\n"
        f"figures.draw('sink_map', {str(path)!r}, out={str(tmp_path / 'a.png')!r})\n"
        "assert 'plotly' not in sys.modules\n"
        f"figures.draw('sink_map', {str(path)!r}, out={str(tmp_path / 'a.html')!r})\n"
        "assert not {'torch', 'jax', 'transformers', 'matplotlib.pyplot'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True,
                          cwd=Path(__file__).parents[1])  # fmt: skip
    assert done.returncode == 0, done.stderr
