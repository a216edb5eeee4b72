"""What a sweep measures: methods under settings, and how far it is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from osp_diag.errors import UsageError
from osp_diag.quantizing.conventions import convention_named
from osp_diag.quantizing.methods import method_named
from osp_diag.quantizing.results import PLAIN_CONVENTION, ROUND_TO_NEAREST
from osp_diag.quantizing.setting import Setting

__all__ = ["SINGLE_SWEEPS", "Case", "Progress", "cases_of"]

SINGLE_SWEEPS = (
    Setting(16, 16),
    *(Setting(bits, 16) for bits in (8, 6, 5, 4, 3)),
    *(Setting(16, bits) for bits in (8, 6, 5, 4)),
    Setting(8, 8), Setting(4, 8), Setting(4, 4),
)  # fmt: skip
"""Weights alone, activations alone, and the three that papers report of both."""


@dataclass(frozen=True)
class Case:
    """One row to measure.

    Attributes
    ----------
    setting
        bits of weights, activations, keys and values.
    method, convention
        by name.
    seed
        of the random numbers of rotations; 0 where a method draws none.
    """

    setting: Setting
    method: str = ROUND_TO_NEAREST
    convention: str = PLAIN_CONVENTION
    seed: int = 0

    def __str__(self) -> str:
        """As the progress bar calls it."""
        seed = f", seed {self.seed}" if method_named(self.method).seeded else ""
        return f"{self.setting} {method_named(self.method).title}{seed}"


@dataclass(frozen=True)
class Progress:
    """How far a sweep is: which case, and how many of its parts, such as layers or sequences."""

    case: str
    cases_done: int
    cases: int
    part: str = ""
    part_done: int = 0
    part_total: int = 0


def cases_of(
    settings: Sequence[Setting],
    methods: Sequence[str] = (ROUND_TO_NEAREST,),
    convention: str = PLAIN_CONVENTION,
    seeds: Sequence[int] = (0,),
) -> list[Case]:
    """Every method under every setting, those that draw random numbers once for each seed.

    16-16-16 is one case, whatever the method.

    Raises
    ------
    UsageError : no such method or convention, or nothing to measure
    """
    convention_named(convention)
    if not settings or not methods or not seeds:
        raise UsageError("a sweep needs at least one setting, method and seed, such as 4-4-16, rtn and 0")
    cases = []
    for name in methods:
        for setting in settings:
            if setting.unquantized:
                cases.append(Case(setting))
                continue
            own_seeds = seeds if method_named(name).seeded else (0,)
            cases += [Case(setting, name, convention, seed) for seed in own_seeds]
    return list(dict.fromkeys(cases))
