"""Per logged step: the optimizers' own settings, what the batch is, and sketches of the weights."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from osp_diag.runs.run import open_run
from osp_diag.trainer.batch_statistics import BATCH_SERIES, BatchCounts
from osp_diag.trainer.data import open_data
from osp_diag.trainer.data.batch import IGNORED, Batch
from osp_diag.trainer.data.training_data import Dealing
from osp_diag.trainer.loop import Training, train
from osp_diag.trainer.model import Llama
from osp_diag.trainer.optimizers import build_optimizer
from osp_diag.trainer.optimizers.settings import OptimizerSettings
from osp_diag.trainer.weight_sketch import WeightSketch, sketch_period
from tests.test_optimizer_routing import configured
from tests.training_runs import minute

# -- the batch -------------------------------------------------------------------------------------------


def batch_of(rows, labels=None):
    ids = torch.tensor(rows)
    following = torch.cat([ids[:, 1:], torch.full_like(ids[:, :1], 9)], dim=1)
    return Batch(ids, following if labels is None else torch.tensor(labels))


def statistics(batch, ranks=1, vocabulary=10):
    """Counted by as many ranks, which add up their counts."""
    parts = [Dealing(len(batch), rank, ranks) for rank in range(ranks)]
    counts = [BatchCounts(vocabulary, dealing) for dealing in parts]
    sums = sum(each.of(batch[dealing.of_rank]) for each, dealing in zip(counts, parts, strict=True))
    return counts[0].statistics(sums.numpy(), 7.0)


def test_a_batch_by_hand():
    found = statistics(batch_of([[1, 2, 1, 2], [3, 3, 3, 3], [3, 3, 3, 3]]))
    assert found.keys() == BATCH_SERIES.keys()
    assert found["unique_token_share"] == 3 / 12
    assert found["commonest_token_share"] == 8 / 12
    # (1, 2) comes again, (3, 3) twice in each of two sequences; the last label, 9, is another each time.
    assert found["repeated_bigram_share"] == pytest.approx(5 / 12)
    assert found["repeated_sequence_share"] == pytest.approx(1 / 3)
    assert (found["label_agreement"], found["data_position"]) == (1.0, 7.0)


def test_labels_that_are_not_the_next_input_show_and_ignored_ones_do_not():
    rows = [[1, 2, 3, 4]]
    healthy = statistics(batch_of(rows, [[2, IGNORED, 4, 5]]))
    assert (healthy["label_agreement"], healthy["unique_token_share"]) == (1.0, 1.0)
    shifted = statistics(batch_of(rows, [[2, IGNORED, 3, 5]]))
    assert shifted["label_agreement"] == 0.5
    assert shifted["batch_hash"] != healthy["batch_hash"]
    nothing = statistics(batch_of(rows, [[IGNORED] * 4]))
    assert np.isnan([nothing["label_agreement"], nothing["unique_token_share"]]).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.lists(st.integers(0, 9), min_size=5, max_size=5), min_size=4, max_size=4))
def test_ranks_count_what_one_process_counts(rows):
    alone = statistics(batch_of(rows))
    assert statistics(batch_of(rows), ranks=2) == statistics(batch_of(rows), ranks=4) == alone
    assert 0 <= alone["batch_hash"] < 2**48
    assert alone["batch_hash"] == int(alone["batch_hash"])


def test_healthy_batches_of_any_packing_agree_with_their_labels():
    for changes in ({"data__separate_documents": True}, {"data__packing": "documents", "data__bos": "none"}):
        config = minute(**changes)
        data = open_data(config.data, batch_size=8, vocabulary_size=4096)
        assert statistics(data.next_batch(), vocabulary=4096)["label_agreement"] == 1.0


# -- the optimizers --------------------------------------------------------------------------------------


def test_settings_are_those_that_the_optimizers_hold():
    config = configured(optimizer__lr="0.01", optimizer__embedding_lr="0.1", optimizer__weight_decay="0.2")
    model = Llama(config.model)
    optimizers = build_optimizer(model, config)
    asked = OptimizerSettings(optimizers)
    optimizers.set_learning_rate(0.5)
    optimizers.muon.param_groups[0]["lr"] *= 10
    dataset = asked.labelled(asked.values()).dataset
    assert set(dataset["parameter_group"].values) == set(optimizers.groups)
    hidden, head = (dataset.sel(parameter_group=name) for name in ("muon.hidden", "adamw.head"))
    assert float(hidden["learning_rate"]) == pytest.approx(0.05)
    assert float(head["learning_rate"]) == pytest.approx(0.05)
    assert (float(hidden["weight_decay"]), float(hidden["momentum"])) == (0.2, 0.95)
    assert (float(head["beta1"]), float(head["beta2"])) == (0.9, 0.95)
    assert np.isnan([hidden["beta1"], head["momentum"]]).all()
    assert float(dataset["parameter_count"].sum()) == model.parameter_count()
    assert float(head["parameter_count"]) == 40 * 16


# -- the weights -----------------------------------------------------------------------------------------


def signs(text, count):
    bits = [f"{byte:08b}" for byte in hashlib.shake_256(text.encode()).digest(count)]
    return np.array([[1 - 2 * int(bit) for bit in row] for row in bits], float)


def test_a_sketch_is_what_its_definition_says():
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (5, 3), "b": (5, 4), "gain": (6,), "scale": (1,), "free": ()}
    parameters = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    sketch = WeightSketch(parameters)
    dataset = sketch.labelled(sketch.take().numpy()).dataset
    assert list(dataset["parameter"].values) == list(parameters)
    for name, shape in shapes.items():
        matrix = parameters[name].double().numpy().reshape(shape[0] if shape else 1, -1)
        norms = np.sort(np.linalg.norm(matrix, axis=1))
        row = dataset.sel(parameter=name)
        np.testing.assert_allclose(row["norm"], np.linalg.norm(matrix), rtol=1e-6)
        np.testing.assert_allclose(row["row_norm_max"], norms[-1], rtol=1e-6)
        np.testing.assert_allclose(row["row_norm_median"], norms[(len(norms) - 1) // 2], rtol=1e-6)
        assert int(row["top_row"]) == np.linalg.norm(matrix, axis=1).argmax()
        s = signs(f"{name} {shape} rows", matrix.shape[0])
        t = signs(f"{name} {shape} columns", matrix.shape[1])
        expected = np.einsum("id,ij,jd->d", s, matrix, t)
        np.testing.assert_allclose(row["projection"], expected, rtol=1e-5, atol=1e-5)


def test_an_edited_row_is_named_and_changes_its_parameter_alone():
    model = Llama(configured().model)
    parameters = dict(model.named_parameters())
    sketch = WeightSketch(parameters)
    before = sketch.labelled(sketch.take().numpy()).dataset
    name = "model.layers.1.mlp.down_proj.weight"
    with torch.no_grad():
        parameters[name][7] *= 10
    after = sketch.labelled(sketch.take().numpy()).dataset
    changed = (before["projection"] != after["projection"]).any("direction")
    assert list(after["parameter"].values[changed]) == [name]
    assert int(after["top_row"].sel(parameter=name)) == 7


@pytest.mark.parametrize(
    ("changes", "parameters", "period"),
    [
        ({}, 10_000_000, 1),
        ({"batch_size": 8}, 1_400_000_000, 2**20 // (8 * 32)),
        ({"sketch_every": 5}, 1_400_000_000, 5),
    ],
)
def test_how_often_the_weights_are_sketched(changes, parameters, period):
    assert sketch_period(minute(**changes), parameters) == period


# -- in a training ---------------------------------------------------------------------------------------


def test_a_silent_change_of_the_learning_rate_is_recorded(tmp_path, monkeypatch):
    clip = Training._clip

    def changing(self):
        if self.step >= 3:
            for optimizer in self.optimizers.each.values():
                for group in optimizer.param_groups:
                    group["lr"] *= 10
        return clip(self)

    monkeypatch.setattr(Training, "_clip", changing)
    periods = {"log_every": 2, "sketch_every": 3, "probe__every": 0, "checkpoint__every": 0}
    config = minute(**periods, steps=9, schedule__name="constant")
    run = train(config, tmp_path / "run.zarr")
    rate = run.logged("optimizer_settings")["learning_rate"].sel(parameter_group="muon.hidden")
    logged = run.series["learning_rate"]
    assert list(run.series["step"].values) == [2, 4, 6, 8, 9]
    np.testing.assert_allclose(rate / logged, [1, 10, 10, 10, 10])
    # The first logged step after every third, and the last step, whose state is saved.
    sketched = run.logged("weight_sketch")["norm"].notnull().all("parameter")
    assert list(run.series["step"].values[sketched]) == [4, 6, 9]
    series = open_run(tmp_path / "run.zarr").series
    assert list(series["data_position"].values) == [16, 32, 48, 64, 72]
    assert len(set(series["batch_hash"].values)) == 5
    assert series["batch_hash"].attrs["definition"].startswith("48 bits of BLAKE2b")


def test_warnings_of_the_build_are_in_the_notes_of_the_run(tmp_path):
    config = minute(steps=1, probe__every=0, model__embedding_projection=False, sketch_every=0)
    run = train(config, tmp_path / "run.zarr")
    assert any("no embedding projections: an ablation, not OSP" in note for note in run.notes)
    assert run.logged_groups == ["optimizer_settings"]
