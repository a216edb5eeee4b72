"""The report as a reader uses it, in a headless Chromium without a network."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from osp_diag.figures.report import write_report
from tests.browser import visit
from tests.report_runs import HOSTILE_NAME, hostile_checkpoint, trainings
from tests.synthetic_runs import without

NOTES = ("GL Driver Message", "Canvas2D: Multiple readback")
"""What Chromium says of drawing without a GPU."""


def complaints(visited) -> list[str]:
    return [said for said in visited.problems if not any(note in said for note in NOTES)]


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    # Without surfaces, which take a browser without a GPU seconds.
    run = without(hostile_checkpoint(weights=False), ["snapshot/attention_input", "snapshot/mlp_input"])
    write_report([run, *trainings()], path)
    return path


@pytest.fixture(scope="module")
def visited(report):
    with visit(report, offline=True) as opened:
        opened.page.wait_for_function(ALL_DRAWN)
        yield opened


@pytest.fixture
def page(visited):
    """The page as it is when it opens, but for what was sorted."""
    visited.page.evaluate("State.set({ run: 'all', layer: null, head: null, step: Controls.steps.at(-1) })")
    visited.page.evaluate("document.querySelectorAll('[name=run]')[0].checked = true; scrollTo(0, 0)")
    yield visited.page
    assert complaints(visited) == []


ALL_DRAWN = """() => {
    Figures.everything();
    const figures = [...document.querySelectorAll("figure.drawn, figure.chart")];
    return figures.every((figure) => figure.hidden || figure.querySelector(".main-svg, .none"));
}"""
CHOSEN = """(selector) => document.querySelector(selector).layout.shapes
    .filter((shape) => shape.name === "chosen-layer")
    .map((shape) => [shape.x0, shape.x1, shape.y0, shape.y1])"""


def drawn(name: str) -> str:
    return f'[data-name="{name}"] .plot'


def test_it_loads_offline_and_draws_every_figure(page):
    assert page.title().endswith("outliers and attention sinks")
    assert page.locator(".card:has(> h2)").count() == 3
    loaded = "performance.getEntriesByType('resource').map((one) => one.name)"
    assert [name for name in page.evaluate(loaded) if not name.startswith("data:")] == []
    assert page.locator("figure.drawn:visible").count() >= 5


def test_hostile_names_and_tokens_are_drawn_as_text(page):
    assert page.locator(".card h2").first.text_content() == HOSTILE_NAME
    assert page.locator("img, b[onmouseover]").count() == 0
    titles = page.locator("#profile-plot .annotation-text").all_text_contents()
    assert any("<script>hurt('name')</script>" in title for title in titles)


def test_hovering_a_map_names_layer_channel_and_value(page):
    page.locator("#channels-plot").scroll_into_view_if_needed()
    page.hover("#channels-plot .nsewdrag >> nth=0", position={"x": 60, "y": 60})
    page.wait_for_selector("#channels-plot .hovertext")
    said = page.locator("#channels-plot .hovertext").text_content()
    assert "layer" in said
    assert "channel" in said
    assert "times the median channel" in said


def test_a_layer_chosen_above_is_marked_in_every_figure_that_has_layers(page):
    assert page.evaluate(CHOSEN, "#profile-plot") == []
    page.evaluate("Figures.everything()")  # else only those near the window
    page.select_option("#layer", "2")
    for selector in ("#profile-plot", drawn("depth_profile")):
        assert all(x0 < 2 < x1 for x0, x1, *_ in page.evaluate(CHOSEN, selector))
    for selector in ("#channels-plot", "#sinks-plot", drawn("outlier_timeline")):
        marks = page.evaluate(CHOSEN, selector)
        assert marks
        assert all(y0 < 2 < y1 for *_, y0, y1 in marks)
    # rows of this one are heads: 4 a layer
    assert [mark[2:] for mark in page.evaluate(CHOSEN, drawn("sink_emergence"))] == [[7.5, 11.5]] * 2
    assert page.locator('table[data-name="layers"] tr.chosen').count() > 3


def test_a_head_chosen_in_the_map_opens_how_it_makes_its_sink(page):
    page.locator("#sinks-plot").scroll_into_view_if_needed()
    box = page.locator("#sinks-plot .nsewdrag").first.bounding_box()
    # 6 layers from below, 4 heads: the middle of layer 4, head 1
    page.mouse.move(box["x"] + box["width"] * 1.5 / 4, box["y"] + box["height"] * (1 - 4.5 / 6))
    page.wait_for_selector("#sinks-plot .hovertext")
    page.mouse.down()
    page.mouse.up()
    page.wait_for_function("State.head === 1")
    assert page.input_value("#layer") == "4"
    assert page.input_value("#head") == "1"
    assert page.locator("#head-title").text_content() == "How layer 4, head 1 makes its sink"
    assert "mixed, not measured" in page.locator("#head-facts").text_content()
    assert page.evaluate("document.getElementById('head-plot').data[0].type") == "bar"


def test_the_step_slider_moves_by_keyboard_and_the_charts_follow(page):
    assert page.locator("#step-shown").text_content() == "50"
    page.focus("#step")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.locator("#step-shown").text_content() == "30"
    titles = page.locator("#profile-plot .annotation-text").all_text_contents()
    assert sum("step 30" in title for title in titles) == 2
    growing = page.evaluate("document.getElementById('profile-plot').data.map((line) => line.y[0])")
    assert pytest.approx(1.6) in [value for value in growing if value]


def test_switching_runs_shows_one_in_cards_charts_figures_and_tables(page):
    page.check("[name=run][value='1']")
    assert page.locator(".card:has(> h2):visible").count() == 1
    assert (
        page.evaluate("new Set(document.getElementById('profile-plot').data.map((line) => line.xaxis)).size")
        == 1
    )
    page.locator(drawn("kurtosis_dynamics")).scroll_into_view_if_needed()
    page.wait_for_function(f"document.querySelector('{drawn('kurtosis_dynamics')}').data.length === 3")
    assert page.locator('[data-name="activation_surface"]').is_hidden()  # this run has no snapshot of it
    rows = page.locator('table[data-name="layers"] tbody tr:visible')
    assert set(rows.evaluate_all("(all) => all.map((row) => row.dataset.run)")) == {"1"}
    page.check("[name=run][value='all']")
    assert page.locator(".card:has(> h2):visible").count() == 3


def test_a_table_sorts_by_its_headings_and_downloads(page, tmp_path):
    table = page.locator('table[data-name="layers"]')
    heading = table.locator("th", has_text="largest |x|")
    column = table.locator("th").all_text_contents().index(heading.text_content())
    values = f"(all) => all.map((row) => row.cells[{column}].dataset.value).filter(Boolean).map(Number)"
    heading.locator("button").click()
    assert heading.get_attribute("aria-sort") == "descending"
    falling = table.locator("tbody tr").evaluate_all(values)
    assert falling == sorted(falling, reverse=True)
    heading.locator("button").press("Enter")
    assert heading.get_attribute("aria-sort") == "ascending"
    assert table.locator("tbody tr").evaluate_all(values) == falling[::-1]
    with page.expect_download() as waiting:
        page.locator(".table", has=table).locator("button.csv").click()
    assert waiting.value.suggested_filename == "layers.csv"
    waiting.value.save_as(tmp_path / "layers.csv")
    with open(tmp_path / "layers.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    assert rows[0][:3] == ["run", "site", "layer"]
    assert len(rows) == 1 + table.locator("tbody tr").count()
    assert HOSTILE_NAME in {row[0] for row in rows}


def test_the_keyboard_alone_reaches_everything(page):
    page.reload()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the verdict"
    page.keyboard.press("Enter")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.closest('.card') !== null")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    page.focus(".card details summary")
    page.keyboard.press("Enter")
    assert page.locator(".card details").first.get_attribute("open") is not None
    page.focus("#definition")
    page.keyboard.press("Enter")
    assert page.locator(".definition[open] summary").text_content().startswith("osp_excess_kurtosis/1")
    controls = "select, input, button, summary, .table .scroll, figure .scroll"
    beyond = "(all) => all.filter((one) => one.offsetParent && one.tabIndex < 0).length"
    assert page.locator(controls).evaluate_all(beyond) == 0


def test_dark_follows_the_system_and_the_switch_and_paper_stays_light(page):
    ground = "getComputedStyle(document.body).backgroundColor"
    ink = "document.getElementById('profile-plot').layout.font.color"
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"{ground} === 'rgb(20, 24, 29)'")
    assert page.evaluate(ink) == "#e6e9ed"
    assert page.get_attribute("#theme", "aria-pressed") == "true"
    page.emulate_media(color_scheme="dark", media="print")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    page.wait_for_function(f"{ink} === '#000000'")
    assert page.locator("nav.controls").is_hidden()
    page.emulate_media(color_scheme="dark", media="screen")
    page.click("#theme")
    assert page.evaluate(ground) == "rgb(255, 255, 255)"
    page.emulate_media(color_scheme="light")


def test_a_telephone_need_not_scroll_sideways(page):
    page.set_viewport_size({"width": 400, "height": 800})
    page.wait_for_function("document.getElementById('profile-plot').layout.width < 400")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    page.set_viewport_size({"width": 1280, "height": 900})
