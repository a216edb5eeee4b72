"""Blocks out of the ordinary: parts in several lists, ``forward`` called directly, rows of several streams,
convolutions for projections."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from benchmarks.models.cases import all_cases
from benchmarks.models.measuring import measure
from osp_diag import Probe
from osp_diag.sites import find_sites
from tests.site_reference import capture_sites, close

TOKENS = torch.arange(24).reshape(2, 12)
WIDTH = 16


@pytest.mark.parametrize(
    ("name", "sites"),
    [
        ("xlm", {"attention", "query_pre_rope", "residual_mid", "mlp_hidden", "mlp_contribution"}),
        ("flaubert (encoder)", {"attention", "residual_mid", "mlp_hidden"}),
        ("squeezebert (encoder)", {"attention", "value", "residual_mid", "mlp_hidden", "mlp_down_weight"}),
        ("prophetnet", {"attention", "attention_contribution", "residual_mid", "mlp_contribution"}),
        ("prophetnet (encoder-decoder)", {"cross_attention_input", "attention", "mlp_hidden"}),
    ],
)
def test_published_ones_agree_with_a_dense_pass(name: str, sites: set[str]) -> None:
    row = measure(all_cases()[name])
    assert row.state == "measured", row.reason
    assert sites <= set(row.sites)
    assert row.layers_compared == row.attention_layers_compared == row.layers == 2
    assert row.bit_identical
    assert row.kurtosis_error is not None
    assert row.kurtosis_error < 1e-5
    assert row.attention_error is not None
    assert row.attention_error < 1e-5


class PreNormed(nn.Module):
    """Three lists that take turns, norms among them, as in a Flaubert that norms first."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.word = nn.Embedding(64, WIDTH)
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(layers))
        self.attentions = nn.ModuleList(Attention() for _ in range(layers))
        self.feeds = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH)) for _ in range(layers)
        )
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, idx: Tensor, states: list[Tensor] | None = None) -> Tensor:
        x = self.word(idx)
        states = [] if states is None else states
        for norm, attention, feed in zip(self.norms, self.attentions, self.feeds, strict=True):
            states.append(x)
            x = x + attention(norm(x))
            x = x + feed(x)
        states.append(x)
        return self.last(x)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.pack, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (4, -1)).transpose(1, 2) for part in self.pack(x).chunk(3, -1))
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("layers", [1, 3])
def test_lists_that_take_turns_are_one_stack(layers: int) -> None:
    torch.manual_seed(0)
    model = PreNormed(layers).eval()
    found = capture_sites(model, {"idx": TOKENS})
    states: list[Tensor] = []
    with torch.no_grad():
        model(TOKENS, states)
    assert found.sites.block_paths == tuple(f"norms.{layer}" for layer in range(layers))
    assert found.sites.attention_layers == tuple(range(layers))
    close(found["embedding", 0], states[0].double())
    for layer in range(layers):
        close(found["residual_pre", layer], states[layer].double())
        close(found["residual_post", layer], states[layer + 1].double())
        middle = found["residual_pre", layer] + found["attention_contribution", layer]
        close(found["residual_mid", layer], middle)
        close(middle + found["mlp_contribution", layer], found["residual_post", layer])
    linear = [site for site in found.sites.sites if site.startswith("linear_input:")]
    assert linear == [
        f"linear_input:{name}" for name in ("attentions.out", "attentions.pack", "feeds.0", "feeds.2")
    ]


def test_a_matrix_without_a_role_is_one_site_of_all_layers() -> None:
    class WithSide(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.side = nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + self.side(x)

    model = PreNormed(2)
    model.attentions = nn.ModuleList(WithSide() for _ in range(2))
    taps = find_sites(model.eval()).taps
    assert [tap.module for tap in taps if tap.site == "projection_weight:attentions.side"] == [
        "attentions.0.side",
        "attentions.1.side",
    ]


def test_two_stacks_of_one_length_are_not_joined() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word = nn.Embedding(64, WIDTH)
            layer: Any = lambda: nn.TransformerEncoderLayer(WIDTH, 4, 48, batch_first=True)  # noqa: E731
            self.lower, self.upper = (nn.ModuleList(layer() for _ in range(2)) for _ in range(2))

        def forward(self, idx: Tensor) -> Tensor:
            x = self.word(idx)
            for block in (*self.lower, *self.upper):
                x = block(x)
            return x

    sites = find_sites(Two().eval())
    assert sites.block_paths == ("lower.0", "lower.1")


def test_the_weight_of_a_convolution_in_groups_is_block_diagonal() -> None:
    case = all_cases()["squeezebert (encoder)"]
    model = case.build(True)
    with Probe(model, sites=["mlp_down_weight"]) as probe, probe.step(0), torch.no_grad():
        model(**case.inputs(model))
    convolution = model.get_submodule(
        next(t.module for t in probe.site_map.taps if t.site == "mlp_down_weight")
    )
    assert isinstance(convolution, nn.Conv1d)
    assert convolution.groups > 1
    weight = convolution.weight.detach().double().numpy()[..., 0]
    rows, width = weight.shape[0] // convolution.groups, weight.shape[1]
    whole = np.zeros((weight.shape[0], width * convolution.groups))
    for group in range(convolution.groups):
        part = slice(group * rows, (group + 1) * rows)
        whole[part, group * width : (group + 1) * width] = weight[part]
    # What the convolution computes, without it.
    x = torch.randn(3, whole.shape[1], 5)
    bias = convolution.bias.detach().double().numpy()
    product = np.einsum("rc,bct->brt", whole, x.double().numpy()) + bias[None, :, None]
    np.testing.assert_allclose(convolution(x).detach().numpy(), product, atol=1e-5)
    data = probe.run.at("mlp_down_weight")
    name = next(n for n in data.data_vars if "maximum" in str(n) or "max" in str(n))
    assert np.isfinite(data[name].sel(layer=0).values).any()


class Streams(nn.Module):
    """Behind the tokens stand as many placeholders, which see the tokens and are seen by none of them."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.place = nn.Embedding(64, WIDTH), nn.Embedding(32, WIDTH)
        self.blocks = nn.ModuleList(StreamBlock() for _ in range(2))

    def forward(self, idx: Tensor) -> Tensor:
        later = self.place(torch.arange(idx.shape[1])).expand(len(idx), -1, -1)
        x = torch.cat([self.word(idx), later], 1)
        for block in self.blocks:
            x = block(x)
        return x[:, : idx.shape[1]]


class StreamBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        tokens, later = x.chunk(2, dim=1)
        x = x + torch.cat([self.attention(tokens), later], 1)
        return x + self.down(self.up(self.norm(x)).relu())


def test_cross_attention_is_of_the_first_stream() -> None:
    case = all_cases()["prophetnet (encoder-decoder)"]
    model = case.build(True)
    batch = case.inputs(model)
    with Probe(model) as probe, probe.step(0), torch.no_grad():
        model(**batch)
    with torch.no_grad():
        # What it returns under this name are the logits, masked.
        logits = model(**batch, output_attentions=True).cross_attentions
    tokens = batch["decoder_input_ids"].shape[1]
    mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).numpy() > 0
    for layer, returned in enumerate(logits):
        dense = returned.double().softmax(-1).numpy()[:, :, :tokens]
        alpha = np.where(mask[:, None], dense.mean(2), np.nan)
        ours = probe.run.at("cross_attention")["key_mass"].sel(step=0, layer=layer)
        np.testing.assert_allclose(ours, np.nanmean(alpha, 0), atol=1e-4)


def test_of_streams_in_a_row_the_first_is_measured() -> None:
    torch.manual_seed(0)
    model = Streams().eval()
    with Probe(model) as probe, probe.step(0), torch.no_grad():
        model(TOKENS)
    assert any("2 streams stand one behind the other" in note for note in probe.run.attrs["notes"])
    double = Streams().double()
    double.load_state_dict(model.state_dict())
    x = double.word(TOKENS)
    for layer, block in enumerate(double.blocks):
        x = x + block.attention(x)
        x = x + block.down(block.up(block.norm(x)).relu())
        ours = probe.run.at("residual_post")["absolute_maximum"].sel(layer=layer, stratum="all")
        assert float(ours.squeeze()) == pytest.approx(float(x.detach().abs().max()), rel=1e-5)
