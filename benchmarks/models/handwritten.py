"""Models of nobody's make: written by hand, quantised, adapted. Each can run densely, for the reference."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["DiffusionModel", "FlexModel", "NanoModel", "TimeFirstEncoder", "quantise"]

WIDTH, HEADS, VOCABULARY = 32, 4, 96


class NanoAttention(nn.Module):
    """Fused q, k, v and torch's fused attention, or written out."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1)
        )
        if self.fused:
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            logits = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
            hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
            mixed = functional.softmax(logits.masked_fill(hidden, float("-inf")), dim=-1) @ v
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class FlexAttention(NanoAttention):
    """The same through flex_attention, called directly; ``fused = False`` is the dense twin."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.fused:
            return super().forward(x)
        from torch.nn.attention.flex_attention import flex_attention

        q, k, v = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1)
        )

        def causal(score: Tensor, b: Tensor, h: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return torch.where(query >= key, score, -float("inf"))

        mixed = flex_attention(q, k, v, score_mod=causal)
        assert isinstance(mixed, Tensor)
        return self.c_proj(mixed.transpose(1, 2).flatten(2))


class NanoBlock(nn.Module):
    """Norm, attention, norm, MLP."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.ln_1, self.attn, self.ln_2 = nn.LayerNorm(WIDTH), attention, nn.LayerNorm(WIDTH)
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoModel(nn.Module):
    """A decoder like nanoGPT."""

    attention: type[NanoAttention] = NanoAttention

    def __init__(self, fused: bool = True) -> None:
        super().__init__()
        self.wte, self.wpe = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(64, WIDTH)
        self.h = nn.ModuleList(NanoBlock(self.attention(fused)) for _ in range(2))
        self.ln_f = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.wte(input_ids) + self.wpe(torch.arange(input_ids.shape[1], device=input_ids.device))
        for block in self.h:
            x = block(x)
        return self.lm_head(self.ln_f(x))

    def dense(self) -> NanoModel:
        """Make attention written out, in place."""
        for module in self.modules():
            if isinstance(module, NanoAttention):
                module.fused = False
        return self


class FlexModel(NanoModel):
    """The same with flex_attention called directly."""

    attention = FlexAttention


class TimeFirstEncoder(nn.Module):
    """torch's own encoder as it is by default: (token, batch, channel)."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.encoder(self.words(input_ids).transpose(0, 1)).transpose(0, 1)

    def dense(self) -> TimeFirstEncoder:
        """Make every layer compute its weights, in place."""
        for module in self.modules():
            if isinstance(module, nn.MultiheadAttention):
                module.forward = _with_weights(module)  # type: ignore[method-assign]
        return self


def _with_weights(attention: nn.MultiheadAttention) -> Any:
    def forward(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
        projected = functional.linear(query, attention.in_proj_weight, attention.in_proj_bias)
        q, k, v = (part.unflatten(-1, (HEADS, -1)).permute(1, 2, 0, 3) for part in projected.chunk(3, dim=-1))
        mixed = functional.softmax(q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), dim=-1) @ v
        return attention.out_proj(mixed.permute(2, 0, 1, 3).flatten(2)), None

    return forward


class ConditionedBlock(nn.Module):
    """Norms shifted, scaled and gated by a condition: DiT's adaLN."""

    def __init__(self, fused: bool) -> None:
        super().__init__()
        self.fused = fused
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.condition = nn.Linear(WIDTH, 6 * WIDTH)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.condition(c)[:, None].chunk(6, -1)
        heads = self.qkv(self.norm1(x) * (1 + scale) + shift).unflatten(-1, (3, HEADS, -1))
        q, k, v = heads.permute(2, 0, 3, 1, 4)
        if self.fused:
            mixed = functional.scaled_dot_product_attention(q, k, v)
        else:
            mixed = functional.softmax(q @ k.mT / math.sqrt(q.shape[-1]), dim=-1) @ v
        x = x + gate * self.out(mixed.transpose(1, 2).flatten(2))
        return x + gate2 * self.down(functional.gelu(self.up(self.norm2(x) * (1 + scale2) + shift2)))


class DiffusionModel(nn.Module):
    """Patches of a latent image through blocks that are told the time step."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.times = nn.Conv2d(4, WIDTH, 2, 2), nn.Embedding(10, WIDTH)
        self.blocks = nn.ModuleList(ConditionedBlock(fused=True) for _ in range(2))

    def forward(self, latents: Tensor, time: Tensor) -> Tensor:
        x, c = self.patches(latents).flatten(2).mT, self.times(time)
        for block in self.blocks:
            x = block(x, c)
        return x

    def dense(self) -> DiffusionModel:
        """Make every layer compute its weights, in place."""
        for module in self.modules():
            if isinstance(module, ConditionedBlock):
                module.fused = False
        return self


class BufferLinear(nn.Module):
    """8-bit weights and their scales in buffers, as GPTQ and AWQ keep them: no parameter at all."""

    qweight: Tensor
    scales: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        weight = linear.weight.detach()
        scales = weight.abs().amax(dim=1, keepdim=True) / 127
        self.register_buffer("qweight", torch.round(weight / scales).to(torch.int8))
        self.register_buffer("scales", scales)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.qweight.to(x.dtype) * self.scales.to(x.dtype)).T


def quantise(model: nn.Module) -> nn.Module:
    """Replace the Linears of all blocks, in place."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear and name != "lm_head" and child.bias is None:
                setattr(module, name, BufferLinear(child))
    return model
