"""Runs and results of analyses as a notebook shows them."""

from __future__ import annotations

from pathlib import Path

import pytest

from osp_diag.analyses.channels.comparison import compare_channels
from osp_diag.analyses.in_notebook import in_notebook
from osp_diag.analyses.summary.summary import summarise
from osp_diag.analyses.summary.verdict import verdict
from tests.browser import visit
from tests.synthetic_runs import synthetic_run, with_attrs, write_run

CELLS = (
    "import osp_diag\nrun = osp_diag.open_run('run.zarr')\nrun",
    "from osp_diag.analyses.summary.summary import summarise\nsummarise(run)",
    "from osp_diag.analyses.channels.comparison import compare_channels\ncompare_channels(run, run)",
    "from osp_diag.analyses.summary.verdict import verdict\nverdict(run)",
)


def test_results_are_their_text_escaped():
    run = with_attrs(synthetic_run(), model_name="<b>model & co")
    for result, said in (
        (summarise(run), summarise(run).text()),
        (compare_channels(run, run), compare_channels(run, run).text()),
    ):
        shown = result._repr_html_()
        assert shown == in_notebook(said)
        assert "&lt;b&gt;model &amp; co" in shown
        assert "<b>model" not in shown
    assert verdict(run)._repr_html_().count("\n") == len(verdict(run).findings)
    assert in_notebook("one line").endswith("<b>one line</b></pre>")


def executed(folder: Path) -> tuple[list[str], Path]:
    """The HTML of each cell's result, and the page that nbconvert makes of the notebook."""
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import ExecutePreprocessor

    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    ExecutePreprocessor(timeout=300, kernel_name="python3").preprocess(
        notebook, {"metadata": {"path": str(folder)}}
    )
    shown = [cell.outputs[-1]["data"]["text/html"] for cell in notebook.cells]
    body, _ = HTMLExporter(theme="light").from_notebook_node(notebook)
    (folder / "light.html").write_text(body, encoding="utf-8")
    dark, _ = HTMLExporter(theme="dark").from_notebook_node(notebook)
    (folder / "dark.html").write_text(dark, encoding="utf-8")
    return shown, folder


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_notebook_shows_runs_and_results_in_light_and_dark(tmp_path, monkeypatch):
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[1]))
    write_run(tmp_path / "run.zarr")
    shown, folder = executed(tmp_path)
    assert "<b>osp_diag run</b>" in shown[0]
    assert "made-up-60M" in shown[0]
    assert all(html.startswith("<pre") for html in shown[1:])
    assert "Verdict" in shown[1]
    for theme in ("light", "dark"):
        # The page itself asks a network for MathJax and RequireJS, which nothing here needs.
        with visit(folder / f"{theme}.html", dark=theme == "dark", offline=True) as found:
            table = found.page.locator("table", has_text="residual_post").last
            assert table.is_visible()
            header, paper = (
                table.locator(where).first.evaluate("e => getComputedStyle(e).color")
                for where in ("th", "td")
            )
            background = found.page.locator("body").evaluate("e => getComputedStyle(e).backgroundColor")
            for ink in (header, paper):
                assert abs(_lightness(ink) - _lightness(background)) > 0.4
            assert not [problem for problem in found.problems if "ERR_INTERNET" not in problem]


def _lightness(colour: str) -> float:
    """From 0 to 1, of "rgb(…)"."""
    parts = [float(part) for part in colour[colour.index("(") + 1 : -1].split(",")[:3]]
    return sum(parts) / 3 / 255
