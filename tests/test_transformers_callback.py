"""The callback in the Trainer of transformers, which trains a tiny Llama on CPU."""

from __future__ import annotations

import gc
from pathlib import Path

import numpy as np
import pytest
import torch

import osp_diag
from osp_diag.errors import StoreError, UsageError
from osp_diag.runs.writer import RunWriter
from osp_diag.trainer.callbacks import OutlierProbeCallback
from tests.tiny_checkpoints import byte_tokenizer
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
    logged_scalars,
    measured,
    token_ids,
    transformers,
)


class Rows(torch.utils.data.Dataset):
    def __init__(self, count: int) -> None:
        self.ids = token_ids(count)

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.ids[index], "labels": self.ids[index]}


class Failing(transformers.Trainer):
    """Fails after so many micro-batches, between forward and backward."""

    fails_after: int | None = None

    def compute_loss(self, *arguments, **options):
        if self.fails_after is not None and self.model.training:
            self.fails_after -= 1
            if self.fails_after < 0:
                raise OSError("the disk is gone")
        return super().compute_loss(*arguments, **options)


def trainer(
    folder: Path, callbacks=(), rows: Rows | None = None, *, fails_after: int | None = None, **options
) -> transformers.Trainer:
    """As a script makes it: a new model and Trainer, with random numbers from the beginning."""
    settings = {
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "dataloader_pin_memory": False,
    }
    arguments = transformers.TrainingArguments(output_dir=str(folder), **settings | options)
    data = {"train_dataset": rows or Rows(24), "eval_dataset": Rows(2)}
    made = Failing(dropping_llama(), arguments, callbacks=list(callbacks), **data)
    made.fails_after = fails_after
    return made


def test_held_out_tokens_are_probed_and_training_does_not_notice(tmp_path, capsys):
    callback = OutlierProbeCallback(held_out(), out=tmp_path / "run.zarr", every=2, **WATCHED)
    before = measured(dropping_llama(), held_out())
    loop = trainer(tmp_path, [callback])
    loop.train()
    alone = trainer(tmp_path)
    alone.train()
    assert_equal_weights(loop.model, alone.model)
    assert_untouched(loop.model)
    assert loop.model.training
    run = callback.run
    assert run.steps.tolist() == [0, 2, 4, 6]
    assert_step(run, 0, before)
    assert_step(run, 6, measured(loop.model, held_out()))
    history = [entry for entry in alone.state.log_history if "loss" in entry]
    series = run.series.sel(step=range(1, 7))
    np.testing.assert_array_equal(series["loss"], [entry["loss"] for entry in history])
    np.testing.assert_array_equal(series["gradient_norm"], [entry["grad_norm"] for entry in history])
    np.testing.assert_array_equal(series["learning_rate"], [entry["learning_rate"] for entry in history])
    seconds = run.series["probe_seconds"]
    assert seconds.dropna("step").step.values.tolist() == [0, 2, 4, 6]
    assert run.attrs["probed_on"] == "held_out"
    assert run.attrs["tokens"] == held_out().numel()


def test_training_steps_are_probed_with_all_their_micro_batches(tmp_path):
    # One step reads every row once, in three micro-batches, so that their order is no matter.
    callback = OutlierProbeCallback(on="training", every=[1, 3], **WATCHED)
    model_before = dropping_llama().train()
    loop = trainer(
        tmp_path, [callback], Rows(6), gradient_accumulation_steps=3, max_steps=3, learning_rate=0.0
    )
    loop.train()
    assert_untouched(loop.model)
    run = callback.run
    assert run.steps.tolist() == [1, 3]
    count = run.at("residual_post")["token_count"].sel(stratum="all")
    assert np.all(count == 6 * POSITIONS)
    # Before the first attention, whose dropout differs, the activations are those of these rows.
    expected = measured(model_before, Rows(6).ids).at("embedding").isel(step=0, drop=True)
    for step in (1, 3):
        np.testing.assert_allclose(
            run.at("embedding")["osp_excess_kurtosis"].sel(step=step),
            expected["osp_excess_kurtosis"],
            rtol=1e-5,
        )


def test_training_is_the_same_with_its_own_steps_probed(tmp_path):
    callback = OutlierProbeCallback(on="training", every=1, **WATCHED)
    loop = trainer(tmp_path, [callback], max_steps=3)
    loop.train()
    alone = trainer(tmp_path, max_steps=3)
    alone.train()
    assert_equal_weights(loop.model, alone.model)


@pytest.mark.parametrize("on", ["held_out", "training"])
def test_a_resumed_training_has_neither_gap_nor_duplicate(tmp_path, on):
    def loop(name: str, **options) -> tuple[transformers.Trainer, OutlierProbeCallback]:
        callback = OutlierProbeCallback(
            held_out(), out=tmp_path / f"{name}.zarr", every=1, on=on, overwrite=True, **WATCHED
        )
        saving = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 3}
        return trainer(tmp_path / name, [callback], **saving, **options), callback

    whole, kept = loop("whole")
    whole.train()
    killed, lost = loop("killed", fails_after=5)
    with pytest.raises(OSError, match="the disk is gone"):
        killed.train()
    lost.close()
    assert lost.run.steps[-1] == 5  # one more than the checkpoint
    again, resumed = loop("killed")
    again.train(resume_from_checkpoint=True)
    assert_equal_weights(again.model, whole.model)
    assert_same_runs(resumed.run, kept.run)
    assert kept.run.series["validation_loss"].dropna("step").step.values.tolist() == [3, 6]
    assert resumed.run.attrs["resumed"][0]["after_step"] == 5


def test_what_was_recorded_is_committed_before_the_checkpoint(tmp_path):
    class Killed(transformers.TrainerCallback):
        """Looks, as a killed process leaves it, at what is on disk when a checkpoint has been written."""

        found: osp_diag.Run

        def on_save(self, args, state, control, **kwargs) -> None:
            self.found = osp_diag.open_run(tmp_path / "run.zarr")

    killed = Killed()
    callback = OutlierProbeCallback(held_out(), out=tmp_path / "run.zarr", every=3, **WATCHED)
    # Ours comes last, so that its own on_save is too late.
    trainer(tmp_path, [killed, callback], save_strategy="steps", save_steps=5, max_steps=5).train()
    assert killed.found.series["loss"].dropna("step").step.values.tolist() == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("on", ["held_out", "training"])
def test_an_exception_leaves_the_run_whole_and_nothing_on_the_model(tmp_path, on):
    callback = OutlierProbeCallback(held_out(), out=tmp_path / "run.zarr", on=on, every=1, **WATCHED)
    # The second micro-batch of step 3 fails, while the step is being measured.
    loop = trainer(tmp_path, [callback], gradient_accumulation_steps=2, fails_after=5)
    with pytest.raises(OSError, match="the disk is gone"), callback:
        loop.train()
    assert_untouched(loop.model)
    assert callback.run.steps.tolist() == ([0, 1, 2] if on == "held_out" else [1, 2])
    assert callback.run.series["loss"].dropna("step").step.values.tolist() == [1, 2]
    RunWriter(tmp_path / "run.zarr", {}, overwrite=True).close()  # nobody holds it


def test_an_exception_is_cleaned_up_after_when_the_trainer_goes(tmp_path):
    callback = OutlierProbeCallback(on="training", out=tmp_path / "run.zarr", every=1, **WATCHED)
    loop = trainer(tmp_path, [callback], gradient_accumulation_steps=2, fails_after=3)
    with pytest.raises(OSError, match="the disk is gone"):
        loop.train()
    model = loop.model
    del loop, callback
    gc.collect()
    assert_untouched(model)
    run = osp_diag.open_run(tmp_path / "run.zarr")
    assert run.series["loss"].dropna("step").step.values.tolist() == [1]


def test_training_again_in_the_same_process_begins_another_run(tmp_path):
    callback = OutlierProbeCallback(held_out(), out=tmp_path / "run.zarr", every=2, overwrite=True, **WATCHED)
    loop = trainer(tmp_path, [callback], fails_after=3)
    with pytest.raises(OSError, match="the disk is gone"):
        loop.train()
    loop.fails_after = None
    loop.train()
    assert callback.run.steps.tolist() == [0, 2, 4, 6]


def test_a_run_that_is_there_is_not_overwritten_unasked(tmp_path):
    options = {"out": tmp_path / "run.zarr", "every": 6, **WATCHED}
    trainer(tmp_path, [OutlierProbeCallback(held_out(), **options)], max_steps=1).train()
    with pytest.raises(StoreError, match="already holds a run"):
        trainer(tmp_path, [OutlierProbeCallback(held_out(), **options)], max_steps=1).train()


def test_a_compiled_model_is_measured(tmp_path):
    callback = OutlierProbeCallback(on="training", every=[2], **WATCHED)
    loop = trainer(tmp_path, [callback], max_steps=2, torch_compile=True, torch_compile_backend="eager")
    loop.train()
    count = callback.run.at("residual_post")["token_count"].sel(step=2, stratum="all")
    assert np.all(count == 2 * POSITIONS)


def test_built_in_text_is_probed_where_only_a_tokenizer_is_known(tmp_path):
    callback = OutlierProbeCallback(**WATCHED)
    loop = trainer(tmp_path, [callback], max_steps=3)
    loop.callback_handler.processing_class = byte_tokenizer()
    loop.train()
    run = callback.run
    assert run.steps.tolist() == [0, 3]  # the last one too
    assert run.attrs["tokens"] == 4096
    assert run.attrs["sequence_length"] == 64


def test_without_tokens_it_says_what_to_give(tmp_path):
    with pytest.raises(UsageError, match="no tokens to probe: give held_out"):
        trainer(tmp_path, [OutlierProbeCallback()]).train()
    with pytest.raises(UsageError, match=r"held_out has shape \(12,\); give token ids of shape"):
        trainer(tmp_path, [OutlierProbeCallback(held_out()[0])]).train()
    with pytest.raises(UsageError, match="on='eval': probe 'held_out' tokens or the 'training'"):
        OutlierProbeCallback(on="eval")
    with pytest.raises(UsageError, match="every=0"):
        OutlierProbeCallback(every=0)
    with pytest.raises(StoreError, match="training has not begun"):
        _ = OutlierProbeCallback().run


def test_loggers_are_told_the_headline_of_every_probe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    kept = Kept()
    both = {"held_out": held_out(), "every": 3, **WATCHED}
    first = OutlierProbeCallback(loggers=kept, **both)
    trainer(tmp_path, [first]).train()
    second = OutlierProbeCallback(loggers=["tensorboard"], run_name="adam", **both)
    trainer(tmp_path, [second]).train()
    assert list(kept.told) == [0, 3, 6]
    assert not kept.closed
    name = "osp_diag/largest_max_median_ratio"
    for step, values in kept.told.items():
        assert values[name] == pytest.approx(largest(first.run, "residual_post", "max_median_ratio", step))
    shown = logged_scalars(tmp_path / "runs" / "adam")
    assert set(shown) == set(kept.told[0])
    assert shown[name] == [(step, pytest.approx(values[name])) for step, values in kept.told.items()]
