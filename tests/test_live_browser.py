"""The live page in a browser, beside a training that begins, dies and goes on."""

import json
import os
import signal
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from osp_diag.runs.writer import RunWriter
from osp_diag.trainer.config_values import as_dictionary
from tests.browser import visit
from tests.growing_runs import ATTRIBUTES, groups, grown_run, record
from tests.training_runs import minute
from tests.warm_processes import Warm, command, read_when

pytest.importorskip("dash")

PATIENCE = 30_000
"""milliseconds that anything may take on a busy machine"""


@contextmanager
def served(*runs):
    """The address at which ``osp-diag watch --serve`` shows these runs."""
    words = ["watch", *map(str, runs), "--serve", "--port", "0", "--every", "0.3"]
    with TemporaryDirectory() as folder:
        shown = Path(folder, "shown")
        process = Warm(command, (words,), stdout=shown)
        try:
            said = read_when(shown, lambda text: "\n" in text, process)
            assert said.startswith("watch: http://127.0.0.1:"), said
            yield said.split()[1]
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(30)


def drawn(page, name):
    """The data of a picture, as the browser has it."""
    return page.evaluate(
        "name => document.querySelector(`#${name} .js-plotly-plot`).data.map("
        "trace => ({x: Array.from(trace.x), y: Array.from(trace.y), name: trace.name}))",
        name,
    )


def wait_for(page, condition, argument=None):
    page.wait_for_function(condition, arg=argument, timeout=PATIENCE)


LAST_STEP = """step => {
  const plot = document.querySelector('#loss .js-plotly-plot');
  return plot && plot.data && plot.data.length && Math.max(...plot.data[0].x) >= step;
}"""


@pytest.mark.slow
def test_a_reader_chooses_layers_sites_and_runs(tmp_path):
    one = grown_run(tmp_path / "one.zarr", model_name="one")
    two = tmp_path / "two.zarr"
    with RunWriter(two, ATTRIBUTES | {"model_name": "<i>two</i>"}) as writer:
        record(writer, [0, 10], layers=5)
        writer.append(20, groups([3.0] * 5, bad_layer=1))
    with served(one, two) as address, visit(address) as seen:
        page = seen.page
        asked = []
        page.on("request", lambda request: asked.append(request.url))
        page.wait_for_selector("#kurtosis-maps .heatmaplayer image", timeout=PATIENCE)
        assert page.title() == "osp-diag, live"
        assert [line["name"] for line in drawn(page, "kurtosis-curves")] == ["one", "&lt;i&gt;two&lt;/i&gt;"]
        assert page.locator("#cards h3").all_inner_texts() == ["one", "<i>two</i>"]
        assert "NaN or Inf in 3 tokens at step" in page.locator("#alerts li.bad").inner_text()

        page.locator("#kurtosis-maps .nsewdrag").first.hover()
        page.wait_for_selector("#kurtosis-maps .hoverlayer .hovertext", timeout=PATIENCE)
        assert "layer" in page.locator("#kurtosis-maps .hoverlayer").text_content()
        buttons = page.locator("#kurtosis-maps .modebar-btn")
        titles = [button.get_attribute("data-title") for button in buttons.all()]
        assert titles == ["Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes"]

        choose(page, "figure", "How loss and kurtosis went in training")
        wait_for(page, "() => document.querySelector('#figure-plot .js-plotly-plot')?.data?.length > 4")
        assert {"one", "&lt;i&gt;two&lt;/i&gt;"} < {line["name"] for line in drawn(page, "figure-plot")}
        assert page.locator("#figure-caption").inner_text().startswith("Training loss and OSP kurtosis of")
        choose(page, "figure", "What quantization costs")
        page.get_by_text("holds no results at few bits").first.wait_for(timeout=PATIENCE)
        wait_for(page, "() => document.querySelector('#figure-box').hidden")

        highest = max(drawn(page, "kurtosis-curves")[0]["y"])
        choose(page, "layer", "0")
        wait_for(page, f"() => {Y_MAX} < {0.5 * highest}")
        choose(page, "site", "embedding")
        wait_for(page, f"() => {Y_MAX} < {0.3 * highest}")
        page.get_by_label("first token").check()
        wait_for(page, f"() => {Y_MAX} > {0.3 * highest}")

        page.locator("#statistic").focus()
        page.keyboard.press("Enter")
        wait_for(page, "() => document.activeElement.value !== undefined")
        for _ in range(9):
            if page.evaluate("document.activeElement.value") == "max_median_ratio":
                break
            page.keyboard.press("ArrowDown")
            page.wait_for_timeout(100)
        page.keyboard.press("Space")
        wait_for(page, f"() => {CURVES}.layout.yaxis.title.text.startsWith('max_median_ratio')")
        page.get_by_label("one", exact=True).focus()
        page.keyboard.press("Space")  # runs are chosen with the keyboard as well
        wait_for(page, f"() => {CURVES}.data.length === 1")
        assert drawn(page, "loss")[0]["name"] == "&lt;i&gt;two&lt;/i&gt;"
        assert {url.split("/")[2] for url in asked} == {address.split("/")[2]}, "nothing leaves loopback"
        assert seen.problems == []


CURVES = "document.querySelector('#kurtosis-curves .js-plotly-plot')"
Y_MAX = f"Math.max(...{CURVES}.data[0].y)"


def choose(page, name, option):
    page.locator(f"#{name}").click()
    page.get_by_role("option", name=option, exact=True).click()


@pytest.mark.slow
def test_the_page_fits_and_follows_the_colours_of_the_system(tmp_path):
    run = grown_run(tmp_path / "run.zarr", model_name="a-model-with-a-long-name/" + "and-no-spaces-" * 8)
    colours, inks = {}, {}
    with served(run) as address:
        for width, dark in ((1280, False), (400, True)):
            with visit(address, width=width, dark=dark) as seen:
                seen.page.wait_for_selector("#loss .scatterlayer .trace", timeout=PATIENCE)
                choose(seen.page, "figure", "How loss and kurtosis went in training")
                seen.page.wait_for_selector("#figure-plot .main-svg .xtick text", timeout=PATIENCE)
                inks[dark] = seen.page.evaluate(
                    "getComputedStyle(document.querySelector('#figure-plot .xtick text')).fill"
                )
                assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
                colours[dark] = seen.page.evaluate(
                    "[getComputedStyle(document.body).backgroundColor,"
                    " getComputedStyle(document.querySelector('#loss .xtick text')).fill]"
                )
                assert seen.problems == []
    assert colours[False] == ["rgb(255, 255, 255)", "rgb(29, 33, 37)"]
    assert colours[True] == ["rgb(20, 23, 26)", "rgb(230, 232, 234)"]
    assert inks == {False: "rgb(38, 38, 38)", True: inks[True]}
    assert min(map(int, inks[True][4:-1].split(","))) > 180, "light on dark"


@pytest.mark.slow
def test_the_page_goes_on_while_a_training_begins_dies_and_resumes(tmp_path):
    config = minute(steps=4000, name="mortal", probe__every=5, probe__sites=("residual_post", "attention"))
    described, out = tmp_path / "config.json", tmp_path / "mortal.zarr"
    described.write_text(json.dumps(as_dictionary(config) | {"checkpoint.every": 10}))

    def train(*words):
        words = ["train", "--config", str(described), "--out", str(out), *words]
        return Warm(command, (words,), stderr=Path(os.devnull))

    with served(out) as address, visit(address) as seen:
        page = seen.page
        page.get_by_text("nothing is there yet; waiting for a writer").wait_for(timeout=PATIENCE)
        process = train()
        try:
            wait_for(page, LAST_STEP, 15)
            page.get_by_text("of 4,000, being written").wait_for(timeout=PATIENCE)
            process.send_signal(signal.SIGKILL)
            process.wait()
            page.get_by_text("its writer died without closing it").wait_for(timeout=PATIENCE)
            reached = max(drawn(page, "loss")[0]["x"])
            process = train("--resume")
            wait_for(page, LAST_STEP, reached + 10)
            page.get_by_text("of 4,000, being written").wait_for(timeout=PATIENCE)
            steps = drawn(page, "loss")[0]["x"]
            assert steps == sorted(set(steps)), "no step twice"
        finally:
            process.kill()
            process.wait()
        assert seen.problems == []
