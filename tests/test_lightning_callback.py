"""The callback in Lightning's Trainer, which trains a tiny Llama on CPU."""

from __future__ import annotations

from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import osp_diag
from osp_diag.errors import UsageError
from osp_diag.runs.writer import RunWriter
from osp_diag.trainer.callbacks.lightning import OutlierProbe
from tests.training_loops import (
    POSITIONS,
    WATCHED,
    Kept,
    assert_equal_weights,
    assert_same_runs,
    assert_step,
    assert_untouched,
    dropping_llama,
    held_out,
    largest,
    measured,
    token_ids,
)

pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{message}")
    for message in (
        # Lightning 2.6 asks torch in a way that torch 2.13 calls old.
        r"`isinstance\(treespec, LeafSpec\)` is deprecated:FutureWarning",
        # Advice.
        "The '(train|val)_dataloader' does not have many workers:UserWarning",
        "Checkpoint directory .* exists and is not empty:UserWarning",
    )
]


class Module(lightning.LightningModule):
    """Training as users write it; ``fails_after`` micro-batches it raises, between forward and backward."""

    def __init__(self, fails_after: int | None = None, dropout: float = 0.2) -> None:
        super().__init__()
        self.model = dropping_llama().train()
        for layer in self.model.model.layers:
            layer.self_attn.attention_dropout = dropout
        self.fails_after, self.losses = fails_after, []

    def training_step(self, batch, batch_index):
        loss = self.model(input_ids=batch, labels=batch).loss
        if self.fails_after is not None:
            self.fails_after -= 1
            if self.fails_after < 0:
                raise OSError("the disk is gone")
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, total_iters=6)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Plain(Module):
    """Nothing that the compiler stumbles over."""

    def training_step(self, batch, batch_index):
        return self.model(input_ids=batch, labels=batch).loss


class Validated(Module):
    def validation_step(self, batch, batch_index):
        self.log("val_loss", self.model(input_ids=batch, labels=batch).loss)


def rows(count: int, rank: int = 0, ranks: int = 1) -> torch.utils.data.DataLoader:
    """In order, two of all ranks' rows a batch."""
    return torch.utils.data.DataLoader(token_ids(count)[rank::ranks], batch_size=2 // ranks)


def trainer(folder: Path, callbacks=(), **options) -> lightning.Trainer:
    settings = {
        "max_steps": 6,
        "accelerator": "cpu",
        "devices": 1,
        "log_every_n_steps": 1,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": False,
    }
    return lightning.Trainer(default_root_dir=folder, callbacks=list(callbacks), **settings | options)


def fit(loop: lightning.Trainer, module: Module, data=None, **options) -> None:
    lightning.seed_everything(3, verbose=False)
    loop.fit(module, data or rows(24), **options)


def test_held_out_tokens_are_probed_and_training_does_not_notice(tmp_path):
    callback = OutlierProbe(held_out(), out=tmp_path / "run.zarr", every=2, **WATCHED)
    before, module, alone = measured(dropping_llama(), held_out()), Module(), Module()
    fit(trainer(tmp_path, [callback], gradient_clip_val=0.5), module)
    fit(trainer(tmp_path, gradient_clip_val=0.5), alone)
    assert_equal_weights(module, alone)
    assert_untouched(module)
    assert module.model.training
    run = callback.run
    assert run.steps.tolist() == [0, 2, 4, 6]
    assert run.attrs["checkpoint_folder"] == str(tmp_path)
    assert_step(run, 0, before)
    assert_step(run, 6, measured(module.model, held_out()))
    series = run.series.sel(step=range(1, 7))
    np.testing.assert_allclose(series["loss"], alone.losses, rtol=1e-6)
    np.testing.assert_allclose(series["learning_rate"], 0.01 * np.linspace(1, 0.1, 7)[:6])
    assert run.series["probe_seconds"].dropna("step").step.values.tolist() == [0, 2, 4, 6]


def test_the_gradient_norm_is_that_before_clipping(tmp_path):
    callback = OutlierProbe(held_out(), every=9, **WATCHED)
    module = Module(dropout=0.0)
    fit(trainer(tmp_path, [callback], max_steps=1, gradient_clip_val=1e-3), module)
    model = dropping_llama().eval()
    model(input_ids=token_ids(24)[:2], labels=token_ids(24)[:2]).loss.backward()
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    assert float(callback.run.series["gradient_norm"].sel(step=1)) == pytest.approx(float(norm), rel=1e-5)


def test_training_steps_are_probed_with_all_their_micro_batches(tmp_path):
    # Validation comes between the micro-batches of step 2 and is no part of it.
    callback = OutlierProbe(on="training", every=1, **WATCHED)
    module, before = Validated(dropout=0.0), dropping_llama()
    loop = trainer(tmp_path, [callback], accumulate_grad_batches=3, max_steps=2)
    fit(loop, module, rows(12), val_dataloaders=rows(2))
    assert_untouched(module)
    assert callback.run.steps.tolist() == [1, 2]
    count = callback.run.at("residual_post")["token_count"].sel(stratum="all")
    assert np.all(count == 6 * POSITIONS)
    assert_step(callback.run, 1, measured(before, token_ids(12)[:6]), rtol=1e-5)
    series = callback.run.series
    np.testing.assert_allclose(series["loss"], np.reshape(module.losses, (2, 3)).mean(axis=1), rtol=1e-6)
    assert series["validation_loss"].dropna("step").step.values.tolist() == [2]


def test_a_validation_within_a_step_is_not_measured(tmp_path):
    callback = OutlierProbe(on="training", every=1, **WATCHED)
    loop = trainer(tmp_path, [callback], accumulate_grad_batches=4, max_steps=1, val_check_interval=2)
    fit(loop, Validated(), rows(8), val_dataloaders=rows(2))
    count = callback.run.at("residual_post")["token_count"].sel(stratum="all")
    assert np.all(count == 4 * POSITIONS)  # the two micro-batches before it
    assert callback.run.series["validation_loss"].step.values.tolist() == [1]


@pytest.mark.parametrize("on", ["held_out", "training"])
def test_a_resumed_training_has_neither_gap_nor_duplicate(tmp_path, on):
    def loop(name: str) -> tuple[lightning.Trainer, OutlierProbe]:
        callback = OutlierProbe(
            held_out(), out=tmp_path / f"{name}.zarr", every=1, on=on, overwrite=True, **WATCHED
        )
        saving = ModelCheckpoint(tmp_path / name, every_n_train_steps=2, save_top_k=-1, filename="{step}")
        # Ours is last in the list, and Lightning yet runs it before the checkpoint's.
        return trainer(tmp_path, [saving, callback], enable_checkpointing=True), callback

    # Epochs of two steps, at whose ends are the checkpoints: Lightning takes up no epoch in its middle.
    whole, (training, kept) = Module(dropout=0.0), loop("whole")
    fit(training, whole, rows(4))
    training, lost = loop("killed")
    with pytest.raises(OSError, match="the disk is gone"):
        fit(training, Module(fails_after=5, dropout=0.0), rows(4))
    assert lost.run.steps[-1] == 5  # one more than the checkpoint
    again, (training, resumed) = Module(dropout=0.0), loop("killed")
    fit(training, again, rows(4), ckpt_path=tmp_path / "killed" / "step=4.ckpt")
    assert_equal_weights(again, whole)
    assert_same_runs(resumed.run, kept.run)
    assert resumed.run.attrs["resumed"][0]["after_step"] == 5


def test_what_was_recorded_is_committed_before_the_checkpoint(tmp_path):
    class Looking(ModelCheckpoint):
        """Looks, as a killed process leaves it, at what is on disk when a checkpoint has been written."""

        def _save_checkpoint(self, trainer, filepath) -> None:
            super()._save_checkpoint(trainer, filepath)
            self.found = osp_diag.open_run(tmp_path / "run.zarr")

    looking = Looking(tmp_path, every_n_train_steps=5, save_on_train_epoch_end=False)
    callback = OutlierProbe(held_out(), out=tmp_path / "run.zarr", every=3, **WATCHED)
    fit(trainer(tmp_path, [callback, looking], enable_checkpointing=True, max_steps=5), Module())
    assert looking.found.series["loss"].dropna("step").step.values.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("on", ["held_out", "training"])
def test_an_exception_leaves_the_run_whole_and_nothing_on_the_model(tmp_path, on):
    callback = OutlierProbe(held_out(), out=tmp_path / "run.zarr", on=on, every=1, **WATCHED)
    module = Module(fails_after=5)
    # The second micro-batch of step 3 fails, while the step is being measured.
    with pytest.raises(OSError, match="the disk is gone"):
        fit(trainer(tmp_path, [callback], accumulate_grad_batches=2), module)
    assert_untouched(module)
    assert callback.run.steps.tolist() == ([0, 1, 2] if on == "held_out" else [1, 2])
    assert callback.run.series["loss"].dropna("step").step.values.tolist() == [1, 2]
    RunWriter(tmp_path / "run.zarr", {}, overwrite=True).close()  # nobody holds it


def test_scalars_come_at_the_trainers_rhythm_and_loggers_at_the_probes(tmp_path):
    kept = Kept()
    callback = OutlierProbe(held_out(), every=3, loggers=kept, **WATCHED)
    fit(trainer(tmp_path, [callback], log_every_n_steps=2), Module())
    assert callback.run.series["loss"].dropna("step").step.values.tolist() == [2, 4, 6]
    assert list(kept.told) == [0, 3, 6]
    name = "osp_diag/largest_max_median_ratio"
    for step, values in kept.told.items():
        assert values[name] == pytest.approx(largest(callback.run, "residual_post", "max_median_ratio", step))


def test_held_out_tokens_run_in_the_trainers_precision(tmp_path):
    callback = OutlierProbe(held_out(), every=[0], **WATCHED)
    fit(trainer(tmp_path, [callback], precision="bf16-mixed", max_steps=1), Module())
    with torch.autocast("cpu", torch.bfloat16):
        expected = measured(dropping_llama(), held_out())
    assert_step(callback.run, 0, expected)


def test_a_compiled_module_is_measured(tmp_path):
    callback = OutlierProbe(on="training", every=[2], **WATCHED)
    fit(trainer(tmp_path, [callback], max_steps=2), torch.compile(Plain(), backend="eager"))
    count = callback.run.at("residual_post")["token_count"].sel(step=2, stratum="all")
    assert np.all(count == 2 * POSITIONS)


def test_a_model_elsewhere_is_asked_for(tmp_path):
    with pytest.raises(
        UsageError, match=r"model='net.decoder': Module has no such module; its own are model"
    ):
        fit(trainer(tmp_path, [OutlierProbe(held_out(), model="net.decoder")]), Module())
