"""Tokens that receive the most attention: dense attention in float64, the laws of the table, and a probe."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import osp_diag
from osp_diag.errors import EstimatorError
from osp_diag.estimators import Suite
from osp_diag.estimators._arrays import namespace_of, sums_by_bin
from osp_diag.estimators.attention import AttentionMask, AttentionObservation, TokenIds
from osp_diag.estimators.top_keys import TopKeys
from osp_diag.probing import relabel
from tests.dense_attention import Case, dense_logits, make_case, sub_batch
from tests.families import FAMILIES
from tests.tiny_checkpoints import VOCABULARY, byte_tokenizer, llama

SUITE = Suite([TopKeys(top=5, minimum=2)])
IDS = 9
namespace_of(torch.zeros(1))  # a compiled function has to find the namespace already there

CASES = {
    "causal": make_case(1),
    "left padding": make_case(4, left=(5, 0, 11)),
    "right padding": make_case(5, right=(0, 9, 20)),
    "window": make_case(9, window=5, left=(3, 0, 8)),
    "learned sinks": make_case(11, sink_logits=np.array([0.0, 3.0, -2.0, 8.0], np.float32)),
    "bidirectional": make_case(16, causal=False, left=(4, 0, 0), right=(0, 7, 2)),
}


def ids_of(case: Case, seed: int = 0) -> np.ndarray:
    """Ids 0 … 8, some far more common than others, and ids that no token has."""
    rng = np.random.default_rng(seed)
    ids = rng.choice(IDS + 2, size=case.strata.shape[1:], p=np.r_[0.3, np.full(9, 0.07), 0.07])
    return np.where(ids < IDS, ids, np.where(ids == IDS, -1, 1000))


def oracle(case: Case, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sum of α over keys, number of them) of each id, from the whole of the attention in float64."""
    logits, allowed = dense_logits(case)
    weights = np.where(allowed, np.exp(np.where(allowed, logits, 0)), 0)
    extra = 0 if case.sink_logits is None else np.exp(case.sink_logits.astype(float))[None, :, None, None]
    total = weights.sum(-1, keepdims=True) + extra
    p = np.divide(weights, total, out=np.zeros_like(weights), where=total > 0)
    usable = total[..., 0] > 0
    alpha, count = np.zeros(IDS), np.zeros(IDS)
    batch, heads, tokens, _ = p.shape
    for b in range(batch):
        valid = case.strata[0, b] > 0
        for k in np.flatnonzero(valid & (case.strata[1, b] == 0)):
            queries = valid & (np.arange(tokens) >= k) if case.causal else valid
            means = [
                p[b, h, queries & usable[b, h], k].mean()
                for h in range(heads)
                if (queries & usable[b, h]).any()
            ]
            if means and 0 <= ids[b, k] < IDS:
                alpha[ids[b, k]] += np.mean(means)
                count[ids[b, k]] += 1
    return alpha, count


def ranked(alpha: np.ndarray, count: np.ndarray, top: int = 5, minimum: int = 2) -> dict[str, Any]:
    mean = np.where(count >= minimum, alpha / np.maximum(count, 1), -np.inf)
    order = np.argsort(-mean)[:top]
    order = order[mean[order] > -np.inf]
    lacking = top - len(order)
    return {
        "top_key_token": np.r_[order, np.full(lacking, -1)],
        "top_key_mass": np.r_[mean[order], np.full(lacking, np.nan)],
        "top_key_count": np.r_[count[order], np.zeros(lacking)],
        "top_key_candidates": (count >= minimum).sum(),
        "later_key_mass": alpha.sum() / count.sum() if count.any() else np.nan,
    }


def observe(
    case: Case, ids: Any, to: Callable[[Any], Any] = np.asarray, **options: Any
) -> AttentionObservation:
    sinks = None if case.sink_logits is None else to(case.sink_logits)
    mask = AttentionMask(
        causal=case.causal, window=case.window, keys=None if case.keys is None else to(case.keys)
    )
    arrays = [to(a) for a in (case.query, case.key, case.value, case.strata)]
    known = None if ids is None else TokenIds(to(ids), IDS)
    return AttentionObservation(
        *arrays, scale=case.scale, mask=mask, sink_logits=sinks, token_ids=known, tile=12, **options
    )


def finalised(state: Any, layout: Any, suite: Suite = SUITE) -> dict[str, np.ndarray]:
    return {name: np.asarray(output.values) for name, output in suite.finalise(state, layout).items()}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, Any], rtol: float = 2e-5) -> None:
    assert set(found) == set(expected)
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=rtol, err_msg=name)


def measured_by(backend: str, case: Case, ids: np.ndarray) -> dict[str, np.ndarray]:
    to = {"numpy": np.asarray, "jax": jnp.asarray}.get(backend, torch.as_tensor)

    def measure(query: Any, key: Any, strata: Any, ids: Any) -> Any:
        inputs = replace(case, query=query, key=key, strata=strata)
        return SUITE.measure(observe(inputs, ids, lambda a: a if hasattr(a, "shape") else to(a)))

    if backend == "jax":
        measure = jax.jit(measure)
    elif backend == "torch-compiled":
        torch.compiler.reset()
        measure = torch.compile(measure, fullgraph=True, backend="aot_eager")
    case = replace(case, value=to(case.value), keys=None if case.keys is None else to(case.keys))
    case = replace(case, sink_logits=None if case.sink_logits is None else to(case.sink_logits))
    inputs = [to(a) for a in (case.query, case.key, case.strata, ids)]
    layout = observe(CASES["causal"], ids_of(CASES["causal"])).layout
    return finalised(SUITE.merge(SUITE.init(layout, inputs[0]), measure(*inputs)), layout)


# -- the definition ----------------------------------------------------------------------------------------


TRACED = ("window", "learned sinks", "bidirectional")
"""Of the others each is traced as part of these: causal, and padded on the left or the right."""


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *((name, backend) for name in CASES for backend in ("numpy", "torch")),
        *((name, backend) for name in TRACED for backend in ("jax", "torch-compiled")),
    ],
)
def test_against_dense_attention_in_float64(name: str, backend: str) -> None:
    case = CASES[name]
    ids = ids_of(case)
    expected = ranked(*oracle(case, ids))
    assert expected["top_key_candidates"] > 5
    assert_same(measured_by(backend, case, ids), expected)


def test_logits_that_the_model_made() -> None:
    case = CASES["left padding"]
    ids = ids_of(case)
    logits, allowed = dense_logits(case)
    given_logits = np.where(allowed, logits, -np.inf).astype(np.float32)
    observation = AttentionObservation.from_logits(
        given_logits, case.value, case.strata, token_ids=TokenIds(ids, IDS)
    )
    found = finalised(SUITE.measure(observation), observation.layout)
    assert_same(found, ranked(*oracle(case, ids)))


def test_first_tokens_of_packed_documents_are_left_out() -> None:
    case = CASES["causal"]
    strata = case.strata.copy()
    strata[1, :, 10] = 1
    strata[2:, :, 10] = 0
    packed, ids = replace(case, strata=strata), ids_of(case)
    observation = observe(packed, ids)
    assert_same(finalised(SUITE.measure(observation), observation.layout), ranked(*oracle(packed, ids)))
    count = SUITE.measure(observation)["token_key_mass.count"]
    known = (ids >= 0) & (ids < IDS)
    assert count.sum() == known.sum() - known[:, [0, 10]].sum()


def test_uniform_attention_gives_the_floor() -> None:
    case = CASES["causal"]
    even = replace(case, query=case.query * 0)
    ids = np.broadcast_to(np.arange(23) % IDS, (3, 23))
    observation = observe(even, ids)
    state = SUITE.measure(observation)
    floor = np.array([sum(1 / (i + 1) for i in range(k, 23)) / (23 - k) for k in range(23)])
    expected = [floor[[k for k in range(1, 23) if k % IDS == v]].mean() for v in range(IDS)]
    np.testing.assert_allclose(
        state["token_key_mass.alpha"] / state["token_key_mass.count"], expected, rtol=1e-5
    )


def test_ids_seen_too_rarely_are_not_ranked_and_missing_ranks_say_so() -> None:
    case = CASES["causal"]
    ids = np.zeros((3, 23), int)
    ids[0, 22] = 7  # seen once: the last key, which only its own query sees
    observation = observe(case, ids)
    state = SUITE.measure(observation)
    found = finalised(state, observation.layout)
    assert found["top_key_token"].tolist() == [0, -1, -1, -1, -1]
    assert found["top_key_count"].tolist() == [65, 0, 0, 0, 0]
    assert found["top_key_candidates"] == 1
    often = finalised(state, observation.layout, Suite([TopKeys(top=20, minimum=1)]))
    assert often["top_key_token"].shape == (20,)
    assert set(often["top_key_token"][:2]) == {0, 7}
    assert (often["top_key_token"][2:] == -1).all()
    assert np.isnan(often["top_key_mass"][2:]).all()


def test_without_ids_there_is_nothing_to_rank() -> None:
    case = CASES["causal"]
    for ids in (None, np.full((3, 23), -1)):
        observation = observe(case, ids)
        found = finalised(SUITE.measure(observation), observation.layout)
        assert (found["top_key_token"] == -1).all()
        assert np.isnan(found["later_key_mass"])
    with pytest.raises(EstimatorError, match=r"token_ids have shape \(2, 23\), expected one id a token"):
        observe(case, np.zeros((2, 23), int))


def test_parameters_are_checked() -> None:
    for wrong in ({"top": 0}, {"minimum": 0}):
        with pytest.raises(EstimatorError, match="both at least 1"):
            TopKeys(**wrong)


def test_sums_by_bin() -> None:
    rng = np.random.default_rng(0)
    index, values = rng.integers(0, 7, 50), rng.normal(size=50).astype(np.float32)
    expected = [values[index == b].astype(float).sum() for b in range(8)]
    for to in (np.asarray, torch.as_tensor, jnp.asarray):
        np.testing.assert_allclose(np.asarray(sums_by_bin(to(index), to(values), 8)), expected, atol=1e-6)


# -- its laws ----------------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), order=st.permutations(range(4)), cut=st.integers(1, 3))
def test_order_and_cuts_of_the_data_do_not_matter(seed: int, order: list[int], cut: int) -> None:
    case = make_case(seed, batch=4, tokens=11, left=(0, 2, 5, 1))
    ids = ids_of(case, seed)
    layout = observe(case, ids).layout
    whole = SUITE.update(SUITE.init(layout, case.query), observe(case, ids))
    parts = [order[:cut], order[cut:]]
    states = [SUITE.measure(observe(sub_batch(case, np.asarray(p)), ids[np.asarray(p)])) for p in parts]
    merged = SUITE.merge(SUITE.merge(SUITE.init(layout, case.query), states[0]), states[1])
    other = SUITE.merge(states[1], SUITE.merge(states[0], SUITE.init(layout, case.query)))
    for name, value in whole.items():
        np.testing.assert_allclose(merged[name], value, rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(other[name], merged[name], rtol=1e-6, atol=1e-9)


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000))
def test_renaming_the_tokens_renames_the_result(seed: int) -> None:
    case = CASES["causal"]
    ids, rng = ids_of(case, seed), np.random.default_rng(seed)
    names = rng.permutation(IDS)
    other = np.where((ids >= 0) & (ids < IDS), names[np.clip(ids, 0, IDS - 1)], ids)
    first, second = (
        finalised(SUITE.measure(observe(case, i)), observe(case, i).layout) for i in (ids, other)
    )
    np.testing.assert_allclose(second["top_key_mass"], first["top_key_mass"], rtol=1e-6)
    expected = np.where(first["top_key_token"] < 0, -1, names[first["top_key_token"]])
    np.testing.assert_array_equal(second["top_key_token"], expected)


def test_finalise_keeps_leading_axes() -> None:
    cases = [make_case(seed) for seed in range(4)]
    states = [SUITE.measure(observe(case, ids_of(case))) for case in cases]
    stacked = {k: np.stack([s[k] for s in states]).reshape(2, 2, *np.shape(states[0][k])) for k in states[0]}
    layout = observe(cases[0], ids_of(cases[0])).layout
    found = finalised(stacked, layout)
    for n, state in enumerate(states):
        for name, value in finalised(state, layout).items():
            np.testing.assert_array_equal(found[name][n // 2, n % 2], value, err_msg=name)


# -- probed ------------------------------------------------------------------------------------------------


def expected_of(model: Any, ids: torch.Tensor, mask: torch.Tensor | None = None) -> list[dict[str, Any]]:
    """Of each layer, from the attention that the model itself returns."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        layers = model(ids, attention_mask=mask, output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    size = model.config.vocab_size
    found = []
    for weights in layers:
        alpha, count = np.zeros(size), np.zeros(size)
        for b, row in enumerate(ids.tolist()):
            valid = np.arange(len(row)) if mask is None else np.flatnonzero(mask[b].numpy())
            for k in valid[1:]:
                queries = [q for q in valid if q >= k]
                alpha[row[k]] += weights[b][:, queries, k].double().mean().item()
                count[row[k]] += 1
        found.append(ranked(alpha, count, 16, 4))
    return found


@pytest.mark.parametrize("padded", [False, True])
def test_a_probe_measures_the_model_s_own_attention(padded: bool) -> None:
    family = FAMILIES["llama"]
    model, generator = family.build(), torch.Generator().manual_seed(3)
    batches = []
    for _ in range(2):
        ids = torch.randint(4, 14, (2, 20), generator=generator)
        mask = torch.ones_like(ids)
        if padded:
            mask[1, :3] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    probe = osp_diag.Probe(model, sites=["attention"], estimators=["top_keys"])
    with torch.no_grad(), probe.step(0):
        for batch in batches:
            model(**batch)
    everything = {name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}
    for layer, expected in enumerate(
        expected_of(model, everything["input_ids"], everything["attention_mask"])
    ):
        found = probe.run.at("attention").sel(step=0, layer=layer)
        assert expected["top_key_candidates"] >= 8
        assert_same({str(name): value.values for name, value in found.data_vars.items()}, expected)
    assert "top_key_token_text" not in probe.run.at("attention").coords


def test_the_store_has_ids_masses_and_texts(tmp_path) -> None:
    model, tokenizer, out = llama(), byte_tokenizer(), tmp_path / "run.zarr"
    options = {"tokenizer": tokenizer, "tokens": 256, "seq_len": 32, "sites": ["attention"]}
    run = osp_diag.probe(model, out=out, **options)
    found = run.at("attention")
    assert dict(found["top_key_mass"].sizes) == {"step": 1, "layer": 2, "key_rank": 16}
    assert found["key_rank"].values.tolist() == list(range(1, 17))
    assert found["top_key_token"].dtype.kind == "i"
    assert found["top_key_token"].attrs["units"] == "token id"
    assert "at least 4 times" in found["top_key_mass"].attrs["definition"]
    assert run.attrs["estimator_parameters"]["top_keys/1"] == {"top": 16, "minimum": 4}
    texts = found["top_key_token_text"]
    assert texts.dims == found["top_key_token"].dims
    for token, text in zip(found["top_key_token"].values.ravel(), texts.values.ravel(), strict=True):
        assert text == ("" if token < 0 else tokenizer.decode([int(token)]))
    assert "top_key_token_text" in run["top_key_mass"].coords
    assert "vocabulary" not in run.sites
    assert run["vocabulary"]["token_text"].sizes == {"token_id": VOCABULARY}
    raw = run.raw("attention")
    assert raw["token_key_mass.alpha"].sizes == {"step": 1, "layer": 2, "token_id": VOCABULARY}
    assert (raw["token_key_mass.count"].sum("token_id") == 8 * 31).all()
    other = relabel(run, "attention", [TopKeys(top=3, minimum=1)])
    assert other["top_key_token_text"].shape == (1, 2, 3)
    in_memory = osp_diag.probe(model, **options)
    xr.testing.assert_equal(in_memory.at("attention"), found.load())
    assert osp_diag.open_run(out).refresh().at("attention")["top_key_token_text"].equals(texts)


def test_texts_are_written_once_and_a_resumed_probe_leaves_them(tmp_path) -> None:
    model, out, batch = llama(), tmp_path / "run.zarr", torch.arange(60).reshape(2, 30) % 7
    for first in (0, 2):
        with osp_diag.Probe(
            model, out=out, tokenizer=byte_tokenizer(), sites=["attention"], resume=first > 0
        ) as probe:
            for step in (first, first + 1):
                with torch.no_grad(), probe.step(step):
                    model(batch)
    found = osp_diag.open_run(out).at("attention")
    assert found["top_key_token_text"].sizes == {"step": 4, "layer": 2, "key_rank": 16}
    assert (found["top_key_candidates"] == 7).all()
    assert (found["top_key_token_text"].isel(key_rank=7) == "").all()


def test_embeddings_have_no_ids() -> None:
    model = FAMILIES["llama"].build()
    probe = osp_diag.Probe(model, sites=["attention"], tokenizer=byte_tokenizer())
    with torch.no_grad(), probe.step(0):
        model(inputs_embeds=torch.randn(1, 6, 32))
    assert (probe.run.at("attention")["top_key_token"] == -1).all()
