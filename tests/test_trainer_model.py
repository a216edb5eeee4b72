"""The training model: equal to Hugging Face's Llama where that exists, to float64 definitions elsewhere."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.attention.flex_attention import flex_attention
from transformers import LlamaConfig, LlamaForCausalLM

from osp_diag.errors import UsageError
from osp_diag.trainer.config import ModelConfig
from osp_diag.trainer.model import Llama
from osp_diag.trainer.model import attention as attention_module
from osp_diag.trainer.model import llama as llama_module
from osp_diag.trainer.model.masks import block_mask, document_starts
from osp_diag.trainer.model.norms import RMSNorm, SRMSNorm, SSNorm
from tests.llama_reference import KINDS, Reference, stirred, tiny

BATCH, TOKENS = 3, 21


def tokens_of(config: ModelConfig, seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocabulary_size, (BATCH, TOKENS), generator=generator)


DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 15, [0] * 21, [4] * 10 + [2] * 3 + [9] * 8])


# -- against Hugging Face ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("key_value_heads", [1, 2, None])
def test_logits_are_those_of_hugging_faces_llama(tied: bool, key_value_heads: int | None) -> None:
    config = tiny(
        norm="rmsnorm",
        embedding_projection=False,
        tie_embeddings=tied,
        key_value_heads=key_value_heads,
        rope_theta=500.0,
    )
    ours = stirred(config)
    theirs = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=97,
            hidden_size=32,
            intermediate_size=config.feed_forward_size,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=key_value_heads,
            rms_norm_eps=config.norm_epsilon,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
            tie_word_embeddings=tied,
        )
    ).eval()
    assert set(ours.state_dict()) == set(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ids = tokens_of(config)
    with torch.no_grad():
        torch.testing.assert_close(ours(ids).logits, theirs(ids).logits, rtol=0, atol=2e-6)


def test_parameters_bear_the_documented_names() -> None:
    model = Llama(tiny(query_key_norm=True, attention="learned_sink"))
    attention = {
        f"self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")
    }
    mlp = {f"mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    norms = {"input_layernorm.weight", "post_attention_layernorm.weight"}
    expected = {
        f"model.layers.{n}.{name}" for n in (0, 1) for name in attention | mlp | norms | {"self_attn.sinks"}
    }
    expected |= {f"model.{name}.weight" for name in ("embed_tokens", "embedding_projection", "norm")}
    expected |= {"unembedding_projection.weight", "lm_head.weight"}
    assert set(model.state_dict()) == {name for name, _ in model.named_parameters()} == expected
    assert tuple(model.blocks) == tuple(model.model.layers)
    gated = dict(Llama(tiny(attention="gated")).named_parameters())
    assert gated["model.layers.1.self_attn.gate_proj.weight"].shape == (32, 32)
    none = dict(Llama(tiny(norm="srmsnorm", query_key_norm=True)).named_parameters())
    assert not [name for name in none if "norm" in name]


# -- the whole model in float64 ------------------------------------------------------------------------------

COMBINATIONS = list(
    itertools.product(KINDS, ("rmsnorm", "ssnorm", "srmsnorm"), (False, True), (False, True), (False, True))
)


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize(("kind", "norm", "projection", "tied", "normed"), COMBINATIONS)
def test_logits_are_those_of_the_definition(
    kind: Any, norm: Any, projection: bool, tied: bool, normed: bool, documents: Tensor | None
) -> None:
    config = tiny(
        attention=kind,
        norm=norm,
        norm_scale=0.7 if norm == "srmsnorm" else 1.3,
        embedding_projection=projection,
        tie_embeddings=tied,
        query_key_norm=normed,
        key_value_heads=2 if projection else None,
    )
    model, ids = stirred(config), tokens_of(config)
    with torch.no_grad():
        found = model(ids, document_ids=documents).logits
    np.testing.assert_allclose(found, Reference(model, ids, documents).logits, rtol=0, atol=3e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_are_as_if_run_apart(kind: Any) -> None:
    model = stirred(tiny(attention=kind))
    ids = tokens_of(model.config)
    with torch.no_grad():
        together = model(ids, document_ids=DOCUMENTS).logits
        for row, documents in enumerate(DOCUMENTS):
            for document in documents.unique():
                inside = documents == document
                apart = model(ids[row : row + 1, inside]).logits[0]
                torch.testing.assert_close(together[row, inside], apart, rtol=0, atol=1e-5)


@given(lengths=st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_documents_begin_where_the_id_changes(lengths: list[int]) -> None:
    ids = torch.repeat_interleave(torch.arange(len(lengths)) * 7 % 5, torch.tensor(lengths))[None]
    expected = torch.cat([torch.full((n,), sum(lengths[:i])) for i, n in enumerate(lengths)])
    torch.testing.assert_close(document_starts(ids)[0], expected)


# -- norms, projections, initial values ----------------------------------------------------------------------


@given(
    scale=st.floats(0.1, 10), spread=st.floats(-3, 3), channels=st.integers(2, 40), seed=st.integers(0, 99)
)
def test_norms_are_their_formulas(scale: float, spread: float, channels: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(5, channels, generator=generator) * 10**spread + 0.01
    double = x.double().numpy()
    unit = double / np.linalg.norm(double, axis=-1, keepdims=True)
    shared = scale * np.sqrt(channels) * unit
    np.testing.assert_allclose(SSNorm(scale, 1e-30)(x).detach(), shared, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(SRMSNorm(scale, 1e-30)(x), shared, rtol=1e-4, atol=1e-6)
    gained = RMSNorm(channels, scale, 1e-30)
    with torch.no_grad():
        gained.weight.mul_(torch.arange(1, channels + 1))
    np.testing.assert_allclose(gained(x).detach(), shared * np.arange(1, channels + 1), rtol=1e-4, atol=1e-5)


def test_norms_compute_in_float32_and_keep_the_dtype() -> None:
    x = torch.randn(4, 64).bfloat16()
    for norm in (RMSNorm(64), SSNorm(), SRMSNorm()):
        assert norm(x).dtype == torch.bfloat16
        torch.testing.assert_close(norm(x), norm(x.float()).bfloat16(), rtol=0, atol=0)


def test_initial_values_are_the_documented_ones() -> None:
    torch.manual_seed(3)
    model = Llama(
        tiny(
            hidden_size=256,
            vocabulary_size=512,
            norm_scale=0.5,
            query_key_norm=True,
            attention="learned_sink",
        )
    )
    for name, value in model.named_parameters():
        if "embedding_projection" in name:
            torch.testing.assert_close(value @ value.T, torch.eye(256), rtol=0, atol=1e-5)
        elif name.endswith(("q_norm.weight", "k_norm.weight")):
            assert value.tolist() == [1.0]
        elif name.endswith("norm.weight"):
            assert value.tolist() == [0.5]
        elif name.endswith("sinks"):
            assert value.tolist() == [0.0] * 4
        else:
            assert value.std().item() == pytest.approx(0.02, rel=0.02), name
            assert value.mean().item() == pytest.approx(0, abs=5e-4), name
    torch.manual_seed(3)
    again = Llama(model.config)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


def test_a_tied_head_is_the_embedding() -> None:
    model = Llama(tiny(tie_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.parameter_count() == Llama(tiny()).parameter_count() - 97 * 32


def test_counts_are_those_done_by_hand() -> None:
    config = tiny(key_value_heads=2, norm="ssnorm", intermediate_size=64)
    block = 32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64 + 2
    multiplied = 2 * block + 2 * 32 * 32 + 97 * 32 + 1
    assert Llama(config).parameter_count() == multiplied + 97 * 32
    assert Llama(config).flops_per_token(50) == 6 * multiplied + 12 * 2 * 32 * 50
    tied = tiny(key_value_heads=2, norm="ssnorm", intermediate_size=64, tie_embeddings=True)
    assert Llama(tied).flops_per_token(50) == Llama(config).flops_per_token(50)


# -- loss ----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_labelled_positions() -> None:
    model = stirred(tiny())
    ids, labels = tokens_of(model.config), tokens_of(model.config, seed=2)
    labels[0, :7], labels[2] = -100, -100
    with torch.no_grad():
        loss, logits = model(ids, labels=labels)
    probability = logits.double().log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    assert loss is not None
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(-probability[labels >= 0].mean().item(), rel=1e-6)
    assert model(ids).loss is None


def test_no_label_at_all_gives_a_loss_of_zero_without_gradients() -> None:
    model = stirred(tiny())
    ids = tokens_of(model.config)
    loss = model(ids, labels=torch.full_like(ids, -100)).loss
    assert loss is not None
    assert loss.item() == 0
    loss.backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_too_long_a_sequence_is_refused() -> None:
    with pytest.raises(UsageError, match=r"65 positions are more than model.max_length=64"):
        Llama(tiny())(torch.zeros(1, 65, dtype=torch.int64))


# -- ways to run it ------------------------------------------------------------------------------------------


def gradients(model: Llama, ids: Tensor, documents: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
    model.zero_grad()
    loss = model(ids, labels=ids, document_ids=documents).loss
    assert loss is not None
    loss.backward()
    return loss.detach(), [
        parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None
    ]


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["whole", "documents"])
@pytest.mark.parametrize("kind", KINDS)
def test_checkpointed_blocks_give_the_same_bits(kind: Any, documents: Tensor | None) -> None:
    model = stirred(tiny(attention=kind)).train()
    ids = tokens_of(model.config)
    loss, plain = gradients(model, ids, documents)
    model.set_activation_checkpointing(True)
    again, checkpointed = gradients(model, ids, documents)
    assert torch.equal(loss, again)
    assert len(plain) == len(list(model.parameters()))
    assert all(map(torch.equal, plain, checkpointed))


# torch's compiler means to hide this warning about an input of its own making, but not from "error".
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize(
    ("kind", "checkpointing"),
    [*((kind, False) for kind in KINDS), ("softmax", True), ("gated", True)],
)
def test_compiled_blocks_give_the_same_numbers(kind: Any, checkpointing: bool) -> None:
    model = stirred(tiny(attention=kind)).train()
    ids = tokens_of(model.config)
    expected = [gradients(model, ids, documents) for documents in (None, DOCUMENTS)]
    model.set_activation_checkpointing(checkpointing)
    torch.compiler.reset()
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for documents, (loss, plain) in zip((None, DOCUMENTS), expected, strict=True):
        found, compiled = gradients(model, ids, documents)
        torch.testing.assert_close(found, loss, rtol=1e-6, atol=1e-6)
        for mine, right in zip(compiled, plain, strict=True):
            torch.testing.assert_close(mine, right, rtol=1e-4, atol=1e-5)
    torch.compiler.reset()


def test_compiled_blocks_take_every_block_mask_without_being_compiled_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As on a GPU, but forward only and without FlexAttention's kernel."""
    graphs: list[int] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return graph.forward

    torch.compiler.reset()
    alone = torch.compile(flex_attention, backend="aot_eager")
    monkeypatch.setattr(attention_module, "_compiled_flex", lambda: alone)
    monkeypatch.setattr(llama_module, "attention_mask", lambda *given: block_mask(given[-1]))
    model = stirred(tiny(attention="softmax"))
    ids = tokens_of(model.config)
    with torch.no_grad():
        for compiled in (False, True):
            for shift in (0, 2, 5):
                documents = document_starts(DOCUMENTS.roll(shift, dims=1))
                found = model(ids, document_ids=documents).logits
                expected = Reference(model, ids, documents).logits
                np.testing.assert_allclose(found, expected, rtol=0, atol=3e-5)
            if not compiled:
                for block in model.blocks:
                    block.compile(backend=backend, fullgraph=True)
    assert len(graphs) == 1
    torch.compiler.reset()


@pytest.mark.parametrize("kind", KINDS)
def test_autocast_keeps_loss_and_gradients_in_float32(kind: Any) -> None:
    model = stirred(tiny(attention=kind, query_key_norm=True)).train()
    ids = tokens_of(model.config)
    loss, plain = gradients(model, ids, DOCUMENTS)
    with torch.autocast("cpu", torch.bfloat16):
        lowered = model(ids, labels=ids, document_ids=DOCUMENTS).loss
    model.zero_grad()
    assert lowered is not None
    lowered.backward()
    assert lowered.dtype == torch.float32
    assert lowered.item() == pytest.approx(loss.item(), rel=0.02)
    for parameter, right in zip(model.parameters(), plain, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        if right.norm() > 1e-3:
            assert nn.functional.cosine_similarity(parameter.grad.flatten(), right.flatten(), dim=0) > 0.95
