"""The weights that scale or write single channels of the residual stream: norm gains and the embedding."""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
from torch import Tensor, nn

from osp_diag.capture.down_projection import weights_at_hand, whole_weight
from osp_diag.sites.names import SiteMap

__all__ = ["channel_weights"]

_GAIN = {
    "units": "1",
    "long_name": "magnitude of a norm's gain",
    "definition": "|γ_j| of channel j, as the module holds it (Gemma multiplies by 1 + γ)",
}
_EMBEDDING = {
    "units": "1",
    "long_name": "largest embedding entry of a channel",
    "definition": "max_v |E_vj| over the vocabulary's rows v",
}
_TOKEN = {"units": "token id", "definition": "argmax_v |E_vj|, the row that has the channel's largest entry"}


def channel_weights(model: nn.Module, site_map: SiteMap) -> xr.Dataset:
    """Norm gains by channel, and the largest entry of each channel of the embedding.

    Parameters
    ----------
    model : not wrapped
    site_map : what :func:`osp_diag.sites.find_sites` found in it

    Returns
    -------
    ``norm_gain`` (norm, layer, channel) of the norms in blocks, by their path within the block;
    ``outside_norm_gain`` (outside_norm, channel) of the others; ``embedding_maximum`` and
    ``embedding_token`` (channel). What the model does not have is left out: gains that are one number for all
    channels, for one.
    """
    width = site_map.hidden_size
    block_gains: dict[tuple[str, int], np.ndarray] = {}
    outside_gains: dict[str, np.ndarray] = {}
    for path, module in model.named_modules():
        if "norm" not in type(module).__name__.lower():
            continue
        gain = _norm_gain(module, width)
        if gain is None:
            continue
        position = _position_in_block(path, site_map)
        if position is None:
            outside_gains[path] = gain
        else:
            block_gains[position] = gain
    variables: dict[str, tuple[Any, ...]] = {}
    if outside_gains:
        variables["outside_norm_gain"] = (
            ("outside_norm", "channel"),
            np.stack(list(outside_gains.values())),
            _GAIN,
        )
    if block_gains:
        norms = list(dict.fromkeys(norm for norm, _ in block_gains))
        values = np.full((len(norms), site_map.number_of_layers, width), np.nan, dtype=np.float32)
        for (norm, layer), gain in block_gains.items():
            values[norms.index(norm), layer] = gain
        variables["norm_gain"] = (("norm", "layer", "channel"), values, _GAIN)
    variables |= _embedding(model, width)
    coordinates: dict[str, Any] = {"outside_norm": list(outside_gains)} if outside_gains else {}
    if block_gains:
        coordinates |= {"norm": norms, "layer": np.arange(site_map.number_of_layers)}
    if variables:
        coordinates["channel"] = np.arange(width)
    return xr.Dataset(variables, coordinates)


def _position_in_block(path: str, site_map: SiteMap) -> tuple[str, int] | None:
    """(path within the block, layer) of a module inside a block."""
    for layer in range(site_map.number_of_layers):
        name = site_map.within_block(layer, path)
        if name is not None:
            return name, layer
    return None


def _norm_gain(module: nn.Module, width: int) -> np.ndarray | None:
    with weights_at_hand(module):
        weight = getattr(module, "weight", None)
        whole = whole_weight(weight) if isinstance(weight, Tensor) else ""
        if isinstance(whole, str) or whole.shape != (width,):
            return None
        return whole.detach().abs().float().cpu().numpy()


def _embedding(model: nn.Module, width: int) -> dict[str, tuple[Any, ...]]:
    """Of the largest embedding as wide as the residual stream: that of the vocabulary."""
    tables = [
        module
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.embedding_dim == width
    ]
    if not tables:
        return {}
    table = max(tables, key=lambda module: module.num_embeddings)
    with weights_at_hand(table):
        whole = whole_weight(table.weight)
        if isinstance(whole, str):
            return {}
        largest, token = whole.detach().abs().max(dim=0)
        return {
            "embedding_maximum": (("channel",), largest.float().cpu().numpy(), _EMBEDDING),
            "embedding_token": (("channel",), token.cpu().numpy(), _TOKEN),
        }
