"""The sites of models out of the ordinary: layers that differ or are shared, odd names, no blocks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from osp_diag import Probe
from osp_diag.errors import SiteError
from osp_diag.sites import find_sites
from tests.families import Family
from tests.site_reference import FusedEncoder, OddModel, capture_sites, captured, close, odd_model

# -- layers that differ, and layers that are shared --------------------------------------------------------


def test_a_hybrid_says_layer_by_layer_what_it_has() -> None:
    family = Family(
        "jamba",
        "JambaForCausalLM",
        "JambaConfig",
        {
            "num_hidden_layers": 4, "num_key_value_heads": 2, "attn_layer_period": 2, "attn_layer_offset": 1,
            "expert_layer_period": 2, "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2,
            "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4,
        },
    )  # fmt: skip
    model = family.build()
    found = capture_sites(model, family.inputs())
    sites = found.sites
    assert sites.attention_layers == (1, 3)
    assert sites.causal_layers == {1, 3}
    assert found.layers("attention_output") == [1, 3]
    assert found.layers("residual_post") == found.layers("mlp_input") == [0, 1, 2, 3]
    assert found.layers("mlp_contribution") == [0, 1, 2, 3]
    assert sorted({*found.layers("mlp_hidden"), *found.experts}) == [0, 1, 2, 3]
    assert any(note.startswith("not in layers 0, 2: attention_input, ") for note in sites.notes)
    assert "layers 1–3    (2)" in sites.describe()
    for layer in (1, 3):
        close(
            found["residual_pre", layer] + found["attention_contribution", layer],
            found["residual_mid", layer],
        )
        close(found["residual_mid", layer] + found["mlp_contribution", layer], found["residual_post", layer])


def test_a_shared_block_counts_once_a_run() -> None:
    found = captured("albert")
    assert found.sites.block_paths == ("albert.encoder.albert_layer_groups.0",) * 2
    assert any("run several times" in note for note in found.sites.notes)
    assert not torch.equal(found["residual_post", 0], found["residual_post", 1])
    assert torch.equal(found["residual_post", 0], found["residual_pre", 1])


def test_a_layer_that_attends_twice_says_that_it_counts_once() -> None:
    family = Family("diffllama", "DiffLlamaForCausalLM", "DiffLlamaConfig", {"num_key_value_heads": 2})
    sites = find_sites(family.build("sdpa"))
    assert "several attention calls in layers 0, 1: the first one is measured" in sites.notes


# -- modules of nobody's make ------------------------------------------------------------------------------


def test_odd_names_do_not_matter() -> None:
    model = odd_model()
    found = capture_sites(model, {"idx": torch.arange(20).reshape(2, 10)})
    sites = found.sites
    assert sites.blocks == "orchard"
    assert not sites.absent
    by_site = {tap.site: (tap.module, tap.side) for tap in sites.taps if tap.layer == 0}
    assert by_site["query_pre_rope"] == ("orchard.0.lemon.one", "output")
    assert by_site["key_pre_rope"] == ("orchard.0.lemon.two", "output")
    assert by_site["attention_output"] == ("orchard.0.lemon.four", "input")
    assert by_site["mlp_hidden"] == ("orchard.0.plum.2", "input")
    assert by_site["residual_mid"] == ("orchard.0.pear", "input")
    for layer in range(3):
        close(
            found["residual_pre", layer] + found["attention_contribution", layer],
            found["residual_mid", layer],
        )
        close(found["residual_mid", layer] + found["mlp_contribution", layer], found["residual_post", layer])


def test_a_model_that_is_a_sequence_of_blocks() -> None:
    sites = find_sites(nn.Sequential(*odd_model().orchard), example=(torch.randn(2, 8, 16),))
    assert sites.block_paths == ("0", "1", "2")
    assert sites.attention_layers == (0, 1, 2)


def test_blocks_can_be_named_by_path_or_pattern() -> None:
    class Mixed(nn.Module):
        """The blocks stand among other things, so that no list holds them alone."""

        def __init__(self) -> None:
            super().__init__()
            inner = odd_model()
            self.all = nn.Sequential(inner.words, *inner.orchard, inner.last)

        def forward(self, ids: Tensor) -> Tensor:
            return self.all(ids)

    with pytest.raises(SiteError, match="Mixed has no list of blocks"):
        find_sites(Mixed())
    sites = find_sites(Mixed(), blocks="all.[1-3]")
    assert sites.block_paths == ("all.1", "all.2", "all.3")
    assert "final_norm" in sites.sites
    assert find_sites(odd_model(), blocks="orchard").block_paths == ("orchard.0", "orchard.1", "orchard.2")
    assert find_sites(odd_model(), blocks="orchard.*").block_paths == ("orchard.0", "orchard.1", "orchard.2")


def test_sites_can_be_named_by_pattern() -> None:
    named = {
        "mlp_hidden": "orchard.*.plum.1:output",
        "apples": "orchard.*.apple",
        "final_norm": "last:output",
    }
    found = capture_sites(
        odd_model(), {"idx": torch.arange(20).reshape(2, 10)}, find_sites(odd_model(), named=named)
    )
    assert found.layers("mlp_hidden") == found.layers("apples") == [0, 1, 2]
    assert found.layers("final_norm") == [2]
    assert torch.equal(found["apples", 1], found["residual_pre", 1])
    by_site = {tap.site: (tap.module, tap.side) for tap in found.sites.taps if tap.layer == 1}
    assert by_site["mlp_hidden"] == ("orchard.1.plum.1", "output")
    queries = find_sites(odd_model(), named={"query_pre_rope": "orchard.*.lemon.one:output"})
    assert {tap.heads for tap in queries.taps if tap.site == "query_pre_rope"} == {2}


def test_wrong_names_are_refused() -> None:
    model = odd_model()
    with pytest.raises(SiteError, match=r"no module that ran matches blocks='elsewhere'.*orchard"):
        find_sites(model, blocks="elsewhere")
    with pytest.raises(SiteError, match=r"no module that ran matches 'orchard\.\*\.plums'"):
        find_sites(model, named={"mlp_hidden": "orchard.*.plums"})
    with pytest.raises(SiteError, match=r"near: orchard.0.plum, "):
        find_sites(model, named={"mlp_hidden": "garden.*.plum"})
    with pytest.raises(SiteError, match=r"ends in 'middle'; write ':input' or ':output'"):
        find_sites(model, named={"mlp_hidden": "orchard.*.plum:middle"})
    with pytest.raises(SiteError, match=r"the input of 'words' is no activation.*try ':output'"):
        find_sites(model, named={"embedding": "words"})
    with pytest.raises(SiteError, match="'attention' is seen at the attention call"):
        find_sites(model, named={"attention": "orchard.*.lemon"})


def test_models_without_blocks_are_refused() -> None:
    with pytest.raises(SiteError, match=r"Sequential has no list of blocks .*name it with `blocks=`"):
        find_sites(nn.Sequential(nn.Embedding(20, 8), nn.Linear(8, 8)))


def test_a_model_that_needs_an_example_says_so() -> None:
    class Pictures(OddModel):
        def forward(self, pixels: Tensor) -> Tensor:  # type: ignore[override]
            return self.orchard(pixels @ torch.ones(3, 16, device=pixels.device))

    with pytest.raises(
        SiteError, match=r"Pictures could not be run on 11 token ids .*pass `example=` a batch"
    ):
        find_sites(Pictures())
    assert find_sites(Pictures(), example={"pixels": torch.randn(1, 9, 3)}).number_of_layers == 3


def test_attention_inside_fused_encoder_layers_is_found() -> None:
    sites = find_sites(FusedEncoder().eval())
    assert sites.attention_layers == (0, 1)
    assert not sites.causal_layers
    assert any("leaves its fused inference path while probed" in note for note in sites.notes)
    assert torch.backends.mha.get_fastpath_enabled()


def test_experts_that_are_modules_give_mlp_hidden() -> None:
    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.router = nn.Linear(16, 4)
            self.experts = nn.ModuleList(
                nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 16)) for _ in range(4)
            )

        def forward(self, x: Tensor) -> Tensor:
            flat, out = x.flatten(0, 1), torch.zeros_like(x.flatten(0, 1))
            best = self.router(flat).argmax(-1)
            for number, expert in enumerate(self.experts):
                rows = (best == number).nonzero()[:, 0]
                if len(rows):
                    out[rows] += expert(flat[rows])
            return out.view_as(x)

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = odd_model()
        for block in model.orchard:
            block.plum = Mixture()
    tokens = torch.arange(20).reshape(2, 10)
    tokens[1] = tokens[0]  # equal states are told apart
    probe = Probe(model)
    sites = {"mlp_input", "mlp_hidden", "mlp_contribution", "mlp_down_weight", "router"}
    assert sites <= set(probe.site_map.sites)
    with probe.step(0), torch.no_grad():
        model(tokens)
    hidden: list[Tensor] = []
    with torch.no_grad():
        for block in model.orchard:
            block.plum.register_forward_pre_hook(lambda module, args: hidden.append(by_hand(module, args[0])))
        model(tokens)
    found = probe.run.at("mlp_hidden").isel(step=0)
    for layer, x in enumerate(hidden):
        norms = x.double().norm(dim=-1)
        for stratum, expected in (("first", norms[:, 0]), ("rest", norms[:, 1:]), ("all", norms)):
            value = float(found["token_norm"].sel(layer=layer, stratum=stratum))
            assert value == pytest.approx(float(expected.mean()), rel=1e-6)


def by_hand(mixture: nn.Module, x: Tensor) -> Tensor:
    """Each token's hidden activations in the expert that it is sent to."""
    best = mixture.router(x).argmax(-1)  # type: ignore[operator]
    every = torch.stack([expert[1](expert[0](x)) for expert in mixture.experts])  # type: ignore[union-attr]
    return every.gather(0, best[None, ..., None].expand(1, *best.shape, every.shape[-1]))[0]
