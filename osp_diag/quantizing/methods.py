"""The ways to quantize that papers compare, by name: how a model is rotated and its weights are rounded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from osp_diag.errors import UsageError
from osp_diag.wording import did_you_mean

__all__ = ["METHODS", "Method", "Rotation", "Rounding", "method_named"]

Rotation = Literal["none", "ffn-hadamard", "random", "learned"]
Rounding = Literal["nearest", "gptq"]


@dataclass(frozen=True)
class Method:
    """One way to quantize.

    Attributes
    ----------
    name
        on the command line and in results.
    rotation
        ``ffn-hadamard``: the input of down projections alone, as it runs (R4); ``random`` (QuaRot): the
        residual stream and each head's values by random Hadamard matrices, folded into the weights, with R4;
        ``learned`` (SpinQuant): the same, trained.
    rounding
        of the weights: to the nearest point, or by GPTQ.
    title
        in tables.
    """

    name: str
    rotation: Rotation
    rounding: Rounding
    title: str

    @property
    def calibrated(self) -> bool:
        """Whether it looks at activations on a text."""
        return self.rounding == "gptq" or self.rotation == "learned"

    @property
    def seeded(self) -> bool:
        """Whether it draws random numbers, by which its results differ."""
        return self.rotation in ("random", "learned")


METHODS = {
    method.name: method
    for method in (
        Method("rtn", "none", "nearest", "RTN"),
        Method("ffn-hadamard", "ffn-hadamard", "nearest", "RTN + FFN Hadamard"),
        Method("gptq", "none", "gptq", "GPTQ"),
        Method("ffn-hadamard+gptq", "ffn-hadamard", "gptq", "FFN Hadamard + GPTQ"),
        Method("quarot", "random", "gptq", "QuaRot"),
        Method("quarot-rtn", "random", "nearest", "QuaRot, RTN"),
        Method("spinquant", "learned", "gptq", "SpinQuant"),
        Method("spinquant-rtn", "learned", "nearest", "SpinQuant, RTN"),
    )
}


def method_named(name: str) -> Method:
    """The method of a name.

    Raises
    ------
    UsageError : there is no such method
    """
    if name not in METHODS:
        raise UsageError(f"there is no method {name!r} of quantization; {did_you_mean(name, METHODS)}")
    return METHODS[name]
