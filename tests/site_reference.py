"""What tests of sites and probes share: raw activations at the sites, and small models of nobody's make."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from osp_diag.capture.experts import ExpertCapture
from osp_diag.capture.hooks import ForwardPass, SiteCapture, heads_first
from osp_diag.seams.attention import AttentionCall, AttentionCapture
from osp_diag.sites import SiteMap, Tap, find_sites
from tests.families import FAMILIES


@functools.cache
def built(name: str, implementation: str | None = None) -> nn.Module:
    """One model for all tests that leave it as it was."""
    return FAMILIES[name].build(implementation)


@functools.cache
def sites_of(name: str) -> SiteMap:
    return find_sites(built(name))


@dataclass
class Captured:
    """Copies of what one forward pass showed at every site."""

    sites: SiteMap
    output: Any = None
    activations: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    calls: dict[int, AttentionCall] = field(default_factory=dict)
    experts: dict[int, Tensor] = field(default_factory=dict)
    failed: list[int] = field(default_factory=list)

    def __getitem__(self, key: tuple[str, int]) -> Tensor:
        return self.activations[key].double()

    def layers(self, site: str) -> list[int]:
        return sorted(layer for name, layer in self.activations if name == site)


def capture_sites(model: nn.Module, batch: dict[str, Any], sites: SiteMap | None = None) -> Captured:
    """Run a model once and keep a copy of every tap, attention call, and expert's hidden state."""
    found = Captured(find_sites(model) if sites is None else sites)
    shape = next(v for v in batch.values() if isinstance(v, Tensor)).shape[:2]

    def on_activation(tap: Tap, layer: int, value: Tensor) -> None:
        assert (tap.site, layer) not in found.activations, "read twice in one pass"
        value = heads_first(tap, value, *shape) if tap.heads else value.reshape(*shape, -1)
        found.activations[tap.site, layer] = value.clone()

    def nothing(_: ForwardPass | bool) -> None:
        return None

    capture = SiteCapture(
        model,
        found.sites.taps,
        found.sites.block_paths,
        on_activation,
        on_start=nothing,  # type: ignore[arg-type]
        on_stop=nothing,
        entries=found.sites.entries,
        channels_first=found.sites.channels_first,
        streams_in_a_row=found.sites.streams_in_a_row,
    )

    def on_call(call: AttentionCall) -> None:
        assert capture.current is not None
        if capture.current.layer is not None:  # an encoder runs before the blocks
            found.calls.setdefault(capture.current.layer, call)

    def on_rows(layer: int, rows: Tensor, slots: int) -> None:
        found.experts[layer] = rows.reshape(-1, slots, rows.shape[-1]).clone()

    experts = ExpertCapture(model, found.sites.expert_layers, capture.active, on_rows, found.failed.append)
    with torch.no_grad(), capture, experts, AttentionCapture(model, on_call, capture.active):
        found.output = model(**batch)
    return found


class OddAttention(nn.Module):
    """Rotary embedding as a module, and names that say nothing."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.one, self.two, self.three = (nn.Linear(width, width, bias=False) for _ in range(3))
        self.four = nn.Linear(width, width, bias=False)
        self.turn, self.heads = Turn(), heads

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            m(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.one, self.two, self.three)
        )
        mixed = nn.functional.scaled_dot_product_attention(self.turn(q), self.turn(k), v, is_causal=True)
        return self.four(mixed.transpose(1, 2).flatten(2))


class Turn(nn.Module):
    """Rotate pairs of channels by the position."""

    def forward(self, x: Tensor) -> Tensor:
        angle = torch.arange(x.shape[-2], device=x.device, dtype=x.dtype)[:, None]
        left, right = x.chunk(2, dim=-1)
        return torch.cat(
            [left * angle.cos() - right * angle.sin(), right * angle.cos() + left * angle.sin()], -1
        )


class OddBlock(nn.Module):
    def __init__(self, width: int, heads: int, scale: float = 1.0) -> None:
        super().__init__()
        self.apple, self.pear = nn.LayerNorm(width), nn.LayerNorm(width)
        self.lemon = OddAttention(width, heads)
        self.plum = nn.Sequential(nn.Linear(width, 3 * width), nn.GELU(), nn.Linear(3 * width, width))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.scale * self.lemon(self.apple(x))
        return x + self.scale * self.plum(self.pear(x))


class OddModel(nn.Module):
    """A decoder with an ``nn.Sequential`` of blocks and odd names."""

    def __init__(self, width: int = 16, heads: int = 2, layers: int = 3, scale: float = 1.0) -> None:
        super().__init__()
        self.words = nn.Embedding(50, width)
        self.orchard = nn.Sequential(*(OddBlock(width, heads, scale) for _ in range(layers)))
        self.last = nn.LayerNorm(width)

    def forward(self, idx: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.last(self.orchard(self.words(idx))) @ self.words.weight.T


def odd_model(**options: Any) -> OddModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return OddModel(**options).eval()


class FusedEncoder(nn.Module):
    """torch's own encoder, whose layers have a fused path."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        return self.encoder(self.words(ids))


def captured(name: str, **options: Any) -> Captured:
    return capture_sites(built(name), FAMILIES[name].inputs(**options), sites_of(name))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * max(scale, 1e-3))
