"""Every family through Probe, end to end: its numbers are those of the model's own tensors in float64.

Attention statistics are computed once more with NumPy from the weights that eager attention returns, token
statistics with NumPy and SciPy from the hidden states.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from osp_diag import Probe
from osp_diag.seams.attention import AttentionCall
from tests.attention_reference import dense_weights, observed
from tests.estimators.activation_oracle import Oracle
from tests.families import FAMILIES, Family
from tests.site_reference import built

ATTENTIVE = [pytest.param(f, id=name) for name, f in FAMILIES.items() if f.has_attention]
EVERY = [pytest.param(f, id=name) for name, f in FAMILIES.items()]
PADDINGS = ["none", "right", "left"]
DELIMITERS = (5, 17, 40, 41, 42, 43)
NO_FINAL_NORM = {"bert", "roberta", "albert"}
EPSILONS = (0.1, 0.2, 0.3, 0.5, 0.8)


def batch_of(family: Family, padding: str) -> dict[str, Tensor]:
    batch = family.inputs(padded=padding == "right")
    if padding == "left":
        batch["attention_mask"][1, :3] = 0
    batch["input_ids"][0, 4] = DELIMITERS[0]
    batch["input_ids"][1, 6] = DELIMITERS[1]
    return batch


def strata_by_hand(batch: dict[str, Tensor]) -> np.ndarray:
    ids, mask = batch["input_ids"].numpy(), batch["attention_mask"].numpy()
    strata = np.zeros((4, *ids.shape))
    for b in range(ids.shape[0]):
        seen = False
        for t in range(ids.shape[1]):
            if mask[b, t]:
                stratum = 1 if not seen else 2 if ids[b, t] in DELIMITERS else 3
                strata[0, b, t] = strata[stratum, b, t] = 1
                seen = True
    return strata


def measured(model: nn.Module, batch: dict[str, Tensor], sites: list[str]) -> Any:
    probe = Probe(model, sites=sites, delimiter_ids=DELIMITERS)
    with torch.no_grad(), probe.step(0):
        model(**batch)
    return probe.run


def variable(run: Any, site: str, name: str, layer: int) -> np.ndarray:
    return run.tree[site][name].sel(step=0, layer=layer).values


# -- attention ---------------------------------------------------------------------------------------------


def probed_model(family: Family) -> nn.Module:
    """gemma2's soft cap exists under eager attention only."""
    return built(family.name, "eager" if family.name == "gemma2" else None)


def own_weights(family: Family, batch: dict[str, Tensor], calls: list[AttentionCall]) -> list[np.ndarray]:
    """The weights that eager attention returns; where that is not what SDPA computes, by definition."""
    if family.output_projection is not None and family.name != "gemma2":
        return [dense_weights(call).numpy() for call in calls]
    with torch.no_grad():
        found = built(family.name, "eager")(**batch, output_attentions=True).attentions
    return [weights.double().numpy() for weights in found]


def expected_attention(weights: np.ndarray, strata: np.ndarray, causal: bool) -> dict[str, np.ndarray]:
    batch, heads, tokens, _ = weights.shape
    received = np.full((batch, heads, tokens), np.nan)
    first: dict[int, list[np.ndarray]] = {s: [] for s in range(4)}
    dominant: dict[int, list[np.ndarray]] = {s: [] for s in range(4)}
    to_stratum, extra = [], []
    for b in range(batch):
        valid = np.flatnonzero(strata[0, b])
        sink = valid[0]
        for place, key in enumerate(range(sink, tokens)):
            queries = [q for q in valid if q >= key or not causal]
            if strata[0, b, key] and queries:
                received[b, :, place] = weights[b][:, queries, key].mean(-1)
        for query in valid:
            row = weights[b, :, query]
            for s in range(4):
                if strata[s, b, query]:
                    first[s].append(row[:, sink])
                    dominant[s].append(row[:, sink] >= row.max(-1) - 1e-12)
            to_stratum.append([row[:, strata[s, b] > 0].sum(-1) for s in range(4)])
            extra.append(1 - row.sum(-1))
    positions = [
        [(received[..., k][known(received, k)].reshape(-1, heads) > e).mean(0) for k in range(4)]
        for e in EPSILONS
    ]

    def by_stratum(values: dict[int, list[np.ndarray]]) -> np.ndarray:
        return np.stack([np.mean(values[s], axis=0) for s in range(4)], axis=-1)

    return {
        "sink_rate": np.moveaxis(np.array(positions), -1, 0),
        "key_mass": np.stack(
            [received[..., k][known(received, k)].reshape(-1, heads).mean(0) for k in range(tokens)], -1
        ),
        "first_token_attention": by_stratum(first),
        "first_token_dominance": by_stratum(dominant),
        "key_mass_share": np.moveaxis(np.mean(to_stratum, axis=0), 0, -1),
        "extra_sink_mass": np.mean(extra, axis=0),
    }


def known(received: np.ndarray, position: int) -> np.ndarray:
    return ~np.isnan(received[..., position])


def largest_logit(call: AttentionCall, weights: np.ndarray, strata: np.ndarray) -> np.ndarray:
    """Of each head, over valid queries and the keys that they give any weight to."""
    if call.logits is not None:
        logits = call.logits.double()
    else:
        assert call.query is not None
        assert call.key is not None
        key = call.key.double().repeat_interleave(call.query.shape[1] // call.key.shape[1], dim=1)
        logits = call.scale * call.query.double() @ key.transpose(-1, -2)
        if call.softcap is not None:
            logits = call.softcap * torch.tanh(logits / call.softcap)
        if call.mask is not None and call.mask.is_floating_point():
            logits = logits + call.mask
    allowed = (weights > 0) & (strata[0][:, None, :, None] > 0)
    return np.where(allowed, logits.numpy(), -np.inf).max((0, 2, 3))


def drained(value: np.ndarray, strata: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(value, axis=-1)
    sinks = [norms[b, :, np.flatnonzero(strata[0, b])[0]] for b in range(len(norms))]
    everyone = [norms[b, :, t] for b, t in np.argwhere(strata[0] > 0)]
    return np.mean(sinks, axis=0) / np.mean(everyone, axis=0)


@pytest.mark.parametrize("padding", ["right", "left"])
@pytest.mark.parametrize("family", ATTENTIVE)
def test_attention_statistics_are_those_of_the_models_own_weights(family: Family, padding: str) -> None:
    model, batch = probed_model(family), batch_of(family, padding)
    strata = strata_by_hand(batch)
    run = measured(model, batch, ["attention"])
    _, calls, _ = observed(model, batch)
    for layer, weights in enumerate(own_weights(family, batch, calls)):
        for name, expected in expected_attention(weights, strata, causal=not family.encoder).items():
            np.testing.assert_allclose(
                variable(run, "attention", name, layer), expected, rtol=0, atol=2e-5, err_msg=name
            )
        np.testing.assert_allclose(
            variable(run, "attention", "max_logit", layer),
            largest_logit(calls[layer], weights, strata),
            rtol=1e-5,
            atol=1e-5,
        )
        value = values_of(model, batch, calls)[layer]
        drain = variable(run, "attention", "value_drain", layer)
        if value is None:
            assert np.isnan(drain).all()
        else:
            expected = drained(value.double().numpy(), strata)
            # Keys that the model repeats before the product count once.
            copies = len(expected) // len(drain)
            np.testing.assert_allclose(np.repeat(drain, copies), expected, rtol=1e-5)


def values_of(model: nn.Module, batch: dict[str, Tensor], calls: list[AttentionCall]) -> list[Tensor | None]:
    """The calls' values; where attention is written out, those of the projection named so, if any."""
    taken: list[Tensor] = []
    projections = [m for path, m in model.named_modules() if path.endswith(".v_proj")]
    hooks = [m.register_forward_hook(lambda m, a, out: taken.append(out.detach())) for m in projections]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    if calls[0].value is None and taken:
        return [value.unflatten(-1, (4, 8)).transpose(1, 2) for value in taken]
    return [call.value for call in calls]


def test_learned_sinks_take_mass_in_gpt_oss_only() -> None:
    for name, takes in (("gpt_oss", True), ("llama", False)):
        run = measured(built(name), FAMILIES[name].inputs(), ["attention"])
        mass = run.tree["attention"]["extra_sink_mass"].values
        assert ((mass > 0.01) == takes).all()


# -- tokens ------------------------------------------------------------------------------------------------


def streams(family: Family, batch: dict[str, Tensor]) -> dict[tuple[str, int], np.ndarray]:
    model = built(family.name)
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
        if not family.has_attention:
            states = (model.get_input_embeddings()(batch["input_ids"]), *states)
    last = "residual_post" if family.name in NO_FINAL_NORM else "final_norm"
    found = {("embedding", 0): states[0], ("residual_post", 0): states[1], (last, 1): states[-1]}
    return {key: value.double().numpy() for key, value in found.items()}


@pytest.mark.parametrize("family", EVERY)
def test_token_statistics_are_those_of_the_hidden_states(family: Family) -> None:
    batch = batch_of(family, "right" if family.encoder else "left")
    sites = ["embedding", "residual_post"] + ["final_norm"] * (family.name not in NO_FINAL_NORM)
    run = measured(built(family.name), batch, sites)
    for (site, layer), x in streams(family, batch).items():
        compared = 0
        for name, expected in Oracle(x, strata_by_hand(batch)).expected().items():
            if name in run.tree[site]:
                found = variable(run, site, name, layer)
                np.testing.assert_allclose(found, expected, rtol=2e-4, atol=1e-5, err_msg=f"{site} {name}")
                compared += 1
        assert compared > 20


@pytest.mark.parametrize("padding", PADDINGS)
def test_padding_is_counted_nowhere_and_strata_are_those_of_the_ids(padding: str) -> None:
    family = FAMILIES["llama"]
    batch = batch_of(family, padding)
    run = measured(built("llama"), batch, ["*"])
    expected = strata_by_hand(batch).sum((1, 2))
    of_weights = ("mlp_gate_weight", "mlp_down_weight", "projection_weight")
    for site in run.tree.children:
        if site not in ("raw", "attention", "linear_input", *of_weights, "snapshot", "series"):
            counts = run.tree[site]["token_count"].values
            np.testing.assert_array_equal(counts, np.broadcast_to(expected, counts.shape), err_msg=site)


@pytest.mark.parametrize("padding", ["right", "left"])
def test_what_stands_in_padding_changes_nothing(padding: str) -> None:
    family = FAMILIES["llama"]
    batch = batch_of(family, padding)
    position = batch["attention_mask"].cumsum(-1).clamp(min=1) - 1
    other = {**batch, "input_ids": batch["input_ids"].where(batch["attention_mask"] > 0, 77)}
    first, second = (
        measured(
            built("llama"), {**b, "position_ids": position}, ["attention", "residual_post", "key_post_rope"]
        )
        for b in (batch, other)
    )
    for site in ("attention", "residual_post", "key_post_rope"):
        for name in first.tree[site]:
            np.testing.assert_allclose(
                first.tree[site][name].values, second.tree[site][name].values, rtol=1e-5, err_msg=name
            )
