"""The training loop on a CPU: what is recorded, what is saved, and that going on is going on exactly."""

import shutil
import signal
import threading

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import xarray as xr
from torch.distributed.checkpoint import FileSystemReader

from osp_diag.errors import DivergenceError, StoreError, TrainingError, UsageError
from osp_diag.runs.run import open_run
from osp_diag.schema import SITES
from osp_diag.trainer.checkpoint import folder_of, latest, without_single_process_warnings
from osp_diag.trainer.checkpoint_folder import CheckpointFolder
from osp_diag.trainer.config import CheckpointConfig
from osp_diag.trainer.exporting import trained_model
from osp_diag.trainer.loop import train
from osp_diag.trainer.scalars import Scalars
from tests.training_runs import minute


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nobody disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run.zarr"
    train(minute(), out)
    return out


def copied(run, folder):
    """A copy of a run and its checkpoints."""
    out = folder / "run.zarr"
    shutil.copytree(run, out)
    shutil.copytree(folder_of(run), folder_of(out))
    return out


def weights(out):
    return trained_model(latest(folder_of(out))).state_dict()


def assert_same_run(one, other):
    """Two runs hold the same numbers to the bit, those of clocks left out."""
    first, second = open_run(one), open_run(other)
    assert list(first.steps) == list(second.steps)
    of_clocks = ("seconds", "per_second")
    for name in (name for name in first.series.data_vars if not name.endswith(of_clocks)):
        np.testing.assert_array_equal(first.series[name], second.series[name], err_msg=name)
    for group in ("optimizer_settings", "weight_sketch"):
        xr.testing.assert_identical(first.logged(group).load(), second.logged(group).load())
    for site in first.sites:
        for name, values in first.at(site).data_vars.items():
            np.testing.assert_array_equal(values, second.at(site)[name], err_msg=f"{site} {name}")
    ours, theirs = weights(one), weights(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_a_run_holds(whole):
    run = open_run(whole)
    assert list(run.steps) == [0, 3, 6]
    series = run.series
    assert list(series["step"].values) == [0, 1, 2, 3, 4, 5, 6]
    assert np.isnan(series["loss"].values[0])
    assert np.isfinite(series["loss"].values[1:]).all()
    assert series["loss"].values[6] < series["loss"].values[1] == pytest.approx(np.log(4096), rel=0.05)
    probed = np.isfinite(series["held_out_loss"].values)
    assert list(series["step"].values[probed]) == [0, 3, 6]
    assert np.isfinite(series["loss"].values[probed][1:]).all()
    for name in ("gradient_norm", "learning_rate", "tokens_per_second", "step_seconds", "probe_seconds"):
        assert np.isfinite(series[name].values[1:]).any(), name
    assert any(name.startswith("update_rms_muon") for name in series.data_vars)
    assert {"residual_post", "attention_input", "mlp_hidden", "attention"} <= set(run.sites)
    assert run.attrs["config"]["optimizer.lr"] == 4e-3
    assert run.attrs["training_data_fingerprint"]


def test_the_optimizer_s_evidence_is_beside_the_probes(whole):
    run = open_run(whole)
    groups = {path.lstrip("/") for path in run.tree.groups}
    assert {"optimizer/update", "weights/embedding_rows", "weights/embedding_projection"} <= groups
    assert "optimizer:update" in run.beside


def test_no_two_variables_of_a_run_share_a_name_and_not_the_definition(whole):
    run = open_run(whole)
    assert all(site in SITES for site in run.sites)
    ratio = run["max_median_ratio"]
    assert (ratio.attrs["estimator"], ratio.dims) == (
        "max_median_ratio/1",
        ("site", "step", "layer", "stratum"),
    )
    definitions: dict[str, set[str]] = {}
    for node in run.tree.subtree:
        if node.path.startswith(("/snapshot/", "/series/")):
            continue  # the same variable at every site, which its definition names; run.logged(group)
        for name, variable in node.data_vars.items():
            definitions.setdefault(str(name), set()).add(str(variable.attrs.get("definition")))
    assert {name: texts for name, texts in definitions.items() if len(texts) > 1} == {}


def test_the_held_out_loss_is_the_model_s_own(whole):
    from osp_diag.trainer.data import open_data

    config = minute()
    data = open_data(config.data, batch_size=8, vocabulary_size=4096)
    ids = torch.as_tensor(data.held_out(config.probe.tokens))
    with torch.no_grad():
        logits = trained_model(latest(folder_of(whole)))(ids).logits.double()
    expected = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    assert open_run(whole).series["held_out_loss"].values[-1] == pytest.approx(float(expected), rel=1e-5)


def test_micro_batches_change_nothing(whole, tmp_path):
    train(minute(micro_batch_size=2), tmp_path / "run.zarr")
    np.testing.assert_allclose(
        open_run(tmp_path / "run.zarr").series["loss"], open_run(whole).series["loss"], rtol=1e-4
    )


def test_checkpointed_activations_change_nothing(whole, tmp_path):
    train(minute(activation_checkpointing=True), tmp_path / "run.zarr")
    assert_same_run(tmp_path / "run.zarr", whole)


def test_probing_does_not_change_the_training(whole, tmp_path):
    train(minute(probe__every=0), tmp_path / "run.zarr")
    ours, theirs = weights(tmp_path / "run.zarr"), weights(whole)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_probes_on_the_training_step_itself(tmp_path):
    run = train(minute(probe__on="training"), tmp_path / "run.zarr")
    assert list(run.steps) == [3, 6]


def test_an_interrupted_run_goes_on_exactly(whole, tmp_path):
    out = tmp_path / "run.zarr"

    def interrupt(step, steps, values):
        if step == 3:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt) as caught:
        train(minute(), out, progress=interrupt)
    assert "the state after step 4 is saved; --resume goes on" in caught.value.__notes__[0]
    train(minute(), out, resume=True)
    assert_same_run(out, whole)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_run_in_another_thread_leaves_signals_alone(tmp_path):
    thread = threading.Thread(target=train, args=(minute(steps=1), tmp_path / "run.zarr"))
    thread.start()
    thread.join()
    assert list(open_run(tmp_path / "run.zarr").steps) == [0, 1]


def test_a_finished_run_has_nothing_left_to_do(whole, tmp_path):
    out = copied(whole, tmp_path)
    train(minute(), out, resume=True)
    assert_same_run(out, whole)


def test_the_last_checkpoints_stay_and_a_ladder_of_older_ones(whole):
    names = sorted(entry.name for entry in folder_of(whole).iterdir())
    assert names == ["step-00000002", "step-00000004", "step-00000006"]


def test_a_checkpoint_of_another_config_is_refused_with_the_difference(whole):
    changed = minute(optimizer__lr=1e-3, model__norm="rmsnorm", divergence__window=50)
    with pytest.raises(TrainingError) as caught:
        train(changed, whole, resume=True)
    message = str(caught.value)
    assert "cannot be resumed under this one" in message
    assert "optimizer.lr: 0.004 → 0.001" in message
    assert 'model.norm: "ssnorm" → "rmsnorm"' in message
    assert "divergence.window: 100 → 50" in message  # a ring of so many losses is part of the state
    assert list(open_run(whole).steps) == [0, 3, 6]


def test_how_the_work_is_done_may_change_on_the_way(tmp_path):
    out = tmp_path / "run.zarr"
    with pytest.raises(KeyboardInterrupt):
        train(minute(), out, progress=lambda step, *_: step == 2 and signal.raise_signal(signal.SIGINT))
    run = train(minute(micro_batch_size=4, checkpoint__every=0, divergence__policy="skip"), out, resume=True)
    assert list(run.steps) == [0, 3, 6]


def test_an_earlier_run_is_not_written_over(whole):
    with pytest.raises(StoreError, match="overwrite"):
        train(minute(), whole)


def test_overwriting_forgets_the_checkpoints_too(whole, tmp_path):
    out = copied(whole, tmp_path)
    run = train(minute(steps=2, checkpoint__every=0), out, overwrite=True)
    assert list(run.steps) == [0, 2]
    assert [entry.name for entry in folder_of(out).iterdir()] == ["step-00000002"]


def test_checkpoints_without_their_run_are_not_taken_for_another_s(whole, tmp_path):
    out = copied(whole, tmp_path)
    shutil.rmtree(out)
    with pytest.raises(TrainingError, match=r"run.zarr is not there; give another --out, --overwrite, or"):
        train(minute(steps=1), out)
    with pytest.raises(TrainingError, match=r"run.zarr is not there; move the run back beside them"):
        train(minute(), out, resume=True)
    assert list(train(minute(steps=1), out, overwrite=True).steps) == [0, 1]


def test_an_unfinished_checkpoint_is_no_checkpoint(whole, tmp_path):
    out = copied(whole, tmp_path)
    (folder_of(out) / "step-00000009.part").mkdir()
    assert latest(folder_of(out)).step == 6
    CheckpointFolder(folder_of(out), CheckpointConfig())
    assert not (folder_of(out) / "step-00000009.part").exists()


def test_a_damaged_checkpoint_is_named(whole, tmp_path):
    out = copied(whole, tmp_path)
    (folder_of(out) / "step-00000006" / "state.json").write_text("{")
    with pytest.raises(TrainingError, match=r"step-00000006 is no checkpoint of this version .* delete it"):
        train(minute(), out, resume=True)


def poisoned(step_of_harm, monkeypatch):
    """Make the loss of one step infinite."""
    from osp_diag.trainer.loop import Training

    original = Training._loss

    def loss(self, batch):
        value = original(self, batch)
        return value / 0 if self.step + 1 == step_of_harm else value

    monkeypatch.setattr(Training, "_loss", loss)


def test_divergence_stops_with_the_state_before_it_saved(whole, tmp_path, monkeypatch):
    out = tmp_path / "run.zarr"
    with monkeypatch.context() as patch:
        poisoned(4, patch)
        with pytest.raises(
            DivergenceError, match=r"step 4 diverged \(loss inf.*the state after step 3 is saved"
        ):
            train(minute(), out)
    assert np.isinf(open_run(out).series["loss"].sel(step=4))
    train(minute(), out, resume=True)
    assert_same_run(out, whole)


@pytest.fixture
def lagging(monkeypatch):
    """Numbers reach the host two steps late, as on a GPU."""
    monkeypatch.setattr("osp_diag.trainer.loop.Scalars", lambda device: Scalars(device, lag=2))


def test_what_is_read_late_is_the_same(whole, lagging, tmp_path):
    train(minute(), tmp_path / "run.zarr")
    assert_same_run(tmp_path / "run.zarr", whole)


def test_an_interruption_that_is_noticed_late_loses_no_row(whole, lagging, tmp_path):
    out = tmp_path / "run.zarr"
    config = minute(steps=10, probe__every=10, checkpoint__every=10, probe__sites=("embedding",))
    train(config, tmp_path / "undisturbed.zarr")
    with pytest.raises(KeyboardInterrupt):
        train(config, out, progress=lambda step, *_: step == 1 and signal.raise_signal(signal.SIGINT))
    assert latest(folder_of(out)).step == 6
    train(config, out, resume=True)
    assert_same_run(out, tmp_path / "undisturbed.zarr")


def test_a_divergence_that_is_noticed_late_has_moved_nothing(whole, lagging, tmp_path, monkeypatch):
    out = tmp_path / "run.zarr"
    config = {"probe__every": 6, "checkpoint__every": 6}
    train(minute(**config), tmp_path / "undisturbed.zarr")
    with monkeypatch.context() as patch:
        poisoned(4, patch)
        with pytest.raises(DivergenceError, match=r"the state after step 3 is saved"):
            train(minute(**config), out)
    train(minute(**config), out, resume=True)
    assert_same_run(out, tmp_path / "undisturbed.zarr")


def test_probes_on_training_steps_keep_rows_in_order(lagging, tmp_path):
    run = train(minute(probe__on="training"), tmp_path / "run.zarr")
    assert list(run.series["step"].values) == [1, 2, 3, 4, 5, 6]
    assert np.isfinite(run.series["loss"]).all()


def test_divergence_can_be_passed_over(tmp_path, monkeypatch):
    poisoned(4, monkeypatch)
    run = train(minute(divergence__policy="skip"), tmp_path / "run.zarr")
    assert list(run.series["skipped_step"].dropna("step")["step"].values) == [4]
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run.zarr").values())


def test_a_skipped_step_moves_neither_weights_nor_moments(tmp_path, monkeypatch):
    out = tmp_path / "run.zarr"
    poisoned(4, monkeypatch)
    train(minute(steps=4, checkpoint__every=3, divergence__policy="skip"), out)
    before, after = (state_of(folder_of(out) / f"step-0000000{step}") for step in (3, 4))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def state_of(folder):
    """Every tensor of a checkpoint, read without our code."""
    reader = FileSystemReader(folder)
    state = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
    }
    with without_single_process_warnings():
        dcp.load(state, storage_reader=reader, no_dist=True)
    return state


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"probe__tokens": 16}, "probe.tokens=16 is less than one sequence .data.sequence_length=32."),
        ({"device": "cuda:9"}, "device='cuda:9' is not on this machine"),
        ({"device": "gpu"}, "device='gpu' is not on this machine"),
    ],
)
def test_bad_values_are_refused_before_anything_is_written(changes, message, tmp_path):
    with pytest.raises(UsageError, match=message):
        train(minute(**changes), tmp_path / "run.zarr")
    assert not list(tmp_path.iterdir())
