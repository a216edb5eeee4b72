"""What "4 bits" means: the grids of weights, activations, keys and values, and how they are measured.

Two conventions: ``plain``, ranges from minima and maxima; and ``osp``, what the scripts released with
Outlier-Safe Pre-Training do (github.com/dmis-lab/Outlier-Safe-Pre-Training).
"""

from __future__ import annotations

from dataclasses import dataclass

from osp_diag.errors import UsageError
from osp_diag.quantizing.grid import Grid
from osp_diag.quantizing.results import OSP_CONVENTION, PLAIN_CONVENTION
from osp_diag.wording import did_you_mean

__all__ = ["CONVENTIONS", "OSP", "PLAIN", "Convention", "convention_named"]


@dataclass(frozen=True, kw_only=True)
class Convention:
    """How a setting is carried out.

    Attributes
    ----------
    name
        on the command line and in results.
    full_range, clip_search
        of the grids of weights: see :class:`~osp_diag.quantizing.grid.Grid`.
    heads_apart
        whether the input of attention's output projection has a grid for each head instead of one a token;
        its range, and that of values, then holds 0 only where they reach it.
    rotates_keys
        whether queries and keys are multiplied by a Hadamard matrix after the rotary embedding, wherever
        keys are rounded.
    sequence_length
        of the evaluated sequences, where the user asks for none; None: as everywhere.
    opening_tokens
        whether sequences begin with the tokenizer's opening tokens, where it has any.
    """

    name: str
    full_range: bool
    clip_search: bool
    heads_apart: bool
    rotates_keys: bool
    sequence_length: int | None
    opening_tokens: bool

    def weights(self, bits: int) -> Grid:
        """Symmetric, one for each output channel."""
        return Grid(bits=bits, symmetric=True, full_range=self.full_range, clip_search=self.clip_search)

    def activations(self, bits: int) -> Grid:
        """Of a Linear's input: asymmetric, one for each token."""
        return Grid(bits=bits, symmetric=False)

    def attention_output(self, bits: int, head_width: int) -> Grid:
        """Of the input of attention's output projection."""
        if not self.heads_apart:
            return self.activations(bits)
        return Grid(bits=bits, symmetric=False, group_size=head_width, zero_in_range=False)

    def keys(self, bits: int) -> Grid:
        """Of keys (batch, head, token, channel) as attention reads them: asymmetric, by token and head."""
        return Grid(bits=bits, symmetric=False)

    def values(self, bits: int) -> Grid:
        """Of values (batch, head, token, channel): asymmetric, by token and head."""
        return Grid(bits=bits, symmetric=False, zero_in_range=not self.heads_apart)


PLAIN = Convention(
    name=PLAIN_CONVENTION,
    full_range=True,
    clip_search=False,
    heads_apart=False,
    rotates_keys=False,
    sequence_length=None,
    opening_tokens=True,
)
OSP = Convention(
    name=OSP_CONVENTION,
    full_range=False,
    clip_search=True,
    heads_apart=True,
    rotates_keys=True,
    sequence_length=2048,
    opening_tokens=False,
)

CONVENTIONS = {convention.name: convention for convention in (PLAIN, OSP)}


def convention_named(name: str) -> Convention:
    """``plain`` or ``osp``.

    Raises
    ------
    UsageError : there is no such convention
    """
    if name not in CONVENTIONS:
        raise UsageError(
            f"there is no convention {name!r} of quantization; {did_you_mean(name, CONVENTIONS)}"
        )
    return CONVENTIONS[name]
