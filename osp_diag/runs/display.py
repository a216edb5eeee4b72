"""How a run shows itself: a few lines of text, and a table for notebooks."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

import xarray as xr

from osp_diag.runs.headline import headline, of_all_tokens
from osp_diag.wording import listed, number

if TYPE_CHECKING:
    from osp_diag.runs.run import Run

__all__ = ["run_as_html", "run_as_text"]

_COLUMNS = (
    ("OSP excess kurtosis, mean", "osp_excess_kurtosis", "mean"),
    ("largest", "osp_excess_kurtosis", "max"),
    ("share of its ceiling, largest", "osp_excess_kurtosis_of_ceiling", "max"),
    ("max/median ratio, mean", "max_median_ratio", "mean"),
    ("largest |x|", "absolute_maximum", "max"),
)
"""Header, statistic and how it is taken over layers, all for the stratum ``all`` at the last step."""
_SIZES = (("number_of_layers", "layers"), ("hidden_size", "channels"))


def _at_last_step(run: Run, site: str, name: str) -> xr.DataArray | None:
    """A statistic by layer at the last step, stratum ``all``; None where the run lacks it."""
    if site not in run.sites or not len(run.steps):
        return None
    dataset = run.at(site)
    if name not in dataset.data_vars:
        return None
    values = of_all_tokens(dataset[name].isel(step=-1))
    return values.load() if values.dims == ("layer",) else None


def _facts(run: Run) -> list[tuple[str, str]]:
    """The lines that text and HTML have in common."""
    attrs = run.attrs
    size = [f"{attrs[key]} {unit}" for key, unit in _SIZES if key in attrs]
    architecture = [str(attrs["architecture"])] if "architecture" in attrs else []
    facts = [("model", _with(str(attrs.get("model_name", "unnamed")), architecture + size))]
    details = [f"BOS {attrs['bos']}"] if "bos" in attrs else []
    if "sequence_length" in attrs:
        details.append(f"sequences of {attrs['sequence_length']}")
    facts.append(("protocol", _with(str(attrs.get("protocol", "unknown")), details)))
    tokens = attrs.get("tokens")
    count = f"{tokens:,}" if isinstance(tokens, int) else str(tokens or "unknown number")
    source = f"{count} from {attrs['token_source']}" if "token_source" in attrs else count
    facts.append(("tokens", _with(source, [str(attrs[key]) for key in ("dtype",) if key in attrs])))
    steps = run.steps
    span = f": {steps[0]} to {steps[-1]}" if len(steps) > 1 else f": {steps[0]}" if len(steps) else ""
    facts.append(("steps", f"{len(steps)}{span}"))
    facts.append(("sites", f"{len(run.sites)}: {listed(run.sites, 8)}"))
    if run.absent_sites:
        facts.append(("absent", listed([f"{site} ({why})" for site, why in run.absent_sites.items()], 4)))
    if run.path is not None:
        facts.append(("path", str(run.path)))
    return facts


def _with(text: str, details: list[str]) -> str:
    return f"{text} ({', '.join(details)})" if details else text


def _headlines(run: Run) -> list[tuple[str, str]]:
    numbers = headline(run)
    lines = []
    if "absolute_maximum" in numbers:
        place = f"{numbers['absolute_maximum_site']}, layer {numbers['absolute_maximum_layer']}"
        lines.append(("largest |x|", f"{number(numbers['absolute_maximum'])} ({place})"))
    if "osp_excess_kurtosis" in numbers:
        over = f"mean over {numbers['osp_excess_kurtosis_tensors']} hidden states"
        lines.append(("OSP excess kurtosis", f"{number(numbers['osp_excess_kurtosis'])} ({over})"))
    return lines


def run_as_text(run: Run) -> str:
    """What ``repr(run)`` prints."""
    lines = _facts(run) + _headlines(run)
    width = max(len(label) for label, _ in lines)
    return "\n".join(["<osp_diag.Run>", *(f"  {label:<{width}}  {text}" for label, text in lines)])


def run_as_html(run: Run) -> str:
    """A self-contained table for notebooks; all text in it is escaped."""
    facts = "".join(
        f'<tr><th style="text-align:left">{escape(label)}</th>'
        f'<td style="text-align:left">{escape(text)}</td></tr>'
        for label, text in _facts(run) + _headlines(run)
    )
    rows = []
    for site in run.sites:
        cells = [_cell(run, site, name, how) for _, name, how in _COLUMNS]
        if any(cells):
            label_cell = f'<td style="text-align:left">{escape(site)}</td>'
            rows.append(label_cell + "".join(f"<td>{escape(cell)}</td>" for cell in cells))
    table = ""
    if rows:
        heads = "".join(f"<th>{escape(head)}</th>" for head in ("site", *(head for head, _, _ in _COLUMNS)))
        body = "".join(f"<tr>{row}</tr>" for row in rows)
        table = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    note = "<p>Over all tokens, at the last step; means and maxima over layers.</p>" if rows else ""
    return (
        f"<div><b>osp_diag run</b><table><tbody>{facts}</tbody></table>{table}{note}"
        f"<details><summary>All arrays</summary>{run.tree._repr_html_()}</details></div>"
    )


def _cell(run: Run, site: str, name: str, how: str) -> str:
    values = _at_last_step(run, site, name)
    if values is None or not values.size:
        return ""
    return number(float(values.mean() if how == "mean" else values.max()))
