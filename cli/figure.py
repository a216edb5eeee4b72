"""``osp-diag figure``: pictures of runs."""

from __future__ import annotations

import ast
import json as json_format
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

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

    The figures:
      depth_profile       magnitudes and a kurtosis by layer
      stratum_comparison  kurtosis and max/median by layer, of first, delimiter and other tokens
      estimator_disagreement  one model under every kurtosis, with noise floors and ceilings
      activation_surface  |activation| over channel and token (fig2; of every Linear: fig8, fig9)
      weight_surface      |W| over input and output channel (fig10, fig11)
      channel_map         which channels are hot, layer by layer
      channel_map_comparison  the channels of two models by layer, and their difference
      concentration_curves    how much energy sits in how few channels, by layer
      sink_map            which heads are attention sinks, layer by layer
      attention_map       where the queries of chosen heads look, by query and key
      qk_magnitude        |q| and |k| in a sink head (fig5 of the OSP paper)
      logit_densities     attention logits of the sink key and of others (fig6 of the OSP paper)
      sink_emergence      when heads become sinks, step by step
      sink_implementation what makes the sink of a head, by channel and rotary frequency
      kurtosis_dynamics   loss and kurtosis while training (fig3 and fig7 of the OSP paper)
      quantization_scatter  perplexity at 4 bits against full precision, or kurtosis (fig1)
      bit_width_sweep     perplexity by bits of weights and of activations (fig4)
      ablation_table      kurtosis and perplexity of several runs (table2)
      outlier_timeline    kurtosis by layer and step, with the step at which each layer leaves the noise

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
        osp-diag figure depth_profile adam.zarr osp.zarr --option arrange=overlaid
    """
    from osp_diag import figures

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


def _parsed(entry: str) -> tuple[str, Any]:
    """``layer=20`` → ("layer", 20); words stay words, and words with commas become several."""
    key, separator, text = entry.partition("=")
    if not separator or not key.strip().isidentifier():
        raise UsageError(f"--option {entry!r}: write KEY=VALUE, for example layer=20")
    return key.strip(), _value(text.strip())


def _value(text: str) -> Any:
    named: dict[str, Any] = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return tuple(part.strip() for part in text.split(",")) if "," in text else text
