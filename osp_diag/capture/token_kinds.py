"""Kinds of tokens that a model has beside text: CLS, registers, patches, image tokens.

Which strata a run has is decided by them, once, before anything is measured.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from osp_diag.errors import CaptureError, UsageError
from osp_diag.schema import STRATA

__all__ = ["TokenKinds", "TokenPlaces", "token_kinds_of_words"]

TokenPlaces = int | Sequence[int] | Callable[[Tensor], Tensor] | EllipsisType
"""Where the tokens of a kind are: positions in the stream that enters the first block (from 0; negative ones
from its end; of each document where several are packed), a function of the token ids (batch, token) that
gives a bool tensor of that shape, or ``...`` for every token that no other kind claims."""

_REST = STRATA[-1]
_WRITING = (
    "write auto, none, or KIND=PLACES such as cls=0, register=1-4 (both ends belong to it) or patch=... (all "
    "other tokens)"
)


@dataclass(frozen=True)
class TokenKinds:
    """The kinds of a model's tokens, and the strata that follow from them.

    A token of two kinds is of the first. With ``...`` among them every token has a kind, and the strata are
    ``all`` and the kinds, the one of ``...`` last. Without it, what has no kind is ``first``, ``delimiter``
    or ``rest`` as in text.

    Parameters
    ----------
    places : kind → where its tokens are

    Raises
    ------
    UsageError : a kind is named like a stratum of text, two have ``...``, or places are none of the above
    """

    places: Mapping[str, TokenPlaces]

    def __post_init__(self) -> None:
        for kind, places in self.places.items():
            _check(kind, places)
        if sum(places is ... for places in self.places.values()) > 1:
            raise UsageError("token_kinds: two kinds have `...`; only one can be all the other tokens")

    @property
    def _remaining(self) -> str | None:
        """The kind of every token that no other claims."""
        return next((kind for kind, places in self.places.items() if places is ...), None)

    @property
    def has_remaining(self) -> bool:
        """Whether every token has a kind."""
        return self._remaining is not None

    @property
    def _claiming(self) -> tuple[str, ...]:
        return tuple(kind for kind, places in self.places.items() if places is not ...)

    @property
    def strata(self) -> tuple[str, ...]:
        """``all``, then what adds up to it, ordinary tokens last."""
        if self._remaining is not None:
            return (STRATA[0], *self._claiming, self._remaining)
        return (*STRATA[:-1], *self._claiming, _REST)

    def members(
        self, input_ids: Int[Tensor, "batch token"], start: int = 0
    ) -> list[Bool[Tensor, "batch token"]]:
        """Which tokens are of each kind but that of ``...``, in the order of :attr:`strata`.

        Parameters
        ----------
        input_ids : −1 where a token has no id
        start : position of the first column

        Raises
        ------
        CaptureError : a function gives no bool tensor of the ids' shape
        """
        claimed = torch.zeros_like(input_ids, dtype=torch.bool)
        members: list[Tensor] = []
        for kind in self._claiming:
            mine = _of_kind(kind, self.places[kind], input_ids, start) & ~claimed
            claimed = claimed | mine
            members.append(mine)
        return members

    def described(self) -> dict[str, str]:
        """Kind → where its tokens are, in words, to be recorded."""
        return {kind: _description(places) for kind, places in self.places.items()}


def token_kinds_of_words(words: Sequence[str]) -> Mapping[str, TokenPlaces] | Literal["auto"] | None:
    """Kinds as they are written on a command line: ``auto``, ``none``, or a ``KIND=PLACES`` each.

    Places are positions and ranges with both ends, ``0,5-8``, negative ones from the end, ``-1``; or ``...``
    for all other tokens. A word may hold several kinds, where ``,KIND=`` begins the next.

    Raises
    ------
    UsageError : a word is none of these, or names a kind twice
    """
    if list(words) in (["auto"], ["none"]):
        return "auto" if words[0] == "auto" else None
    if not words:
        raise UsageError(f"--token-kinds names none: {_WRITING}")
    kinds: dict[str, TokenPlaces] = {}
    for word in (part for text in words for part in re.split(r",(?=[^,=]+=)", text)):
        kind, _, places = word.partition("=")
        if kind in kinds:
            raise UsageError(f"--token-kinds names the kind {kind!r} twice; write all its places in one")
        kinds[kind] = ... if places == "..." else _positions_of(places, word)
    return kinds


def _positions_of(places: str, word: str) -> list[int]:
    positions: list[int] = []
    for part in places.split(","):
        ends = re.fullmatch(r"(-?\d+)(?:-(-?\d+))?", part)
        first, last = (int(ends[1]), int(ends[2] or ends[1])) if ends else (0, -1)
        if last < first or (first < 0 <= last):
            raise UsageError(f"--token-kinds {word!r}: {_WRITING}")
        positions += range(first, last + 1)
    return positions


def _check(kind: str, places: object) -> None:
    is_remaining = kind == _REST and places is ...
    if not isinstance(kind, str) or not kind.isidentifier() or (kind in STRATA and not is_remaining):
        raise UsageError(
            f"token_kinds: {kind!r} cannot be the name of a kind; take a word other than {', '.join(STRATA)} "
            "(`rest` may stand for `...`, all other tokens)"
        )
    if places is ... or callable(places) or _is_position(places):
        return
    if isinstance(places, Sequence) and not isinstance(places, str) and all(map(_is_position, places)):
        return
    raise UsageError(
        f"token_kinds: the places of {kind!r} are {places!r}; give positions (0, range(1, 5)), a function of "
        "the token ids, or `...` for all other tokens"
    )


def _is_position(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _of_kind(kind: str, places: TokenPlaces, ids: Tensor, start: int) -> Tensor:
    if callable(places):
        mine = places(ids)
        if not isinstance(mine, Tensor) or mine.dtype != torch.bool or mine.shape != ids.shape:
            found = f"{mine.dtype} {tuple(mine.shape)}" if isinstance(mine, Tensor) else type(mine).__name__
            raise CaptureError(
                f"token_kinds: the function of {kind!r} gave {found}; it must give a bool tensor of the ids' "
                f"shape {tuple(ids.shape)}"
            )
        return mine
    assert places is not ..., "it claims nothing itself"
    positions = [places] if isinstance(places, int) else places
    # Compared by runs, so that nothing is copied to the device.
    place = torch.arange(start, start + ids.shape[1], device=ids.device)
    end = start + ids.shape[1]
    mine = torch.zeros_like(place, dtype=torch.bool)
    for first, last in _runs(sorted({p if p >= 0 else p + end for p in positions})):
        mine = mine | ((place >= first) & (place <= last))
    return mine.expand(ids.shape)


def _runs(positions: Sequence[int]) -> list[tuple[int, int]]:
    """Sorted positions as (first, last) of each run without a gap."""
    runs: list[tuple[int, int]] = []
    for position in positions:
        if runs and position == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], position)
        else:
            runs.append((position, position))
    return runs


def _description(places: TokenPlaces) -> str:
    if places is ...:
        return "every other token"
    if callable(places):
        return str(places) if hasattr(places, "token") else f"by {getattr(places, '__qualname__', places)}"
    positions = sorted([places] if isinstance(places, int) else places)
    parts = [str(a) if a == b else f"{a} to {b}" for a, b in _runs(positions)]
    return f"position{'s' if len(positions) > 1 else ''} {', '.join(parts)}"
