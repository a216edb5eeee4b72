"""Attention calls of models that know nothing of transformers, and of compiled ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from osp_diag.seams.attention import AttentionCall, AttentionCapture, SkipReason
from tests.attention_reference import dense_weights, no_trace, observed
from tests.families import BATCH, FAMILIES, TOKENS

# -- plain PyTorch -----------------------------------------------------------------------------------------


class ToyAttention(nn.Module):
    """Attention in one of the ways that people write it; ``weights`` keeps what it computed."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.heads = way, 4
        self.qkv, self.out = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        split = (batch, tokens, self.heads, width // self.heads)
        q, k, v = (t.view(split).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        mask = torch.ones(tokens, tokens, dtype=torch.bool).tril()
        logits = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
        self.weights = (logits - logits.logsumexp(-1, keepdim=True)).exp().detach()
        out = self.attend(q, k, v, mask)
        return self.out(out.transpose(1, 2).reshape(x.shape))

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        sdpa = functional.scaled_dot_product_attention
        additive = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
        batch, heads = q.shape[:2]
        if self.way == "sdpa causal":
            return sdpa(q, k, v, None, 0.0, True)
        if self.way == "sdpa keywords":
            return sdpa(query=q, key=k, value=v, attn_mask=mask, scale=q.shape[-1] ** -0.5)
        if self.way == "sdpa additive":
            return sdpa(q, k, v, attn_mask=additive)
        if self.way == "sdpa operator":
            return torch.ops.aten.scaled_dot_product_attention(q, k, v, None, 0.0, True)
        if self.way == "sdpa three axes":
            flat = sdpa(*(t.flatten(0, 1) for t in (q, k, v)), attn_mask=mask)
            return flat.unflatten(0, (batch, heads))
        logits = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5 + additive
        if self.way == "bmm three axes":
            flat = torch.softmax(logits.flatten(0, 1), dim=2) @ v.flatten(0, 1)
            return flat.unflatten(0, (batch, heads))
        weights = {
            "functional": lambda: functional.softmax(logits, dim=-1, dtype=torch.float32),
            "method": lambda: logits.softmax(-1),
            "module": lambda: nn.Softmax(dim=3)(logits),
            "torch": lambda: torch.softmax(input=logits, dim=-1),
            "safe": lambda: torch._safe_softmax(logits, -1),
        }[self.way]()
        return weights @ v


class ToyBlock(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(32), ToyAttention(way)
        self.router, self.mlp = nn.Linear(32, TOKENS), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        # As many experts as tokens, so that the gates look like a one-headed attention.
        gates = self.router(x).softmax(-1)
        return x + self.mlp(x) * gates.max(-1, keepdim=True).values


class ToyGPT(nn.Module):
    """A GPT that knows nothing of transformers."""

    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config = type("Config", (), {"num_attention_heads": 4})()
        self.embedding = nn.Embedding(96, 32)
        self.blocks = nn.ModuleList(ToyBlock(way) for _ in range(2))
        self.head = nn.Linear(32, TOKENS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(x).softmax(-1)


WAYS = {
    "sdpa causal": "scaled_dot_product_attention",
    "sdpa keywords": "scaled_dot_product_attention",
    "sdpa additive": "scaled_dot_product_attention",
    "sdpa operator": "scaled_dot_product_attention",
    "sdpa three axes": "scaled_dot_product_attention",
    "bmm three axes": "softmax",
    "functional": "softmax",
    "method": "softmax",
    "module": "softmax",
    "torch": "softmax",
    "safe": "softmax",
}


@pytest.mark.parametrize("way", WAYS)
def test_plain_torch_models(way: str) -> None:
    model = ToyGPT(way)
    ids = FAMILIES["llama"].inputs()["input_ids"]
    expected = model(ids)
    calls: list[AttentionCall] = []
    with no_trace(model), AttentionCapture(model, calls.append) as capture:
        output = model(ids)
    assert torch.equal(output, expected)
    assert not capture.skipped
    assert [call.seam for call in calls] == [WAYS[way]] * 2
    for call, block in zip(calls, model.blocks, strict=True):
        assert call.module in (block.attention, *block.attention.children())
        torch.testing.assert_close(dense_weights(call).float(), block.attention.weights, atol=1e-6, rtol=0)


def test_a_softmax_outside_of_the_given_blocks_is_no_attention() -> None:
    model, ids = ToyGPT("method"), FAMILIES["llama"].inputs()["input_ids"]
    calls: list[AttentionCall] = []
    with AttentionCapture(model, calls.append, blocks=[model.blocks[1]]):
        model(ids)
    assert [call.module for call in calls] == [model.blocks[1].attention]


class ToyEncoder(nn.Module):
    """Around ``nn.MultiheadAttention``, alone or in ``nn.TransformerEncoderLayer``."""

    def __init__(self, *, batch_first: bool = True, layers: bool = False, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        if layers:
            layer = nn.TransformerEncoderLayer(32, 4, 48, dropout=0.0, batch_first=batch_first)
            self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        else:
            self.attention = nn.MultiheadAttention(32, 4, batch_first=batch_first, **options)
        self.layers = layers

    def forward(self, x: Tensor, **options: Any) -> Tensor:
        return self.encoder(x, **options) if self.layers else self.attention(x, x, x, **options)[0]


MASKED = torch.ones(TOKENS, TOKENS, dtype=torch.bool).triu(1)
PADDED = (torch.arange(TOKENS) >= TOKENS - 3).expand(BATCH, -1) & torch.tensor([[False], [True]])
MULTIHEAD_MASKS = {
    "none": {},
    "causal": {"attn_mask": MASKED},
    "additive": {"attn_mask": torch.zeros(MASKED.shape).masked_fill(MASKED, -torch.inf)},
    "padding": {"key_padding_mask": PADDED},
    "both": {"attn_mask": MASKED, "key_padding_mask": PADDED},
    "per head": {"attn_mask": MASKED.expand(BATCH * 4, -1, -1)},
}


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("gradients", [True, False], ids=["slow path", "fast path"])
@pytest.mark.parametrize("masks", MULTIHEAD_MASKS)
def test_multihead_attention(masks: str, gradients: bool, batch_first: bool) -> None:
    model = ToyEncoder(batch_first=batch_first).eval()
    x = torch.randn(BATCH, TOKENS, 32, generator=torch.Generator().manual_seed(5))
    given = x if batch_first else x.transpose(0, 1)
    calls: list[AttentionCall] = []
    with torch.set_grad_enabled(gradients):
        expected = model(given, **MULTIHEAD_MASKS[masks])
        with no_trace(model), AttentionCapture(model, calls.append):
            output = model(given, **MULTIHEAD_MASKS[masks])
        _, weights = model.attention(
            given, given, given, **MULTIHEAD_MASKS[masks], need_weights=True, average_attn_weights=False
        )
    assert torch.equal(output, expected)
    assert [call.seam for call in calls] == ["multi-head attention"]
    torch.testing.assert_close(dense_weights(calls[0]).float(), weights, atol=1e-6, rtol=0)


def test_multihead_attention_with_extra_keys_or_foreign_keys_is_skipped() -> None:
    x = torch.randn(BATCH, TOKENS, 32)
    model = ToyEncoder(add_zero_attn=True)
    with AttentionCapture(model, lambda call: pytest.fail("delivered")) as capture:
        model(x)
    assert capture.skipped == {SkipReason.EXTRA_KEYS: 1}
    decoder = nn.TransformerDecoderLayer(32, 4, 48, batch_first=True)
    calls: list[AttentionCall] = []
    with AttentionCapture(decoder, calls.append) as capture:
        decoder(x, torch.randn(BATCH, TOKENS, 32))
    assert [call.module for call in calls] == [decoder.self_attn]
    assert capture.skipped == {SkipReason.CROSS: 1}


def test_fused_encoder_layers_are_left_alone_and_counted() -> None:
    model, x = ToyEncoder(layers=True).eval(), torch.randn(BATCH, TOKENS, 32)
    calls: list[AttentionCall] = []
    with torch.no_grad():
        expected = model(x)
        with no_trace(model), AttentionCapture(model, calls.append) as capture:
            output = model(x)
        assert torch.equal(output, expected)
        assert (len(calls), capture.skipped) == (0, {SkipReason.FUSED_ENCODER: 2})
    with no_trace(model), AttentionCapture(model, calls.append) as capture:
        slow = model(x)
    assert torch.equal(slow, model(x))
    assert (len(calls), capture.skipped) == (2, {})


# -- torch.compile -----------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("how", ["torch.compile(model)", "model.compile()"])
def test_a_compiled_model_is_observed_under_force_eager(how: str) -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    compiled = model
    if how == "model.compile()":
        model.compile(backend="eager", fullgraph=True)
    else:
        compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = compiled(**batch).logits
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        with torch.compiler.set_stance("force_eager"):
            output, calls, capture = observed(compiled, batch)
        assert (len(calls), capture.forwards) == (2, 1)
        assert torch.equal(output.logits, expected)
        # Without the stance the compiled code runs as if nobody were there, and says so.
        output, calls, capture = observed(compiled, batch)
        assert (len(calls), capture.forwards) == (0, 0)
        assert torch.equal(compiled(**batch).logits, expected)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_blocks_are_observed_without_compiling_anew() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    for layer in model.model.layers:
        layer.compile(backend="eager", fullgraph=True)
    with torch.no_grad():
        expected = model(**batch).logits
        graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
        output, calls, _ = observed(model, batch)
        assert torch.equal(output.logits, expected)
        assert torch.equal(model(**batch).logits, expected)
    assert len(calls) == 2
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs
