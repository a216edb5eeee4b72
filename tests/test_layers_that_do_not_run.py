"""A block that does not run in a probed step is NaN there, and never ends the loop that is probed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import osp_diag
from osp_diag.errors import CaptureError
from osp_diag.estimators import Suite, get_estimator
from osp_diag.estimators.base import Layout
from osp_diag.probing.labelling import StepLabels, labelled_groups, relabel

IDS = torch.arange(24).reshape(2, 12)
SITES = ["embedding", "residual_post", "attention", "query_post_rope", "mlp_down_weight"]


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.LayerNorm(width),
            nn.Linear(width, 3 * width),
            nn.Linear(width, width),
        )
        self.mlp_norm, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (
            part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm(x)).chunk(3, dim=-1)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(torch.relu(self.up(self.mlp_norm(x))))


class Skipping(nn.Module):
    """Leaves out the blocks in ``skipped``, as LayerDrop does by chance."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(64, 8)
        self.blocks = nn.ModuleList(Block(8) for _ in range(3))
        self.head = nn.Linear(8, 64)
        self.skipped: set[int] = set()

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embedding(ids)
        for number, block in enumerate(self.blocks):
            if number not in self.skipped:
                x = block(x)
        return self.head(x)


def probed(steps: list[set[int]], out: Path | None = None, **options: Any) -> osp_diag.Run:
    """A run of one forward pass a step, of the same tokens, each without some of the blocks."""
    model = Skipping()
    with osp_diag.Probe(model, out=out, sites=SITES, compile=False, **options) as probe, torch.no_grad():
        for step, skipped in enumerate(steps):
            model.skipped = skipped
            with probe.step(step):
                model(IDS)
        return probe.run


STEPS = [{1}, set(), {0, 2}, {0, 1, 2}, set()]
"""The first block of all is away in some step, and every layer in one."""


@pytest.fixture(scope="module")
def whole() -> osp_diag.Run:
    return probed([set()])


@pytest.fixture(scope="module", params=["memory", "disk"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> osp_diag.Run:
    out = tmp_path_factory.mktemp("skipping") / "run.zarr" if request.param == "disk" else None
    return probed(STEPS, out, token_groups=2)


@pytest.mark.parametrize("site", SITES)
def test_what_did_not_run_is_nan_and_the_rest_is_what_it_is(
    run: osp_diag.Run, whole: osp_diag.Run, site: str
) -> None:
    found, expected = run.at(site), whole.at(site).isel(step=0)
    assert found["step"].values.tolist() == list(range(len(STEPS)))
    assert found["layer"].values.tolist() == expected["layer"].values.tolist()
    for name, variable in found.data_vars.items():
        for step, skipped in enumerate(STEPS):
            for layer in found["layer"].values:
                values = variable.sel(step=step, layer=layer).values
                if layer in skipped:
                    assert (np.isnan(values) if values.dtype.kind == "f" else values == -1).all(), name
                elif not skipped:
                    np.testing.assert_array_equal(values, expected[name].sel(layer=layer).values)


@pytest.mark.parametrize("site", ["residual_post", "attention"])
def test_its_sums_give_the_same_again(run: osp_diag.Run, site: str) -> None:
    again, found = relabel(run, site), run.at(site)
    for name in found.data_vars:
        np.testing.assert_array_equal(again[name].values, found[name].values, err_msg=str(name))
    groups = run.tree["token_groups/residual_post"].to_dataset()
    assert np.isnan(groups["channel.square"].sel(step=0, layer=1)).all()


def test_a_site_whose_every_layer_was_away_at_first_joins_later(whole: osp_diag.Run) -> None:
    run = probed([{0}, set()])
    tokens = run.at("embedding")["token_count"].sel(stratum="all", layer=0)
    assert np.isnan(tokens.values[0])
    assert tokens.values[1] == whole.at("embedding")["token_count"].sel(stratum="all").item() == 24


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_first_step_in_which_no_block_ran_is_one_without_numbers(
    whole: osp_diag.Run, on_disk: bool, tmp_path: Path
) -> None:
    run = probed([{0, 1, 2}, set()], tmp_path / "run.zarr" if on_disk else None)
    assert run.steps.tolist() == [1]
    expected = whole.at("residual_post")["token_norm"].isel(step=0).values
    np.testing.assert_array_equal(run.at("residual_post")["token_norm"].sel(step=1), expected)
    (note,) = [note for note in run.attrs["notes"] if "no site was reached" in note]
    assert note.startswith("step 0 is not in the run, because no site was reached in it: no block ran")


def test_a_training_in_which_no_block_ever_runs_ends_well(tmp_path: Path) -> None:
    model = Skipping()
    batches_of_our_own = osp_diag.Probe(model, sites=SITES, compile=False)
    with osp_diag.Probe(model, out=tmp_path / "run.zarr", sites=SITES, compile=False) as probe:
        model.skipped = {0, 1, 2}
        for step in range(2):
            with probe.step(step):
                model(IDS)
            probe.append_series(step, {"loss": 1.0})
    notes = [note for note in probe.attributes["notes"] if "is not in the run" in note]
    assert [note.split(",")[0] for note in notes] == ["step 0 is not in the run", "step 1 is not in the run"]
    # Batches of our own would never give any number.
    with pytest.raises(CaptureError, match="the model ran but no site was reached; if it is compiled or"):
        batches_of_our_own.measure(0, [{"ids": IDS}])


def test_a_resumed_run_has_the_layers_that_it_had(tmp_path: Path) -> None:
    path = tmp_path / "run.zarr"
    for step, skipped in enumerate([set(), {0, 2}, {1}]):
        model = Skipping()
        with osp_diag.Probe(model, out=path, sites=SITES, resume=step > 0, compile=False) as probe:
            model.skipped = skipped
            with probe.step(step), torch.no_grad():
                model(IDS)
    largest = osp_diag.open_run(path).at("attention")["max_logit"].isel(head=0)
    assert np.isfinite(largest.values).tolist() == [[True] * 3, [False, True, False], [True, False, True]]


def test_a_layer_that_the_run_has_no_room_for_is_left_out_with_its_reason() -> None:
    """Part of a block may run at a later step only, when the run's layers are settled."""
    labels, left_out = StepLabels(), dict[str, str]()
    suite = Suite([get_estimator("token_scale")])
    layout = Layout(channels=4, tokens=2)
    ones = {name: np.ones(suite.shape(spec, layout)) for name, spec in suite.fields(layout).items()}
    for layers in ([0, 2], [1, 2]):
        states = {("mlp_out", layer, "activation"): ones for layer in layers}
        step = labelled_groups(
            lambda site: {"activation": suite},
            states,
            dict.fromkeys(states, layout),
            keep_raw=False,
            labels=labels,
            left_out=left_out,
        )
    assert step["mlp_out"]["layer"].values.tolist() == [0, 2]
    assert np.isnan(step["mlp_out"]["token_count"].values).all(axis=1).tolist() == [True, False]
    assert left_out == {
        "mlp_out of layer 1": "it ran for the first time when the run's layers were settled, so the run has "
        "no room for it"
    }
