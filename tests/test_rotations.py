"""Rotations leave what a model computes as it is, spread its outliers, and are undone to the bit."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from osp_diag.errors import CheckpointError, UsageError
from osp_diag.quantizing.rotations import DenseRotation, StreamRotations, rotated
from osp_diag.trainer.config import ModelConfig
from osp_diag.trainer.model import Llama
from tests.families import FAMILIES, VOCABULARY

IDS = torch.randint(3, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(0))
CASES = {
    "grouped queries": ("llama", {}),
    "one key head": ("llama", {"num_key_value_heads": 1}),
    "biases, tied head": ("qwen2", {"tie_word_embeddings": True}),
    "fused projections": ("phi3", {}),
    "norms of queries and keys": ("qwen3", {}),
    "gains of 1 + w, scaled embedding": ("gemma", {}),
}


def build(case: str) -> nn.Module:
    family, options = CASES[case]
    return with_gains(FAMILIES[family].build(**options))


def with_gains(model: nn.Module) -> nn.Module:
    """Norms and biases as they are after training: of no two channels the same."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                size = 0.5 if name.endswith("bias") else 1.0
                parameter.add_(size * torch.rand(parameter.shape, generator=generator))
    return model


def outlier_safe() -> nn.Module:
    """The trainer's own model: one gain a norm, projections of the embedding and before the head."""
    config = ModelConfig(
        layers=2, hidden_size=32, heads=4, key_value_heads=2, intermediate_size=48,
        vocabulary_size=VOCABULARY, norm="ssnorm", embedding_projection=True, query_key_norm=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return with_gains(Llama(config).eval())


def rotate(model: nn.Module, kind: str = "random") -> None:
    """And back at once."""
    with rotated(model, kind):
        pass


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("case", [*CASES, "outlier-safe"])
@pytest.mark.parametrize("kind", ["ffn-hadamard", "random"])
def test_logits_stay_and_weights_come_back(case, kind):
    model = outlier_safe() if case == "outlier-safe" else build(case)
    parameters, before, expected = dict(model.named_parameters()), state(model), logits(model)
    with rotated(model, kind, seed=3) as applied:
        assert torch.allclose(logits(model), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))
        changed = {n for n, value in model.state_dict().items() if not torch.equal(value, before[n])}
        downs = {name for name in before if "down_proj" in name}
        assert changed == downs if kind == "ffn-hadamard" else changed > downs
        assert {f"{path}.weight" for path in applied.online} == downs
        narrow = kind == "random" and case in (
            "norms of queries and keys",
            "gains of 1 + w, scaled embedding",
        )
        assert applied.notes == (("block Hadamard 2 of 10",) if narrow else ())
        assert (applied.key_rotation is None) == (kind == "ffn-hadamard")
    assert {name: id(p) for name, p in model.named_parameters()} == {n: id(p) for n, p in parameters.items()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(logits(model), expected)
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_a_channel_that_outweighs_all_others_is_spread_over_all():
    model = build("grouped queries")
    with torch.no_grad():
        model.model.embed_tokens.weight[:, 7] = 100.0
    streams = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: streams.append(args[0]))
    logits(model)
    with rotated(model) as applied:
        streams.clear()
        logits(model)
    assert applied.key_rotation.description == "Hadamard 8"
    stream = streams[0].abs()
    assert float(stream.max()) < 30
    assert float(stream.min()) > 5


def test_seeds_give_other_rotations_and_the_same_seed_the_same():
    model = build("grouped queries")
    weights = []
    for seed in (0, 0, 1):
        with rotated(model, seed=seed):
            weights.append(model.model.embed_tokens.weight.clone())
    assert torch.equal(weights[0], weights[1])
    assert not torch.allclose(weights[0], weights[2])


def test_given_rotations_are_applied():
    model = build("biases, tied head")
    generator = torch.Generator().manual_seed(0)
    stream, values = (
        DenseRotation(torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0])
        for n in (32, 8)
    )
    expected, table = logits(model), model.model.embed_tokens.weight.clone()
    with rotated(model, "learned", rotations=StreamRotations(stream=stream, values={0: values, 1: values})):
        assert torch.allclose(model.model.embed_tokens.weight, table @ stream.values.float(), atol=1e-5)
        assert model.lm_head.weight is not model.model.embed_tokens.weight
        assert torch.allclose(logits(model), expected, atol=1e-4)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_half_precision_moves_logits_by_rounding_alone():
    model = build("grouped queries").bfloat16()
    expected = logits(model).float()
    with rotated(model):
        assert model.model.embed_tokens.weight.dtype == torch.bfloat16
        assert float((logits(model).float() - expected).norm() / expected.norm()) < 0.05


def test_all_is_put_back_after_an_error():
    model = build("grouped queries")
    before = state(model)
    with pytest.raises(RuntimeError, match="in between"), rotated(model):
        raise RuntimeError("in between")
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(not module._forward_pre_hooks for module in model.modules())


def test_sizes_without_a_hadamard_matrix_are_said():
    model = FAMILIES["llama"].build(intermediate_size=46, hidden_size=36, num_attention_heads=6)
    with rotated(model) as applied:
        assert applied.notes == ("block Hadamard 2 of 46", "block Hadamard 2 of 6")
    with rotated(model, "none") as applied:
        assert applied.notes == ()


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("olmo2", "what block 0 adds to it is not the output of one Linear"),
        ("cohere", "what block 0 adds to it is not the output of one Linear"),
        (
            "stablelm",
            "input_layernorm, a LayerNorm, cannot be folded .* it subtracts the mean or adds a bias",
        ),
        ("opt", "what its first block reads is the output of no embedding or Linear"),
    ],
)
def test_streams_that_cannot_be_rotated_are_refused(family, reason):
    model = FAMILIES[family].build()
    before = state(model)
    with pytest.raises(CheckpointError, match=reason) as error:
        rotate(model)
    assert "the methods rtn, gptq, ffn-hadamard and ffn-hadamard+gptq need no rotation of the stream" in str(
        error.value
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rotate(model, "ffn-hadamard")


class Nosy(nn.Module):
    """A head that looks at single channels of the embedding, unseen."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model
        self.config = model.config

    def get_input_embeddings(self) -> nn.Module:
        return self.inner.get_input_embeddings()

    def forward(self, input_ids: torch.Tensor, **options: object) -> object:
        output = self.inner(input_ids, **options)
        seen = self.get_input_embeddings().weight[input_ids][..., :1]
        output.logits = output.logits + 10 * seen
        return output


def test_what_reads_the_stream_unseen_is_noticed_by_the_logits():
    model = Nosy(build("grouped queries"))
    before = state(model)
    with pytest.raises(CheckpointError, match=r"predicts otherwise when it is rotated: its logits move by"):
        rotate(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_has_no_linears_to_rotate_is_refused():
    with pytest.raises(CheckpointError, match="its experts are stacked in one parameter"):
        rotate(FAMILIES["mixtral"].build(), "ffn-hadamard")
    with pytest.raises(CheckpointError, match=r"c_proj is a Conv1D, not an nn.Linear"):
        rotate(FAMILIES["gpt2"].build(), "ffn-hadamard")
    model = build("grouped queries")
    parametrize.register_parametrization(model.model.layers[0].mlp.down_proj, "weight", nn.Identity())
    with pytest.raises(CheckpointError, match="remove the parametrization first"):
        rotate(model)
    with pytest.raises(UsageError, match="rotation 'spun' is unknown; there are none, ffn-hadamard, random"):
        rotate(model, "spun")
    with pytest.raises(UsageError, match="give `rotations=` with the kind 'learned'"):
        rotate(model, "learned")
