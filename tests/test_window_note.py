"""Layers whose mask hides the first token from later queries: numbers respect it, a note names the layers."""

from __future__ import annotations

from html import escape

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from osp_diag import Probe, Run
from osp_diag.figures.report.build import build_report
from tests.families import Family

TOKENS = torch.randint(3, 60, (2, 24), generator=torch.Generator().manual_seed(1))
WINDOW = 6


class Layer(nn.Module):
    """Attention that makes its own mask of a window inside of ``forward``."""

    def __init__(self, way: str, window: int | None) -> None:
        super().__init__()
        self.way, self.window = way, window
        self.project, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.project(x).chunk(3, -1))
        distance = torch.arange(x.shape[1])[:, None] - torch.arange(x.shape[1])
        seen = (distance >= 0) & (distance < (self.window or x.shape[1]))
        if self.way == "kernel":
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        else:
            mixed = ((q @ k.mT * 8**-0.5).masked_fill(~seen, float("-inf"))).softmax(-1) @ v
        return x + self.out(mixed.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, way: str) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 16)
        self.layers = nn.ModuleList(Layer(way, window) for window in (None, WINDOW, WINDOW))

    def forward(self, tokens: Tensor) -> Tensor:
        x = 3 * self.words(tokens)
        for layer in self.layers:
            x = layer(x)
        return x


def probed(model: nn.Module, **batch: Tensor) -> Run:
    with Probe(model) as probe, probe.step(0), torch.no_grad():
        model(**batch)
    return probe.run


NOTE = (
    "the sink rate of layers 1, 2, where a sliding window (or a mask like one) hides the first token from "
    "later queries, is 0 by construction once ε exceeds about w/T, the share of queries that see it (0.25); "
    "visible_sink_rate is over those queries"
)


@pytest.mark.parametrize("way", ["kernel", "softmax"])
def test_masks_made_inside_of_attention_hold(way: str) -> None:
    torch.manual_seed(0)
    model = Model(way).eval()
    run = probed(model, tokens=TOKENS)
    assert run.notes == (NOTE,)
    x = 3 * model.words(TOKENS).double()
    distance = torch.arange(24)[:, None] - torch.arange(24)
    for number, layer in enumerate(model.double().layers):
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in layer.project(x).chunk(3, -1))
        seen = (distance >= 0) & (distance < (layer.window or 24))
        weights = (q @ k.mT * 8**-0.5).masked_fill(~seen, float("-inf")).softmax(-1)
        alpha = np.stack([weights[:, :, k:, k].mean(-1).detach().numpy() for k in range(24)], -1)
        ours = run.at("attention").sel(step=0, layer=number)
        np.testing.assert_allclose(ours["key_mass"], alpha.mean(0), atol=1e-6)
        rate = (alpha[:, :, 0] > 0.1).mean(0)
        np.testing.assert_array_equal(ours["sink_rate"].sel(epsilon=0.1, sink_position=0), rate)
        if layer.window is not None:
            assert (ours["sink_rate"].sel(sink_position=0, epsilon=[0.3, 0.5, 0.8]) == 0).all()
        x = x + layer.out((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_note_stands_where_the_numbers_are_read(implementation: str) -> None:
    family = Family(
        "mistral", "MistralForCausalLM", "MistralConfig", {"num_key_value_heads": 2, "sliding_window": WINDOW}
    )
    model = family.build(implementation)
    run = probed(model, input_ids=TOKENS)
    (note,) = run.notes
    assert note == NOTE.replace("1, 2", "0, 1")
    assert note in run.attrs["notes"]
    assert run.summary().as_dict()["notes"] == [note]
    assert note in " ".join(run.summary().text().split())
    assert escape(note) in build_report([run]).html
    short = probed(model, input_ids=TOKENS[:, :WINDOW])
    assert short.notes == ()
    assert "notes" not in short.summary().as_dict()
