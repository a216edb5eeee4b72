"""How a fault gets into a training: what is done to it when it is built, to its batches, after its steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from itertools import count
from typing import Any, Literal
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from osp_diag.trainer import loop
from osp_diag.trainer.config import Destination, TrainConfig
from osp_diag.trainer.data import Batch
from osp_diag.trainer.data.batch import IGNORED
from osp_diag.trainer.model import llama
from osp_diag.trainer.optimizers import build
from osp_diag.trainer.optimizers.routes import Routing
from osp_diag.trainer.optimizers.routing import named_parameters

__all__ = [
    "Edit",
    "Planting",
    "Spot",
    "late_labels",
    "multiply_rates",
    "one_token",
    "projections_without_orthogonality",
    "random_tokens",
    "repeated_document",
    "reroute",
    "rotary_base",
    "round_weights",
    "set_decay",
    "shuffled_labels",
    "spike",
]

Axis = Literal["row", "column", "channel", "head", "all"]
BatchChange = Callable[[Batch, Batch, int, int], Batch]
"""(the batch, the first one since the onset, its number from there on, the vocabulary's size) → what is
trained on instead"""


def _nothing(_: Any) -> None:
    """What is done where nothing is."""


@dataclass(frozen=True)
class Planting:
    """A silent fault: no configuration tells of it.

    Attributes
    ----------
    begin : done once to the training, before its first step
    batch : puts another batch in the place of each
    code : makes the context in which the code computes something else
    """

    begin: Callable[[loop.Training], None] = _nothing
    batch: BatchChange | None = None
    code: Callable[[], AbstractContextManager[Any]] = nullcontext

    @contextmanager
    def planted(self) -> Iterator[None]:
        """Trainings that begin within the block have the fault."""
        with patch.object(loop, "Training", self._training()), self.code():
            yield

    def _training(self) -> type[loop.Training]:
        planting = self

        class FaultyTraining(loop.Training):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **options)
                planting.begin(self)
                if planting.batch is not None:
                    _change_batches(self, planting.batch)

        return FaultyTraining


def _change_batches(training: loop.Training, change: BatchChange) -> None:
    original, first = training.data.next_batch, list[Batch]()
    numbers, vocabulary = count(), training.config.model.vocabulary_size

    def next_batch() -> Batch:
        batch = original()
        first[:] = first or [batch]
        return change(batch, first[0], next(numbers), vocabulary)

    training.data.next_batch = next_batch  # type: ignore[method-assign]


# Weights


@dataclass(frozen=True)
class Spot:
    """What an edit touches.

    Attributes
    ----------
    parameter : by its whole name
    layer : of the parameter and of the site; None for the embedding
    index : of the row, column, channel or head
    """

    parameter: str
    layer: int | None
    index: int


@dataclass(frozen=True)
class Edit:
    """A part of a matrix or gain that is multiplied.

    Attributes
    ----------
    parameter : its name, with ``{layer}``
    axis : ``row`` or ``column`` of a matrix, ``channel`` of a gain, ``head``: the rows of one; ``all`` of it
    factor : by which it is multiplied
    site : where the change is first seen, in network order; None: at no site
    layer, index : with the seed 0; others draw theirs
    """

    parameter: str
    axis: Axis
    factor: float
    site: str | None
    layer: int | None = None
    index: int = 0

    def spot(self, config: TrainConfig, seed: int) -> Spot:
        """Which part of which parameter, of a training with this seed."""
        layer, index = self.layer, self.index
        if seed:
            # Of the name too: or else every edit of a seed would fall on the same layer.
            draw = np.random.default_rng([seed, *self.parameter.encode()])
            layer = None if layer is None else int(draw.integers(config.model.layers))
            index = 0 if self.axis == "all" else int(draw.integers(self._count(config)))
        return Spot(self.parameter.format(layer=layer), layer, index)

    def _count(self, config: TrainConfig) -> int:
        model = config.model
        if self.axis == "head":
            return model.number_of_key_value_heads if "k_proj" in self.parameter else model.heads
        outer = self.axis == "row" and ("embed_tokens" in self.parameter or "lm_head" in self.parameter)
        # Of all other rows, columns and channels only those along the residual stream are edited.
        return model.vocabulary_size if outer else model.hidden_size

    def begin(self, config: TrainConfig, seed: int) -> Callable[[loop.Training], None]:
        """Multiplies the part."""
        spot = self.spot(config, seed)

        @torch.no_grad()
        def multiply(training: loop.Training) -> None:
            weight = named_parameters(training.model)[spot.parameter]
            width = config.model.head_size
            part = {
                "row": slice(spot.index, spot.index + 1),
                "channel": slice(spot.index, spot.index + 1),
                "head": slice(spot.index * width, (spot.index + 1) * width),
                "column": (slice(None), slice(spot.index, spot.index + 1)),
                "all": slice(None),
            }[self.axis]
            weight[part] *= self.factor

        return multiply


@torch.no_grad()
def projections_without_orthogonality(training: loop.Training) -> None:
    """Normal entries of variance 1/d: of the size of an orthogonal matrix, with singular values of 0 to 2."""
    generator = torch.Generator().manual_seed(training.config.seed)
    for name, weight in named_parameters(training.model).items():
        if name.endswith("embedding_projection.weight"):
            weight.copy_(torch.randn(weight.shape, generator=generator) / weight.shape[0] ** 0.5)


def round_weights(training: loop.Training) -> None:
    """After every update, every weight to the nearest bfloat16."""
    step = training.optimizers.step

    @torch.no_grad()
    def rounding_step(**options: Any) -> None:
        step(**options)
        for weight in training.model.parameters():
            weight.copy_(weight.bfloat16())

    training.optimizers.step = rounding_step  # type: ignore[method-assign]


# Optimizers


def multiply_rates(factor: float) -> Callable[[loop.Training], None]:
    """Every group's learning rate, in the optimizers alone."""

    def multiply(training: loop.Training) -> None:
        for optimizer in training.optimizers.each.values():
            for group in optimizer.param_groups:
                group["initial_lr"] *= factor

    return multiply


def set_decay(value: float) -> Callable[[loop.Training], None]:
    """Weight decay of every group that has any, in the optimizers alone."""

    def change(training: loop.Training) -> None:
        for optimizer in training.optimizers.each.values():
            for group in optimizer.param_groups:
                if group["weight_decay"]:
                    group["weight_decay"] = value

    return change


def reroute(pattern: str, destination: Destination) -> Callable[[], AbstractContextManager[Any]]:
    """Another optimizer moves these parameters than the configuration says."""
    route = build.route

    def rerouted(model: nn.Module, config: TrainConfig) -> Routing:
        routing = route(model, config)
        routes = tuple(
            replace(entry, optimizer=destination) if fnmatchcase(entry.name, pattern) else entry
            for entry in routing.routes
        )
        return replace(routing, routes=routes)

    return lambda: patch.object(build, "route", rerouted)


# The function


def rotary_base(theta: float) -> Callable[[], AbstractContextManager[Any]]:
    """The model rotates by another base than its configuration says."""
    rotation = llama.rotation
    return lambda: patch.object(
        llama, "rotation", lambda positions, head_size, _: rotation(positions, head_size, theta)
    )


# Batches


def random_tokens(batch: Batch, first: Batch, number: int, vocabulary: int) -> Batch:
    """Uniformly drawn ids, whose next tokens are the labels."""
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(vocabulary, (len(batch), batch.input_ids.shape[1] + 1), generator=generator)
    return replace(batch, input_ids=ids[:, :-1].contiguous(), labels=ids[:, 1:].contiguous())


def repeated_document(batch: Batch, first: Batch, number: int, vocabulary: int) -> Batch:
    """The first sequence of the first batch, in every place of every batch."""
    return first[[0] * len(batch)]  # type: ignore[index]


def one_token(batch: Batch, first: Batch, number: int, vocabulary: int) -> Batch:
    """The first batch is one token, over and over."""
    if number:
        return batch
    ids = torch.full_like(batch.input_ids, int(batch.input_ids[0, 0]))
    return replace(batch, input_ids=ids, labels=ids.clone())


def spike(batch: Batch, first: Batch, number: int, vocabulary: int) -> Batch:
    """Every label of the first batch is the last id of the vocabulary."""
    return batch if number else replace(batch, labels=torch.full_like(batch.labels, vocabulary - 1))


def late_labels(batch: Batch, first: Batch, number: int, vocabulary: int) -> Batch:
    """Labels one position late: the token after the next."""
    labels = torch.roll(batch.labels, -1, dims=1)
    labels[:, -1] = IGNORED
    return replace(batch, labels=labels)


def shuffled_labels(batch: Batch, first: Batch, number: int, vocabulary: int) -> Batch:
    """The labels of every sequence in another order."""
    order = torch.randperm(batch.labels.shape[1], generator=torch.Generator().manual_seed(number))
    return replace(batch, labels=batch.labels[:, order])
