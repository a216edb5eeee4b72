"""The settings and methods of the tables of the OSP paper (Park et al. 2025, arXiv 2506.19697)."""

from __future__ import annotations

from dataclasses import dataclass

from osp_diag.errors import UsageError
from osp_diag.quantizing.setting import Setting

__all__ = ["TABLES", "PaperTable", "paper_table"]


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables, of one model: a perplexity for each method and setting.

    Attributes
    ----------
    number
        of the table.
    settings
        its columns.
    methods
        name → heading of its row.
    row_heading
        what the rows are.
    """

    number: int
    settings: tuple[Setting, ...]
    methods: dict[str, str]
    row_heading: str


_COLUMNS = ("16-16-16", "4-8-16", "4-8-8", "4-4-16", "4-4-4")

TABLES = {
    2: PaperTable(2, tuple(map(Setting.read, _COLUMNS)), {"rtn": "–", "ffn-hadamard": "yes"}, "FFN Hadamard"),
    4: PaperTable(
        4,
        (Setting(4, 4, 4),),
        {
            "rtn": "RTN",
            "ffn-hadamard": "+ FFN Hadamard",
            "ffn-hadamard+gptq": "+ GPTQ",
            "quarot": "QuaRot",
            "spinquant": "SpinQuant",
        },
        "method",
    ),
}
"""By number; both in the convention ``osp``."""


def paper_table(number: int) -> PaperTable:
    """The table of a number.

    Raises
    ------
    UsageError : there is no such table
    """
    if number not in TABLES:
        raise UsageError(f"--table {number}: give 2 or 4, the tables of the OSP paper that quantize models")
    return TABLES[number]
