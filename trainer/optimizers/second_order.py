"""SOAP and Shampoo, through pytorch_optimizer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from osp_diag.errors import TrainingError, UsageError
from osp_diag.trainer.config import OptimizerConfig
from osp_diag.trainer.optimizers.squares import SquareSums, square_sums

__all__ = ["SecondOrder"]

PRECONDITION_EVERY = 10
"""Steps between new preconditioners, of both; SOAP's paper takes 10."""

RMSPROP = 3
"""The library's number for grafting RMSProp's size."""


class SecondOrder:
    """SOAP (Vyas et al. 2024, https://arxiv.org/abs/2409.11321) or blocked Shampoo (Gupta et al. 2018,
    https://arxiv.org/abs/1802.09568; Anil et al. 2020) in Muon's place.

    Shampoo's update takes its size from RMSProp's of the same layer (grafting), so that learning rates
    compare with AdamW's and Muon's. Both work on whole matrices, on every rank.

    Parameters
    ----------
    name : ``soap`` or ``shampoo``
    names : of the parameters, for messages and state
    groups : parameter groups (``params``, ``lr``, ``weight_decay``)
    config : betas, epsilon

    Attributes
    ----------
    optimizer : the library's
    recording : keep in ``last_update`` what the next steps do
    last_update : name → squares of the last step's update, summed. Only while recording

    Raises
    ------
    UsageError : pytorch_optimizer is not installed
    TrainingError : a parameter is sharded
    """

    def __init__(
        self, name: str, names: dict[Tensor, str], groups: list[dict[str, Any]], config: OptimizerConfig
    ) -> None:
        sharded = [
            names[value] for group in groups for value in group["params"] if isinstance(value, DTensor)
        ]
        if sharded:
            raise TrainingError(
                f"{name} works on whole matrices and {sharded[0]} is sharded; say parallel.mode=ddp"
            )
        self.names = names
        self.recording = False
        self.last_update: dict[str, SquareSums] = {}
        self._make = lambda: _library_optimizer(name, [dict(group) for group in groups], config)
        self.optimizer = self._make()

    @torch.no_grad()
    def step(self, skip: Tensor | None = None) -> None:
        """One step of the library's.

        Where ``skip`` is true (on the device) parameters and tensors of state are put back afterwards; the
        library's own count of steps, which says when preconditioners are due, goes on.
        """
        parameters = {self.names[value]: value for group in self._groups for value in group["params"]}
        before = {}
        if skip is not None or self.recording:
            before = {name: value.clone() for name, value in parameters.items()}
        state = {}
        if skip is not None:
            for name, value in parameters.items():
                if value.grad is not None:
                    value.grad.masked_fill_(skip, 0.0)
                state[name] = {key: tensor.clone() for key, tensor in _tensors(self.optimizer.state[value])}
        self.optimizer.step()
        if skip is not None:
            for name, value in parameters.items():
                value.copy_(torch.where(skip, before[name], value))
                for key, tensor in _tensors(self.optimizer.state[value]):
                    if key in state[name]:
                        tensor.copy_(torch.where(skip, state[name][key], tensor))
        self.last_update = {}
        if self.recording:
            for group in self._groups:
                for value in group["params"]:
                    name, decay_factor = self.names[value], 1 - group["lr"] * group["weight_decay"]
                    # W' = (1 − ηλ) W − η · update, solved for the update.
                    self.last_update[name] = square_sums((before[name] * decay_factor - value) / group["lr"])

    @property
    def _groups(self) -> list[dict[str, Any]]:
        return self.optimizer.param_groups

    def states(self) -> dict[str, dict[str, Tensor]]:
        """Parameter name → tensor by flat key; before the first step as they will be shaped, and 0 steps."""
        optimizer = self.optimizer
        if not optimizer.state:
            optimizer = self._make()
            _allocate(optimizer)
        states = {}
        for group in self._groups:
            steps = {"group_step": torch.tensor(group.get("step", 0))}
            for parameter in group["params"]:
                states[self.names[parameter]] = dict(_tensors(optimizer.state[parameter])) | steps
        return states

    def load(self, states: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take over what :meth:`states` gave."""
        steps = {name: int(state["group_step"]) for name, state in states.items()}
        if not any(steps.values()):
            # The library reads the first gradient into state that isn't there yet.
            self.optimizer.state.clear()
        else:
            if not self.optimizer.state:
                _allocate(self.optimizer)
            for parameter, state in self.optimizer.state.items():
                for key, value in _tensors(state):
                    value.copy_(states[self.names[parameter]][key])
        for group in self._groups:
            group["step"] = steps[self.names[group["params"][0]]]


def _library_optimizer(name: str, groups: list[dict[str, Any]], config: OptimizerConfig) -> Any:
    try:
        import pytorch_optimizer as library
    except ImportError as error:
        raise UsageError(
            f"{name} comes with the library pytorch_optimizer, which is not installed; "
            "pip install 'osp-diag[second-order]'"
        ) from error
    if name == "soap":
        return library.SOAP(
            groups, betas=config.betas, eps=config.epsilon, precondition_frequency=PRECONDITION_EVERY
        )
    return library.ScalableShampoo(
        groups,
        betas=config.betas,
        decoupled_weight_decay=True,
        moving_average_for_momentum=True,
        start_preconditioning_step=PRECONDITION_EVERY,
        preconditioning_compute_steps=PRECONDITION_EVERY,
        graft_type=RMSPROP,
        nesterov=False,
        use_svd=True,
    )


def _allocate(optimizer: Any) -> None:
    """Let the library make its state, as for gradients of zero."""
    for group in optimizer.param_groups:
        gradients = [parameter.grad for parameter in group["params"]]
        for parameter in group["params"]:
            parameter.grad = torch.zeros_like(parameter)
        with torch.no_grad():
            optimizer.init_group(group)
        for parameter, gradient in zip(group["params"], gradients, strict=True):
            parameter.grad = gradient


def _tensors(state: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor in nested dictionaries, lists and the library's own objects, by its path."""
    if isinstance(state, Tensor):
        yield path, state
        return
    items: Iterable[tuple[Any, Any]] = ()
    if isinstance(state, dict):
        items = state.items()
    elif isinstance(state, (list, tuple)):
        items = enumerate(state)
    elif type(state).__module__.startswith("pytorch_optimizer.") and not isinstance(state, Enum):
        items = vars(state).items()
    for key, value in items:
        yield from _tensors(value, f"{path}.{key}" if path else str(key))
