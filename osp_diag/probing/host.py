"""Bringing small device arrays to the host: in as few transfers as there are devices, or without waiting."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import xarray as xr

from osp_diag.capture.snapshots import LogitRule, Snapshots
from osp_diag.capture.states import Key
from osp_diag.estimators.base import State
from osp_diag.schema import SITES

__all__ = ["copy_under_way", "snapshot_datasets", "to_host"]


def to_host(states: Mapping[Key, State]) -> dict[Key, State]:
    """NumPy copies of all states, through one transfer a device."""
    by_device: dict[torch.device, list[tuple[Key, str]]] = {}
    for key, state in states.items():
        for name, value in state.items():
            by_device.setdefault(value.device, []).append((key, name))
    copies: dict[Key, State] = {key: {} for key in states}
    for entries in by_device.values():
        tensors = [states[key][name] for key, name in entries]
        # In float64, which holds every float32 and every count below 2^53 exactly.
        flat = torch.cat([tensor.reshape(-1).double() for tensor in tensors]).cpu().numpy()
        ends = np.cumsum([tensor.numel() for tensor in tensors])
        for (key, name), tensor, piece in zip(entries, tensors, np.split(flat, ends[:-1]), strict=True):
            copies[key][name] = piece.reshape(tensor.shape)
    return copies


def copy_under_way(value: torch.Tensor) -> torch.Tensor:
    """A copy on the host that is whole once the device has got here; itself where it is on the host."""
    if not value.is_cuda:
        return value
    host = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
    return host.copy_(value, non_blocking=True)


def snapshot_datasets(snapshots: Snapshots) -> dict[str, xr.Dataset]:
    """The kept raw activations one dataset a site: (layer, token, channel) or (layer, head, token, …).

    Beside those of queries and keys, ``snapshot/attention`` holds what makes logits of them.
    """
    groups: dict[str, xr.Dataset] = {}
    for site in dict.fromkeys(site for site, _ in snapshots.copies):
        layers = sorted(layer for s, layer in snapshots.copies if s == site)
        shape = snapshots.copies[site, layers[0]].shape
        members = [layer for layer in layers if snapshots.copies[site, layer].shape == shape]
        values = np.stack([snapshots.copies[site, layer].cpu().numpy() for layer in members])
        dims = (
            ("layer", "head", "token", "head_channel") if values.ndim == 4 else ("layer", "token", "channel")
        )
        coordinates = {"layer": members} | {
            dim: np.arange(n) for dim, n in zip(dims[1:], values.shape[1:], strict=True)
        }
        attributes = {"units": "1", "long_name": f"activation at {site}", "definition": SITES.get(site, site)}
        groups[f"snapshot/{site}"] = xr.Dataset({"activation": (dims, values, attributes)}, coordinates)
    if snapshots.rules:
        groups["snapshot/attention"] = _logit_rules(snapshots.rules)
    return groups


def _logit_rules(rules: Mapping[int, LogitRule]) -> xr.Dataset:
    """What makes logits of the kept queries and keys, for the layers whose shapes are those of the first."""
    first_rule = next(iter(rules.values()))
    members = {
        layer: rule
        for layer, rule in sorted(rules.items())
        if (rule.bias.shape[1:], rule.sink_logits.shape)
        == (first_rule.bias.shape[1:], first_rule.sink_logits.shape)
    }
    # One table for all heads of a layer, unless some layer has one for each.
    tables = max(rule.bias.shape[0] for rule in members.values())
    bias = [
        np.broadcast_to(rule.bias.cpu().numpy(), (tables, *first_rule.bias.shape[1:]))
        for rule in members.values()
    ]
    definitions = {
        "scale": "factor of q·k",
        "softcap": "bound of scale·q·k, which becomes softcap·tanh(scale·q·k / softcap); NaN for none",
        "sink_logit": "logit of a head's imaginary key, which takes mass and gives nothing; −∞ for none",
        "logit_bias": "added to the logits; −∞ where the key is not allowed (causality, windows, masks)",
        "sees_beyond": "whether a query also attends to keys behind the kept ones",
    }
    values = {
        "scale": (("layer",), np.array([rule.scale for rule in members.values()])),
        "softcap": (("layer",), np.array([rule.softcap for rule in members.values()])),
        "sink_logit": (("layer", "head"), np.stack([rule.sink_logits.numpy() for rule in members.values()])),
        "logit_bias": (("layer", "bias_head", "query_token", "key_token"), np.stack(bias)),
        "sees_beyond": (("layer",), np.array([rule.sees_beyond for rule in members.values()], dtype=np.int8)),
    }
    return xr.Dataset(
        {
            name: (dims, array, {"units": "1", "definition": definitions[name]})
            for name, (dims, array) in values.items()
        },
        {"layer": list(members)},
    )
