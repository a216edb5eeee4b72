"""Who wrote the hot channels of a layer: its attention, its MLP, or what came before it."""

from __future__ import annotations

import numpy as np
import xarray as xr

from osp_diag.analyses.channels.hot import TOP, of_site
from osp_diag.errors import StoreError
from osp_diag.runs.run import Run

__all__ = ["CLEAR", "WRITERS", "outlier_writers"]

CLEAR = 2 / 3
"""Share of the block's own writing from which on one of the two is named."""
WRITERS = ("attention", "MLP", "both", "earlier")

_PARTS = ("entering", "attention", "mlp")


def outlier_writers(run: Run, *, top: int = TOP) -> xr.Dataset:
    """Energy that each part of a block brings into the largest channels of its output, by step.

    For the ``top`` channels of largest RMS at ``residual_post`` (of that step, layer and stratum):
    ``energy`` is Σ over these channels of the mean square over tokens, of what enters the block, of what
    attention adds and of what the MLP adds. With the contributions at hand they are measured (``method``
    is "contributions"); else the gain of energy from entrance to ``residual_mid``, and from there to
    ``residual_post``, stands for them ("stream": products of the parts are then counted with the later one).
    ``writer`` is "earlier" where most of the energy entered; else whoever wrote two thirds of the rest; else
    "both". It is "" where nothing is known, and the attribute ``unknown`` says why.

    Returns
    -------
    ``energy`` (part, step, layer, stratum), ``attention_share`` of what the block itself wrote, and
    ``writer`` (step, layer, stratum).

    Raises
    ------
    StoreError : the run holds no ``channel_rms`` by step at ``residual_post``
    """
    post = of_site(run, "residual_post", "channel_rms", "outlier_writers")
    sources, method, unknown = _sources(run)
    layers = []
    for layer in post["layer"].values:
        out = post.sel(layer=layer).transpose("step", "stratum", "channel").load().values
        # The `top` largest channels of each step and stratum; they need not stay the same over training.
        channels = np.argsort(-out, axis=-1, kind="stable")[..., :top]
        entering, middle, late = (_energy(source, layer, channels) for source in sources)
        if method == "stream":
            # Gains of energy stand for the parts: from entrance to residual_mid, from there to the output.
            whole = np.sum(np.take_along_axis(out, channels, axis=-1) ** 2, axis=-1)
            middle, late = np.maximum(middle - entering, 0), np.maximum(whole - middle, 0)
        layers.append(np.stack([entering, middle, late]))
    energy = np.stack(layers, axis=2)
    written = energy[1] + energy[2]
    # attention / (attention + MLP), NaN where the block wrote nothing.
    share = np.divide(energy[1], written, out=np.full(written.shape, np.nan), where=written > 0)
    dims = ("step", "layer", "stratum")
    attrs = {"site": "residual_post", "top": top, "method": method, "unknown": unknown}
    return xr.Dataset(
        {
            "energy": (
                ("part", *dims),
                energy,
                {"units": "activation²", "definition": f"Σ of mean squares in the {top} largest channels"},
            ),
            "attention_share": (
                dims,
                share,
                {"units": "1", "definition": "attention's share of the energy that the block wrote there"},
            ),
            "writer": (
                dims,
                _writer(energy, share),
                {"definition": f"earlier: most of it entered; or who wrote {CLEAR:.0%} of the rest; or both"},
            ),
        },
        coords={
            "part": list(_PARTS),
            "step": post["step"].values,
            "layer": post["layer"].values,
            "stratum": [str(name) for name in post["stratum"].values],
        },
        attrs=attrs,
    )


def _writer(energy: np.ndarray, share: np.ndarray) -> np.ndarray:
    entering, written = energy[0], energy[1] + energy[2]
    # Two thirds of what the block wrote make a writer, unless more energy entered than the block wrote.
    writers = np.where(share >= CLEAR, "attention", np.where(share <= 1 - CLEAR, "MLP", "both"))
    writers = np.where(entering > written, "earlier", writers)
    measured = np.isfinite(energy).all(axis=0) & (entering + written > 0)
    return np.where(measured, writers, "").astype(str)


def _sources(run: Run) -> tuple[list[dict[int, xr.DataArray]], str, str]:
    """By layer: what enters, attention and MLP (or the stream after them); the method; what is missing."""
    entering = _entering(run)
    contributions = [_by_layer(run, site) for site in ("attention_contribution", "mlp_contribution")]
    if all(contributions):
        return [entering, *contributions], "contributions", ""
    middle = _by_layer(run, "residual_mid")
    if middle and entering:
        return [entering, middle, {}], "stream", ""
    return (
        [{}, {}, {}],
        "none",
        "the run holds neither both of attention_contribution and mlp_contribution nor residual_mid with "
        "what enters the block; probe with them among --sites",
    )


def _entering(run: Run) -> dict[int, xr.DataArray]:
    """What enters each block: ``residual_pre``, or the output of the block before it."""
    # A block's entrance is the output of the one before; a measured residual_pre overrules it.
    before = {layer + 1: values for layer, values in _by_layer(run, "residual_post").items()}
    embedding = list(_by_layer(run, "embedding").values())
    return before | ({0: embedding[0]} if embedding else {}) | _by_layer(run, "residual_pre")


def _by_layer(run: Run, site: str) -> dict[int, xr.DataArray]:
    try:
        rms = of_site(run, site, "channel_rms", "outlier_writers")
    except StoreError:
        return {}
    rms = rms.transpose("layer", "step", "stratum", "channel")
    return {int(layer): rms.sel(layer=layer) for layer in rms["layer"].values}


def _energy(source: dict[int, xr.DataArray], layer: int, channels: np.ndarray) -> np.ndarray:
    """Σ of mean squares in the largest channels, (step, stratum); NaN where the layer is absent."""
    if int(layer) not in source:
        return np.full(channels.shape[:-1], np.nan)
    values = source[int(layer)].load().values
    return np.sum(np.take_along_axis(values, channels, axis=-1).astype(np.float64) ** 2, axis=-1)
