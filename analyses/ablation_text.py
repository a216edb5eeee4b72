"""The ablation table for a report (Markdown) and for a terminal (plain text)."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.wording import number

__all__ = ["as_markdown", "as_text"]

_WIDTH = 110
NONE = "–"

Column = tuple[str, Callable[[xr.Dataset], Any]]
"""A heading, and what a row has under it: one value or (mean, largest)."""


def _mean_and_largest(variable: str, **at: Any) -> Callable[[xr.Dataset], Any]:
    return lambda row: row[variable].sel(at).values


def _single(variable: str, **at: Any) -> Callable[[xr.Dataset], Any]:
    return lambda row: row[variable].sel(at).item()


def _sequence(stratum: str) -> dict[str, str]:
    return {"protocol": "sequence", "stratum": stratum}


_MEAN = {"reduction": "mean"}
OUTLIERS: tuple[Column, ...] = (
    ("kurtosis", _mean_and_largest("osp_kurtosis", **_sequence("all"))),
    ("/ floor", _single("osp_kurtosis_over_floor", **_sequence("all"), **_MEAN)),
    ("first token", _single("osp_kurtosis", **_sequence("first"), **_MEAN)),
    ("delimiters", _single("osp_kurtosis", **_sequence("delimiter"), **_MEAN)),
    ("rest", _single("osp_kurtosis", **_sequence("rest"), **_MEAN)),
    ("published protocol", _mean_and_largest("osp_kurtosis", protocol="osp-published", stratum="all")),
    ("max/median", _mean_and_largest("max_median_ratio", stratum="all")),
)
OTHERS: tuple[Column, ...] = (
    ("max |x| residual", _single("absolute_maximum", site="residual_post", reduction="largest")),
    ("max |x| down_proj input", _single("absolute_maximum", site="mlp_hidden", reduction="largest")),
    ("sink rate %", lambda row: 100 * row["sink_rate"].values),
    ("loss", _single("loss")),
    ("perplexity", _single("perplexity", precision="full")),
    ("perplexity W4A4", _single("perplexity", precision="W4A4")),
    ("tokens/s", _single("tokens_per_second")),
)


def as_markdown(table: xr.Dataset) -> str:
    """Markdown tables, a row a recipe (of perplexities at few bits two), and what the columns mean.

    Parameters
    ----------
    table : of :func:`osp_diag.analyses.ablation.ablation_table`
    """
    tables = [_cells(table, (*OUTLIERS, *OTHERS)), *_paper_cells(table)]
    texts = [
        "\n".join(
            [
                _markdown_line(heads),
                _markdown_line(["---", *["---:"] * (len(heads) - 1)]),
                *map(_markdown_line, rows),
            ]
        )
        for heads, rows in tables
    ]
    return "\n\n".join([*texts, "\n".join(f"- {note}" for note in _notes(table)) + "\n"])


def as_text(table: xr.Dataset) -> str:
    """Tables that fit a terminal, and under them what the columns mean."""
    tables = [*(_cells(table, columns) for columns in (OUTLIERS, OTHERS)), *_paper_cells(table)]
    blocks = [_aligned(heads, rows) for heads, rows in tables]
    notes = [
        textwrap.fill(note, _WIDTH, subsequent_indent="  ", break_on_hyphens=False) for note in _notes(table)
    ]
    return "\n\n".join([*blocks, "\n".join(notes)])


def _cells(table: xr.Dataset, columns: Sequence[Column]) -> tuple[list[str], list[list[str]]]:
    rows = []
    for label in table["recipe"].values:
        row = table.sel(recipe=label)
        rows.append([str(label), *(_cell(value(row)) for _, value in columns)])
    return ["recipe", *(name for name, _ in columns)], rows


def _paper_cells(table: xr.Dataset) -> list[tuple[list[str], list[list[str]]]]:
    """Table 2 of the OSP paper, two lines a recipe; nothing where it was not measured."""
    perplexity = table["paper_perplexity"]
    measured = perplexity.notnull().any(("ffn_hadamard", "bits"))
    if not measured.any():
        return []
    rows = [
        [
            str(recipe) if line == 0 else "",
            str(had),
            *(_number(v) for v in perplexity.sel(recipe=recipe, ffn_hadamard=had).values),
        ]
        for recipe in table["recipe"].values[measured.values]
        for line, had in enumerate(table["ffn_hadamard"].values)
    ]
    return [(["perplexity", "FFN Hadamard", *map(str, table["bits"].values)], rows)]


def _cell(value: Any) -> str:
    if np.ndim(value):
        mean, largest = map(_number, value)
        return mean if mean == NONE else f"{mean} ({largest})"
    return _number(value)


def _number(value: float) -> str:
    return NONE if np.isnan(value) else number(float(value))


def _markdown_line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _aligned(heads: list[str], rows: list[list[str]]) -> str:
    """Columns side by side, the first to the left, numbers to the right; long headings stacked."""
    stacked = [textwrap.wrap(head, 10, break_long_words=False) for head in heads]
    height = max(map(len, stacked))
    above = [[""] * (height - len(words)) + words for words in stacked]
    lines = [*(list(line) for line in zip(*above, strict=True)), *rows]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return "\n".join(
        "  ".join(
            [line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))]
        ).rstrip()
        for line in lines
    )


def _notes(table: xr.Dataset) -> list[str]:
    floors = sorted({float(value) for value in table["floor"].values if np.isfinite(value)})
    ceilings = sorted({float(value) for value in table["ceiling"].values if np.isfinite(value)})
    lengths = sorted({int(value) for value in table["sequence_length"].values})
    notes = [
        "kurtosis: osp_excess_kurtosis/1, mean over hidden states (largest of them); the floor, which noise "
        f"scores, is {_several(floors)}, the ceiling {_several(ceilings)}",
        "first token, delimiters, rest: the mean by stratum of tokens",
        "published protocol: the same when every token is a sequence of its own, as the released OSP script "
        "feeds them",
        "max/median, sink rate %: mean over layers (largest layer); max |x|: of all layers",
        f"sink rate: ε = {float(table['epsilon']):g}, first token, T = {_several(lengths)}",
        f"loss: {table['loss'].attrs['definition']}",
        f"{table.attrs['tokens']:,} held-out tokens. {table.attrs['quantization']}",
    ]
    if _paper_cells(table):
        notes.append(f"16-16-16 to 4-4-4: perplexity {table['paper_perplexity'].attrs['definition']}")
    probed = [
        str(row.recipe.item()) for row in _rows(table) if row.measured_on.item() != "exported checkpoint"
    ]
    if probed:
        notes.append(f"by the last probe of the run, not of an exported checkpoint: {' / '.join(probed)}")
    recipes: dict[str, list[str]] = {}
    for label, reason in zip(table["recipe"].values, table["absent"].values, strict=True):
        recipes.setdefault(str(reason), []).append(str(label))
    return notes + [
        f"{NONE} of {' / '.join(labels)}: {reason}" for reason, labels in recipes.items() if reason
    ]


def _rows(table: xr.Dataset) -> list[xr.Dataset]:
    return [table.isel(recipe=index) for index in range(table.sizes["recipe"])]


def _several(values: Sequence[float]) -> str:
    return " / ".join(map(number, values)) or NONE
