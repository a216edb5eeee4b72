"""What models can still do at few bits against what they can do as they are: Figure 1 of the OSP paper.

Both axes are the mean accuracy on ten tasks; models that lose nothing lie on the diagonal.
"""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.analyses.run_labels import labels_of
from osp_diag.analyses.task_scores import task_scores
from osp_diag.figures._caption import caption
from osp_diag.figures._placement import InGallery, InReport
from osp_diag.figures.backend import Backend, Canvas
from osp_diag.figures.styles import Style
from osp_diag.quantizing.setting import notation
from osp_diag.quantizing.tasks.groups import GROUPS
from osp_diag.runs.run import Run
from osp_diag.runs.steps import step_of

REPORT = InReport("What the models can still do at few bits", place=132)
GALLERY = InGallery(see="The model without outliers keeps what it can do.", place=11, width="one-column")

__all__ = ["GALLERY", "REPORT", "draw", "prepare"]


def prepare(
    runs: list[Run],
    *,
    of: str = "ten",
    bits: str | None = None,
    method: str | None = None,
    convention: str | None = None,
) -> xr.Dataset:
    """One point a run.

    Parameters
    ----------
    of : a group of tasks (``ten``, ``osp-published``), or one task
    bits : of the y axis, such as 4-4-4; by default 4-4-4, or 4-4-16 where not all runs have that
    method, convention : how weights and activations were rounded; by default what all runs have

    Returns
    -------
    ``full`` and ``few_bits``, accuracy in percent (run).
    """
    scores = task_scores(runs, of, bits=bits, method=method, convention=convention)
    steps = [step_of(run) for run in runs]
    dataset = xr.Dataset(
        {
            "full": ("run", 100 * np.array(scores.full), {"units": "%"}),
            "few_bits": ("run", 100 * np.array(scores.few), {"units": "%"}),
        },
        coords={"run": labels_of(runs, steps)},
    )
    setting = scores.setting
    words = notation(*setting.bits.bits)
    what = "mean accuracy on ten tasks" if of in GROUPS else f"accuracy on {of}"
    meaning = f"{of}: {GROUPS[of].meaning}" if of in GROUPS else of
    documents = f", of each only the first {setting.limit} documents" if setting.limit else ""
    remark = (
        f"{meaning} ({scores.harness}), BOS {setting.bos}{documents}; weights and inputs of the blocks' "
        f"Linears, keys and values at so many bits by {setting.method}, grids {setting.convention}"
    )
    title = f"{what[0].upper()}{what[1:]} at {words} against full precision"
    dataset.attrs = {
        "title": title,
        "caption": caption(title, runs, steps, [], [remark]),
        "bits": words,
        "what": what,
    }
    return dataset


def draw(dataset: xr.Dataset, backend: Backend, *, style: Style, width: str) -> Canvas:
    """Points with their names beside them, and the diagonal."""
    x, y = dataset["full"].values, dataset["few_bits"].values
    inches = style.widths[width]
    canvas = backend.canvas(1, 1, width=inches, height=min(0.78 * inches, 3.6), style=style)
    panel = canvas.panel(
        0,
        0,
        x_label=f"{dataset.attrs['what']}, %",
        y_label=f"at {dataset.attrs['bits']}, %",
    )
    for name, across, up, colour in zip(
        dataset["run"].values, x, y, style.colours_of_runs(len(x)), strict=False
    ):
        panel.scatter(np.array([across]), np.array([up]), label=str(name), colour=colour, texts=[str(name)])
    low, high = _limits(np.concatenate([x, y]))
    panel.line(
        np.array([low, high]), np.array([low, high]), label="no loss", colour=style.grey, dash="dotted"
    )
    panel.limits("x", low, high)
    panel.limits("y", low, high)
    panel.legend()
    return canvas


def _limits(values: np.ndarray) -> tuple[float, float]:
    """A margin of an eighth of the range, within 0 and 100."""
    low, high = float(values.min()), float(values.max())
    margin = max((high - low) / 8, 2.0)
    return max(0.0, low - margin), min(100.0, high + margin)
