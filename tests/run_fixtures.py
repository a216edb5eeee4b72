"""Small datasets and runs for the tests of the store, with values that follow from the step."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from osp_diag.runs.writer import RunWriter

STRATA = ["all", "first", "delimiter", "rest"]

ATTRIBUTES: dict[str, Any] = {
    "model_name": "tiny",
    "model_fingerprint": "abc",
    "architecture": "LlamaForCausalLM",
    "number_of_layers": 3,
    "hidden_size": 5,
    "token_source": "built-in text",
    "token_fingerprint": "def",
    "protocol": "sequence",
    "bos": "no",
    "sequence_length": 16,
    "tokens": 1024,
    "dtype": "float32",
    "device": "cpu",
    "estimators": ["osp_excess_kurtosis/1"],
    "sites": {"residual_post": "the output of every block", "query_post_rope": "no rotary embedding"},
    "versions": {"torch": "2.11"},
    "created": "2026-01-01T00:00:00+00:00",
    "command": "osp-diag probe tiny",
}


def site(step: int, layers: int = 3, channels: int = 5, offset: float = 0.0) -> xr.Dataset:
    """What a site measures at a step: kurtosis is 100·step + 10·layer + stratum."""
    kurtosis = (100.0 * step + 10.0 * np.arange(layers)[:, None] + np.arange(4)[None, :] + offset).astype(
        np.float32
    )
    rms = (step + np.arange(layers * channels).reshape(layers, channels) / 7).astype(np.float32)
    return xr.Dataset(
        {
            "osp_excess_kurtosis": (
                ("layer", "stratum"),
                kurtosis,
                {
                    "estimator": "osp_excess_kurtosis/1",
                    "units": "1",
                    "long_name": "excess kurtosis, OSP's formula",
                    "ceiling": float(channels - 3),
                    "source": "OSP",
                },
            ),
            "absolute_maximum": (("layer", "stratum"), 2 * kurtosis),
            "channel_rms": (("layer", "channel"), rms),
            "token_count": (("layer",), np.full(layers, step, np.int64)),
        },
        coords={"layer": np.arange(layers), "stratum": STRATA, "channel": np.arange(channels)},
        attrs={"note": "made up"},
    )


def sums(step: int, layers: int = 3) -> xr.Dataset:
    values = np.full((layers, 4), step + 0.1)
    return xr.Dataset(
        {"moments.fourth": (("layer", "stratum"), values)},
        coords={"layer": np.arange(layers), "stratum": STRATA},
    )


def groups(step: int) -> dict[str, xr.Dataset]:
    return {
        "residual_post": site(step),
        "linear_input:mlp.down_proj": site(step, channels=9, offset=0.5),
        "raw/residual_post": sums(step),
    }


def snapshot() -> dict[str, xr.Dataset]:
    """Snapshot groups: token texts, and raw activations at one site."""
    texts = xr.Dataset(
        {
            "token_text": (("token",), ["The", " café", "\n", "<script>"]),
            "token_id": (("token",), np.array([5, 6, 7, 8])),
        },
        coords={"token": np.arange(4)},
    )
    activation = np.arange(3 * 4 * 5, dtype=np.float32).reshape(3, 4, 5)
    residual = xr.Dataset(
        {"activation": (("layer", "token", "channel"), activation)},
        coords={"layer": np.arange(3), "token": np.arange(4)},
    )
    return {"snapshot": texts, "snapshot/residual_post": residual}


def write_run(path: Path, steps: tuple[int, ...] = (0, 10, 20), **attributes: Any) -> Path:
    """A complete small run with snapshots and series."""
    with RunWriter(path, ATTRIBUTES | attributes) as writer:
        for step in steps:
            writer.append(step, groups(step))
            writer.append_series(step, {"loss": 3.0 - step / 100})
            writer.append_series(step + 5, {"loss": 2.9 - step / 100, "learning_rate": 1e-3})
        for group, dataset in snapshot().items():
            writer.write_static(group, dataset)
    return path


@cache
def _values(step: int) -> dict[tuple[str, str], np.ndarray]:
    return {
        (name, str(key)): data[key].values for name, data in groups(step).items() for key in data.data_vars
    }


def check_run(path: Path, every: int = 1) -> list[int]:
    """Assert that what readers see of a run written with :func:`groups` is whole; returns its steps.

    No gap: the steps are 0, ``every``, 2·``every`` …; no duplicate; every array has every step, with the
    values of that step.
    """
    with xr.open_datatree(path, engine="zarr", consolidated=True) as tree:
        steps = tree.coords["step"].values.tolist() if "step" in tree.coords else []
        assert steps == list(range(0, len(steps) * every, every))
        for name, expected in groups(0).items():
            if not steps:
                break
            found = tree[name.replace(":", "/")].to_dataset().load()
            assert set(found.data_vars) == set(expected.data_vars)
            for key, coordinate in expected.coords.items():
                assert found[key].values.tolist() == coordinate.values.tolist()
            for key in expected.data_vars:
                rows = np.stack([_values(step)[name, str(key)] for step in steps])
                np.testing.assert_array_equal(found[key].values, rows, err_msg=f"{name}/{key}")
        if "series" in tree.children:
            series = tree["series"].to_dataset().load()
            logged = series["logged_step"].values
            assert logged.tolist() == sorted(set(logged.tolist()))
            np.testing.assert_array_equal(series["loss"].values, logged / 2.0)
    return steps
