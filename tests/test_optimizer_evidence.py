"""Evidence about optimizers and weights: definitions by independent code, structure, storage."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given
from hypothesis import strategies as st

from osp_diag.estimators.base import Layout
from osp_diag.estimators.registry import get_estimator
from osp_diag.runs.run import open_run
from osp_diag.runs.writer import RunWriter
from osp_diag.trainer.optimizers import optimizer_evidence
from osp_diag.trainer.optimizers.concentration import TOP_ROWS, concentration, orthogonality, row_norms
from tests.test_optimizers import made, train


def lower_median(values: np.ndarray) -> float:
    return float(np.sort(values)[(len(values) - 1) // 2])


def by_hand(energy: np.ndarray) -> dict[str, float]:
    root = np.sqrt(energy)
    return {
        "participation_ratio": energy.sum() ** 2 / (energy**2).sum(),
        "top_share": energy.max() / energy.sum(),
        "max_median_ratio": root.max() / lower_median(root) if lower_median(root) else math.nan,
    }


@given(
    channels=st.integers(1, 40), seed=st.integers(0, 99), power=st.integers(1, 6), scale=st.integers(-12, 12)
)
def test_concentration(channels, seed, power, scale):
    values = np.abs(np.random.default_rng(seed).normal(size=channels)) ** power + 1e-3
    found = concentration(torch.tensor(values * 10.0**scale))
    for name, expected in by_hand(values).items():
        assert found[name].item() == pytest.approx(expected, rel=1e-4), name


def test_concentration_is_that_of_activations():
    x = torch.randn(30, 12, dtype=torch.float64) * torch.linspace(0.1, 4, 12)
    state = {"token.count": torch.tensor([30.0]), "channel.square": x.square().sum(0)[None]}
    outputs = get_estimator("channel_concentration").finalise(state, Layout(channels=12))
    found = concentration(x.square().mean(0))
    assert found["participation_ratio"].item() == pytest.approx(
        outputs["participation_ratio"].values.item(), rel=1e-5
    )
    assert found["top_share"].item() == pytest.approx(outputs["channel_share"].values[0, 0].item(), rel=1e-5)


def test_one_channel_and_equal_ones_and_none():
    one, equal = torch.zeros(8), torch.full((8,), 3.0)
    one[2] = 5
    assert concentration(one)["participation_ratio"] == 1
    assert concentration(one)["max_median_ratio"].isnan()
    assert concentration(equal)["participation_ratio"] == 8
    assert concentration(torch.zeros(8))["top_share"] == 1 / 8


@given(size=st.integers(2, 12), seed=st.integers(0, 99), scale=st.floats(0.01, 100))
def test_orthogonality(size, seed, scale):
    generator = np.random.default_rng(seed)
    orthogonal = np.linalg.qr(generator.normal(size=(size, size)))[0]
    found = orthogonality(torch.tensor(orthogonal * scale))
    assert found["orthogonality_error"].item() == pytest.approx(0, abs=1e-9)
    assert found["scale"].item() == pytest.approx(scale)
    assert found["condition_number"].item() == pytest.approx(1)
    matrix = generator.normal(size=(size, size))
    found = orthogonality(torch.tensor(matrix))
    values = np.linalg.svd(matrix, compute_uv=False)
    squares = values**2 / np.mean(values**2)
    assert found["orthogonality_error"].item() == pytest.approx(
        np.sqrt(np.mean((squares - 1) ** 2)), rel=1e-6
    )
    assert found["condition_number"].item() == pytest.approx(values[0] / values[-1], rel=1e-4)


def test_a_singular_projection_has_a_large_condition_number():
    assert orthogonality(torch.diag(torch.tensor([1.0, 0.0])))["condition_number"] > 1e7


def test_row_norms():
    squares = torch.tensor([4.0, 1.0, 0.25, 9.0])
    found = row_norms(squares, top=6)
    assert found["row_norm_mean"] == pytest.approx(1.625)
    assert found["row_norm_max_median_ratio"] == 3
    assert found["top_row"][:4].tolist() == [3, 0, 1, 2]
    assert found["top_row_norm"][4:].isnan().all()


# Of a model


def test_evidence_of_muon():
    model, optimizers = made(model__norm="rmsnorm")
    optimizers.record_updates(True)
    train(model, optimizers, range(3))
    before = model.model.layers[1].mlp.up_proj.weight.detach().clone()
    train(model, optimizers, range(3, 4))
    found = optimizer_evidence(model, optimizers)

    entry = optimizers.routing.of("model.layers.1.mlp.up_proj.weight")
    lr = entry.lr / 4
    update = (before * (1 - lr * entry.weight_decay) - model.model.layers[1].mlp.up_proj.weight.detach()) / lr
    at = found["optimizer/update"].sel(layer=1, matrix="mlp.up_proj")
    for axis, side in ((1, "row"), (0, "column")):
        for name, expected in by_hand((update.double() ** 2).mean(axis).numpy()).items():
            assert at[f"update_{name}"].sel(side=side).item() == pytest.approx(expected, rel=5e-3)

    assert optimizers.adamw is not None
    head = optimizers.adamw.state[model.lm_head.weight]["exp_avg_sq"].double()
    at = found["optimizer/second_moment"].sel(outside_matrix="lm_head")
    for name, expected in by_hand(head.mean(0).numpy()).items():
        assert at[f"outside_second_moment_{name}"].sel(side="column").item() == pytest.approx(
            expected, rel=1e-4
        )

    gain = model.model.layers[0].input_layernorm.weight.detach()
    at = found["weights/norm_gain"].sel(layer=0, norm="input_layernorm")
    assert at.norm_gain_max.item() == pytest.approx(gain.abs().max().item())
    assert at.norm_gain_participation_ratio.item() == pytest.approx(
        by_hand(gain.numpy() ** 2)["participation_ratio"], rel=1e-5
    )

    norms = model.model.embed_tokens.weight.detach().norm(dim=1)
    at = found["weights/embedding_rows"].sel(matrix="embed_tokens")
    assert at.embedding_row_norm_mean.item() == pytest.approx(norms.mean().item(), rel=1e-5)
    assert at.embedding_top_row.values.tolist() == norms.topk(TOP_ROWS).indices.tolist()
    assert set(found["weights/embedding_projection"].matrix.values) == {
        "embedding_projection",
        "unembedding_projection",
    }
    for dataset in found.values():
        for variable in dataset.data_vars.values():
            assert variable.attrs["units"]
            assert variable.attrs["definition"]


@pytest.mark.parametrize("name", ["adamw", "muon", "muon_only", "soap"])
def test_every_step_has_the_same_structure_and_fits_a_run(tmp_path, name):
    model, optimizers = made(optimizer__name=name)
    recorded = []
    with RunWriter(tmp_path / "run.zarr", {}) as writer:
        for step in range(4):
            found = optimizer_evidence(model, optimizers)
            writer.append(step, found)
            recorded.append(found)
            optimizers.record_updates(step % 2 == 0)
            train(model, optimizers, range(step, step + 1))
    assert ("optimizer/second_moment" in recorded[0]) == (name != "muon_only")
    for step, defined in ((0, False), (1, True), (2, False), (3, True)):
        update = recorded[step]["optimizer/update"]
        assert all(
            np.isfinite(value).all() == defined
            for value in update.data_vars.values()
            if "share" in value.name
        )
        if "optimizer/second_moment" in recorded[step]:
            share = recorded[step]["optimizer/second_moment"].outside_second_moment_top_share
            assert np.isfinite(share).all() == (step > 0)
    run = open_run(tmp_path / "run.zarr")
    xr.testing.assert_equal(
        run["weights:embedding_rows"].isel(step=2, drop=True).load(), recorded[2]["weights/embedding_rows"]
    )


def test_groups_without_anything_to_say_are_left_out():
    model, optimizers = made(model__norm="srmsnorm", model__embedding_projection=False)
    assert set(optimizer_evidence(model, optimizers)) == {
        "optimizer/second_moment",
        "optimizer/update",
        "weights/embedding_rows",
    }


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_orthogonality_of_a_matrix_that_is_not_finite_is_nan(bad):
    matrix = torch.eye(3)
    matrix[0, 1] = bad
    numbers = orthogonality(matrix)
    assert torch.isnan(numbers["orthogonality_error"])
    assert torch.isnan(numbers["condition_number"])
    assert not torch.isfinite(numbers["scale"])
