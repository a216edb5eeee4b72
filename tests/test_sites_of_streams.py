"""Streams and calls out of the ordinary: several streams, updates, lists, modules that run twice, repeats."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import Tensor, nn

from osp_diag import Probe
from osp_diag.sites import find_sites
from tests.families import Family
from tests.site_reference import OddBlock, OddModel, capture_sites, captured, close, odd_model

TOKENS = torch.arange(20).reshape(2, 10)


def norms(run: object, site: str) -> Tensor:
    return torch.as_tensor(run.at(site)["token_norm"].sel(stratum="all").values)  # type: ignore[attr-defined]


class Updating(nn.Module):
    """A block that gives what is to be added."""

    def __init__(self, inner: OddBlock) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner
        update = inner.lemon(inner.apple(x))
        return update + inner.plum(inner.pear(x + update))


class UpdatingModel(OddModel):
    def forward(self, idx: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.words(idx)
        for block in self.orchard:
            x = x + block(x)
        return self.last(x)


class Attend(nn.Module):
    def __init__(self, inner: OddBlock) -> None:
        super().__init__()
        self.norm, self.mix = inner.apple, inner.lemon

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.norm(x))


class ListModel(OddModel):
    """Layers are lists of an attention and an MLP that begins with its norm, and the model adds."""

    def forward(self, idx: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x = self.words(idx)
        for attend, feed in self.orchard:
            x = x + attend(x)
            x = x + feed(x)
        return self.last(x)


def updating() -> OddModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UpdatingModel()
    model.orchard = nn.Sequential(*(Updating(block) for block in model.orchard))
    return model.eval()


def lists() -> OddModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = ListModel()
    model.orchard = nn.ModuleList(
        nn.ModuleList([Attend(b), nn.Sequential(b.pear, b.plum)]) for b in model.orchard
    )
    return model.eval()


@pytest.mark.parametrize("build", [updating, lists])
def test_the_stream_after_a_block_is_what_is_read_next(build: object) -> None:
    plain = capture_sites(odd_model(), {"idx": TOKENS})
    found = capture_sites(build(), {"idx": TOKENS})  # type: ignore[operator]
    assert found.sites.number_of_layers == 3
    assert not found.sites.absent
    for place, value in plain.activations.items():
        if not place[0].startswith("linear_input"):
            close(found[place], value)
    assert set(found.calls) == {0, 1, 2}


def test_repeated_keys_count_once() -> None:
    class Repeating(nn.Module):
        """Two key heads for four of the queries, repeated by hand."""

        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(16, n) for n in (16, 8, 8, 16))

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (m(x).unflatten(-1, (-1, 4)).transpose(1, 2) for m in (self.q, self.k, self.v))
            k, v = (t.repeat_interleave(2, dim=1) for t in (k, v))
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.o(mixed.transpose(1, 2).flatten(2))

    model = odd_model()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        for block in model.orchard:
            block.lemon = Repeating()
    probe = Probe(model)
    with probe.step(0), torch.no_grad():
        model(TOKENS)
    for site in ("key_pre_rope", "key_post_rope", "value"):
        assert probe.run.at(site).sizes["head"] == 2
    torch.testing.assert_close(norms(probe.run, "key_post_rope"), norms(probe.run, "key_pre_rope"))


def test_a_norm_that_runs_twice_is_read_at_its_own_call() -> None:
    class Twice(OddBlock):
        """One norm before attention and MLP, one for queries and keys."""

        def __init__(self) -> None:
            super().__init__(16, 2)
            del self.pear
            self.lemon = NormedHeads()

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.lemon(self.apple(x))
            return x + self.plum(self.apple(x))

    class NormedHeads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v, self.o = (nn.Linear(16, n) for n in (16, 8, 8, 16))
            self.norm = nn.LayerNorm(8)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = (m(x).unflatten(-1, (-1, 8)).transpose(1, 2) for m in (self.q, self.k, self.v))
            q, k, v = self.norm(q), self.norm(k).repeat_interleave(2, 1), v.repeat_interleave(2, 1)
            mixed = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            return self.o(mixed.transpose(1, 2).flatten(2))

    model = odd_model()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.orchard = nn.Sequential(*(Twice() for _ in range(2))).eval()
    found = capture_sites(model, {"idx": TOKENS})
    for layer, call in found.calls.items():
        close(found["query_pre_rope", layer], call.query)
        close(found["key_pre_rope", layer], call.key[:, ::2])
        close(
            found["residual_mid", layer],
            found["residual_pre", layer] + found["attention_contribution", layer],
        )
        close(found["residual_post", layer], found["residual_mid", layer] + found["mlp_contribution", layer])


def test_of_several_streams_the_first_is_read() -> None:
    config = transformers.Gemma3nTextConfig(
        vocab_size=60, vocab_size_per_layer_input=60, hidden_size=32, hidden_size_per_layer_input=8,
        intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        num_kv_shared_layers=0, laurel_rank=4, activation_sparsity_pattern=[0.0, 0.0], pad_token_id=0,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Gemma3nForCausalLM(config).eval()
    states: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda module, args, output: states.append(output[0].detach()))
    probe = Probe(model)
    states.clear()
    ids = torch.arange(4, 44).reshape(4, 10)  # as many sequences as streams
    with probe.step(0), torch.no_grad():
        model(input_ids=ids)
    truth = torch.stack([state.double().norm(dim=-1).mean() for state in states])
    torch.testing.assert_close(norms(probe.run, "residual_post")[0], truth, rtol=1e-6, atol=0)
    assert "4 streams run side by side: residual sites are those of the first" in probe.run.attrs["notes"]
    taps = {tap.site: tap.module for tap in probe.site_map.taps if tap.layer == 0}
    assert taps["mlp_hidden"] == "model.layers.0.mlp.down_proj"
    assert taps["residual_mid"] == "model.layers.0.pre_feedforward_layernorm"


def test_a_router_is_no_attention() -> None:
    class Routed(nn.Module):
        """A dense mixture: every expert is weighed by a softmax over eight."""

        def __init__(self) -> None:
            super().__init__()
            self.gate, self.norm = nn.Linear(16, 8), nn.LayerNorm(16)
            self.feed = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16))

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            return x + self.gate(y).softmax(-1)[..., :1] * self.feed(y)

    model = odd_model()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.orchard = nn.Sequential(model.orchard[0], Routed()).eval()
    probe = Probe(model)
    assert probe.site_map.attention_layers == (0,)
    with probe.step(0), torch.no_grad():
        model(TOKENS[:, :8])
    attention = probe.run.at("attention")["first_token_attention"]
    assert attention.sizes["layer"] == 1


def test_layers_that_do_not_run_keep_their_number() -> None:
    class Skipping(OddModel):
        def forward(self, idx: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = self.words(idx)
            for number, block in enumerate(self.orchard):
                x = x if number == 1 else block(x)
            return self.last(x)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Skipping().eval()
    found = capture_sites(model, {"idx": TOKENS})
    assert found.sites.number_of_layers == 3
    assert found.layers("mlp_hidden") == found.layers("residual_post") == sorted(found.calls) == [0, 2]
    assert found.layers("final_norm") == [2]
    assert any(note.startswith("layers 1 did not run in the pass") for note in found.sites.notes)
    close(found["residual_post", 0], found["residual_pre", 2])


def test_block_diagonal_gates_are_no_experts() -> None:
    family = Family(
        "recurrentgemma",
        "RecurrentGemmaForCausalLM",
        "RecurrentGemmaConfig",
        {
            "num_key_value_heads": 1,
            "lru_width": 32,
            "block_types": ["recurrent", "attention"],
            "attention_window_size": 32,
        },
    )
    sites = find_sites(family.build())
    assert not sites.expert_layers
    assert {"mlp_hidden", "mixer_input", "mixer_contribution", "residual_mid"} <= set(sites.sites)
    assert captured("mixtral").sites.expert_layers.keys() == {0, 1}


# -- norms before the MLP ----------------------------------------------------------------------------------


class Modulated(OddBlock):
    """adaLN-zero: scale, shift and gate by a condition, all zero at initialisation."""

    def __init__(self) -> None:
        super().__init__(16, 2)
        self.condition = nn.Linear(16, 6 * 16)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

    def forward(self, x: Tensor) -> Tensor:
        scale, shift, gate, scale_2, shift_2, gate_2 = self.condition(x.mean(1, keepdim=True)).chunk(6, -1)
        x = x + gate * self.lemon(self.apple(x) * (1 + scale) + shift)
        return x + gate_2 * self.plum(self.pear(x) * (1 + scale_2) + shift_2)


class Functional(OddBlock):
    """Norms that are functions, as in modded-nanogpt."""

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.lemon(nn.functional.rms_norm(x, (16,)))
        return x + self.plum(nn.functional.rms_norm(x, (16,)))


def test_the_stream_before_a_modulated_norm_is_what_the_norm_reads() -> None:
    model = odd_model()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.orchard = nn.Sequential(*(Modulated() for _ in range(2))).eval()
    sites = find_sites(model)
    places = {tap.site: tap.module for tap in sites.taps if tap.layer == 1}
    assert places["residual_mid"] == "orchard.1.pear"
    assert places["mlp_input"] == "orchard.1.plum"
    assert "scaled or mixed outside of modules" in sites.absent["attention_contribution"]


def test_a_stream_that_only_a_function_reads_is_not_made_up() -> None:
    model = odd_model()
    with torch.random.fork_rng():
        torch.manual_seed(1)
        model.orchard = nn.Sequential(*(Functional(16, 2) for _ in range(2))).eval()
    found = capture_sites(model, {"idx": TOKENS})
    assert "a norm that is no module" in found.sites.absent["residual_mid"]
    for layer in range(2):
        total = found["attention_contribution", layer] + found["mlp_contribution", layer]
        close(found["residual_pre", layer] + total, found["residual_post", layer])
