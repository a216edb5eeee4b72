"""The contract of an estimator: ``init / update / merge / finalise`` over a small mergeable state.

Two layers keep definitions apart from the work of reading activations:

* A :class:`Measurement` says which sums (or maxima, or minima) to take over an observation.
  Its state is a flat dictionary of small arrays, each with a declared way of combining, so that
  ``update`` and ``merge`` are written once, here, and are associative and commutative by
  construction. Raw sums are what the run store keeps.
* An :class:`Estimator` is one published definition of one number. It names the measurements that
  it needs and computes its outputs from their sums. Estimators that need the same measurement
  share it: the activations are read once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import numpy as np

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, Namespace, accumulator_dtype, namespace_of
from osp_diag.schema import STRATA

Combine = Literal["sum", "maximum", "minimum"]
Observes = Literal["activation", "heads", "attention", "weight", "routing", "product", "state", "gate"]
"""What an estimator looks at: activations of a site (or their gradients), the same by head, attention, a
weight matrix, which experts tokens are sent to, what a projection is given and gives, the state of a
recurrent mixer, or the two matrices that make a gated hidden state."""
State = dict[str, Array]

__all__ = [
    "Estimator",
    "Field",
    "Layout",
    "Measurement",
    "Observes",
    "Output",
    "Source",
    "State",
    "Suite",
    "measure_each",
    "merge_states",
]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """The static sizes of what is observed at one site.

    ``channels`` is the width d of the activations; for attention, ``head_channels`` is the width of
    one head, and ``key_value_heads`` ≤ ``heads`` under grouped-query attention. ``vocabulary`` is the
    number of token ids, 1 where ids are not known. For the weights of a projection, ``channels`` is what
    it takes in and ``output_channels`` what it gives. ``strata`` names the strata of tokens, ``all`` first.
    """

    channels: int = 1
    heads: int = 1
    key_value_heads: int = 1
    head_channels: int = 1
    tokens: int = 1
    vocabulary: int = 1
    output_channels: int = 1
    experts: int = 1
    strata: tuple[str, ...] = STRATA

    def size(self, dim: str) -> int:
        sizes = {
            "stratum": len(self.strata),
            "channel": self.channels,
            "head": self.heads,
            "key_value_head": self.key_value_heads,
            "head_channel": self.head_channels,
            "key_position": self.tokens,
            "token_position": self.tokens,
            "token_id": self.vocabulary,
            "output_channel": self.output_channels,
            "expert": self.experts,
        }
        width = dim.removeprefix("block_")
        if width.isdecimal():
            return -(-self.channels // int(width))
        if dim not in sizes:
            raise EstimatorError(
                f"dimension {dim!r} has no size in the layout; give it coordinates in `Measurement.coords`"
            )
        return sizes[dim]


@dataclass(frozen=True)
class Field:
    """One array of a state: its named dimensions and how two of them combine."""

    dims: tuple[str, ...]
    combine: Combine = "sum"

    @property
    def identity(self) -> float:
        return {"sum": 0.0, "maximum": -np.inf, "minimum": np.inf}[self.combine]


@dataclass(frozen=True)
class Source:
    """Where a definition is published, and who computes the same number."""

    citation: str
    url: str = ""


@dataclass(frozen=True)
class Output:
    """One finalised number with its labels. ``values`` has the dimensions ``dims`` last."""

    values: Array
    dims: tuple[str, ...] = ()
    unit: str = "1"
    definition: str = ""
    coords: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    floor: float | None = None
    ceiling: float | None = None


# Why sums and definitions are two things: docs/decisions.md, Estimators.
class Measurement(ABC):
    """Sums over an observation. Subclasses are frozen dataclasses, equal when they measure the same."""

    name: str

    reads_elements: ClassVar[bool] = False
    """Whether it looks at the activations themselves, beyond their row and channel reductions.

    What does not can be measured later, when the activations are gone.
    """

    reads_output_weight: ClassVar[bool] = False
    """Whether, of attention, it looks at the output projection, which is read for nothing else."""

    @abstractmethod
    def fields(self, layout: Layout) -> Mapping[str, Field]:
        """The state's arrays by name."""

    @abstractmethod
    def measure(self, observation: Any) -> Mapping[str, Array]:
        """What this observation adds to each field, on the observation's device."""

    def coords(self) -> Mapping[str, Sequence[Any]]:
        """Coordinate values of dimensions that :class:`Layout` does not size."""
        return {}

    def qualified_fields(self, layout: Layout) -> dict[str, Field]:
        return {f"{self.name}.{key}": value for key, value in self.fields(layout).items()}


class Estimator(ABC):
    """One published or clearly stated definition of one number (or one small family of them)."""

    name: ClassVar[str]
    version: ClassVar[int] = 1
    title: ClassVar[str]
    formula: ClassVar[str]
    unit: ClassVar[str] = "1"
    range: ClassVar[str]
    floor: ClassVar[str] = "none"
    ceiling: ClassVar[str] = "none"
    sources: ClassVar[tuple[Source, ...]]
    also_used_by: ClassVar[tuple[str, ...]] = ()
    observes: ClassVar[Observes] = "activation"
    sites: ClassVar[tuple[str, ...]] = ("*",)
    """Patterns of the sites where the definition applies by default."""
    optional: ClassVar[bool] = False
    """Left out of the default set (costly, or a control)."""
    family: ClassVar[str] = ""
    """A name that asks for several estimators at once, where they are one instrument."""

    @property
    def identifier(self) -> str:
        return f"{self.name}/{self.version}"

    @property
    @abstractmethod
    def measurements(self) -> tuple[Measurement, ...]:
        """What has to be summed over the data."""

    @abstractmethod
    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        """The outputs, from sums that may carry any leading axes (layers, steps)."""

    def init(self, layout: Layout, like: Array) -> State:
        """An empty state on ``like``'s backend and device."""
        return Suite((self,)).init(layout, like)

    def update(self, state: State, observation: Any) -> State:
        """``state`` with ``observation`` added. Pure: nothing is changed in place."""
        return Suite((self,)).update(state, observation)

    def merge(self, first: State, second: State) -> State:
        """The state of both data sets together: associative and commutative."""
        return Suite((self,)).merge(first, second)


def _combine(xp: Namespace, how: Combine, first: Array, second: Array) -> Array:
    # The state's dtype wins: it is the accumulator's, and increments may be narrower.
    second = xp.astype(second, first.dtype, copy=False)
    if how == "sum":
        return first + second
    return xp.maximum(first, second) if how == "maximum" else xp.minimum(first, second)


def merge_states(fields: Mapping[str, Field], first: State, second: State) -> State:
    """Combine two states field by field, as declared."""
    if not first:
        return dict(second)
    xp = namespace_of(next(iter(first.values())))
    return {key: _combine(xp, spec.combine, first[key], second[key]) for key, spec in fields.items()}


def measure_each(measurements: Sequence[Measurement], observation: Any) -> State:
    """What one observation adds to each field of some measurements, by "measurement.field"."""
    return {
        f"{measurement.name}.{key}": value
        for measurement in measurements
        for key, value in measurement.measure(observation).items()
    }


class Suite:
    """Several estimators over the same kind of observation, sharing their measurements."""

    def __init__(self, estimators: Sequence[Estimator]) -> None:
        self.estimators = tuple(estimators)
        by_name: dict[str, Measurement] = {}
        for estimator in self.estimators:
            for measurement in estimator.measurements:
                namesake = by_name.setdefault(measurement.name, measurement)
                if namesake != measurement:
                    raise EstimatorError(
                        f"two different measurements are named {measurement.name!r} "
                        f"({namesake} and {measurement}); give one of them another name"
                    )
        self.measurements = tuple(by_name.values())

    def fields(self, layout: Layout) -> dict[str, Field]:
        fields: dict[str, Field] = {}
        for measurement in self.measurements:
            fields |= measurement.qualified_fields(layout)
        return fields

    def coords(self) -> dict[str, Sequence[Any]]:
        coords: dict[str, Sequence[Any]] = {}
        for measurement in self.measurements:
            coords |= measurement.coords()
        return coords

    def shape(self, spec: Field, layout: Layout) -> tuple[int, ...]:
        coords = self.coords()
        return tuple(len(coords[dim]) if dim in coords else layout.size(dim) for dim in spec.dims)

    def init(self, layout: Layout, like: Array) -> State:
        xp = namespace_of(like)
        dtype = accumulator_dtype(xp, like)
        on_host = not hasattr(like, "device") or isinstance(like, np.ndarray)
        device = {} if on_host else {"device": like.device}
        return {
            key: xp.full(self.shape(spec, layout), spec.identity, dtype=dtype, **device)
            for key, spec in self.fields(layout).items()
        }

    def measure(self, observation: Any) -> State:
        """What one observation adds, before it is combined with a state."""
        return measure_each(self.measurements, observation)

    def opening(self, increment: State) -> State:
        """The state that holds one increment alone: what merging it into an empty state gives."""
        return {
            key: namespace_of(value).astype(value, accumulator_dtype(namespace_of(value), value))
            for key, value in increment.items()
        }

    def update(self, state: State, observation: Any) -> State:
        return merge_states(self.fields(observation.layout), state, self.measure(observation))

    def merge(self, first: State, second: State) -> State:
        """As :func:`merge_states`; the sizes of a layout do not matter to how fields combine."""
        return merge_states(self.fields(Layout()), first, second)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        outputs: dict[str, Output] = {}
        for estimator in self.estimators:
            for name, output in estimator.finalise(state, layout).items():
                if name in outputs:
                    raise EstimatorError(f"two estimators produce an output named {name!r}: rename one")
                outputs[name] = output
        return outputs
