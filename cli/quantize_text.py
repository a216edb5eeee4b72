"""What ``osp-diag quantize`` prints: rows with intervals, and the tables of the OSP paper."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import xarray as xr

from osp_diag.quantizing.methods import METHODS, method_named
from osp_diag.quantizing.results import QuantizedResult, perplexity_of, result_rows
from osp_diag.quantizing.setting import Setting
from osp_diag.quantizing.tables import PaperTable
from osp_diag.resampling import FEW_SEQUENCES
from osp_diag.wording import counted, number

__all__ = ["aligned", "as_rows", "as_text"]


def as_rows(results: xr.Dataset, notes: Sequence[str]) -> list[dict[str, object]]:
    """One dictionary a row, each with all notes; what is not finite is null, which JSON knows."""
    columns = {str(name): values.values.tolist() for name, values in results.data_vars.items()}
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return [
        {name: None if isinstance(v, float) and not math.isfinite(v) else v for name, v in row.items()}
        | {"notes": [*filter(None, [row["notes"]]), *notes]}
        for row in rows
    ]


def as_text(results: xr.Dataset, name: str, notes: Sequence[str], of_paper: PaperTable | None = None) -> str:
    """Lines for a terminal.

    Parameters
    ----------
    results : rows, the one without rounding among them
    name : of the model
    notes : one sentence each
    of_paper : the table that they are shown as, above the rows
    """
    rows = result_rows(results)
    first = rows[0]
    conventions = list(dict.fromkeys(row.convention for row in rows if not _setting(row).unquantized))
    lines = [
        f"{name}: perplexity of {first.tokens:,} tokens ({first.token_source}, sequences of "
        f"{first.sequence_length:,})" + (f", convention {' and '.join(conventions)}" if conventions else "")
    ]
    if of_paper is not None:
        lines += ["", *aligned(_paper_lines(rows, of_paper)), ""]
    lines += aligned(_row_lines(rows))
    if any(row.divergence_tokens not in (0, row.tokens) for row in rows):
        kept = max(row.divergence_tokens for row in rows)
        notes = [*notes, f"KL is of the first {kept:,} tokens, as many as fit on the disk (TMPDIR)"]
    sequences = first.tokens // (first.sequence_length - 1)
    if sequences < FEW_SEQUENCES:
        of_few = f"{counted(sequences, 'sequence')} alone: intervals by resampling them are too narrow"
        notes = [*notes, of_few]
    own = {f"{method_named(row.method).title}: {row.notes}": None for row in rows if row.notes}
    return "\n".join([*lines, *(f"Note: {note}" for note in (*own, *notes))])


def _row_lines(rows: Sequence[QuantizedResult]) -> list[list[str]]:
    full = next((row for row in rows if _setting(row).unquantized), None)
    lines = [["bits", "method", "perplexity", "95% interval", "× 16-16-16", "KL to 16-16-16"]]
    for row in rows:
        method = method_named(row.method)
        label = method.title + (f", seed {row.seed}" if method.seeded else "")
        value = perplexity_of(row.negative_log_likelihood)
        low, high = (
            perplexity_of(bound)
            for bound in (row.negative_log_likelihood_low, row.negative_log_likelihood_high)
        )
        if _setting(row).unquantized:
            lines.append([str(_setting(row)), "", number(value), _interval(low, high), "", ""])
            continue
        factor = (
            ""
            if full is None
            else number(math.exp(min(row.negative_log_likelihood - full.negative_log_likelihood, 700)))
        )
        divergence = "" if math.isnan(row.divergence) else f"{number(row.divergence)} nat"
        lines.append([str(_setting(row)), label, number(value), _interval(low, high), factor, divergence])
    return lines + _seed_lines(rows)


def _seed_lines(rows: Sequence[QuantizedResult]) -> list[list[str]]:
    """Of what was measured with several seeds the median, and from where to where they range."""
    lines = []
    for name in METHODS:
        for setting in dict.fromkeys(map(_setting, rows)):
            values = _perplexities(rows, name, setting)
            if len(values) > 1:
                label = f"{METHODS[name].title}, median of {len(values)} seeds"
                span = f"seeds {number(min(values))} to {number(max(values))}"
                lines.append([str(setting), label, number(float(np.median(values))), span, "", ""])
    return lines


def _paper_lines(rows: Sequence[QuantizedResult], table: PaperTable) -> list[list[str]]:
    """A line a method, a column a setting; of several seeds the median and the range."""
    lines = [[table.row_heading, *map(str, table.settings)]]
    for name, heading in table.methods.items():
        cells = []
        for setting in table.settings:
            values = _perplexities(rows, name, setting)
            text = number(float(np.median(values))) if values else "–"
            several = f" ({number(min(values))} to {number(max(values))})" if len(values) > 1 else ""
            cells.append(text + several)
        lines.append([heading, *cells])
    return lines


def _perplexities(rows: Sequence[QuantizedResult], method: str, setting: Setting) -> list[float]:
    """Of one method under one setting, by seed; without rounding all methods are one."""
    return [
        perplexity_of(row.negative_log_likelihood)
        for row in rows
        if _setting(row) == setting and (row.method == method or setting.unquantized)
    ]


def _setting(row: QuantizedResult) -> Setting:
    return Setting(row.weight_bits, row.activation_bits, row.key_value_bits)


def _interval(low: float, high: float) -> str:
    return "" if math.isnan(low) or math.isnan(high) else f"{number(low)} to {number(high)}"


def aligned(lines: list[list[str]]) -> list[str]:
    """Columns side by side, the first two of words to the left, numbers to the right."""
    used = [column for column in zip(*lines, strict=True) if any(column[1:])]
    widths = [max(map(len, column)) for column in used]
    texts = [
        not any(cell[:1].isdigit() for cell in column[1:]) or index == 0 for index, column in enumerate(used)
    ]
    return [
        "  "
        + "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, texts, strict=True)
        ).rstrip()
        for line in zip(*used, strict=True)
    ]
