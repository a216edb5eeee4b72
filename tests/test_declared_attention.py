"""Attention functions that their authors declare are seen as all others are, and run as they did."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import create_block_mask

from osp_diag import Probe, attention_function
from osp_diag.errors import CaptureError
from tests.attention_reference import dense_weights, no_trace, observed

TOKENS, HEADS = 11, 2


@attention_function(causal=True)
def sunk(query: Tensor, key: Tensor, value: Tensor, sink_logits: Tensor, note: str = "") -> Tensor:
    """Attention with a sink, by a softmax that nothing recognises: its T×T array has one column more."""
    logits = (query @ key.mT / query.shape[-1] ** 0.5).masked_fill(
        ~torch.ones(query.shape[2], query.shape[2], dtype=torch.bool).tril(), -torch.inf
    )
    column = sink_logits[:, None, None].expand(*logits.shape[:3], 1)
    return torch.cat([logits, column], -1).softmax(-1)[..., :-1] @ value


@attention_function()
def plain(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    mask: Any = None,
) -> Tensor:
    """Attention by a library's function, which must not be counted a second time."""
    if mask is not None:
        index = torch.meshgrid(*(torch.arange(n) for n in (*query.shape[:3], TOKENS)), indexing="ij")
        mask = mask.mask_mod(*index)
    return functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=causal, scale=scale
    )


class Layer(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.way, self.qkv, self.out = way, nn.Linear(16, 48), nn.Linear(16, 16)
        self.sinks = nn.Parameter(torch.tensor([0.5, -1.0]))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (HEADS, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        out = {
            "sunk": lambda: sunk(q, k, v, self.sinks, note="!"),
            "keywords": lambda: sunk(sink_logits=self.sinks, value=v, key=k, query=q),
            "causal": lambda: plain(q, k, v, causal=True, scale=0.3),
            "block mask": lambda: plain(
                q, k, v, mask=create_block_mask(near, None, None, TOKENS, TOKENS, device="cpu")
            ),
        }[self.way]()
        return self.out(out.transpose(1, 2).flatten(2))


def near(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
    return (key <= query) & (query - key < 4)


class Model(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(30, 16), nn.ModuleList([Layer(way), Layer(way)])

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.embed(input_ids)
        for layer in self.layers:
            x = x + layer(x)
        return x


IDS = torch.arange(3 * TOKENS).reshape(3, TOKENS) % 30


@pytest.mark.parametrize("way", ["sunk", "keywords", "causal", "block mask"])
def test_calls_are_seen_once_and_as_they_are(way: str) -> None:
    model = Model(way)
    with torch.no_grad():
        expected = model(IDS)
    with no_trace(model):
        output, calls, capture = observed(model, {"input_ids": IDS})
    assert torch.equal(output, expected)
    assert [call.seam for call in calls] == ["declared function"] * 2
    assert [call.module for call in calls] == list(model.layers)
    assert not capture.skipped
    call = calls[0]
    assert call.scale == (0.3 if way == "causal" else 8**-0.5)
    if way == "block mask":
        assert call.mask is None
        assert call.mask_function is near
        assert not call.causal
    else:
        assert call.causal
    assert (call.sink_logits is not None) == (way in ("sunk", "keywords"))
    assert call.value is not None
    averaged = (dense_weights(call) @ call.value.double()).transpose(1, 2).flatten(2)
    x = model.embed(IDS)
    torch.testing.assert_close(model.layers[0].out(averaged.float()), model.layers[0](x), rtol=0, atol=1e-6)


def test_a_probe_measures_the_mass_of_the_declared_sink() -> None:
    model = Model("sunk")
    with torch.no_grad(), (probe := Probe(model, sites=["attention"])).step(0):
        model(IDS)
    _, calls, _ = observed(model, {"input_ids": IDS})
    for layer, call in enumerate(calls):
        expected = 1 - dense_weights(call).sum(-1).mean((0, 2))
        found = probe.run.tree["attention"]["extra_sink_mass"].sel(step=0, layer=layer).values
        np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_compiled_code_holds_nothing_of_it() -> None:
    model = Model("causal")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(IDS), model(IDS))
    torch.compiler.reset()


def test_other_function_modes_change_nothing() -> None:
    model = Model("sunk")
    with torch.no_grad():
        expected = model(IDS)
        with torch.device("cpu"):
            assert torch.equal(model(IDS), expected)


def test_gradients_flow_through_an_observed_call() -> None:
    model = Model("sunk")
    gradients = []
    for probe in (None, Probe(model, sites=["attention"])):
        model.zero_grad()
        if probe is None:
            model(IDS).square().mean().backward()
        else:
            with probe.step(0):
                model(IDS).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert all(map(torch.equal, *gradients))
    assert len(gradients[0]) == len(list(model.parameters()))


def test_mistakes_are_told() -> None:
    with pytest.raises(
        CaptureError, match=r"attention_function\(causl=…\): an attention call has no such field"
    ):
        attention_function(causl=True)

    def without_value(query: Tensor, keys: Tensor) -> Tensor:
        return query + keys

    with pytest.raises(CaptureError, match="without_value has no parameter key or value"):
        attention_function()(without_value)


def test_it_keeps_its_name_and_document() -> None:
    assert sunk.__name__ == "sunk"
    assert sunk.__doc__ is not None
    assert sunk.__doc__.startswith("Attention with a sink")
