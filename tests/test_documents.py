"""Documents in a row give the numbers of the same documents fed one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from osp_diag import Probe
from osp_diag.capture.documents import _cuts
from osp_diag.estimators.attention_mask import AttentionMask
from osp_diag.trainer.model import Llama
from tests.families import FAMILIES
from tests.llama_reference import tiny
from tests.test_probe_laws import numbers, probed

SITES = ["residual_post", "attention", "attention_input", "mlp_hidden", "query_post_rope", "value"]
LENGTHS = [[5, 9, 3], [17]]


def packed_ids() -> Tensor:
    return torch.randint(4, 60, (2, 17), generator=torch.Generator().manual_seed(5))


def documents(ids: Tensor) -> list[Tensor]:
    return [part[None] for row, lengths in zip(ids, LENGTHS, strict=True) for part in row.split(lengths)]


def positions() -> Tensor:
    return torch.stack([torch.cat([torch.arange(n) for n in lengths]) for lengths in LENGTHS])


def numbering() -> Tensor:
    return torch.stack([torch.arange(len(n)).repeat_interleave(torch.tensor(n)) for n in LENGTHS])


def assert_same_statistics(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert set(found) == set(expected)
    for name, value in expected.items():
        if "logit_density" in name or "histogram" in name:
            continue  # an ulp may move a logit over the edge of a bin
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("way", ["positions", "mask", "eager positions"])
def test_packed_documents_are_those_fed_one_by_one(way: str) -> None:
    model = FAMILIES["llama"].build("eager" if "eager" in way else "sdpa")
    ids = packed_ids()
    options: dict[str, Any] = {"sites": SITES, "delimiter_ids": (7, 8, 9, 10)}
    expected = probed(model, *({"input_ids": part, "use_cache": False} for part in documents(ids)), **options)
    batch: dict[str, Any] = {"input_ids": ids, "use_cache": False, "position_ids": positions()}
    if way == "mask":
        same = numbering()[:, :, None] == numbering()[:, None, :]
        batch["attention_mask"] = (same & torch.ones(17, 17, dtype=torch.bool).tril())[:, None]
    found = probed(model, batch, **options)
    assert_same_statistics(found, expected)
    assert found["/residual_post/token_count"][0, 1] == 4


@pytest.mark.parametrize("kind", ["softmax", "learned_sink"])
def test_documents_that_the_trainer_separates(kind: Any) -> None:
    model = Llama(tiny(attention=kind)).eval()
    ids = packed_ids() % model.config.vocabulary_size

    def run(*calls: dict[str, Any]) -> dict[str, np.ndarray]:
        probe = Probe(model, sites=SITES)
        with torch.no_grad(), probe.step(0):
            for call in calls:
                model(**call)
        return numbers(probe)

    expected = run(*({"input_ids": part} for part in documents(ids)))
    assert_same_statistics(run({"input_ids": ids, "document_ids": numbering()}), expected)


def test_positions_that_attention_does_not_follow_make_no_documents() -> None:
    model, ids = FAMILIES["llama"].build("eager"), packed_ids()
    # With a padding mask transformers leave attention causal over the whole row.
    batch = {"input_ids": ids, "position_ids": positions(), "attention_mask": torch.ones_like(ids)}
    probe = Probe(model, sites=["attention"])
    with torch.no_grad(), probe.step(0):
        weights = model(**batch, output_attentions=True).attentions
    found = numbers(probe)["/attention/first_token_attention"][:, :, 0]
    expected = torch.stack([layer[..., 0].mean((0, 2)) for layer in weights])
    np.testing.assert_allclose(found, expected, rtol=1e-5)


class Bidirectional(nn.Module):
    """Blocks that are handed a mask, made inside of anything that the caller may say."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 16)
        self.layers = nn.ModuleList(Attending() for _ in range(2))

    def forward(self, tokens: Tensor) -> Tensor:
        # Documents end with token 1.
        number = torch.cat([torch.zeros_like(tokens[:, :1]), (tokens == 1).long().cumsum(1)[:, :-1]], 1)
        mask = (number[:, :, None] == number[:, None, :])[:, None]
        x = self.words(tokens)
        for layer in self.layers:
            x = layer(x, mask)
        return x


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def test_documents_of_a_mask_that_sees_both_ways() -> None:
    model, ids = Bidirectional().eval(), packed_ids()
    ids[0, [4, 13]] = 1

    def run(*calls: Tensor) -> dict[str, np.ndarray]:
        probe = Probe(model, sites=["residual_post", "attention"])
        with torch.no_grad(), probe.step(0):
            for call in calls:
                model(call)
        return numbers(probe)

    assert_same_statistics(run(ids), run(*documents(ids)))


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5), min_size=1, max_size=6), causal=st.booleans(), seed=st.integers(0, 99)
)
def test_cuts_are_where_nothing_is_seen_across(lengths: list[int], causal: bool, seed: int) -> None:
    number = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    tokens = len(number)
    allowed = number[:, None] == number[None, :]
    if causal:
        allowed = allowed & torch.ones(tokens, tokens, dtype=torch.bool).tril()
    generator = torch.Generator().manual_seed(seed)
    allowed |= torch.rand(tokens, tokens, generator=generator) < 0.02
    found = _cuts(AttentionMask(causal=False, tensor=allowed[None, None]), torch.ones(1, tokens).bool())[0]
    for t in range(tokens):
        assert bool(found[t]) == (not allowed[t:, :t].any() and not allowed[:t, t:].any())
