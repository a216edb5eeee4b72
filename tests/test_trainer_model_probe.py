"""Every site of the training model, as a probe measures it, against the model in float64."""

from __future__ import annotations

import itertools
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from osp_diag import Probe
from osp_diag.schema import OCCASIONAL_SITES, SITES
from osp_diag.sites import find_sites
from osp_diag.trainer.model import Llama
from tests.attention_reference import no_trace
from tests.dense_attention import Case, dense_outputs
from tests.estimators.activation_oracle import Oracle, fisher
from tests.llama_reference import KINDS, Reference, sink_logits, stirred, tiny

# torch's compiler means to hide this warning about an input of its own making, but not from "error".
pytestmark = pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"
)

DELIMITERS = (5, 17, 40, 41, 42, 43)
NORMS = {"softmax": "ssnorm", "softmax_off_by_one": "rmsnorm", "learned_sink": "srmsnorm", "gated": "ssnorm"}


def model_of(kind: Any, *, normed: bool = False) -> Llama:
    return stirred(tiny(attention=kind, norm=NORMS[kind], query_key_norm=normed))


def batch_of() -> Tensor:
    ids = torch.randint(50, 97, (3, 19), generator=torch.Generator().manual_seed(4))
    ids[0, 4], ids[1, 6], ids[2, 18] = DELIMITERS[:3]
    return ids


def strata_of(ids: Tensor) -> np.ndarray:
    first = np.zeros(ids.shape)
    first[:, 0] = 1
    delimiter = np.isin(ids.numpy(), DELIMITERS) * (1 - first)
    return np.stack([np.ones(ids.shape), first, delimiter, 1 - first - delimiter])


def evaluate(model: Llama, ids: Tensor) -> None:
    with torch.no_grad():
        model(ids)


def train(model: Llama, ids: Tensor) -> None:
    loss = model(ids, labels=ids).loss
    assert loss is not None
    loss.backward()


def probed(model: Llama, ids: Tensor, way: str, sites: list[str]) -> Any:
    """The run of one step. Ways to run a model that has already run so, as in the middle of training."""
    model.set_activation_checkpointing("checkpointed" in way)
    if "compiled" in way:
        for block in model.blocks:
            block.compile(backend="aot_eager")
    run = evaluate if way == "evaluated" else train
    run(model, ids)
    probe = Probe(model, sites=sites, delimiter_ids=DELIMITERS)
    with probe.step(0):
        run(model, ids)
    torch.compiler.reset()
    return probe.run


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("normed", [False, True], ids=["", "query-key-norm"])
def test_every_site_is_found(kind: Any, normed: bool) -> None:
    found = find_sites(model_of(kind, normed=normed))
    assert not found.absent
    assert set(SITES) - set(OCCASIONAL_SITES) <= set(found.sites)
    assert found.causal_layers == {0, 1}
    assert found.notes == ("attention seen through declared function (2 layers)",)
    taps = {(tap.site, tap.layer): (tap.module, tap.side) for tap in found.taps}
    assert taps["embedding", 0] == ("model.layers.0", "input")
    assert taps["attention_output", 1] == ("model.layers.1.self_attn.o_proj", "input")
    assert taps["key_pre_rope", 1] == (
        "model.layers.1.self_attn." + ("k_norm" if normed else "k_proj"),
        "output",
    )
    linears = {site for site in found.sites if site.startswith("linear_input:")}
    assert {"linear_input:model.embedding_projection", "linear_input:unembedding_projection"} <= linears
    assert ("linear_input:self_attn.gate_proj" in linears) == (kind == "gated")


COMBINATIONS = [
    *itertools.product(KINDS, ("evaluated", "checkpointed", "compiled and checkpointed")),
    ("softmax", "trained"),
    ("learned_sink", "compiled"),
]


@cache
def expected_of(kind: Any) -> dict[tuple[str, int], dict[str, np.ndarray]]:
    """The numbers of every site and layer, whatever way the model is run."""
    ids = batch_of()
    reference = Reference(model_of(kind, normed=kind == "learned_sink"), ids)
    expected = {
        place: expected_activations(x.reshape(*ids.shape, -1), ids) for place, x in reference.sites.items()
    }
    return expected | {("attention", layer): expected_attention(reference, layer, ids) for layer in range(2)}


@pytest.mark.parametrize(("kind", "way"), COMBINATIONS)
def test_every_number_is_that_of_the_definition(kind: Any, way: str) -> None:
    model, ids = model_of(kind, normed=kind == "learned_sink"), batch_of()
    sites = {site for site, _ in expected_of(kind)}
    assert sites == set(SITES) - {"mlp_down_weight", *OCCASIONAL_SITES}
    run = probed(model, ids, way, [*sites])
    for (site, layer), expected in expected_of(kind).items():
        compare(run, site, layer, expected)
        if site != "attention":
            continue
        takes = kind in ("softmax_off_by_one", "learned_sink")
        assert ((expected["extra_sink_mass"] > 1e-3) == takes).all()


def compare(run: Any, site: str, layer: int, expected: dict[str, np.ndarray]) -> None:
    for name, value in expected.items():
        found = run.tree[site][name].sel(step=0, layer=layer).values
        message = f"{site} {layer} {name}"
        np.testing.assert_allclose(found, value.reshape(found.shape), rtol=2e-4, atol=2e-5, err_msg=message)


def expected_activations(x: np.ndarray, ids: Tensor) -> dict[str, np.ndarray]:
    oracle = Oracle(x, strata_of(ids))
    return {
        "fisher_kurtosis": oracle.over_tokens(fisher),
        "token_norm": oracle.over_tokens(lambda token: float(np.linalg.norm(token))),
        "channel_rms": np.stack([np.sqrt((rows**2).mean(0)) for rows in oracle.rows]),
        "absolute_maximum": np.array([np.abs(rows).max() for rows in oracle.rows]),
    }


ATTENTION_NAMES = (
    "sink_rate", "key_mass", "first_token_attention", "first_token_dominance", "key_mass_share",
    "extra_sink_mass", "max_logit", "delta_logit", "value_norm", "value_drain",
)  # fmt: skip


def expected_attention(reference: Reference, layer: int, ids: Tensor) -> dict[str, np.ndarray]:
    query, key, value = (
        reference.sites[site, layer].transpose(0, 2, 1, 3)
        for site in ("query_post_rope", "key_post_rope", "value")
    )
    sinks = sink_logits(reference.model, reference.config, layer)
    allowed = reference.allowed
    case = Case(query, key, value, strata_of(ids), scale=8**-0.5, allowed=allowed, sink_logits=sinks)
    outputs = dense_outputs(case)
    return {name: outputs[name] for name in ATTENTION_NAMES}


def test_documents_are_sequences_of_their_own() -> None:
    model, ids = model_of("learned_sink"), batch_of()
    numbering = torch.tensor([[0] * 8 + [1] * 11, [0] * 19, [3] * 2 + [4] * 17])
    documents = [(0, 0, 8), (0, 8, 19), (1, 0, 19), (2, 0, 2), (2, 2, 19)]
    reference = Reference(model, ids, numbering)
    probe = Probe(model, sites=["attention"], delimiter_ids=DELIMITERS)
    with torch.no_grad(), probe.step(0):
        model(ids, document_ids=numbering)

    def apart(values: np.ndarray, mode: Any = "edge") -> np.ndarray:
        """(sequence, token, …) → (document, token, …), the shorter ones padded."""
        parts = [values[row, start:stop] for row, start, stop in documents]
        return np.stack([np.pad(p, [(0, 19 - len(p)), *[(0, 0)] * (p.ndim - 1)], mode) for p in parts])

    strata = np.stack([apart(stratum, "constant") for stratum in strata_of(ids)])
    strata[1, :, 0], strata[2:, :, 0] = 1, 0
    allowed = np.tril(np.ones((19, 19), dtype=bool)) & (strata[0] > 0)[:, None, None, :]
    for layer in range(2):
        query, key, value = (
            apart(reference.sites[site, layer]).transpose(0, 2, 1, 3)
            for site in ("query_post_rope", "key_post_rope", "value")
        )
        sinks = sink_logits(reference.model, reference.config, layer)
        case = Case(query, key, value, strata, scale=8**-0.5, allowed=allowed, sink_logits=sinks)
        outputs = dense_outputs(case)
        compare(probe.run, "attention", layer, {name: outputs[name] for name in ATTENTION_NAMES})


@pytest.mark.parametrize("kind", KINDS)
def test_a_probed_step_trains_the_same_bits_and_leaves_no_trace(kind: Any) -> None:
    model, ids = model_of(kind).train(), batch_of()

    def step() -> list[Tensor]:
        model.zero_grad()
        train(model, ids)
        return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]

    expected = step()
    probe = Probe(model, sites=["*"])
    with no_trace(model), probe.step(0):
        found = step()
    assert all(map(torch.equal, found, expected))
