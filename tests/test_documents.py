"""Documents in a row give the numbers of the same documents fed one by one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from osp_diag import Probe, attention_function
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


class TakesOffsets(nn.Module):
    """A model of somebody's own whose attention makes its mask of the documents' offsets itself."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 16)
        self.layers = nn.ModuleList(OwnMask(way) for _ in range(2))

    def forward(self, tokens: Tensor, cu_seqlens: Tensor | None = None) -> Tensor:
        x = self.words(tokens)
        for layer in self.layers:
            x = layer(x, cu_seqlens)
        return x


@attention_function(causal=True)
def varlen(query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """A kernel that no seam sees: exponentials and sums by hand, document by document."""
    tokens = query.shape[2]
    rows = torch.arange(len(query) * tokens).reshape(len(query), tokens)
    number = rows // tokens if cu_seqlens is None else torch.searchsorted(cu_seqlens, rows, right=True)
    seen = (number[:, :, None] == number[:, None, :]) & torch.ones(tokens, tokens).tril().bool()
    weights = (query @ key.mT * 8**-0.5).exp() * seen[:, None]
    return weights @ value / weights.sum(-1, keepdim=True)


class OwnMask(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.project, self.out = way, nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor, offsets: Tensor | None) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        place = torch.arange(x.shape[0] * x.shape[1])
        if offsets is None or self.way == "deaf":
            number = place // x.shape[1]
        else:
            number = torch.searchsorted(offsets, place, right=True)
        if self.way == "told by nobody":
            number = place // 4
        number = number.reshape(x.shape[:2])
        mask = (
            (number[:, :, None] == number[:, None, :]) & torch.ones(x.shape[1], x.shape[1]).tril().bool()
        )[:, None]
        if self.way == "declared":
            mixed = varlen(q, k, v, offsets)
        elif self.way == "softmax":
            mixed = (q @ k.mT * 8**-0.5).masked_fill(~mask, float("-inf")).softmax(-1) @ v
        else:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(mixed.transpose(1, 2).flatten(2))


def run_of_offsets(model: nn.Module, *calls: dict[str, Any]) -> tuple[dict[str, np.ndarray], Probe]:
    probe = Probe(model, sites=["residual_post", "attention"])
    with torch.no_grad(), probe.step(0):
        for call in calls:
            model(**call)
    return numbers(probe), probe


OFFSETS = torch.tensor([0, 5, 14, 17, 34])


@pytest.mark.parametrize("way", ["kernel", "softmax", "declared"])
def test_offsets_of_documents_make_documents(way: str) -> None:
    torch.manual_seed(0)
    model, ids = TakesOffsets(way).eval(), packed_ids()
    found, _ = run_of_offsets(model, {"tokens": ids, "cu_seqlens": OFFSETS})
    assert_same_statistics(found, run_of_offsets(model, *({"tokens": part} for part in documents(ids)))[0])
    flat = {"tokens": ids.reshape(1, 34), "cu_seqlens": OFFSETS.int()}
    assert_same_statistics(run_of_offsets(model, flat)[0], found)


def test_documents_that_attention_does_not_keep_apart_have_no_sinks() -> None:
    model, ids = TakesOffsets("deaf").eval(), packed_ids()
    found, probe = run_of_offsets(model, {"tokens": ids, "cu_seqlens": OFFSETS})
    assert not any(name.startswith("/attention/") for name in found)
    reason = probe.run.absent_sites["attention"]
    assert reason == "the documents that the model was told of see one another in its attention"


def test_documents_that_attention_alone_knows_are_noted_and_its_mask_holds() -> None:
    model, ids = TakesOffsets("told by nobody").eval(), packed_ids()[:, :16]
    found, probe = run_of_offsets(model, {"tokens": ids})
    assert any("attention of layer 0 is cut where no token sees" in note for note in probe.run.notes)
    # Of 16 tokens 4 see the first one.
    assert "about w/T, the share of queries that see it (0.25)" in " ".join(probe.run.notes)
    x = model.words(ids).double()
    with torch.no_grad():
        q, k, _ = (
            t.unflatten(-1, (2, 8)).transpose(1, 2) for t in model.layers[0].double().project(x).chunk(3, -1)
        )
    number = torch.arange(16) // 4
    seen = (number[:, None] == number) & torch.ones(16, 16).tril().bool()
    weights = (q @ k.mT * 8**-0.5).masked_fill(~seen, float("-inf")).softmax(-1).numpy()
    mass = [weights[:, :, place:, place].mean((0, 2)) for place in range(16)]
    np.testing.assert_allclose(found["/attention/key_mass"][0], np.stack(mass, 1), atol=1e-6)


def test_offsets_as_transformers_hand_them_to_flash_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels for packed rows take them; sdpa takes no notice of them."""
    model, ids = FAMILIES["llama"].build("sdpa"), packed_ids()[:1]
    offsets = torch.tensor([0, 5, 14, 17], dtype=torch.int32)
    batch = {"input_ids": ids, "use_cache": False, "cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets}
    batch |= {"max_length_q": 9, "max_length_k": 9}
    ignored = probed(model, batch, sites=SITES)
    assert_same_statistics(ignored, probed(model, {"input_ids": ids, "use_cache": False}, sites=SITES))

    def varlen(module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **options: Any) -> Any:
        assert mask is None
        offsets = options.get("cu_seq_lens_q", torch.tensor([0, query.shape[2]])).tolist()
        groups = query.shape[1] // key.shape[1]
        parts = [
            nn.functional.scaled_dot_product_attention(
                query[:, :, a:b], key[:, :, a:b].repeat_interleave(groups, 1),
                value[:, :, a:b].repeat_interleave(groups, 1), is_causal=True,
            )
            for a, b in pairwise(offsets)
        ]  # fmt: skip
        return torch.cat(parts, 2).transpose(1, 2), None

    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, "flash_of_ours", varlen)
    monkeypatch.setitem(
        type(ALL_MASK_ATTENTION_FUNCTIONS)._global_mapping, "flash_of_ours", lambda *_, **__: None
    )
    model.config._attn_implementation = "flash_of_ours"
    found = probed(model, batch, sites=SITES)
    model.config._attn_implementation = "sdpa"
    parts = ids.split([5, 9, 3], 1)
    # Positions go on over the row, where those of the documents alone begin again.
    places = torch.arange(17)[None].split([5, 9, 3], 1)
    expected = probed(
        model,
        *(
            {"input_ids": p, "position_ids": t, "use_cache": False}
            for p, t in zip(parts, places, strict=True)
        ),
        sites=SITES,
    )
    assert_same_statistics(found, expected)
