"""The tokens on which methods look at activations: others than those that are evaluated."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Int64

from osp_diag.errors import UsageError
from osp_diag.probing.settings import TokenSettings
from osp_diag.tokens import TokenBatches, make_batches

if TYPE_CHECKING:
    from osp_diag.checkpoints import Checkpoint

__all__ = ["Calibration", "calibration_from", "calibration_of"]

FEWEST_TOKENS = 1024
"""With fewer, the second moments of a Linear's inputs say little of most of its channels."""
_WINDOW = 16
"""Tokens in a row that are the same text, where they occur twice."""
_SAME_TEXT = 0.5
"""Share of the calibration's windows in the evaluated tokens from which on it is refused …"""
_TOUCHES = 0.01
"""… and from which on a note says so."""


@dataclass(frozen=True)
class Calibration:
    """Token ids for methods that look at activations.

    Attributes
    ----------
    tokens
        of shape (sequence, position).
    source
        where they come from, in words.
    """

    tokens: Int64[np.ndarray, "sequence position"] = field(repr=False)
    source: str = "ids in hand"

    @property
    def description(self) -> str:
        """``32 × 512 tokens of the built-in text``."""
        sequences, length = self.tokens.shape
        return f"{sequences} × {length} tokens of {self.source}"

    @property
    def fingerprint(self) -> str:
        """Equal for equal tokens."""
        return make_batches(ids=self.tokens).fingerprint

    def overlap(self, evaluated: Int64[np.ndarray, "sequence position"]) -> float:
        """Share of the calibration's runs of 16 tokens that occur in the evaluated sequences, 0 to 1."""
        own, other = _windows(self.tokens), _windows(np.asarray(evaluated))
        return float(np.isin(own, other).mean()) if own.size else 0.0

    def note(self, evaluated: Int64[np.ndarray, "sequence position"]) -> str:
        """What is to be said where part of it is evaluated, too; else empty."""
        share = self.overlap(evaluated)
        if share < _TOUCHES:
            return ""
        return (
            f"{share:.0%} of the calibration text is in the text that is evaluated; methods that saw it look "
            "better than they are"
        )

    def refuse_overlap(self, evaluated: Int64[np.ndarray, "sequence position"]) -> None:
        """Refuse to calibrate on what is evaluated.

        Raises
        ------
        UsageError : most of the calibration is in the evaluated sequences
        """
        share = self.overlap(evaluated)
        if share > _SAME_TEXT:
            raise UsageError(
                f"{share:.0%} of the calibration text is in the text that is evaluated, which would make "
                "methods that saw it look better than they are; give another text (--calibration FILE)"
            )


def _windows(tokens: Int64[np.ndarray, "sequence position"]) -> np.ndarray:
    """A number for each run of 16 tokens of each sequence, equal for equal runs."""
    length = min(_WINDOW, tokens.shape[1])
    runs = np.lib.stride_tricks.sliding_window_view(tokens.astype(np.uint64), length, axis=1)
    factors = np.random.default_rng(0).integers(1, 2**63, length, dtype=np.uint64) | np.uint64(1)
    return (runs * factors).sum(-1, dtype=np.uint64).ravel()


def calibration_from(
    checkpoint: Checkpoint, source: str, settings: TokenSettings, evaluated: TokenBatches, tokens: int
) -> Calibration:
    """Calibration on a text of the user's own.

    Parameters
    ----------
    source : a UTF-8 file, or the text itself
    settings : of the evaluated tokens, whose sequences these resemble
    evaluated : the tokens that are evaluated
    tokens : how many

    Raises
    ------
    UsageError : it is too short, or what is evaluated
    TokenError : it cannot be made into tokens
    """
    length = evaluated.sequence_length
    own = replace(
        settings, text=source, dataset=None, split=None, text_column=None, ids=None, random_tokens=False,
        tokens=max(tokens, length), seq_len=length,
    )  # fmt: skip
    batches = own.batches(checkpoint)
    return _checked(batches.tokens, batches.source, evaluated.tokens)


def calibration_of(
    longer: Int64[np.ndarray, "sequence position"],
    source: str,
    evaluated: Int64[np.ndarray, "sequence position"],
) -> Calibration:
    """Calibration on what follows the evaluated tokens in their source.

    Parameters
    ----------
    longer : sequences of the source, of which the first are the evaluated ones

    Raises
    ------
    UsageError : too little is left
    """
    return _checked(longer[len(evaluated) :], f"{source}, behind those that are evaluated", evaluated)


def _checked(tokens: np.ndarray, source: str, evaluated: np.ndarray) -> Calibration:
    if tokens.size < min(FEWEST_TOKENS, evaluated.size):
        raise UsageError(
            f"the calibration text is too short: {tokens.size:,} tokens ({source}), and {FEWEST_TOKENS:,} "
            "are the fewest that say something; give a longer text (--calibration FILE), or fewer --tokens"
        )
    calibration = Calibration(tokens, source)
    calibration.refuse_overlap(evaluated)
    return calibration
