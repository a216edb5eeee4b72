"""Made-up trainings in which outliers emerge at a known step, at a known rate, in known channels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import xarray as xr

from osp_diag.analyses.emergence.history import SITES
from osp_diag.estimators.token_kurtosis import gaussian_floor
from osp_diag.runs.run import Run
from tests.synthetic_runs import STRATA

WIDTH, LAYERS = 64, 4
FLOOR = gaussian_floor(WIDTH)
HOT = {9: (0, 10**6), 33: (100, 10**6), 50: (60, 240), 51: (0, 10**6)}
"""Channel → first and last step at which it is hot, at ``residual_post`` from layer 1 on."""


@dataclass(frozen=True)
class Course:
    """Kurtosis of a site and layer: noise, from ``onset`` on growth, then a plateau."""

    onset: float
    doubling: float = 20.0
    plateau: float = np.inf

    def at(self, step: float) -> float:
        """In units of the noise."""
        return float(np.clip(2.0 ** ((step - self.onset) / self.doubling), 1.0, self.plateau))


@dataclass(frozen=True)
class Training:
    """What is planted. Layers of ``residual_post`` that are not named stay in the noise."""

    courses: Mapping[tuple[str, int], Course] = field(
        default_factory=lambda: {
            ("residual_post", 1): Course(100, 20, 60),
            ("residual_post", 2): Course(160, 30),
            ("residual_post", 3): Course(160, 30),
        }
    )
    steps: Sequence[int] = tuple(range(0, 400, 10))
    wobble: float = 0.1
    """of ln κ from probe to probe"""
    attention_writes: float = 0.1
    """share of the energy of the hot channels in layer 1"""
    sites: Sequence[str] = SITES
    seed: int = 0


def emerging_run(training: Training = Training()) -> Run:
    """A run of that training. The stratum ``delimiter`` has no tokens."""
    rng = np.random.default_rng(training.seed)
    steps = []
    for step in training.steps:
        groups = {}
        for site in training.sites:
            layers = {"embedding": [0], "final_norm": [LAYERS - 1]}.get(site, list(range(LAYERS)))
            kurtosis = np.empty((len(layers), len(STRATA)))
            for row, layer in enumerate(layers):
                course = training.courses.get((site, layer), Course(np.inf))
                wobble = np.exp(training.wobble * rng.standard_normal(len(STRATA)))
                kurtosis[row] = FLOOR * course.at(step) * wobble
            rms = np.stack([_rms(site, layer, step, training, rng) for layer in layers])[:, None]
            rms = np.repeat(rms, len(STRATA), axis=1)
            kurtosis[:, 2] = rms[:, 2] = np.nan
            told = {"estimator": "osp_excess_kurtosis/1", "floor": FLOOR}
            groups[site] = xr.Dataset(
                {
                    "osp_excess_kurtosis": (("layer", "stratum"), kurtosis, told),
                    "channel_rms": (("layer", "stratum", "channel"), rms),
                },
                coords={"layer": layers, "stratum": list(STRATA), "channel": np.arange(WIDTH)},
            )
        steps.append((step, groups))
    attrs = {
        "model_name": "made-up",
        "hidden_size": WIDTH,
        "number_of_layers": LAYERS,
        "protocol": "sequence",
        "bos": "no",
        "tokens": 64,
        "dtype": "float32",
    }
    return Run.in_memory(steps, {}, attrs)


def _rms(site: str, layer: int, step: int, training: Training, rng: np.random.Generator) -> np.ndarray:
    """Layer 1 writes the hot channels; later layers carry them on and add nothing."""
    rms = 1 + 0.05 * rng.random(WIDTH)
    own = {
        "attention_contribution": training.attention_writes,
        "mlp_contribution": 1 - training.attention_writes,
    }
    if site in own:
        rms *= 0.1
    for channel, (first, last) in HOT.items():
        if not first <= step <= last:
            continue
        height = 20.0 + channel / 10
        if site == "residual_post" and layer >= 1:
            rms[channel] = height
        elif site in own and layer == 1:
            rms[channel] = height * np.sqrt(own[site])
        elif site == "residual_mid" and layer >= 1:
            rms[channel] = height * (np.sqrt(training.attention_writes) if layer == 1 else 1.0)
    return rms
