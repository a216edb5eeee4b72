"""``osp-diag figure``: pictures of runs."""

from __future__ import annotations

import ast
import json as json_format
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from osp_diag import figures
from osp_diag.errors import UsageError

VERB = "figure"
HELP = "draw a figure of one run or several"

FigureName = Annotated[str, tyro.conf.arg(metavar="NAME")]
Runs = Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN...")]
Options = tyro.conf.UseAppendAction[
    Annotated[tuple[str, ...], tyro.conf.arg(name="option", metavar="KEY=VALUE")]
]


def run(
    name: FigureName,
    runs: Runs,
    /,
    *,
    out: Path | None = None,
    option: Options = (),
    step: int | None = None,
    width: Literal["auto", "one-column", "two-column"] = "auto",
    style: str = "paper",
    json: bool = False,
) -> int:
    """Draw a figure of one run or several, which `osp-diag probe` or a training run wrote.

    The figures, with other names that they go by (fig1 to fig11 and table2 are the OSP paper's):
      {figures}

    The suffix of --out decides the format: .png, .pdf and .svg for a paper, .html for a page that turns
    and zooms and needs no network.

    Args:
        name: which figure.
        runs: the runs to draw, side by side.
        out: the file to write; by default NAME.png in the current folder.
        option: an option of the figure, such as layer=20; may be given several times.
        step: of training; the last one by default.
        width: of the paper's column.
        style: fonts and colours.
        json: print what was drawn as JSON.

    Examples:
        osp-diag figure depth_profile run.zarr --out depth.pdf
        osp-diag figure fig2 adam.zarr osp.zarr --option layer=20 --out surface.html
        osp-diag figure fig8 run.zarr --option 'sites=linear_input:*' --option layer=1,7,15,22
        osp-diag figure depth_profile adam.zarr osp.zarr --option arrange=overlaid"""
    options = dict(_parsed(entry) for entry in option)
    if step is not None:
        options["step"] = step
    path = out if out is not None else Path(f"{name}.png")
    figures.draw(name, runs, out=path, style=style, width=None if width == "auto" else width, **options)
    if json:
        print(
            json_format.dumps(
                {"figure": name, "out": str(path), "runs": [str(run) for run in runs]}, indent=2
            )
        )
    else:
        print(f"figure: {path}")
    return 0


def _figures() -> str:
    """The figures as lines of the help, from what their files say of themselves."""
    from osp_diag.figures._registry import summaries

    return "\n      ".join(
        f"{', '.join((name, *summary.aliases))}\n          {summary.line}"
        for name, summary in summaries().items()
    )


if run.__doc__:  # Python started with -OO has none
    run.__doc__ = run.__doc__.format(figures=_figures())


def _parsed(entry: str) -> tuple[str, Any]:
    """``layer=20`` → ("layer", 20); words stay words, and words with commas become several."""
    key, separator, text = entry.partition("=")
    if not separator or not key.strip().isidentifier():
        raise UsageError(f"--option {entry!r}: write KEY=VALUE, for example layer=20")
    return key.strip(), _value(text.strip())


def _value(text: str) -> Any:
    constants: dict[str, Any] = {"true": True, "false": False, "none": None}
    if text.lower() in constants:
        return constants[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return tuple(part.strip() for part in text.split(",")) if "," in text else text
