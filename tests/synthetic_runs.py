"""Runs made up from random activations with planted outliers, for the tests of figures and analyses.

The activations are drawn once and every statistic is computed from them in plain NumPy, so that the
numbers of one run agree with each other: a massive activation on the first token from
``emergence_layer`` on, in two channels; one everyday outlier channel on all tokens; one sink head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
from scipy.stats import norm

from osp_diag.estimators import ActivationObservation, Suite, default_estimators, estimators_named
from osp_diag.estimators.attention_tiles import LogitGrid
from osp_diag.probing.labelling import label_states
from osp_diag.runs.run import Run
from osp_diag.runs.writer import RunWriter
from tests.synthetic_statics import (
    few_bits,
    task_accuracies,
    token_texts,
    weight_maps,
    where_few_bits_hurt,
)

FEW_BITS = ("quantization", "layer_errors", "sensitivity", "spared_channels", "tasks")
STRATA = ("all", "first", "delimiter", "rest")
EPSILONS = (0.1, 0.2, 0.3, 0.8)


@dataclass(frozen=True)
class Plan:
    """What the made-up model looks like."""

    model_name: str = "made-up-60M"
    layers: int = 6
    channels: int = 64
    heads: int = 4
    key_value_heads: int = 2
    sequences: int = 3
    tokens: int = 24
    seed: int = 0
    massive: float = 2600.0
    massive_channels: tuple[int, int] = (17, 41)
    emergence_layer: int = 3
    everyday: float = 14.0
    everyday_channel: int = 5
    sink_head: tuple[int, int] = (4, 1)
    protocol: str = "sequence"
    steps: tuple[int, ...] = (0,)
    attention: bool = True
    snapshots: bool = True
    weights: bool = True
    few_bits: bool = True
    every_estimator: bool = False
    """Every default statistic of activations and the block lens, also those that no figure draws."""

    @property
    def head_channels(self) -> int:
        return self.channels // self.heads


OUTLIER_FREE = Plan(model_name="made-up-osp-60M", massive=0.0, everyday=0.0, seed=1)


def _strata(plan: Plan) -> np.ndarray:
    """(stratum, sequence, token), 0 and 1."""
    first = np.zeros((plan.sequences, plan.tokens))
    first[:, 0] = 1
    if plan.protocol == "osp-published":
        first[:] = 1
    delimiter = np.array([text in (".", ",", "\n") for text in token_texts(plan.tokens)]) * (1 - first)
    return np.stack([np.ones_like(first), first, delimiter, 1 - first - delimiter])


def _residual(plan: Plan, rng: np.random.Generator, strata: np.ndarray) -> np.ndarray:
    """Residual stream after the embedding and after each block, (layer + 1, sequence, token, channel)."""
    shape = (plan.layers + 1, plan.sequences, plan.tokens, plan.channels)
    x = np.cumsum(rng.standard_normal(shape) * 0.6, axis=0)
    x[1:, ..., plan.everyday_channel] += plan.everyday
    spikes = strata[1] * (1 + 0.02 * rng.standard_normal(strata[1].shape))
    for share, channel in zip((1.0, -0.6), plan.massive_channels, strict=True):
        x[1 + plan.emergence_layer :, ..., channel] += share * plan.massive * spikes
    return x


def _normalised(x: np.ndarray) -> np.ndarray:
    return x / np.sqrt(np.mean(x**2, axis=-1, keepdims=True))


def _over(values: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Mean of (layer, sequence, token) over the tokens of each stratum, (layer, stratum)."""
    count = strata.sum(axis=(1, 2))
    total = np.einsum("lbt,sbt->ls", values, strata)
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _osp(x: np.ndarray) -> np.ndarray:
    return np.maximum(np.mean(x**4, axis=-1) / np.var(x, axis=-1, ddof=1) ** 2 - 3, 0)


def _fisher(x: np.ndarray) -> np.ndarray:
    centred = x - x.mean(axis=-1, keepdims=True)
    return np.mean(centred**4, axis=-1) / np.mean(centred**2, axis=-1) ** 2 - 3


def activation_statistics(x: np.ndarray, strata: np.ndarray) -> xr.Dataset:
    """The estimators' outputs at one site from its activations (layer, sequence, token, channel)."""
    magnitude = np.abs(x)
    layers, d = x.shape[0], x.shape[-1]
    flat = magnitude.reshape(layers, -1)
    member = strata[None, ..., None] > 0
    masked = np.where(member, magnitude[:, None], 0.0)
    top = np.sort(masked.reshape(layers, len(STRATA), x.shape[1], -1), axis=-1)[..., -3:][..., ::-1]
    median = np.median(flat, axis=-1)
    massive = (masked > 100) & (masked >= 1000 * median[:, None, None, None, None])
    count = np.maximum(strata.sum(axis=(1, 2)), 1)[:, None]
    channel = ("layer", "stratum", "channel")
    floor = {"floor": float(np.sqrt(24 / (2 * np.pi * d))), "ceiling": float(d - 3)}
    six = np.where(member, magnitude[:, None] >= 6, False)
    return xr.Dataset(
        {
            "osp_excess_kurtosis": (
                ("layer", "stratum"),
                _over(_osp(x), strata),
                {"estimator": "osp_excess_kurtosis/1", "long_name": "excess kurtosis, OSP formula", **floor},
            ),
            "fisher_kurtosis": (
                ("layer", "stratum"),
                _over(_fisher(x), strata),
                {"estimator": "fisher_kurtosis/1", "ceiling": float(d - 4)},
            ),
            "max_median_ratio": (
                ("layer", "stratum"),
                _over(magnitude.max(-1) / np.median(magnitude, axis=-1), strata),
                {"estimator": "max_median_ratio/1"},
            ),
            "top_magnitude": (
                ("layer", "stratum", "rank"),
                top.mean(axis=2),
                {"estimator": "top_magnitude/1"},
            ),
            "median_magnitude": (("layer",), median, {"estimator": "top_magnitude/1"}),
            "massive_activation_count": (
                ("layer", "stratum"),
                massive.sum(axis=(3, 4)).mean(axis=2),
                {"estimator": "massive_activations/1"},
            ),
            "massive_activation_channel_count": (
                ("layer", "channel"),
                massive[:, 0].sum(axis=(1, 2)),
                {"estimator": "massive_activations/1"},
            ),
            "outlier_feature_fraction": (channel, six.sum(axis=(2, 3)) / count, {"estimator": "llm_int8/1"}),
            "channels_above_six": (("layer", "stratum"), six.any(axis=(2, 3)).sum(axis=-1)),
            "channel_rms": (
                channel,
                np.sqrt((masked**2).sum(axis=(2, 3)) / count),
                {"estimator": "channel_moments/1"},
            ),
            "channel_absolute_maximum": (
                channel,
                masked.max(axis=(2, 3)),
                {"estimator": "channel_moments/1"},
            ),
            "absolute_maximum": (
                ("layer", "stratum"),
                masked.max(axis=(2, 3, 4)),
                {"estimator": "absolute_maximum/1"},
            ),
            "token_count": (("stratum",), strata.sum(axis=(1, 2))),
            "nonfinite_token_count": (("layer", "stratum"), np.zeros((layers, len(STRATA)))),
            "nonfinite_first_token": (("layer",), np.full(layers, np.nan)),
            "nonfinite_first_channel": (("layer",), np.full(layers, np.nan)),
        },
        coords={
            "layer": np.arange(layers),
            "stratum": list(STRATA),
            "rank": [1, 2, 3],
            "channel": np.arange(d),
        },
    )


def remaining_statistics(site: str, x: np.ndarray, strata: np.ndarray) -> xr.Dataset:
    """What the default estimators and the block lens say of a site, (layer, sequence, token, channel)."""
    lens = [estimator for estimator in estimators_named("block_lens") if estimator.observes == "activation"]
    suite = Suite([*default_estimators(observes="activation", site=site), *lens])
    layers = {}
    for layer, values in enumerate(x):
        observation = ActivationObservation(values.astype(np.float32), strata.astype(np.float32))
        state = suite.update(suite.init(observation.layout, values), observation)
        layers[layer] = (state, observation.layout)
    return label_states(suite, layers)


def attention_statistics(plan: Plan, rng: np.random.Generator) -> xr.Dataset:
    """Sinks in one strong head, weaker ones in every head of the later layers."""
    mass = rng.uniform(0.02, 0.12, (plan.layers, plan.heads))
    if plan.massive:
        mass[plan.emergence_layer :] += 0.35
        mass[plan.sink_head] = 0.93
    rate = np.stack([1 / (1 + np.exp(-40 * (mass - epsilon))) for epsilon in EPSILONS], axis=-1)
    first_token = np.repeat(mass[..., None], len(STRATA), axis=-1)
    return xr.Dataset(
        {
            "sink_rate": (
                ("layer", "head", "epsilon", "sink_position"),
                np.stack([rate, rate * 0.1], axis=-1),
                {"estimator": "sink_rate/1"},
            ),
            "first_token_attention": (
                ("layer", "head", "stratum"),
                first_token,
                {"estimator": "first_token_attention/1"},
            ),
            "max_logit": (("layer", "head"), 20 + 120 * mass, {"estimator": "max_logit/1"}),
            **_logits(plan, mass, rng),
        },
        coords={
            "layer": np.arange(plan.layers),
            "head": np.arange(plan.heads),
            "epsilon": list(EPSILONS),
            "sink_position": [0, 1],
            "stratum": list(STRATA),
            "key_class": ["sink", "other"],
            "logit_bin": LogitGrid().centres,
            "quantile": [0.05, 0.5, 0.95],
        },
    )


def _logits(plan: Plan, mass: np.ndarray, rng: np.random.Generator) -> dict[str, Any]:
    """Gaussian logits, the sink key's as far above the others' as the sink's mass asks for."""
    spread, others = 1.0, -3.0
    centre = np.stack([others + np.log(plan.tokens * mass / (1 - mass)), np.full_like(mass, others)], axis=-1)
    edges = LogitGrid().edges
    reached = norm.cdf((edges - centre[..., None]) / spread)
    quantiles = centre[..., None] + spread * norm.ppf([0.05, 0.5, 0.95])
    parts = rng.standard_normal((plan.layers, plan.heads, plan.head_channels))
    parts += (centre[..., :1] - parts.sum(-1, keepdims=True)) / plan.head_channels
    head = ("layer", "head")
    told = {"estimator": "logit_distribution/1"}
    return {
        "logit_density": (
            (*head, "key_class", "logit_bin"),
            np.diff(reached) / np.diff(edges),
            told,
        ),
        "logit_quantile": ((*head, "key_class", "quantile"), quantiles, told),
        "sink_logit_contribution": (
            (*head, "head_channel"),
            parts,
            {"estimator": "sink_logit_contribution/1"},
        ),
    }


def _query_and_key(plan: Plan, rng: np.random.Generator) -> dict[str, xr.Dataset]:
    found = {}
    for site, heads in (("query_post_rope", plan.heads), ("key_post_rope", plan.key_value_heads)):
        x = rng.standard_normal((plan.layers, heads, plan.tokens, plan.head_channels))
        if plan.massive:
            x[..., 3] *= 9
            x[..., 1:, plan.head_channels // 2 + 3] += 12
        found[site] = xr.Dataset(
            {"activation": (("layer", "head", "token", "head_channel"), x.astype(np.float32))},
            coords={"layer": np.arange(plan.layers), "token": np.arange(plan.tokens)},
        )
    unseen = np.triu(np.full((plan.tokens, plan.tokens), -np.inf, dtype=np.float32), 1)
    found["attention"] = xr.Dataset(
        {
            "scale": ("layer", np.full(plan.layers, plan.head_channels**-0.5)),
            "softcap": ("layer", np.full(plan.layers, np.nan)),
            "sink_logit": (("layer", "head"), np.full((plan.layers, plan.heads), -np.inf)),
            "logit_bias": (
                ("layer", "bias_head", "query_token", "key_token"),
                np.tile(unseen, (plan.layers, 1, 1, 1)),
            ),
            "sees_beyond": ("layer", np.zeros(plan.layers, dtype=np.int8)),
        },
        coords={"layer": np.arange(plan.layers)},
    )
    return found


def _attrs(plan: Plan) -> dict[str, Any]:
    published = plan.protocol == "osp-published"
    return {
        "model_name": plan.model_name,
        "model_fingerprint": f"fingerprint of {plan.model_name}",
        "architecture": "LlamaForCausalLM",
        "number_of_layers": plan.layers,
        "hidden_size": plan.channels,
        "tokenizer": "made-up",
        "token_source": "made-up text",
        "token_fingerprint": "0123456789abcdef",
        "protocol": plan.protocol,
        "bos": "no",
        "sequence_length": 1 if published else plan.tokens,
        "tokens": plan.sequences * plan.tokens,
        "dtype": "float32",
        "device": "cpu",
        "estimators": ["osp_excess_kurtosis/1", "fisher_kurtosis/1", "sink_rate/1"],
        "sites": {"attention": "measured" if plan.attention else "absent: the blocks have no attention"},
        "versions": {"numpy": np.__version__},
        "created": "2026-01-01T00:00:00+00:00",
        "command": "tests.synthetic_runs",
    }


def _groups(plan: Plan) -> tuple[dict[str, xr.Dataset], dict[str, xr.Dataset]]:
    """Statistics and snapshots of one step, by site."""
    rng = np.random.default_rng(plan.seed)
    strata = _strata(plan)
    x = _residual(plan, rng, strata)
    tensors = {
        "embedding": x[:1],
        "residual_pre": x[:-1],
        "attention_input": _normalised(x[:-1]),
        "mlp_input": _normalised(x[1:]),
        "residual_post": x[1:],
        "final_norm": _normalised(x[-1:]),
    }
    statistics = {site: activation_statistics(values, strata) for site, values in tensors.items()}
    if plan.every_estimator:
        for site, values in tensors.items():
            others = remaining_statistics(site, values, strata).drop_vars(
                list(statistics[site].data_vars), errors="ignore"
            )
            statistics[site] = statistics[site].merge(others)
    statistics["final_norm"] = statistics["final_norm"].assign_coords(layer=[plan.layers - 1])
    if plan.attention:
        statistics["attention"] = attention_statistics(plan, rng)
    snapshots = {
        site: xr.Dataset(
            {"activation": (("layer", "token", "channel"), values[:, 0].astype(np.float32))},
            coords={"layer": np.arange(values.shape[0]), "token": np.arange(plan.tokens)},
        )
        for site, values in tensors.items()
        if site in ("residual_post", "attention_input", "mlp_input")
    }
    return statistics, snapshots | (_query_and_key(plan, rng) if plan.attention else {})


def make_tree(plan: Plan = Plan()) -> xr.DataTree:
    """The run's tree as the store lays it out; steps before the last have nothing planted."""
    quiet = replace(plan, massive=0.0, everyday=0.0)
    per_step = [_groups(plan if step == plan.steps[-1] else quiet)[0] for step in plan.steps]
    snapshots = _groups(plan)[1]
    step = xr.DataArray(np.array(plan.steps, dtype=np.int64), dims="step", name="step")
    nodes: dict[str, xr.Dataset] = {"/": xr.Dataset(coords={"step": step}, attrs=_attrs(plan))}
    for site in per_step[0]:
        nodes[site] = xr.concat([groups[site] for groups in per_step], dim=step, combine_attrs="override")
    logged = np.arange(plan.steps[-1] + 1)
    nodes["series"] = xr.Dataset(
        {"loss": ("logged_step", 3 + 5 * np.exp(-logged / 40))}, coords={"logged_step": logged}
    )
    if plan.snapshots:
        nodes["snapshot"] = xr.Dataset(
            {
                "token_text": (("token",), token_texts(plan.tokens)),
                "token_id": (("token",), np.arange(plan.tokens)),
            }
        )
        nodes |= {f"snapshot/{site}": values for site, values in snapshots.items()}
    if plan.weights:
        nodes |= weight_maps(plan.layers, plan.channels, spike=7.5 if plan.massive else 0.9)
    if plan.few_bits:
        harm = 1.0 if plan.massive else 0.1
        nodes["quantization"] = few_bits(harm)
        nodes |= where_few_bits_hurt(plan.layers, plan.channels, harm)
        nodes["tasks"] = task_accuracies(harm)
    return xr.DataTree.from_dict(nodes)


def synthetic_run(plan: Plan = Plan(), **changes: Any) -> Run:
    """A run with the planted outliers of ``plan``, some of its fields replaced by ``changes``."""
    return Run(make_tree(replace(plan, **changes)))


def with_attrs(run: Run, **attrs: Any) -> Run:
    """The same run under other attributes."""
    tree = run.tree.copy()
    tree.attrs = {**tree.attrs, **attrs}
    return Run(tree)


def without(run: Run, paths: Sequence[str]) -> Run:
    """The same run without some groups or variables (``"residual_post/top_magnitude"``)."""
    nodes = {node.path: node.to_dataset(inherit=False) for node in run.tree.subtree}
    for path in paths:
        group, _, variable = f"/{path}".rpartition("/")
        if f"/{path}" in nodes:
            del nodes[f"/{path}"]
        else:
            nodes[group] = nodes[group].drop_vars(variable)
    return Run(xr.DataTree.from_dict(nodes))


def write_run(path: Path, plan: Plan = Plan()) -> Path:
    """The run of ``plan`` on disk, as a probe would write it."""
    tree = make_tree(plan)
    groups = {
        node.path.strip("/"): node.to_dataset(inherit=False) for node in tree.subtree if node.path != "/"
    }
    with RunWriter(path, dict(tree.attrs)) as writer:
        for step, loss in enumerate(groups["series"]["loss"].values):
            writer.append_series(step, {"loss": loss})
        for index, step in enumerate(plan.steps):
            writer.append(
                step,
                {
                    name: group.isel(step=index, drop=True)
                    for name, group in groups.items()
                    if "step" in group.dims
                },
            )
        for name, group in groups.items():
            if name.startswith(("snapshot", "weight_map/")) or name in FEW_BITS:
                writer.write_static(name, group)
    return path
