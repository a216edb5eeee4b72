"""What a page of a figure says at the pointer: layer, channel, head, token and value."""

from __future__ import annotations

import pytest

from osp_diag import figures
from tests.browser import visit
from tests.synthetic_runs import synthetic_run


@pytest.fixture(scope="module")
def run():
    return synthetic_run(steps=(0, 10, 20))


def traces(name: str, run, **options) -> list:
    return list(figures.draw(name, run, backend="plotly", **options).data)


def test_pooled_channels_are_named_as_a_span(run):
    pooled = traces("channel_map", run, pixels=16)[0]
    assert list(pooled.text[0][:2]) == ["0 to 3", "4 to 7"]
    assert pooled.hovertemplate.startswith("layer %{y}<br>channel %{text}<br>channel_rms")
    alone = traces("channel_map", run)[0]
    assert alone.text is None
    assert alone.hovertemplate.startswith("layer %{y}<br>channel %{x}<br>")


def test_heads_and_steps_are_named_where_rows_only_count(run):
    emergence = traces("sink_emergence", run)[0]
    assert emergence.text[5][2] == "layer 1, head 1<br>probed step 20"
    bars = traces("sink_implementation", run)[0]
    assert bars.text[:3] == ("channel 0", "channel 0", "channel 1")
    assert bars.hovertemplate.startswith("%{text}<br>part of the sink logit")


def test_inner_panels_go_by_the_names_of_the_outer_ones(run):
    found = traces("depth_profile", [run, synthetic_run(model_name="other")])
    assert all(
        trace.hovertemplate.startswith("layer %{x:,.6~g}<br>") for trace in found if trace.hovertemplate
    )
    kurtosis = [trace for trace in found if trace.name == "rest"]
    assert len(kurtosis) == 2
    assert all("osp_excess_kurtosis/1 %{y:,.4g}" in trace.hovertemplate for trace in kurtosis)


def test_a_value_along_x_is_told_with_its_row(run):
    dots = [trace for trace in traces("estimator_disagreement", run) if trace.mode == "markers"]
    assert dots[0].text[:2] == ("layer 0", "layer 1")
    assert dots[0].hovertemplate.startswith(
        "%{text}<br>%{y}<br>kurtosis, floor and ceiling".partition(",")[0]
    )


@pytest.mark.slow
def test_a_browser_shows_it_and_marks_lie_over_their_panel(run, tmp_path):
    figures.draw("attention_map", run, heads="4:1", tokens=6, out=tmp_path / "map.html")
    with visit(tmp_path / "map.html", offline=True) as found:
        box = found.page.locator(".nsewdrag").first.bounding_box()
        assert box is not None
        found.page.mouse.move(box["x"] + box["width"] / 12, box["y"] + box["height"] * 11 / 12)
        said = found.page.locator(".hoverlayer .hovertext").first.text_content(timeout=5000)
        assert said is not None
        assert said.startswith("query 5 \u201cday\u201dkey 0 \u201c<s>\u201dattention ")
        assert not found.problems
    figures.draw("sink_implementation", run, out=tmp_path / "sink.html")
    with visit(tmp_path / "sink.html", offline=True) as found:
        panel = found.page.locator(".nsewdrag").first.bounding_box()
        assert panel is not None
        marks = found.page.locator(".annotation-arrow-g").all()
        assert marks
        boxes = [mark.bounding_box() for mark in marks]
        assert all(box is not None and box["x"] > panel["x"] - 20 for box in boxes)
        assert not found.problems
