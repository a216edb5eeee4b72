"""Bits of weights, activations, keys and values, as papers write them: W-A-KV."""

from __future__ import annotations

import re
from dataclasses import dataclass

from osp_diag.errors import UsageError

__all__ = ["CALIBRATION_TOKENS", "FEWEST_BITS", "MOST_BITS", "UNQUANTIZED", "Setting", "notation"]

UNQUANTIZED = 16
"""Bits at which a tensor stays as it is, as in the W-A-KV columns of papers."""
FEWEST_BITS, MOST_BITS = 2, 8
CALIBRATION_TOKENS = 16_384
"""On which methods look at activations by default: a sixteenth of what the OSP release takes, which two
cores would read for an hour."""

_DASHES = re.compile(r"(\d+)-(\d+)-(\d+)")
_LETTERS = re.compile(r"W(\d+)A(\d+)(?:KV(\d+))?", re.IGNORECASE)


@dataclass(frozen=True, order=True)
class Setting:
    """So many bits each, 2 to 8, or 16 for "as it is".

    Attributes
    ----------
    weight_bits
        of the weights of the blocks' Linears.
    activation_bits
        of the inputs of these Linears.
    key_value_bits
        of the keys and values that attention reads.

    Raises
    ------
    UsageError : bits that have no meaning
    """

    weight_bits: int = 4
    activation_bits: int = 4
    key_value_bits: int = UNQUANTIZED

    def __post_init__(self) -> None:
        for name in ("weight_bits", "activation_bits", "key_value_bits"):
            bits = getattr(self, name)
            if bits != UNQUANTIZED and not FEWEST_BITS <= bits <= MOST_BITS:
                raise UsageError(
                    f"{name}={bits}: give {FEWEST_BITS} to {MOST_BITS}, or {UNQUANTIZED} for none"
                )

    @classmethod
    def read(cls, text: str) -> Setting:
        """``4-4-16``, ``W4A4`` or ``W4A4KV4``.

        Raises
        ------
        UsageError : it is written otherwise, or has bits that have no meaning
        """
        match = _DASHES.fullmatch(text.strip()) or _LETTERS.fullmatch(text.strip())
        if match is None:
            raise UsageError(
                f"{text!r} is no setting; write 4-4-16 (bits of weights, activations, keys and values) or "
                "W4A4, W4A4KV4 …, where 16 leaves a tensor as it is"
            )
        weight, activation, key_value = match.groups()
        return cls(int(weight), int(activation), int(key_value or UNQUANTIZED))

    @property
    def unquantized(self) -> bool:
        """Whether nothing is rounded."""
        return self.bits == (UNQUANTIZED,) * 3

    @property
    def bits(self) -> tuple[int, int, int]:
        """Of weights, activations, keys and values."""
        return self.weight_bits, self.activation_bits, self.key_value_bits

    def __str__(self) -> str:
        """As the columns of the OSP paper's tables: ``4-4-16``."""
        return "-".join(map(str, self.bits))


def notation(weight_bits: int, activation_bits: int, key_value_bits: int = UNQUANTIZED) -> str:
    """A setting as papers write it: ``W4A4``, with ``KV4`` behind it where keys and values are rounded."""
    key_value_part = "" if key_value_bits == UNQUANTIZED else f"KV{key_value_bits}"
    return f"W{weight_bits}A{activation_bits}{key_value_part}"
