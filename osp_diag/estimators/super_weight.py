"""Super weights: single entries of a down projection that make a layer's largest activation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxtyping import Float

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, namespace_of, quotient, take_along_last
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Observes, Output, Source
from osp_diag.estimators.counts import maximum_or_nan
from osp_diag.schema import DOWN_WEIGHT

__all__ = ["ProductObservation", "ProductPeaks", "SuperWeight"]

YU = Source("Yu et al. 2024, The Super Weight in Large Language Models", "https://arxiv.org/abs/2411.07191")

SPIKE = 50.0
"""From which multiple of the median channel's peak on the largest activation is a spike."""


class ProductObservation:
    """What a down projection was given and what it gave, of some sequences.

    Parameters
    ----------
    inputs : (batch, token, channel)
    outputs : (batch, token, row), bias included
    valid : (batch, token), 0 for padding

    A token with NaN or Inf on either side is left out.
    """

    def __init__(
        self,
        inputs: Float[Any, "batch token channel"],
        outputs: Float[Any, "batch token row"],
        valid: Float[Any, "batch token"],
    ) -> None:
        if inputs.shape[:2] != outputs.shape[:2] or inputs.shape[:2] != valid.shape:
            raise EstimatorError(
                f"inputs {tuple(inputs.shape)}, outputs {tuple(outputs.shape)} and valid "
                f"{tuple(valid.shape)} are not of the same (batch, token)"
            )
        self.inputs, self.outputs, self.valid = inputs, outputs, valid
        self.layout = Layout(
            channels=inputs.shape[-1], output_channels=outputs.shape[-1], tokens=inputs.shape[1]
        )


@dataclass(frozen=True)
class ProductPeaks(Measurement):
    """The largest magnitude of each input and output channel, and whether both come on the same token.

    ``weight`` is the entry between the two channels with the largest; it is known when all data is, and
    until then −Inf.
    """

    name = "product_peak"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {
            "input": Field(("channel",), "maximum"),
            "output": Field(("output_channel",), "maximum"),
            "same_token": Field(()),
            "sequences": Field(()),
            "weight": Field((), "maximum"),
        }

    def measure(self, observation: ProductObservation) -> Mapping[str, Array]:
        xp = namespace_of(observation.inputs)
        magnitudes = [xp.abs(x) for x in (observation.inputs, observation.outputs)]
        per_token = [xp.astype(xp.max(magnitude, axis=-1), xp.float32) for magnitude in magnitudes]
        counted = (observation.valid > 0) & xp.isfinite(per_token[0]) & xp.isfinite(per_token[1])
        zero = [xp.zeros_like(magnitude[:1, :1, :1]) for magnitude in magnitudes]
        tops = [
            xp.astype(xp.max(xp.where(counted[..., None], m, z), axis=(0, 1)), xp.float32)
            for m, z in zip(magnitudes, zero, strict=True)
        ]
        at = [xp.argmax(xp.where(counted, peak, -xp.ones_like(peak)), axis=-1) for peak in per_token]
        holds = xp.astype(xp.any(counted, axis=-1), xp.float32)
        same = xp.astype(at[0] == at[1], xp.float32) * holds
        total = xp.sum(holds)
        return {
            "input": tops[0],
            "output": tops[1],
            "same_token": xp.sum(same),
            "sequences": total,
            "weight": xp.zeros_like(total) - xp.inf,
        }


def _position(values: Array) -> Array:
    xp = namespace_of(values)
    return xp.argmax(values, axis=-1)


@dataclass(frozen=True)
class SuperWeight(Estimator):
    """Row and column of a down projection whose output and input have the layer's largest activations.

    Yu et al. find super weights so: where the input of a layer's ``down_proj`` spikes in channel c and its
    output in channel r, the entry W_rc is one. They look at the spikes in a drawing, and from there go on
    with the entry set to 0. Here the entry of *every* layer is given, with its value, and counts as a super
    weight (``super_weight`` is 1) under this rule: the two maxima are on the same token in at least half of
    the sequences; the entry's product alone, |W_rc| max|x_c|, is at least half of max|y_r|; and max|y_r| is
    at least 50 times the median over output channels of theirs. A layer's second super weight is not seen
    before the first is taken out. Of experts there is none. The first condition says nothing where every
    token is fed as a sequence of its own (protocol osp-published), and is not known, so that ``super_weight``
    is NaN, where tokens are made one by one with a cache.
    """

    name: ClassVar[str] = "super_weight"
    title: ClassVar[str] = "Super weight of a down projection"
    formula: ClassVar[str] = "(r, c) = (argmax_i max_t |y_ti|, argmax_j max_t |x_tj|) of y = W_down x"
    range: ClassVar[str] = "0 or 1; row and column are channels, the value is any number"
    sources: ClassVar[tuple[Source, ...]] = (YU,)
    also_used_by: ClassVar[tuple[str, ...]] = (
        "Confusable with `weight_outliers`, which looks at the matrix alone.",
    )
    observes: ClassVar[Observes] = "product"
    sites: ClassVar[tuple[str, ...]] = (DOWN_WEIGHT,)

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (ProductPeaks(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        inputs, outputs = state["product_peak.input"], state["product_peak.output"]
        xp = namespace_of(inputs)
        weight = maximum_or_nan(state["product_peak.weight"])
        largest_input, largest_output = (maximum_or_nan(xp.max(x, axis=-1)) for x in (inputs, outputs))
        missing = xp.nan * xp.ones_like(largest_input)

        def channel(values: Array, top: Array) -> Array:
            return xp.where(top > 0, xp.astype(_position(values), values.dtype), missing)

        agreement = quotient(state["product_peak.same_token"], state["product_peak.sequences"])
        share = quotient(xp.abs(weight) * largest_input, largest_output)
        rank = (outputs.shape[-1] - 1) // 2
        index = xp.full_like(_position(outputs), rank)
        spike = quotient(largest_output, take_along_last(xp.sort(outputs, axis=-1), index))
        is_super = (agreement >= 0.5) & (share >= 0.5) & (spike >= SPIKE)
        flag = xp.astype(is_super, inputs.dtype)
        is_known = xp.isfinite(share) & (state["product_peak.sequences"] > 0)
        row, column = channel(outputs, largest_output), channel(inputs, largest_input)
        return {
            "super_weight": Output(
                xp.where(is_known, flag, missing),
                (),
                definition="1 if the entry at (row, column) is a super weight under the rule",
                floor=0.0,
                ceiling=1.0,
            ),
            "super_weight_value": Output(weight, (), definition="W_rc at (row, column)"),
            "super_weight_row": Output(row, (), "channel", "channel of the layer's largest |y| after W_down"),
            "super_weight_column": Output(column, (), "channel", "channel of the largest |x| before W_down"),
            "super_weight_share": Output(
                share, (), definition="|W_rc| max_t |x_tc| / max_t |y_tr|", floor=0.0
            ),
            "super_weight_spike": Output(
                spike, (), definition="max_t |y_tr| / lower median over i of max_t |y_ti|", floor=1.0
            ),
            "super_weight_same_token": Output(
                agreement,
                (),
                definition="share of sequences whose largest |x| and largest |y| are on the same token",
                floor=0.0,
                ceiling=1.0,
            ),
        }
