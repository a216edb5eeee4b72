"""Alignment of the gate and up projections of a gated MLP, neuron by neuron."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, accumulator_dtype, namespace_of, quotient
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Observes, Output, Source
from osp_diag.estimators.counts import maximum_or_nan
from osp_diag.schema import GATE_WEIGHT

__all__ = ["GateCosines", "GateObservation", "SwigluAlignment"]

ALIGNED = 0.5
"""From which |cos| on a neuron counts as aligned."""

_BLOCK_ELEMENTS = 2**22
"""Weights looked at together, so that float32 copies stay small."""


class GateObservation:
    """The gate and up projections of one MLP.

    Parameters
    ----------
    gate, up : (neuron, input), a neuron being a channel of the MLP's hidden state

    Raises :class:`~osp_diag.errors.EstimatorError` for shapes that differ, or are none of matrices.
    """

    def __init__(self, gate: Float[Any, "neuron input"], up: Float[Any, "neuron input"]) -> None:
        if len(gate.shape) != 2 or tuple(gate.shape) != tuple(up.shape) or 0 in gate.shape:
            raise EstimatorError(
                "gate and up projections are observed as (neuron, input) both, none of them 0; got "
                f"{tuple(gate.shape)} and {tuple(up.shape)}"
            )
        self.gate, self.up = gate, up
        self.layout = Layout(channels=gate.shape[0])


@dataclass(frozen=True)
class GateCosines(Measurement):
    """Cosine of each neuron's two rows; −Inf where one of them is zero, or holds NaN or Inf.

    A maximum, as all that is measured of weights: the same matrices, seen again, change nothing.
    """

    name = "gate_cosine"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"cosine": Field(("channel",), "maximum")}

    def measure(self, observation: GateObservation) -> Mapping[str, Array]:
        neurons, inputs = observation.gate.shape
        xp = namespace_of(observation.gate)
        height = max(1, _BLOCK_ELEMENTS // inputs)
        parts = [slice(start, min(start + height, neurons)) for start in range(0, neurons, height)]
        cosines = [_cosines(observation.gate[rows, :], observation.up[rows, :]) for rows in parts]
        return {"cosine": xp.concat(cosines)}


def _cosines(gate: Array, up: Array) -> Array:
    xp = namespace_of(gate)
    wide = accumulator_dtype(xp, gate)
    units, is_defined = [], None
    for rows in (gate, up):
        rows = xp.astype(rows, xp.float32)
        peak = xp.max(xp.abs(rows), axis=-1)
        is_whole = xp.isfinite(peak) & (peak > 0)
        is_defined = is_whole if is_defined is None else is_defined & is_whole
        # Divided by its largest entry first, so that no square leaves the range.
        units.append(rows / xp.where(is_whole, peak, xp.ones_like(peak))[:, None])
    first, second = units
    product = xp.sum(first * second, axis=-1, dtype=wide)
    squares = xp.sum(first * first, axis=-1, dtype=wide) * xp.sum(second * second, axis=-1, dtype=wide)
    cosine = product / xp.sqrt(xp.where(is_defined, squares, xp.ones_like(squares)))
    return xp.where(is_defined, xp.clip(cosine, -1.0, 1.0), xp.full_like(cosine, -xp.inf))


@dataclass(frozen=True)
class SwigluAlignment(Estimator):
    """|cos| between each neuron's rows of the gate and of the up projection: mean, largest, share above 0.5.

    Where the two rows of a neuron point the same way, or opposite ways, hidden = f(gate · x) · (up · x) grows
    with the square of x, and so do outliers at ``mlp_hidden``. Fishman et al. find the two to align over
    long trainings with weight decay; before, they are as unrelated as random vectors. Of every gated MLP,
    whatever its f. ``swiglu_alignment_cosine`` has the sign and every neuron, which is a channel of
    ``mlp_hidden``. Neurons with a row of zeros, or with NaN or Inf, are NaN and left out. Experts are not
    measured.
    """

    name: ClassVar[str] = "swiglu_alignment"
    title: ClassVar[str] = "Alignment of gate and up projections"
    formula: ClassVar[str] = "mean_i |cos(w_gate,i, w_up,i)| over neurons i"
    range: ClassVar[str] = "[0, 1]; cosines [−1, 1]"
    floor: ClassVar[str] = "√(2 / (πd)) of random rows of width d: 0.033 at 576, 0.018 at 2048"
    ceiling: ClassVar[str] = "1, every neuron's rows parallel or opposite"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "Fishman et al. 2024, Scaling FP8 Training to Trillion-Token LLMs",
            "https://arxiv.org/abs/2409.12517",
        ),
    )
    observes: ClassVar[Observes] = "gate"
    sites: ClassVar[tuple[str, ...]] = (GATE_WEIGHT,)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (GateCosines(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        cosine = state["gate_cosine.cosine"]
        xp = namespace_of(cosine)
        is_defined = cosine > -xp.inf
        zero = xp.zeros_like(cosine)
        size = xp.where(is_defined, xp.abs(cosine), zero)
        count = xp.sum(xp.astype(is_defined, cosine.dtype), axis=-1)
        largest = xp.where(count > 0, xp.max(size, axis=-1), xp.nan * count)
        # A neuron that is not defined comes behind one whose cosine is 0.
        order = xp.where(is_defined, size, zero - 1.0)
        neuron = xp.astype(xp.argmax(order, axis=-1), cosine.dtype)
        aligned = xp.sum(xp.astype(size > ALIGNED, cosine.dtype), axis=-1)
        return {
            "swiglu_alignment": Output(
                quotient(xp.sum(size, axis=-1), count), definition=self.formula, floor=0.0, ceiling=1.0
            ),
            "swiglu_alignment_max": Output(
                largest, definition="max_i |cos(w_gate,i, w_up,i)| over neurons i", floor=0.0, ceiling=1.0
            ),
            "swiglu_alignment_neuron": Output(
                xp.where(count > 0, neuron, largest),
                (),
                "channel",
                "the neuron of the largest |cos|, a channel of mlp_hidden",
            ),
            "swiglu_alignment_share": Output(
                quotient(aligned, count),
                definition=f"share of neurons with |cos(w_gate,i, w_up,i)| > {ALIGNED}",
                floor=0.0,
                ceiling=1.0,
            ),
            "swiglu_alignment_cosine": Output(
                maximum_or_nan(cosine),
                ("channel",),
                definition="cos(w_gate,i, w_up,i) of neuron i",
                floor=-1.0,
                ceiling=1.0,
            ),
        }
