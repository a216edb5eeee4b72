"""The probes in the Trainer of Lightning."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, Unpack

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import FSDPStrategy
from torch import Tensor, nn

from osp_diag.errors import UsageError
from osp_diag.probing.control import LoopActions
from osp_diag.probing.settings import keyword_form
from osp_diag.runs.run import Run
from osp_diag.trainer.parallel import gathered
from osp_diag.trainer.recording import IN_TRAINING, HeldOut, Recording, RecordingOptions, RecordingSettings

__all__ = ["OutlierProbe"]


class OutlierProbe(Callback):
    """Probes a model while ``lightning.Trainer`` trains it.

    Steps are ``Trainer.global_step``, which counts the updates of every optimizer.

    Loss, learning rate and gradient norm (before clipping; not under Lightning's FSDP strategy, where no rank
    has all gradients) are kept every ``log_every_n_steps`` steps of the Trainer, and ``val_loss`` after each
    validation as ``validation_loss``. Under several ranks the loss is the mean over them.

    Parameters
    ----------
    held_out, options : see :class:`osp_diag.trainer.recording.Recording`
    model : the language model's place in the LightningModule ("model", "net.decoder"); "" if it is one itself

    Raises
    ------
    UsageError : no module is at that place

    Examples
    --------
    >>> probe = OutlierProbe(tokens, out="run.zarr")  # doctest: +SKIP
    >>> Trainer(callbacks=[probe]).fit(module, loader)  # doctest: +SKIP
    """

    @keyword_form(RecordingSettings(), IN_TRAINING)
    def __init__(
        self, held_out: HeldOut | None = None, *, model: str = "model", **options: Unpack[RecordingOptions]
    ) -> None:
        self.recording = Recording(held_out, **options)
        self.place = model
        self._losses: list[Tensor] = []
        self._numbers: dict[str, Any] = {}
        self._last_step = 0

    @property
    def run(self) -> Run:
        """What was recorded so far."""
        return self.recording.run

    # Events

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model = self._model(pl_module)
        self._last_step = trainer.global_step
        self._losses, self._numbers = [], {}
        steps = trainer.estimated_stepping_batches
        self.recording.begin(
            model,
            trainer.global_step,
            last=int(steps) if math.isfinite(steps) else None,
            config=dict(pl_module.hparams),
            autocast=trainer.precision_plugin.forward_context,
            eager=getattr(pl_module, "_compiler_ctx", None) is not None,
            checkpoints=_folder(trainer),
        )
        if trainer.global_step == 0:
            self.recording.after_step(0)

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self.recording.open_step(trainer.global_step + 1)

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self.recording.close_step()
        if self._logs_next_step(trainer):
            self._numbers = {"learning_rate": optimizer.param_groups[0]["lr"]}
            if not isinstance(trainer.strategy, FSDPStrategy):
                self._numbers["gradient_norm"] = _gradient_norm(optimizer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        updated = step > self._last_step
        if self._is_logged(trainer, step if updated else step + 1):
            # Lightning divides the loss by the number of micro-batches, so that their sum is the mean.
            loss = outputs.get("loss") if isinstance(outputs, dict) else None
            self._losses += [loss.detach()] if isinstance(loss, Tensor) else []
        if not updated:
            return
        self._last_step = step
        self.recording.after_step(step)
        if self._is_logged(trainer, step):
            if self._losses:
                loss = torch.stack(self._losses).sum()
                self._numbers["loss"] = trainer.strategy.reduce(loss, reduce_op="mean")
            self.recording.scalars(step, {name: float(value) for name, value in self._numbers.items()})
        self._losses, self._numbers = [], {}
        self.recording.take_request(step, _actions(trainer))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Between micro-batches: what was trained on so far is measured, the validation is not.
        self.recording.close_step()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loss = trainer.callback_metrics.get("val_loss")
        if loss is not None:
            self.recording.scalars(trainer.global_step, {"validation_loss": float(loss)})

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.recording.flush()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.recording.end()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.recording.end()

    # Parts

    def _model(self, pl_module: LightningModule) -> nn.Module:
        try:
            return pl_module.get_submodule(self.place)
        except AttributeError as error:
            children = ", ".join(name for name, _ in pl_module.named_children()) or "none"
            raise UsageError(
                f"model={self.place!r}: {type(pl_module).__name__} has no such module; its own are {children}"
            ) from error

    def _logs_next_step(self, trainer: Trainer) -> bool:
        return self._is_logged(trainer, trainer.global_step + 1)

    @staticmethod
    def _is_logged(trainer: Trainer, step: int) -> bool:
        every: int = getattr(trainer, "log_every_n_steps", 0)
        return every > 0 and step % every == 0


def _actions(trainer: Trainer) -> LoopActions:
    """What the Trainer does on request; its own callbacks say which checkpoints they delete."""

    def checkpoint() -> str:
        path = Path(trainer.default_root_dir) / f"osp-diag-step={trainer.global_step}.ckpt"
        trainer.save_checkpoint(path)
        return f"{path} is saved"

    def stop() -> str:
        trainer.should_stop = True
        return "the Trainer ends after this step, unless min_steps or min_epochs go on"

    return LoopActions(checkpoint=checkpoint, stop=stop)


def _folder(trainer: Trainer) -> str:
    """Where the checkpoints of the Trainer lie; without a callback that saves some, those on request."""
    return getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir


def _gradient_norm(optimizer: torch.optim.Optimizer) -> Tensor:
    """‖g‖₂ over all parameters, on the device."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    # Gradients sharded by FSDP2 give a sharded norm.
    return gathered(norm)
