"""Surfaces of activations at any Linear's input and of weights: layers and models side by side."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import xarray as xr

import osp_diag
from osp_diag import figures
from osp_diag.capture.snapshots import Snapshots
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures._registry import figure_module
from osp_diag.figures._surfaces import Axes, _heading, _places, in_block_order, short_name
from osp_diag.figures.backend import none
from osp_diag.figures.styles import load_style
from osp_diag.runs.run import Run
from tests.synthetic_runs import OUTLIER_FREE, synthetic_run
from tests.tiny_checkpoints import byte_tokenizer, llama

LAYERS = (0, 3, 5)


@pytest.fixture(scope="module")
def run():
    return synthetic_run()


@pytest.fixture(scope="module")
def clean():
    return synthetic_run(OUTLIER_FREE)


def with_linear_inputs(run: Run) -> Run:
    """The snapshots of residual_post and attention_input as inputs of two projections, and a head's."""
    nodes = {node.path: node.to_dataset(inherit=False) for node in run.tree.subtree}
    nodes["/snapshot/linear_input/mlp.down_proj"] = nodes["/snapshot/residual_post"]
    nodes["/snapshot/linear_input/self_attn.q_proj"] = nodes["/snapshot/attention_input"]
    nodes["/snapshot/linear_input/lm_head"] = nodes["/snapshot/residual_post"].isel(layer=[-1])
    return Run(xr.DataTree.from_dict(nodes))


def data(name: str, runs, **options) -> xr.Dataset:
    return figures.draw(name, runs, backend="none", **options)


def recording(name: str, runs, width: str = "two-column", **options) -> none.Canvas:
    module = figure_module(name)
    canvas: none.Canvas = module.draw(
        module.prepare(runs, **options), none, style=load_style("paper"), width=width
    )
    return canvas


def heights(canvas: none.Canvas) -> list[float]:
    return [
        call["high"] for panel in canvas.panels.values() for name, call in panel.calls if name == "limits"
    ]


def test_the_papers_numbers_are_aliases():
    known = figures.aliases()
    assert {known[f"fig{n}"] for n in (2, 8, 9)} == {"activation_surface"}
    assert {known[f"fig{n}"] for n in (10, 11)} == {"weight_surface"}


def test_names_are_short_and_in_the_order_of_a_block():
    assert short_name("linear_input:mlp.down_proj") == "down_proj input"
    assert (short_name("self_attn.o_proj"), short_name("residual_post")) == ("o_proj", "residual_post")
    assert in_block_order(["mlp.up_proj", "b", "self_attn.v_proj", "a"]) == [
        "self_attn.v_proj",
        "mlp.up_proj",
        "a",
        "b",
    ]


@pytest.mark.parametrize(
    ("run", "inches", "heading"),
    [
        ("", 3.4, ("down_proj", "layer 7, max 5 at channel 41, token 0")),
        ("", 1.7, ("down_proj", "layer 7, max 5")),
        ("a model", 3.4, ("a model: down_proj", "layer 7, max 5 at channel 41, token 0")),
        ("a model", 2.3, ("a model", "down_proj, layer 7, max 5")),
        ("a model, layer 7", 2.3, ("a model, layer 7", "down_proj, max 5")),
        ("a model with a long name", 1.7, ("cut", "down_proj, max 5")),
    ],
)
def test_headings_fit_their_panels(run, inches, heading):
    part = xr.Dataset({"peak": 5.0, "layer": 7.0, "peak_channel": 41.0, "peak_token": 0.0})
    axes = Axes(values="magnitude", quantity="|x|", row="site", x="channel", y="token")
    title, subtitle = _heading(run, "down_proj", part, axes, inches)
    assert subtitle == heading[1]
    assert len(title) <= 12 * inches
    assert title == heading[0] or title.endswith("\u2026")


# -- activations -----------------------------------------------------------------------------------------


def test_inputs_of_all_linears_at_several_layers(run):
    full = with_linear_inputs(run)
    found = data("fig8", full, sites="linear_input:*", layer=(1, 3, 5))
    assert found["site"].values.tolist() == [
        "linear_input:self_attn.q_proj",
        "linear_input:mlp.down_proj",
    ]  # not the head, which is no part of a block
    assert found["run"].values.tolist() == ["layer 1", "layer 3", "layer 5"]
    assert found["layer"].values.tolist() == [1, 3, 5]
    raw = np.abs(run.snapshot("residual_post")["activation"])
    np.testing.assert_allclose(
        found["peak"].sel(site="linear_input:mlp.down_proj"),
        raw.sel(layer=[1, 3, 5]).max(("token", "channel")),
    )
    canvas = recording("fig8", [full], sites="linear_input:*", layer=(1, 3, 5))
    assert canvas.shape == (2, 3)
    assert [panel.labels["title"] for panel in canvas.panels.values()][:3] == ["q_proj input"] * 3
    assert canvas.panels[1, 2].labels["subtitle"].startswith("layer 5, max ")


def test_layers_of_several_models_side_by_side(run, clean):
    found = data("fig2", [run, clean], sites="residual_post", layer=(2, 4))
    assert found["run"].values.tolist() == [
        "made-up-60M, layer 2",
        "made-up-60M, layer 4",
        "made-up-osp-60M, layer 2",
        "made-up-osp-60M, layer 4",
    ]
    assert len(set(heights(recording("fig2", [run, clean], layer=(2, 4))))) == 8
    assert len(set(heights(recording("fig2", [run, clean], layer=(2, 4), z_scale="shared")))) == 1


def test_in_a_narrow_figure_rows_and_columns_change_places(run):
    wide = recording("fig2", [run], layer=(1, 2, 3, 4))
    narrow = recording("fig2", [run], width="one-column", layer=(1, 2, 3, 4))
    assert (wide.shape, narrow.shape) == ((2, 4), (4, 2))
    assert narrow.panels[1, 0].labels["title"] == "attention_input"
    assert narrow.panels[1, 0].labels["subtitle"].startswith("layer 2, max")
    assert [narrow.panels[row, 0].labels["x_label"] for row in range(4)] == ["", "", "", "channel"]
    assert recording("fig2", [run], width="one-column").shape == (2, 1)


@pytest.mark.parametrize(
    ("names", "runs", "fitting", "shape"),
    [
        (7, 4, 4, (7, 4)),
        (2, 3, 2, (3, 2)),
        (1, 3, 2, (3, 1)),
        (3, 6, 4, (6, 3)),
        (5, 6, 4, (10, 3)),
        (3, 1, 4, (1, 3)),
        (2, 1, 2, (2, 1)),
        (7, 1, 4, (7, 1)),
    ],
)
def test_no_place_of_the_grid_stays_empty(names, runs, fitting, shape):
    places = set(_places(names, runs, fitting).values())
    assert len(places) == names * runs
    assert places == {(row, column) for row in range(shape[0]) for column in range(shape[1])}


def test_a_pattern_that_no_snapshot_matches(run):
    with pytest.raises(StoreError, match=r"no snapshot that the runs share matches 'linear_input:\*'; that"):
        data("fig8", run, sites="linear_input:*")


# -- weights ---------------------------------------------------------------------------------------------


def test_a_large_weight_keeps_height_and_place(run):
    found = data("weight_surface", run, cells=5)
    assert found["projection"].values.tolist() == ["self_attn.o_proj", "mlp.down_proj"]
    assert found["layer"].values.tolist() == list(LAYERS)
    assert found["magnitude"].shape == (3, 2, 5, 5)
    spiked = found.sel(run="layer 3", projection="mlp.down_proj")
    assert spiked["magnitude"].max() == spiked["peak"] == 7.5
    assert (spiked["peak_output_channel"], spiked["peak_input_channel"]) == (17, 40)
    row, column = np.unravel_index(int(spiked["magnitude"].values.argmax()), (5, 5))
    for first, cell, channel in (
        (spiked["first_output_channel"].values, row, 17),
        (spiked["first_input_channel"].values, column, 40),
    ):
        assert first[cell] <= channel < np.append(first, np.inf)[cell + 1]
    assert "step 0" in found.attrs["caption"]
    assert "cells show the maximum" in found.attrs["caption"]


def test_models_side_by_side_each_at_its_largest_weight(run, clean):
    found = data("weight_surface", [run, clean], weights="down_proj")
    assert found["run"].values.tolist() == ["made-up-60M", "made-up-osp-60M"]
    assert found["peak"].values.ravel().tolist() == [7.5, pytest.approx(0.9)]
    assert heights(recording("fig10", [run, clean], weights="down_proj")) == [7.5, pytest.approx(0.9)]
    shared = recording("fig11", [run, clean], weights=("down_proj",), z_scale="shared")
    assert heights(shared) == [7.5, 7.5]
    assert shared.panels[0, 1].labels["title"] == "made-up-osp-60M: down_proj"
    assert shared.panels[0, 1].labels["x_label"] == "input channel"


def test_a_projection_that_a_layer_lacks_leaves_its_place_empty(run):
    nodes = {node.path: node.to_dataset(inherit=False) for node in run.tree.subtree}
    nodes["/weight_map/self_attn.o_proj"] = nodes["/weight_map/self_attn.o_proj"].isel(layer=[0])
    canvas = recording("weight_surface", [Run(xr.DataTree.from_dict(nodes))], layer=3)
    assert canvas.panels[0, 0].labels["subtitle"] == "not in this run"
    assert not canvas.panels[0, 0].calls
    assert heights(canvas) == [7.5]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layer": 4}, UsageError, r"run of made-up-60M holds no weights of layer 4; it has 0, 3, 5"),
        ({"z_scale": "log"}, UsageError, r"weight_surface: z_scale is own or shared, not 'log'"),
        ({"cells": 1}, UsageError, r"at least 2 cells a side"),
        ({"weights": "up_proj"}, StoreError, r"matches 'up_proj'; there are self_attn.o_proj, mlp.down_proj"),
    ],
)
def test_what_cannot_be_drawn_is_refused(run, options, error, message):
    with pytest.raises(error, match=message):
        data("weight_surface", run, **options)


def test_a_run_without_weights_says_how_to_get_them():
    with pytest.raises(StoreError, match=r"holds none; probe the checkpoint with .*--weights mlp.down_proj"):
        data("weight_surface", synthetic_run(weights=False))


# -- a real run ------------------------------------------------------------------------------------------


def test_inputs_and_weights_of_a_real_model(tmp_path):
    model = llama(layers=3)
    text = tmp_path / "text.txt"
    text.write_text("a bird sang of days that went. " * 9)
    options = {"text": text, "tokens": 96, "seq_len": 32, "tokenizer": byte_tokenizer()}
    run = osp_diag.probe(
        model, sites=["linear_input:*"], weights=["down_proj"], out=tmp_path / "run.zarr", **options
    )
    kept: list[np.ndarray] = []
    model.model.layers[1].mlp.down_proj.register_forward_pre_hook(
        lambda _, given: kept.append(given[0].numpy())
    )
    ids = torch.tensor(run["snapshot"]["token_id"].values[None])
    with torch.no_grad():
        model(ids)
    found = data("fig9", run, sites="linear_input:*", layer=1)
    assert found["site"].values.tolist()[-1] == "linear_input:mlp.down_proj"
    assert found.sizes["site"] == 7
    np.testing.assert_allclose(found["magnitude"].isel(run=0).sel(site="linear_input:mlp.down_proj").dropna(
        "channel", how="all"), np.abs(kept[0][0]), rtol=1e-4, atol=1e-6)  # fmt: skip
    weights = data("fig11", run, layer=1)
    matrix = np.abs(model.model.layers[1].mlp.down_proj.weight.detach().numpy())
    np.testing.assert_allclose(weights["magnitude"].isel(run=0, projection=0), matrix)
    assert weights["peak"].item() == matrix.max()


def test_what_is_too_large_to_keep_is_noted(tmp_path, monkeypatch):
    monkeypatch.setattr(
        Snapshots.__init__, "__kwdefaults__", {"sites": (), "layers": None, "megabytes": 0.004}
    )
    text = tmp_path / "text.txt"
    text.write_text("a bird sang of days that went. " * 9)
    run = osp_diag.probe(llama(), text=text, tokens=96, seq_len=32, tokenizer=byte_tokenizer())
    notes = [note for note in run.attrs["notes"] if note.startswith("raw activations too large to keep")]
    assert len(notes) == 1
    assert "mlp_hidden of layer 1" in notes[0]
