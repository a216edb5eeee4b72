"""Sites of every family: the tensors there are what their names say, or a reason stands in their place."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from osp_diag.errors import SiteError
from osp_diag.sites import DEFAULT_SITES, find_sites
from tests.attention_reference import dense_weights, no_trace
from tests.families import FAMILIES, Family
from tests.site_reference import Captured, FusedEncoder, OddModel, built, capture_sites, odd_model, sites_of

EVERY = [pytest.param(family, id=family.name) for family in FAMILIES.values()]
ATTENTIVE = [p for p in EVERY if p.values[0].has_attention]
PARALLEL = {"gpt_neox", "gptj", "codegen", "phi", "falcon", "falcon_alibi", "cohere"}
POST_NORM = {"bert", "roberta", "albert"}
NO_FINAL_NORM = POST_NORM
SOFTMAX = {name for name, family in FAMILIES.items() if family.seam == "softmax"}
UNNAMED_PROJECTIONS = {"codegen", "bloom", "mpt"}
EXPERTS = {"mixtral": {0, 1}, "qwen2_moe": {0, 1}, "deepseek_v3": {1}, "gpt_oss": {0, 1}}


def captured(name: str, **options: Any) -> Captured:
    return capture_sites(built(name), FAMILIES[name].inputs(**options), sites_of(name))


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    scale = float(expected.abs().max())
    torch.testing.assert_close(found.double(), expected.double(), rtol=0, atol=tolerance * max(scale, 1e-3))


# -- which sites there are ---------------------------------------------------------------------------------


def expected_absences(family: Family) -> set[str]:
    name = family.name
    absent: set[str] = set()
    if not family.has_attention:
        absent |= {s for s in DEFAULT_SITES if s.startswith(("attention", "query", "key", "value"))}
        absent.add("residual_mid")
    if name == "mamba":
        absent |= {"mlp_input", "mlp_hidden", "mlp_down_weight", "mlp_contribution"}
    if name in SOFTMAX:
        absent |= {"query_post_rope", "key_post_rope"}
    if name in UNNAMED_PROJECTIONS:
        absent |= {"query_pre_rope", "key_pre_rope", "value"}
    if name == "deepseek_v3":
        absent |= {"query_pre_rope", "key_pre_rope"}
    if name in PARALLEL:
        absent.add("residual_mid")
    if name in NO_FINAL_NORM:
        absent.add("final_norm")
    return absent


@pytest.mark.parametrize("family", EVERY)
def test_each_site_is_there_or_says_why_not(family: Family) -> None:
    sites = sites_of(family.name)
    assert set(DEFAULT_SITES) - set(sites.sites) == expected_absences(family)
    assert set(sites.absent) == expected_absences(family)
    assert all(sites.absent.values())
    assert sites.number_of_layers == 2
    assert sites.hidden_size == 32
    assert set(sites.attention_layers) == ({0, 1} if family.has_attention else set())
    assert sites.causal_layers == (frozenset() if family.encoder else frozenset(sites.attention_layers))
    assert set(sites.expert_layers) == EXPERTS.get(family.name, set())


@pytest.mark.parametrize("family", EVERY)
def test_all_sites_are_read_once_in_every_layer(family: Family) -> None:
    found = captured(family.name)
    single = {"embedding", "final_norm"}
    for site in found.sites.sites:
        at_the_call = site == "attention" or (site, 0) not in found.activations
        if site.startswith("linear_input") or site in single or at_the_call:
            continue
        layers = found.layers(site)
        if site == "mlp_hidden":
            layers = sorted({*layers, *found.experts})
        assert layers == [0, 1], site
    assert not found.failed


def test_absences_say_why() -> None:
    assert "latent attention" in sites_of("deepseek_v3").absent["query_pre_rope"]
    assert "hands only attention logits to its softmax" in sites_of("bloom").absent["query_post_rope"]
    assert "no projection is named so" in sites_of("bloom").absent["value"]
    assert "parallel block" in sites_of("gpt_neox").absent["residual_mid"]
    assert "no attention here" in sites_of("mamba").absent["attention"]
    assert sites_of("mamba").absent["mlp_hidden"] == "no MLP in the block"
    assert sites_of("rwkv").absent["residual_mid"] == "no attention in the block"
    assert sites_of("bert").absent["final_norm"] == "no norm reads the last block's output"


def test_the_description_is_readable() -> None:
    text = sites_of("gpt_neox").describe()
    lines = text.splitlines()
    assert lines[0] == "2 blocks at 'gpt_neox.layers', residual stream of width 32"
    assert "  embedding                layers 0      (1)  input of gpt_neox.layers.0" in lines
    assert (
        "  query_pre_rope           layers 0–1    (2)  output of gpt_neox.layers.0.attention.query_key_value"
        in lines
    )
    assert "  attention                layers 0–1    (2)  the attention call" in lines
    assert "  absent: residual_mid: attention and MLP read the same state (parallel block)" in lines
    assert lines[-1] == "  note: attention seen through attention interface (2 layers)"
    experts = sites_of("mixtral").describe()
    assert "  mlp_hidden               layers 0–1    (2)  the experts' weights" in experts.splitlines()
    assert text.count("no attention here") == 0
    assert sites_of("mamba").describe().count("no attention here") == 1


def test_finding_sites_leaves_no_trace() -> None:
    model = FAMILIES["llama"].build().train()
    model.model.layers[0].eval()
    with no_trace(model):
        find_sites(model)


# -- the residual stream -----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", EVERY)
def test_the_stream_is_what_the_model_calls_hidden_states(family: Family) -> None:
    model, batch = built(family.name), family.inputs(padded=True)
    found = capture_sites(model, batch, sites_of(family.name))
    with torch.no_grad():
        states = model(**batch, output_hidden_states=True).hidden_states
        if not family.has_attention:  # their first hidden state is that after the first block
            states = (model.get_input_embeddings()(batch["input_ids"]), *states)
            assert torch.equal(found.activations["residual_post", 1], states[2])
    assert torch.equal(found.activations["embedding", 0], states[0])
    for layer in range(2):
        assert torch.equal(found.activations["residual_pre", layer], states[layer])
    assert torch.equal(found.activations["residual_post", 0], states[1])
    last = "residual_post" if family.name in NO_FINAL_NORM else "final_norm"
    assert torch.equal(found.activations[last, 1], states[-1])


@pytest.mark.parametrize("family", ATTENTIVE)
def test_contributions_are_what_is_added_to_the_stream(family: Family) -> None:
    found = captured(family.name, padded=True)
    for layer in range(2):
        before, after = found["residual_pre", layer], found["residual_post", layer]
        attention, mlp = found["attention_contribution", layer], found["mlp_contribution", layer]
        if family.name in PARALLEL:
            close(before + attention + mlp, after)
        elif family.name in POST_NORM:
            middle = found["residual_mid", layer]
            first, second = norms_of(built(family.name), family.name, layer)
            close(first(before + attention), middle)
            close(second(middle + mlp), after)
        else:
            middle = found["residual_mid", layer]
            close(before + attention, middle)
            close(middle + mlp, after)


def norms_of(model: nn.Module, name: str, layer: int) -> list[Any]:
    if name == "albert":
        block = model.albert.encoder.albert_layer_groups[0].albert_layers[0]
        norms = [block.attention.LayerNorm, block.full_layer_layer_norm]
    else:
        block = getattr(model, name).encoder.layer[layer]
        norms = [block.attention.output.LayerNorm, block.output.LayerNorm]

    def apply(norm: nn.LayerNorm, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        return scaled * norm.weight.detach().double() + norm.bias.detach().double()

    return [lambda x, norm=norm: apply(norm, x) for norm in norms]


def test_a_residual_multiplier_is_noted() -> None:
    family = FAMILIES["granite"]
    model = family.build(residual_multiplier=0.25)
    found = capture_sites(model, family.inputs())
    for layer in range(2):
        middle = found["residual_mid", layer]
        close(found["residual_pre", layer] + 0.25 * found["attention_contribution", layer], middle)
        close(middle + 0.25 * found["mlp_contribution", layer], found["residual_post", layer])
    assert "the stream receives 0.25 times attention_contribution (layers 0, 1)" in found.sites.notes
    assert "the stream receives 0.25 times mlp_contribution (layers 0, 1)" in found.sites.notes


def test_what_no_module_gives_is_not_made_up() -> None:
    class Gated(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.attend, self.feed = inner.lemon, inner.plum
            self.a, self.b = inner.apple, inner.pear
            self.gain = nn.Parameter(torch.linspace(0.1, 2.0, 16))

        def forward(self, x: Tensor) -> Tensor:
            x = x + self.gain * self.attend(self.a(x))
            return x + self.gain * self.feed(self.b(x))

    model = odd_model()
    model.orchard = nn.Sequential(*(Gated(block) for block in model.orchard))
    sites = find_sites(model)
    for site in ("attention_contribution", "mlp_contribution"):
        assert sites.absent[site].startswith("what is added to the stream is no module's output")


# -- attention ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [p for p in ATTENTIVE if p.values[0].name not in UNNAMED_PROJECTIONS])
def test_attention_output_is_weights_times_values(family: Family) -> None:
    found = captured(family.name)
    for layer, call in found.calls.items():
        value = found["value", layer] if call.value is None else call.value.double()
        heads = call.tensor.shape[1]
        value = value.repeat_interleave(heads // value.shape[1], dim=1)
        mixed = (dense_weights(call) @ value).transpose(1, 2).flatten(2)
        close(found["attention_output", layer], mixed, 1e-4)


@pytest.mark.parametrize("family", ATTENTIVE)
def test_attention_and_mlp_inputs_are_what_their_projections_read(family: Family) -> None:
    found = captured(family.name)
    for layer in range(2):
        linears = [
            found.activations[tap.site, layer]
            for tap in found.sites.taps
            if tap.layer == layer and tap.site.startswith("linear_input")
        ]
        for site in ("attention_input", "mlp_input"):
            if site == "attention_input" or layer not in found.sites.expert_layers:
                assert any(torch.equal(found.activations[site, layer], x) for x in linears)


POSITIONS_ELSEWHERE = [
    "gpt2", "gpt_bigcode", "opt", "biogpt", "bert", "roberta", "albert", "falcon_alibi",
    "t5_encoder", "gpt2_upcast",
]  # fmt: skip
ROTARY = [
    "llama", "mistral", "mixtral", "qwen2", "qwen2_moe", "qwen3", "gemma", "gemma2", "gemma3", "gpt_neox",
    "phi", "phi3", "falcon", "olmo2", "cohere", "gpt_oss", "starcoder2", "stablelm", "granite", "glm4",
    "nemotron", "modernbert",
]  # fmt: skip


def test_the_lists_cover_every_family_with_projections() -> None:
    with_projections = {f.name for f in FAMILIES.values() if "query_pre_rope" in sites_of(f.name).sites}
    assert with_projections == {*POSITIONS_ELSEWHERE, *ROTARY, "gptj", "gpt_neo"}


@pytest.mark.parametrize("name", POSITIONS_ELSEWHERE)
def test_without_rotary_embedding_projections_enter_the_product(name: str) -> None:
    found = captured(name)
    for layer, call in found.calls.items():
        for site, tensor in (("query_pre_rope", call.query), ("key_pre_rope", call.key)):
            own = found[site, layer]
            own = own.repeat_interleave(tensor.shape[1] // own.shape[1], dim=1)
            factor = float((own * tensor).sum() / (own * own).sum())  # some scale queries beforehand
            close(factor * own, tensor)
            assert factor == pytest.approx(1.0) or site == "query_pre_rope"


@pytest.mark.parametrize("name", ROTARY)
def test_the_models_own_rotary_embedding_leads_from_pre_to_post(name: str) -> None:
    found, model = captured(name), built(name)
    rotary = next(m for path, m in model.named_modules() if path.split(".")[-1].startswith("rotary_emb"))
    tokens = torch.arange(12)[None]
    for layer, call in found.calls.items():
        module = sys.modules[type(call.module).__module__]
        takes_type = "layer_type" in inspect.signature(rotary.forward).parameters
        kinds = {"layer_type": model.config.layer_types[layer]} if takes_type else {}
        cos, sin = rotary(torch.zeros(1, 12, 32), tokens, **kinds)
        query, key = found["query_pre_rope", layer].float(), found["key_pre_rope", layer].float()
        width = query.shape[-1] if name == "gpt_oss" else min(cos.shape[-1], query.shape[-1])
        turned = module.apply_rotary_pos_emb(query[..., :width], key[..., :width], cos, sin)
        for before, after, wanted in zip((query, key), turned, (call.query, call.key), strict=True):
            whole = torch.cat([after, before[..., width:]], dim=-1)
            whole = whole.repeat_interleave(wanted.shape[1] // whole.shape[1], dim=1)
            close(whole, wanted)
        assert not torch.allclose(query[:, :, 1:], call.query[:, :, 1:], atol=1e-3)


@pytest.mark.parametrize("name", ["gptj", "gpt_neo"])
def test_projections_named_where_only_logits_are_seen(name: str) -> None:
    found, model = captured(name), built(name)
    for layer in range(2):
        x = found["attention_input", layer]
        attention = model.transformer.h[layer].attn
        attention = getattr(attention, "attention", attention)
        for site, projection in (
            ("query_pre_rope", attention.q_proj),
            ("key_pre_rope", attention.k_proj),
            ("value", attention.v_proj),
        ):
            expected = (x @ projection.weight.detach().double().T).unflatten(-1, (4, 8)).transpose(1, 2)
            close(found[site, layer], expected)


# -- mixtures of experts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("name", sorted(EXPERTS))
def test_experts_hidden_states_are_those_of_the_chosen_experts(name: str, implementation: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    model.set_experts_implementation(implementation)
    routed: dict[str, tuple[Tensor, Tensor]] = {}
    for path in sites_of(name).expert_layers.values():
        model.get_submodule(path).register_forward_pre_hook(
            lambda module, args, kwargs, path=path: routed.update(
                {path: first_two((*args, *kwargs.values()))}
            ),
            with_kwargs=True,
        )
    found = capture_sites(model, family.inputs(), sites_of(name))
    assert not found.failed
    assert set(found.experts) == EXPERTS[name]
    for layer, path in found.sites.expert_layers.items():
        hidden, chosen = routed[path]
        expected = hidden_by_experts(name, model.get_submodule(path), hidden.double(), chosen)
        assert found.experts[layer].shape == expected.shape
        close(in_order(found.experts[layer].double()), in_order(expected))


def first_two(values: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    tensors = [v for v in values if isinstance(v, Tensor)]
    hidden = next(v for v in tensors if v.is_floating_point())
    chosen = next(v for v in tensors if not v.is_floating_point())
    return hidden.detach().reshape(-1, hidden.shape[-1]), chosen.reshape(-1, chosen.shape[-1])


def hidden_by_experts(name: str, experts: Any, hidden: Tensor, chosen: Tensor) -> Tensor:
    """(token, slot, channel) by the formula, one expert at a time in float64."""
    out = []
    for x, row in zip(hidden, chosen, strict=True):
        for expert in row.tolist():
            weight = experts.gate_up_proj[expert].detach().double()
            if name == "gpt_oss":
                both = x @ weight + experts.gate_up_proj_bias[expert].detach().double()
                gate, up = both[::2].clamp(max=7.0), both[1::2].clamp(-7.0, 7.0)
                out.append((up + 1) * gate * torch.sigmoid(1.702 * gate))
            else:
                gate, up = (weight @ x).chunk(2)
                out.append(gate * torch.sigmoid(gate) * up)
    return torch.stack(out).reshape(*chosen.shape, -1)


def in_order(rows: Tensor) -> Tensor:
    """Slots of each token in the order of their sums: implementations differ in theirs."""
    order = rows.sum(-1).argsort(dim=-1)
    return rows.gather(1, order[..., None].expand_as(rows))


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
        SiteError, match=r"Pictures could not be run on 8 token ids .*pass `example=` a batch"
    ):
        find_sites(Pictures())
    assert find_sites(Pictures(), example={"pixels": torch.randn(1, 9, 3)}).number_of_layers == 3


def test_attention_inside_fused_encoder_layers_is_found() -> None:
    sites = find_sites(FusedEncoder().eval())
    assert sites.attention_layers == (0, 1)
    assert not sites.causal_layers
    assert any("leaves its fused inference path while probed" in note for note in sites.notes)
    assert torch.backends.mha.get_fastpath_enabled()


def test_experts_that_are_modules_are_no_mlp_hidden() -> None:
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
    sites = find_sites(model)
    assert "modules of their own" in sites.absent["mlp_hidden"]
    assert {"mlp_input", "mlp_contribution"} <= set(sites.sites)
    assert not any("experts" in site for site in sites.sites)
