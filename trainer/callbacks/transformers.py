"""The probes in the Trainer of Hugging Face transformers."""

from __future__ import annotations

from typing import Any, Unpack

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from osp_diag.checkpoints.trainer_state import run_scalars
from osp_diag.probing.control import LoopActions
from osp_diag.probing.settings import keyword_form
from osp_diag.runs.run import Run
from osp_diag.trainer.recording import IN_TRAINING, HeldOut, Recording, RecordingOptions, RecordingSettings

__all__ = ["OutlierProbeCallback"]


class OutlierProbeCallback(TrainerCallback):
    """Probes the model while ``transformers.Trainer`` trains it.

    Scalars are kept when the Trainer logs them (``logging_steps``): the loss is then the mean since it logged
    last. If ``train`` raises, no event tells callbacks; use this one as a context manager around it, so that
    the run is closed at once and nothing of the probe stays on the model.

    Parameters
    ----------
    held_out, options : see :class:`osp_diag.trainer.recording.Recording`

    Examples
    --------
    >>> with OutlierProbeCallback(out="run.zarr", loggers=["wandb"]) as probe:  # doctest: +SKIP
    ...     Trainer(model, arguments, train_dataset=data, callbacks=[probe]).train()
    >>> probe.run["osp_excess_kurtosis"]  # doctest: +SKIP
    """

    @keyword_form(RecordingSettings(), IN_TRAINING)
    def __init__(self, held_out: HeldOut | None = None, **options: Unpack[RecordingOptions]) -> None:
        self.recording = Recording(held_out, **options)

    @property
    def run(self) -> Run:
        """What was recorded so far."""
        return self.recording.run

    def close(self) -> None:
        """Let go of the model and of the run; only needed where ``train`` raised."""
        self.recording.end()

    def __enter__(self) -> OutlierProbeCallback:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    # Events

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.recording.begin(
            kwargs["model"],
            state.global_step,
            last=state.max_steps,
            tokenizer=kwargs.get("processing_class"),
            config=args.to_sanitized_dict(),
            # The Trainer hands out the model within its compiled wrapper.
            eager=bool(args.torch_compile),
            checkpoints=args.output_dir,
        )
        if state.global_step == 0:
            self.recording.after_step(0)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.recording.open_step(state.global_step + 1)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.recording.close_step()

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.recording.after_step(state.global_step)
        self.recording.take_request(state.global_step, _actions(control))
        self._before_save(control)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.recording.scalars(state.global_step, run_scalars(logs or {}))
        self._before_save(control)

    def _before_save(self, control: TrainerControl) -> None:
        """The step's events come before its checkpoint; the last of them is not known, so each commits."""
        if control.should_save:
            self.recording.flush()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.recording.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.recording.end()


def _actions(control: TrainerControl) -> LoopActions:
    """What the Trainer does on request; its own settings say which checkpoints it deletes."""

    def checkpoint() -> str:
        control.should_save = True
        return "the Trainer saves a checkpoint after this step"

    def stop() -> str:
        control.should_training_stop = True
        return "the Trainer ends after this step"

    return LoopActions(checkpoint=checkpoint, stop=stop)
