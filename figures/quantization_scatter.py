"""What models keep at few bits against what they are at full precision: Figure 1 of the OSP paper.

The paper's axes are the mean of ten tasks; here they are perplexities, so that good models lie at the lower
left and those that lose nothing on the diagonal. The other axis can be the OSP kurtosis or the tokens seen.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.analyses.few_bits import perplexity_at
from osp_diag.analyses.run_labels import labels_of
from osp_diag.errors import StoreError, UsageError
from osp_diag.figures._caption import caption
from osp_diag.figures._few_bits import results_and_remark
from osp_diag.figures._hidden_states import KURTOSIS, kurtosis_by_step
from osp_diag.figures._placement import SIX_RECIPES, InGallery
from osp_diag.figures.backend import AxisScale, Backend, Canvas
from osp_diag.figures.styles import Style
from osp_diag.quantizing.results import PLAIN_CONVENTION, ROUND_TO_NEAREST, UNQUANTIZED, notation
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

ALIASES = ("fig1",)
GALLERY = InGallery(
    SIX_RECIPES,
    "Models that lose nothing at 4 bits lie on the diagonal, as models this small nearly do.",
    place=10,
    width="one-column",
)
LABELS = {
    "perplexity": "perplexity at full precision",
    "kurtosis": "OSP kurtosis\nosp_excess_kurtosis/1",
    "tokens": "tokens seen in training",
}
_WIDE_RANGE = 10.0
"""Values that differ by more than this factor are drawn on a logarithmic axis."""

__all__ = ["ALIASES", "GALLERY", "draw", "prepare"]


def prepare(
    runs: list[Run],
    *,
    against: str = "perplexity",
    weight_bits: int = 4,
    activation_bits: int = 4,
    key_value_bits: int = UNQUANTIZED,
    method: str = ROUND_TO_NEAREST,
    convention: str = PLAIN_CONVENTION,
) -> xr.Dataset:
    """One point a run.

    Parameters
    ----------
    against : what is at full precision on the x axis: ``perplexity``, ``kurtosis`` (mean over hidden states
        at the run's last probe) or ``tokens`` (steps times tokens a step)
    weight_bits, activation_bits, key_value_bits : of the y axis
    method, convention : how weights and activations were rounded, as `osp-diag quantize` calls it

    Returns
    -------
    ``few_bits``, the perplexity at so many bits, and ``full``, what it is drawn against (run).
    """
    if against not in LABELS:
        raise UsageError(f"quantization_scatter: against is {', '.join(LABELS)}, not {against!r}")
    results, remark = results_and_remark(runs, method, convention)
    steps = [step_of(run) for run in runs]
    setting = (weight_bits, activation_bits, key_value_bits)
    bits = notation(*setting)
    few = [
        _perplexity(run, table, setting, method, convention) for run, table in zip(runs, results, strict=True)
    ]
    if against == "perplexity":
        full = [
            _perplexity(run, table, (UNQUANTIZED,) * 3, method, convention)
            for run, table in zip(runs, results, strict=True)
        ]
    elif against == "kurtosis":
        full = [float(kurtosis_by_step(run, "quantization_scatter")[1][-1]) for run in runs]
    else:
        full = [_tokens(run, step) for run, step in zip(runs, steps, strict=True)]
    dataset = xr.Dataset(
        {"full": ("run", full), "few_bits": ("run", few)}, coords={"run": labels_of(runs, steps)}
    )
    title = f"Perplexity at {bits} against {LABELS[against].partition(chr(10))[0]}"
    estimators = ["perplexity", *([KURTOSIS] if against == "kurtosis" else [])]
    dataset.attrs = {
        "title": title,
        "caption": caption(title, runs, steps, estimators, [remark]),
        "against": against,
        "bits": bits,
    }
    return dataset


def _perplexity(
    run: Run, results: xr.Dataset, setting: tuple[int, ...], method: str, convention: str
) -> float:
    value = perplexity_at(results, *setting)
    if np.isnan(value):
        bits = notation(*setting)
        way = "" if method == ROUND_TO_NEAREST else f" --method {method}"
        way += "" if convention == PLAIN_CONVENTION else f" --convention {convention}"
        raise StoreError(
            f"quantization_scatter: the run of {model_name(run.attrs)} holds no perplexity at {bits}; "
            f"measure it with `osp-diag quantize CHECKPOINT --run RUN --bits {bits}{way}`"
        )
    return value


def _tokens(run: Run, step: int) -> float:
    per_step = run.attrs.get("tokens_per_step")
    if not per_step:
        raise StoreError(
            f"quantization_scatter: the run of {model_name(run.attrs)} does not say how many tokens a step "
            "of training takes; draw it against perplexity or kurtosis"
        )
    return float(per_step) * step


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """Points with their names beside them."""
    x, y = dataset["full"].values, dataset["few_bits"].values
    inches = style.widths[width]
    canvas = backend.canvas(1, 1, width=inches, height=min(0.78 * inches, 3.6), style=style)
    x_scale, y_scale = _scale(x), _scale(y)
    same = dataset.attrs["against"] == "perplexity"
    if same:
        x_scale = y_scale = max(x_scale, y_scale)  # "log" if either is
    panel = canvas.panel(
        0,
        0,
        x_label=LABELS[dataset.attrs["against"]].replace("\n", ", "),
        y_label=f"perplexity at {dataset.attrs['bits']}",
        x_scale=x_scale,
        y_scale=y_scale,
    )
    colours = style.colours_of_runs(len(x))
    for name, across, up, colour in zip(dataset["run"].values, x, y, colours, strict=False):
        panel.scatter(np.array([across]), np.array([up]), label=str(name), colour=colour, texts=[str(name)])
    ends = {"x": _limits(x, x_scale), "y": _limits(y, y_scale)}
    if same:
        both = (min(ends["x"][0], ends["y"][0]), max(ends["x"][1], ends["y"][1]))
        panel.line(np.array(both), np.array(both), label="no loss", colour=style.grey, dash="dotted")
    for axis, (low, high) in ends.items():
        panel.limits(axis, low, high)  # type: ignore[arg-type]
    panel.legend()
    return canvas


def _scale(values: np.ndarray) -> AxisScale:
    finite = values[np.isfinite(values) & (values > 0)]
    return "log" if finite.size and finite.max() > _WIDE_RANGE * finite.min() else "linear"


def _limits(values: np.ndarray, scale: AxisScale) -> tuple[float, float]:
    """A margin of an eighth of the range on either side, on the axis as it is drawn."""
    finite = values[np.isfinite(values) & (values > 0 if scale == "log" else True)]
    if not finite.size:
        return 0.0, 1.0
    low, high = float(finite.min()), float(finite.max())
    if scale == "log":
        margin = (high / low) ** 0.125 if high > low else 1.1
        return low / margin, high * margin
    margin = (high - low) / 8 or max(abs(high), 1.0) / 8
    return low - margin, high + margin
