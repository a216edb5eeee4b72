"""Sites of every family: the tensors there are what their names say, or a reason stands in their place."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from osp_diag.schema import DEFAULT_SITES, OCCASIONAL_SITES
from osp_diag.sites import find_sites
from tests.attention_reference import dense_weights, no_trace
from tests.families import FAMILIES, Family
from tests.site_reference import built, capture_sites, captured, close, odd_model, sites_of

EVERY = [pytest.param(family, id=family.name) for family in FAMILIES.values()]
ATTENTIVE = [p for p in EVERY if p.values[0].has_attention]
PARALLEL = {"gpt_neox", "gptj", "codegen", "phi", "falcon", "falcon_alibi", "cohere"}
POST_NORM = {"bert", "roberta", "albert"}
NO_FINAL_NORM = POST_NORM
SOFTMAX = {name for name, family in FAMILIES.items() if family.seam == "softmax"}
UNNAMED_PROJECTIONS = {"codegen", "bloom", "mpt"}
GATED = {
    *(
        "llama",
        "mistral",
        "qwen2",
        "qwen3",
        "gemma",
        "gemma2",
        "gemma3",
        "phi3",
        "olmo2",
        "cohere",
        "stablelm",
    ),
    *("granite", "glm4", "modernbert", "deepseek_v3"),
}
EXPERTS = {"mixtral": {0, 1}, "qwen2_moe": {0, 1}, "deepseek_v3": {1}, "gpt_oss": {0, 1}}


# -- which sites there are ---------------------------------------------------------------------------------


def expected_absences(family: Family) -> set[str]:
    name = family.name
    absent: set[str] = set()
    if not family.has_attention:
        absent |= {s for s in DEFAULT_SITES if s.startswith(("attention", "query", "key", "value"))}
    if name == "mamba":
        absent |= {"residual_mid", "mlp_input", "mlp_hidden", "mlp_down_weight", "mlp_contribution"}
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
    occasional = set() if family.has_attention else {"mixer_input", "mixer_contribution"}
    occasional |= {"mixer_state"} if family.name == "mamba" else set()
    occasional |= {"router"} if family.name in EXPERTS else set()
    occasional |= {"mlp_gate_weight"} if family.name in GATED else set()
    assert set(OCCASIONAL_SITES) & set(sites.sites) == occasional
    assert set(DEFAULT_SITES) - set(OCCASIONAL_SITES) - set(sites.sites) == expected_absences(family)
    not_read = {"mixer_state"} if family.name == "rwkv" else set()
    not_read |= {"mlp_gate_weight"} if family.name in set(EXPERTS) - GATED else set()
    assert set(sites.absent) == expected_absences(family) | not_read
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
        at_the_call = site in ("attention", "mixer_state") or (site, 0) not in found.activations
        if site.startswith(("linear_input", "projection_weight")) or site in single or at_the_call:
            continue
        layers = found.layers(site)
        if site in ("mlp_hidden", "router"):
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
    assert sites_of("mamba").absent["residual_mid"].startswith("no MLP in the block, so that nothing lies")
    assert "osp_diag.attention_function" in sites_of("mamba").absent["attention"]
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
