"""The optimizers of a run as one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from osp_diag.errors import TrainingError
from osp_diag.probing.ranks import is_distributed
from osp_diag.trainer.config import OptimizerConfig, TrainConfig
from osp_diag.trainer.optimizers.adamw import adamw, adamw_step, adamw_update
from osp_diag.trainer.optimizers.muon import Muon
from osp_diag.trainer.optimizers.routes import Route, Routing
from osp_diag.trainer.optimizers.routing import named_trainable_parameters, route
from osp_diag.trainer.optimizers.second_order import SecondOrder
from osp_diag.trainer.optimizers.sharding import local, placement_of, sum_over_shards
from osp_diag.trainer.optimizers.squares import SquareSums, of_whole, square_sums

__all__ = ["Optimizers", "build_optimizer"]

State = dict[str, dict[str, dict[str, Tensor]]]


def build_optimizer(
    model: nn.Module, config: TrainConfig, *, process_group: ProcessGroup | None = None
) -> Optimizers:
    """Route the parameters of a model and make the optimizers that move them.

    Parameters
    ----------
    model : on its device, and sharded if it is to be (FSDP2, HSDP)
    config : of the run
    process_group : of the ranks that hold the same plain parameters, among which Muon shares out its work;
        None: all ranks, if there are several

    Raises
    ------
    UsageError, TrainingError : what is misrouted, missing or placed in an unknown way, by parameter name
    """
    if process_group is None and is_distributed():
        process_group = dist.group.WORLD
    return Optimizers(
        named_trainable_parameters(model), route(model, config), config.optimizer, process_group
    )


class Optimizers:
    """Several optimizers that step together, each over its own parameters.

    Parameters
    ----------
    parameters : trainable ones by name
    routing : which optimizer has which
    config : hyperparameters
    process_group : of the ranks that hold the same plain parameters; None: this process is alone

    Attributes
    ----------
    parameters, routing : as given
    groups : ``optimizer.role`` → (name, parameter) pairs; what :meth:`update_rms` speaks of
    muon, adamw, second_order : the optimizers, or None where no parameter goes to one
    """

    def __init__(
        self,
        parameters: Mapping[str, Tensor],
        routing: Routing,
        config: OptimizerConfig,
        process_group: ProcessGroup | None = None,
    ) -> None:
        self.parameters, self.routing = dict(parameters), routing
        self.groups: dict[str, list[tuple[str, Tensor]]] = {}
        for assignment in routing.routes:
            self.groups.setdefault(assignment.group, []).append(
                (assignment.name, self.parameters[assignment.name])
            )
        self._names = {parameter: name for name, parameter in self.parameters.items()}
        self._recording = self._is_recorded = False
        self._squares: dict[str, SquareSums] | None = None

        self.muon: Muon | None = None
        self.adamw: torch.optim.AdamW | None = None
        self.second_order: dict[str, SecondOrder] = {}
        for name in dict.fromkeys(assignment.optimizer for assignment in routing.routes):
            groups = self._parameter_groups(
                assignment for assignment in routing.routes if assignment.optimizer == name
            )
            if name == "muon":
                for group in groups:
                    group["params"] = [(self._names[value], value) for value in group["params"]]
                self.muon = Muon(
                    groups,
                    momentum=config.momentum,
                    nesterov=config.nesterov,
                    steps=config.newton_schulz_steps,
                    dtype=config.newton_schulz_dtype,
                    form=config.muon_form,
                    process_group=process_group,
                )
            elif name == "adamw":
                self.adamw = adamw(groups, config.betas, config.epsilon)
            else:
                self.second_order[name] = SecondOrder(name, self._names, groups, config)

    def _parameter_groups(self, routes: Iterable[Route]) -> list[dict[str, Any]]:
        """Parameter groups of one learning rate, decay and mesh: no kernel takes DTensors and plain ones."""
        groups: dict[Any, dict[str, Any]] = {}
        for assignment in routes:
            parameter = self.parameters[assignment.name]
            mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
            group = groups.setdefault(
                (assignment.lr, assignment.weight_decay, mesh, parameter.device, parameter.dtype),
                {
                    "params": [],
                    "lr": assignment.lr,
                    "weight_decay": assignment.weight_decay,
                    "initial_lr": assignment.lr,
                },
            )
            group["params"].append(parameter)
        return list(groups.values())

    @property
    def each(self) -> dict[str, torch.optim.Optimizer]:
        """The torch optimizers by name."""
        by_name: dict[str, torch.optim.Optimizer | None] = {"muon": self.muon, "adamw": self.adamw}
        by_name |= {name: second.optimizer for name, second in self.second_order.items()}
        return {name: optimizer for name, optimizer in by_name.items() if optimizer is not None}

    # Stepping

    def step(self, *, skip: Tensor | None = None) -> None:
        """Move every parameter once. Nothing waits on the host.

        Parameters
        ----------
        skip : a boolean scalar on the device; where it is true nothing moves and no state changes, whatever
            the gradients
        """
        self._is_recorded, self._squares = self._recording, None
        if self.muon is not None:
            self.muon.recording = self._recording
            self.muon.step(skip=skip)
        if self.adamw is not None:
            adamw_step(self.adamw, skip)
        for second in self.second_order.values():
            second.recording = self._recording
            second.step(skip)

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for optimizer in self.each.values():
            optimizer.zero_grad(set_to_none=True)

    def set_learning_rate(self, factor: float) -> None:
        """The learning rates of the next steps: each parameter's peak times ``factor``."""
        for optimizer in self.each.values():
            for group in optimizer.param_groups:
                group["lr"] = group["initial_lr"] * factor

    # What the last step did

    def record_updates(self, recording: bool) -> None:
        """Whether the next steps keep what :meth:`update_rms` and the evidence need of them."""
        self._recording = recording

    def update_rms(self) -> dict[str, Tensor]:
        """Group → root mean square of the last step's update; scalars on the device.

        The update is what the learning rate multiplies: W ← (1 − ηλ) W − η · update, so it is about 0.2 for
        matrices under Muon. Empty unless the last step was recorded. A collective where parameters are
        sharded, so that every rank has to ask.
        """
        # RMS = √(Σ u² / entries): each rank sums the rows that it holds, then the ranks their sums.
        squares, totals, placements = self._local_squares(), [], []
        members = [
            (group, name) for group, pairs in self.groups.items() for name, _ in pairs if name in squares
        ]
        for _, name in members:
            totals.append(squares[name].row.sum())
            placements.append(placement_of(name, self.parameters[name], None))
        sums, entries = dict[str, Tensor](), dict[str, int]()
        for (group, name), total in zip(members, sum_over_shards(totals, placements), strict=True):
            sums[group] = sums[group] + total if group in sums else total
            entries[group] = entries.get(group, 0) + self.parameters[name].numel()
        return {group: (square / entries[group]).sqrt() for group, square in sums.items()}

    def update_squares(self) -> dict[str, SquareSums]:
        """Parameter name → the last step's update, squared and summed over columns and over rows.

        Empty unless the last step was recorded. Small tensors on the device; a collective where parameters
        are sharded.
        """
        return of_whole(self._local_squares(), self.parameters)

    @torch.no_grad()
    def _local_squares(self) -> dict[str, SquareSums]:
        """The same of the rows that this rank holds."""
        if not self._is_recorded:
            return {}
        if self._squares is None:
            squares: dict[str, SquareSums] = {}
            if self.muon is not None:
                squares |= {self._names[value]: sums for value, sums in self.muon.last_update.items()}
            if self.adamw is not None:
                for group in self.adamw.param_groups:
                    for value in group["params"]:
                        squares[self._names[value]] = square_sums(adamw_update(self.adamw, group, value))
            for second in self.second_order.values():
                squares |= second.last_update
            self._squares = squares
        return self._squares

    # State

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer state on this rank."""
        tensors = (
            value
            for part in self.state_dict().values()
            for state in part.values()
            for value in state.values()
        )
        return sum(local(value).numel() * value.element_size() for value in tensors)

    def state_dict(self) -> State:
        """Optimizer → parameter name → tensors, sharded as their parameters are.

        There from the beginning and, save SOAP's and Shampoo's, the tensors themselves: reading a checkpoint
        into them restores the optimizer, :meth:`load_state_dict` does so for all.
        """
        state: State = {}
        if self.muon is not None:
            state["muon"] = {
                self._names[parameter]: {"momentum_buffer": self.muon.momentum_buffer(parameter)}
                for parameter in _parameters(self.muon)
            }
        if self.adamw is not None:
            state["adamw"] = {
                self._names[parameter]: dict(self.adamw.state[parameter])
                for parameter in _parameters(self.adamw)
            }
        return state | {name: second.states() for name, second in self.second_order.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> None:
        """Take over a state; the same parameters, shapes and optimizers have to be in it.

        Raises
        ------
        TrainingError : with the first of what is missing, left over or of another shape
        """
        current = self.state_dict()
        _check_fits(_flat(current), _flat(state))
        for name, second in self.second_order.items():
            second.load(state[name])
        for name in ("muon", "adamw"):
            for parameter, tensors in current.get(name, {}).items():
                for key, value in tensors.items():
                    if value is not state[name][parameter][key]:
                        value.copy_(state[name][parameter][key])


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _flat(state: Mapping[str, Mapping[str, Mapping[str, Tensor]]]) -> dict[str, Tensor]:
    return {
        f"{name}: {parameter}: {key}": value
        for name, part in state.items()
        for parameter, tensors in part.items()
        for key, value in tensors.items()
    }


def _check_fits(current: Mapping[str, Tensor], loaded: Mapping[str, Tensor]) -> None:
    problems = [f"{key} is missing" for key in current.keys() - loaded.keys()]
    problems += [f"{key} is not of this run" for key in loaded.keys() - current.keys()]
    problems += [
        f"{key} has shape {tuple(loaded[key].shape)}, not {tuple(current[key].shape)}"
        for key in current.keys() & loaded.keys()
        if loaded[key].shape != current[key].shape
    ]
    if problems:
        raise TrainingError(
            f"the optimizer state is another run's: {min(problems)} ({len(problems)} such differences); "
            "resume with the model and optimizer that saved it"
        )
