"""How large the state of a recurrent mixer is after the last token of a sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, accumulator_dtype, namespace_of, quotient
from osp_diag.estimators.attention import channel_norm
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Observes, Output, Source
from osp_diag.estimators.counts import maximum_or_nan
from osp_diag.schema import MIXER_STATE

__all__ = ["MixerStateNorm", "MixerStateSums", "StateObservation"]


class StateObservation:
    """The recurrent state of one layer after the last token of some sequences.

    Parameters
    ----------
    state : (batch, …), any floating dtype: of four axes or more the second is heads, of fewer all is one head
    whole : (batch,) of 0 and 1: 1 for a sequence without padding, whose state is that of its last token

    Raises
    ------
    EstimatorError : a state of no elements, or another number of sequences
    """

    def __init__(self, state: Float[Any, "batch ..."], whole: Float[Any, " batch"]) -> None:
        shape = tuple(state.shape)
        if len(shape) < 2 or 0 in shape or tuple(whole.shape) != shape[:1]:
            raise EstimatorError(
                "states must be (batch, …), none of them 0, and `whole` (batch,); got "
                f"{shape} and {tuple(whole.shape)}"
            )
        xp = namespace_of(state)
        wide = accumulator_dtype(xp, state)
        heads = shape[1] if len(shape) > 3 else 1
        self.state = xp.reshape(xp.astype(state, wide), (shape[0], heads, -1))
        self.whole = xp.astype(whole, wide)
        self.layout = Layout(heads=heads, head_channels=self.state.shape[-1])


@dataclass(frozen=True)
class MixerStateSums(Measurement):
    """Over sequences: Σ and max of the state's norm, of each head's, Σ of its square, and counts."""

    name = "mixer_state"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {
            "norm": Field(()),
            "norm_maximum": Field((), "maximum"),
            "head_norm": Field(("head",)),
            "head_norm_maximum": Field(("head",), "maximum"),
            "mean_square": Field(()),
            "count": Field(()),
            "padded": Field(()),
            "nonfinite": Field(()),
        }

    def measure(self, observation: StateObservation) -> Mapping[str, Array]:
        state, whole = observation.state, observation.whole
        xp = namespace_of(state)
        finite = xp.astype(xp.all(xp.isfinite(state), axis=(1, 2)), state.dtype)
        counted = whole * finite
        state = xp.where(counted[:, None, None] > 0, state, xp.zeros_like(state))
        head = channel_norm(state)
        norm = xp.sqrt(xp.sum(head**2, axis=-1))
        none = -xp.inf * xp.ones_like(norm)
        elements = state.shape[1] * state.shape[2]
        return {
            "norm": xp.sum(norm),
            "norm_maximum": xp.max(xp.where(counted > 0, norm, none)),
            "head_norm": xp.sum(head, axis=0),
            "head_norm_maximum": xp.max(xp.where(counted[:, None] > 0, head, none[:, None]), axis=0),
            "mean_square": xp.sum(norm**2) / elements,
            "count": xp.sum(counted),
            "padded": xp.sum(1 - whole),
            "nonfinite": xp.sum(whole * (1 - finite)),
        }


@dataclass(frozen=True)
class MixerStateNorm(Estimator):
    """Frobenius norm of what a recurrent mixer carries on after the last token of a sequence.

    The whole state of a layer and each head's; its root mean square per element compares layers whose states
    differ in size. Of a mixer without heads (Mamba) all is one head. The norm grows with the length of the
    sequences where the mixer forgets little. Sequences with padding are left out, because whether padding
    enters the state depends on the model, and so are states with NaN or Inf; both are counted.
    """

    name: ClassVar[str] = "mixer_state_norm"
    title: ClassVar[str] = "Norm of a recurrent state"
    formula: ClassVar[str] = "mean over sequences of ‖S_T‖_F, S_T = the state after the last token T"
    unit: ClassVar[str] = "activation"
    range: ClassVar[str] = "[0, ∞)"
    floor: ClassVar[str] = "0, nothing is carried on"
    sources: ClassVar[tuple[Source, ...]] = (
        Source(
            "Gu & Dao 2023, Mamba: Linear-Time Sequence Modeling with Selective State Spaces (of the state)",
            "https://arxiv.org/abs/2312.00752",
        ),
    )
    observes: ClassVar[Observes] = "state"
    sites: ClassVar[tuple[str, ...]] = (MIXER_STATE,)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (MixerStateSums(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        sums = {name.removeprefix("mixer_state."): value for name, value in state.items()}
        count = sums["count"]
        xp = namespace_of(count)

        def output(values: Array, definition: str, dims: tuple[str, ...] = ()) -> Output:
            return Output(values, dims, self.unit, definition, floor=0.0)

        def number(values: Array, definition: str) -> Output:
            return Output(values, (), "sequence", definition, floor=0.0)

        return {
            self.name: output(quotient(sums["norm"], count), self.formula),
            "mixer_state_norm_max": output(
                maximum_or_nan(sums["norm_maximum"]), "the largest over sequences of ‖S_T‖_F"
            ),
            "mixer_state_rms": output(
                xp.sqrt(quotient(sums["mean_square"], count)),
                "√(mean over sequences and elements of S_T²)",
            ),
            "mixer_state_head_norm": output(
                quotient(sums["head_norm"], count[..., None]),
                "mean over sequences of ‖S_T‖_F of one head",
                ("head",),
            ),
            "mixer_state_head_norm_max": output(
                maximum_or_nan(sums["head_norm_maximum"]),
                "the largest over sequences of ‖S_T‖_F of one head",
                ("head",),
            ),
            "mixer_state_sequences": number(count, "sequences whose state was measured"),
            "mixer_state_padded_sequences": number(
                sums["padded"], "sequences left out because they have padding"
            ),
            "mixer_state_nonfinite_sequences": number(
                sums["nonfinite"], "sequences left out because their state has NaN or Inf"
            ),
        }
