"""The weights behind hot channels: norm gains, the embedding, rows of the projections that write them."""

from __future__ import annotations

import xarray as xr

from osp_diag.analyses.channels.profiles import over_median
from osp_diag.errors import OspDiagError
from osp_diag.runs.run import Run

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
_WORDS = {
    _NORMS: "norm gains",
    _ROWS: "embedding rows",
    _DOWN: "rows of the down projection",
}


def compared_weights(first: Run, second: Run, steps: tuple[int, int]) -> tuple[xr.Dataset, list[str]]:
    """What both runs hold of the weights, side by side on the dimension ``run``; and notes on the rest.

    Layers, norms or rows that one run lacks are NaN. Rows of the projections that write into the residual
    stream are where a checkpoint was probed (``projection_row_ratio``, of the layers that it keeps maps of),
    those of the down projection also where the site ``mlp_down_weight`` was.
    """
    parts, absent = [], {}
    for group, names in _VARIABLES.items():
        group_parts = [
            _group(run, group, names, step) for run, step in zip((first, second), steps, strict=True)
        ]
        datasets = [part for part in group_parts if part is not None]
        if len(datasets) < 2:
            absent[_WORDS[group]] = group
            continue
        shared = [name for name in datasets[0].data_vars if name in datasets[1].data_vars]
        parts.append(
            xr.concat(
                [part[shared] for part in datasets],
                "run",
                join="outer",
                data_vars="all",
                coords="minimal",
                compat="override",
                combine_attrs="override",
            )
        )
    writers = [part for part in map(_writers, (first, second)) if part is not None]
    if len(writers) == 2:
        parts.append(
            xr.concat(
                writers, "run", join="outer", data_vars="all", coords="minimal", combine_attrs="override"
            )
        )
    by_channel = [_by_channel(run) for run in (first, second)]
    # Gains and rows by channel say more than the statistics above, whose absence then needs no note.
    if all(part.data_vars for part in by_channel):
        parts.append(
            xr.concat(
                by_channel, "run", join="outer", data_vars="all", coords="minimal", combine_attrs="override"
            )
        )
        absent = {words: group for words, group in absent.items() if group == _DOWN}
    notes = []
    if absent:
        words = "; ".join(f"{name} ({group})" for name, group in absent.items())
        notes.append(
            f"weights not compared, for not both runs hold them: {words}; training runs do, and the rest "
            "needs the checkpoints"
        )
    return xr.merge(parts, compat="override", join="outer", combine_attrs="drop"), notes


def _writers(run: Run) -> xr.Dataset | None:
    """Rows of the projections into the residual stream, by projection, layer and channel that they write.

    ``projection_row_ratio`` is the largest |W| of a row over that of the median row of its matrix.
    """
    width = run.attrs.get("hidden_size")
    ratios = []
    try:
        names = list(run.weight_maps)
    except (OspDiagError, AttributeError):
        return None
    for name in names:
        rows = run.weight_map(name)["row_maximum"]
        # Only projections into the residual stream have its channels as rows.
        if rows.sizes["output_channel"] != width:
            continue
        ratio = over_median(rows.load(), "output_channel").expand_dims(projection=[name])
        ratios.append(ratio.rename({"layer": "projection_layer"}).rename("projection_row_ratio"))
    if not ratios:
        return None
    joined = xr.concat(ratios, "projection", join="outer").to_dataset()
    joined["projection_row_ratio"].attrs = {
        "units": "1",
        "definition": "largest |W| of the row that writes a channel, over that of the matrix's median row",
    }
    return joined


def _by_channel(run: Run) -> xr.Dataset:
    """Gains and embedding entries by channel of the residual stream, over those of the median channel.

    ``channel_gain_ratio`` (gain_norm, gain_layer, weight_channel), norms outside the blocks at layer −1;
    ``channel_embedding_ratio`` and ``channel_embedding_token`` (weight_channel).
    """
    weights = getattr(run, "channel_weights", xr.Dataset())
    by_channel = weights.rename(
        {dim: new for dim, new in (("channel", "weight_channel"),) if dim in weights.dims}
    ).load()
    # Gains inside and outside the blocks on one axis; a norm outside has no layer and stands at −1.
    ratios: dict[str, xr.DataArray] = {}
    gains = []
    if "norm_gain" in by_channel:
        gains.append(by_channel["norm_gain"].rename(norm="gain_norm", layer="gain_layer"))
    if "outside_norm_gain" in by_channel:
        outside = by_channel["outside_norm_gain"].rename(outside_norm="gain_norm")
        gains.append(outside.expand_dims(gain_layer=[-1]))
    if gains:
        joined = xr.concat([gain.rename("gain") for gain in gains], "gain_norm", join="outer")
        ratios["channel_gain_ratio"] = over_median(joined, "weight_channel")
        ratios["channel_gain_ratio"].attrs = {
            "units": "1",
            "definition": "|gain| of a channel over the median channel's, of the same norm and layer",
        }
    if "embedding_maximum" in by_channel:
        largest = by_channel["embedding_maximum"]
        ratios["channel_embedding_ratio"] = over_median(largest, "weight_channel")
        ratios["channel_embedding_ratio"].attrs = {
            "units": "1",
            "definition": "largest |entry| of the embedding in a channel over that of the median channel",
        }
        ratios["channel_embedding_token"] = by_channel["embedding_token"].astype(float)
    return xr.Dataset(ratios)


def _group(run: Run, group: str, names: dict[str, str], step: int) -> xr.Dataset | None:
    if group not in (*run.sites, *run.beside):
        return None
    dataset = run[group]
    # Older runs have the names without their group's; either is renamed to the one of a comparison.
    names_in_run = {
        old if old in dataset else new: new for new, old in names.items() if {old, new} & set(dataset)
    }
    if not names_in_run:
        return None
    values = dataset[list(names_in_run)].sel(step=step, drop=True).load().rename(names_in_run)
    return values.rename({old: new for old, new in _DIMS.items() if old in values.dims})
