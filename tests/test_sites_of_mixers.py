"""What mixes tokens beside self-attention that is seen: own kernels, state spaces, cross-attention."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from osp_diag.sites import SiteMap, find_sites
from tests.site_reference import Captured, OddModel, capture_sites, captured, close, odd_model

TOKENS = torch.arange(20).reshape(2, 10)


def place(sites: SiteMap, site: str, layer: int = 0) -> tuple[str, str]:
    return next((tap.module, tap.side) for tap in sites.taps if (tap.site, tap.layer) == (site, layer))


def adds_up(found: Captured, mixing: tuple[str, ...], layers: int) -> None:
    for layer in range(layers):
        middle = found["residual_pre", layer] + sum(found[site, layer] for site in mixing)
        close(middle, found["residual_mid", layer])
        close(middle + found["mlp_contribution", layer], found["residual_post", layer])


# -- attention that no seam sees ---------------------------------------------------------------------------


def exponentials(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention by hand, without any function that a seam knows."""
    weights = (q @ k.mT / q.shape[-1] ** 0.5).exp().tril()
    return weights / weights.sum(-1, keepdim=True) @ v


class Unseen(nn.Module):
    """One head; called with the state alone, or with something more."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.inward, self.outward = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        return self.outward(exponentials(*self.inward(x).chunk(3, -1)))


class Modules(nn.Module):
    """Both are modules, and no name says which is which."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Unseen(), nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))
        self.before, self.between = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.before(x))
        return x + self.second(self.between(x))


class WithArguments(Modules):
    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(self.before(x), x)
        return x + self.second(self.between(x))


class Flat(nn.Module):
    """All projections stand in the block itself."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (
            nn.Linear(*shape) for shape in ((16, 48), (16, 16), (16, 24), (24, 16))
        )
        self.before, self.between = nn.LayerNorm(16), nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.b(exponentials(*self.a(self.before(x)).chunk(3, -1)))
        return x + self.d(self.c(self.between(x)).relu())


class FlatParallel(Flat):
    def forward(self, x: Tensor) -> Tensor:
        y = self.before(x)
        return x + self.b(exponentials(*self.a(y).chunk(3, -1))) + self.d(self.c(y).relu())


def unseen(block: type[nn.Module]) -> OddModel:
    model = odd_model(layers=2)
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model.orchard = nn.Sequential(*(block() for _ in range(2)))
    return model.eval()


@pytest.mark.parametrize(
    ("block", "mixer", "mlp", "hidden"),
    [
        (Modules, "first", "second", "second.2"),
        (WithArguments, "first", "second", "second.2"),
        (Flat, "a", "c", "d"),
    ],
)
def test_unseen_attention_leaves_the_mlp_its_sites(
    block: type[nn.Module], mixer: str, mlp: str, hidden: str
) -> None:
    found = capture_sites(unseen(block), {"idx": TOKENS})
    assert place(found.sites, "mixer_input") == (f"orchard.0.{mixer}", "input")
    assert place(found.sites, "mlp_input") == (f"orchard.0.{mlp}", "input")
    assert place(found.sites, "mlp_hidden") == (f"orchard.0.{hidden}", "input")
    assert "declared with osp_diag.attention_function" in found.sites.absent["attention"]
    adds_up(found, ("mixer_contribution",), 2)


def test_unseen_attention_and_norms_that_are_functions() -> None:
    class Functions(Modules):
        """As modded-nanogpt."""

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.first(nn.functional.rms_norm(x, (16,)), x)
            return x + self.second(nn.functional.rms_norm(x, (16,)))

    found = capture_sites(unseen(Functions), {"idx": TOKENS})
    assert place(found.sites, "mixer_input") == ("orchard.0.first", "input")
    assert place(found.sites, "mlp_hidden") == ("orchard.0.second.2", "input")
    assert "a norm that is no module" in found.sites.absent["residual_mid"]
    for layer in range(2):
        total = found["mixer_contribution", layer] + found["mlp_contribution", layer]
        close(found["residual_pre", layer] + total, found["residual_post", layer])


def test_what_cannot_be_told_apart_is_not_guessed() -> None:
    sites = find_sites(unseen(FlatParallel))
    assert "declare the function that computes it" in sites.absent["mlp_hidden"]
    assert "mlp_input" not in sites.sites


def test_blocks_that_are_an_mlp_and_nothing_else() -> None:
    class Feed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 24), nn.Linear(24, 16)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(self.norm(x)).relu())

    found = capture_sites(unseen(Feed), {"idx": TOKENS})
    assert place(found.sites, "mlp_hidden") == ("orchard.0.down", "input")
    assert found.sites.absent["residual_mid"] == "no attention in the block"
    close(found["residual_pre", 1] + found["mlp_contribution", 1], found["residual_post", 1])


def test_a_state_space_layer_has_sites_of_its_mixer() -> None:
    mamba = captured("mamba")
    assert place(mamba.sites, "mixer_input") == ("backbone.layers.0.mixer", "input")
    for layer in range(2):
        close(
            mamba["residual_pre", layer] + mamba["mixer_contribution", layer], mamba["residual_post", layer]
        )
    rwkv = captured("rwkv")  # whose first block norms its stream first
    close(rwkv["residual_pre", 1] + rwkv["mixer_contribution", 1], rwkv["residual_mid", 1])


# -- cross-attention ---------------------------------------------------------------------------------------

SMALL: dict[str, Any] = {"vocab_size": 60, "d_model": 32}


def t5() -> nn.Module:
    config = transformers.T5Config(
        **SMALL, d_kv=8, d_ff=48, num_heads=4, num_layers=2, decoder_start_token_id=0
    )
    return transformers.T5ForConditionalGeneration(config).eval()


def bart() -> nn.Module:
    sizes = {f"{side}_{what}": n for side in ("encoder", "decoder") for what, n in SIZES.items()}
    config = transformers.BartConfig(**SMALL, **sizes, max_position_embeddings=32)
    return transformers.BartForConditionalGeneration(config).eval()


SIZES = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}
BATCH = {"input_ids": torch.arange(24).reshape(2, 12), "decoder_input_ids": torch.arange(20).reshape(2, 10)}


def decoded(model: nn.Module) -> Captured:
    sites = find_sites(model)
    assert not sites.absent or set(sites.absent) == {"final_norm"}
    return capture_sites(model, dict(reversed(BATCH.items())), sites)


def test_cross_attention_is_not_the_mlp() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        found = decoded(t5())
    assert place(found.sites, "cross_attention_input")[0] == "decoder.block.0.layer.1.EncDecAttention"
    assert place(found.sites, "cross_attention_output")[0] == "decoder.block.0.layer.1.EncDecAttention.o"
    assert place(found.sites, "mlp_input")[0] == "decoder.block.0.layer.2.DenseReluDense"
    adds_up(found, ("attention_contribution", "cross_attention_contribution"), 2)


def test_cross_attention_where_sums_are_normed() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = bart()
        found = decoded(model)
    for number, layer in enumerate(model.model.decoder.layers):
        before = found["residual_pre", number] + found["attention_contribution", number]
        with torch.no_grad():
            before = layer.self_attn_layer_norm(before.float())
            close(found["cross_attention_input", number], before.double())
            middle = before + found["cross_attention_contribution", number].float()
            middle = layer.encoder_attn_layer_norm(middle)
            close(found["residual_mid", number], middle.double())
            after = layer.final_layer_norm(middle + found["mlp_contribution", number].float())
            close(found["residual_post", number], after.double())
    assert place(found.sites, "mlp_hidden")[0] == "model.decoder.layers.0.fc2"
