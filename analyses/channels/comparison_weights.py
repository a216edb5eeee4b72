"""The weights behind hot channels: norm gains, the embedding, rows of the projections that write them."""

from __future__ import annotations

from typing import Any

import xarray as xr

from osp_diag.analyses.channels.profiles import over_median
from osp_diag.errors import OspDiagError

__all__ = ["compared_weights"]

_NORMS, _ROWS, _DOWN = "weights:norm_gain", "weights:embedding_rows", "mlp_down_weight"

_VARIABLES: dict[str, dict[str, str]] = {
    _NORMS: {
        "norm_gain_max": "gain_max",
        "norm_gain_max_median_ratio": "max_median_ratio",
        "norm_gain_top_share": "top_share",
        "outside_norm_gain_max": "outside_gain_max",
        "outside_norm_gain_max_median_ratio": "outside_max_median_ratio",
        "outside_norm_gain_top_share": "outside_top_share",
    },
    _ROWS: {
        "embedding_row_norm_max": "norm_max",
        "embedding_row_norm_max_median_ratio": "norm_max_median_ratio",
        "embedding_top_row": "top_row",
        "embedding_top_row_norm": "top_row_norm",
    },
    _DOWN: {"down_projection_row_ratio": "weight_outlier_row_ratio"},
}
"""What is taken of each group: its name, in a comparison and in runs, and the one that older runs give it."""
_DIMS = {"layer": "weight_layer", "rank": "row_rank", "matrix": "embedding_matrix"}
_SAID = {
    _NORMS: "norm gains",
    _ROWS: "embedding rows",
    _DOWN: "rows of the down projection",
}


def compared_weights(first: Any, second: Any, steps: tuple[int, int]) -> tuple[xr.Dataset, list[str]]:
    """What both runs hold of the weights, side by side on the dimension ``run``; and notes on the rest.

    Layers, norms or rows that one run lacks are NaN. Rows of the projections that write into the residual
    stream are where a checkpoint was probed (``projection_row_ratio``, of the layers that it keeps maps of),
    those of the down projection also where the site ``mlp_down_weight`` was.
    """
    parts, missing = [], {}
    for group, names in _VARIABLES.items():
        found = [_group(run, group, names, step) for run, step in zip((first, second), steps, strict=True)]
        present = [part for part in found if part is not None]
        if len(present) < 2:
            missing[_SAID[group]] = group
            continue
        shared = [name for name in present[0].data_vars if name in present[1].data_vars]
        parts.append(
            xr.concat(
                [part[shared] for part in present],
                "run",
                join="outer",
                data_vars="all",
                coords="minimal",
                compat="override",
                combine_attrs="override",
            )
        )
    writers = [found for found in map(_writers, (first, second)) if found is not None]
    if len(writers) == 2:
        parts.append(
            xr.concat(
                writers, "run", join="outer", data_vars="all", coords="minimal", combine_attrs="override"
            )
        )
    by_channel = [_by_channel(run) for run in (first, second)]
    if all(found.data_vars for found in by_channel):
        parts.append(
            xr.concat(
                by_channel, "run", join="outer", data_vars="all", coords="minimal", combine_attrs="override"
            )
        )
        missing = {said: group for said, group in missing.items() if group == _DOWN}
    notes = []
    if missing:
        said = "; ".join(f"{name} ({group})" for name, group in missing.items())
        notes.append(
            f"weights not compared, for not both runs hold them: {said}; training runs do, and the rest "
            "needs the checkpoints"
        )
    return xr.merge(parts, compat="override", join="outer", combine_attrs="drop"), notes


def _writers(run: Any) -> xr.Dataset | None:
    """Rows of the projections into the residual stream, by projection, layer and channel that they write.

    ``projection_row_ratio`` is the largest |W| of a row over that of the median row of its matrix.
    """
    width = run.attrs.get("hidden_size")
    found = []
    try:
        names = list(run.weight_maps)
    except (OspDiagError, AttributeError):
        return None
    for name in names:
        rows = run.weight_map(name)["row_maximum"]
        if rows.sizes["output_channel"] != width:
            continue
        ratio = over_median(rows.load(), "output_channel").expand_dims(projection=[name])
        found.append(ratio.rename({"layer": "projection_layer"}).rename("projection_row_ratio"))
    if not found:
        return None
    joined = xr.concat(found, "projection", join="outer").to_dataset()
    joined["projection_row_ratio"].attrs = {
        "units": "1",
        "definition": "largest |W| of the row that writes a channel, over that of the matrix's median row",
    }
    return joined


def _by_channel(run: Any) -> xr.Dataset:
    """Gains and embedding entries by channel of the residual stream, over those of the median channel.

    ``channel_gain_ratio`` (gain_norm, gain_layer, weight_channel), norms outside the blocks at layer −1;
    ``channel_embedding_ratio`` and ``channel_embedding_token`` (weight_channel).
    """
    held = getattr(run, "channel_weights", xr.Dataset())
    named = held.rename(
        {dim: new for dim, new in (("channel", "weight_channel"),) if dim in held.dims}
    ).load()
    found: dict[str, xr.DataArray] = {}
    gains = []
    if "norm_gain" in named:
        gains.append(named["norm_gain"].rename(norm="gain_norm", layer="gain_layer"))
    if "outside_norm_gain" in named:
        outside = named["outside_norm_gain"].rename(outside_norm="gain_norm")
        gains.append(outside.expand_dims(gain_layer=[-1]))
    if gains:
        joined = xr.concat([gain.rename("gain") for gain in gains], "gain_norm", join="outer")
        found["channel_gain_ratio"] = over_median(joined, "weight_channel")
        found["channel_gain_ratio"].attrs = {
            "units": "1",
            "definition": "|gain| of a channel over the median channel's, of the same norm and layer",
        }
    if "embedding_maximum" in named:
        largest = named["embedding_maximum"]
        found["channel_embedding_ratio"] = over_median(largest, "weight_channel")
        found["channel_embedding_ratio"].attrs = {
            "units": "1",
            "definition": "largest |entry| of the embedding in a channel over that of the median channel",
        }
        found["channel_embedding_token"] = named["embedding_token"].astype(float)
    return xr.Dataset(found)


def _group(run: Any, group: str, names: dict[str, str], step: int) -> xr.Dataset | None:
    if group not in (*run.sites, *run.beside):
        return None
    dataset = run[group]
    held = {old if old in dataset else new: new for new, old in names.items() if {old, new} & set(dataset)}
    if not held:
        return None
    chosen = dataset[list(held)].sel(step=step, drop=True).load().rename(held)
    return chosen.rename({old: new for old, new in _DIMS.items() if old in chosen.dims})
