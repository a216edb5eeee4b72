"""Which tokens there are is read off the stream between the blocks, in whatever layout it has."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from osp_diag import Probe
from osp_diag.errors import SiteError
from osp_diag.sites import find_sites
from tests.families import FAMILIES
from tests.test_probe_laws import numbers

VISION = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "image_size": 12, "patch_size": 4,
}  # fmt: skip
SPEECH = {
    "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24, "vocab_size": 60,
    "num_mel_bins": 4, "max_source_positions": 10, "max_target_positions": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 3,
}  # fmt: skip
SOUND = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24,
    "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
}  # fmt: skip


def measured(model: nn.Module, example: Any, **options: Any) -> tuple[Probe, Any]:
    """A probe after one pass over its example, and what the model returned."""
    probe = Probe(model, example=example, **options)
    with torch.no_grad(), probe.step(0):
        output = model(**example) if isinstance(example, dict) else model(*example)
    return probe, output


def images() -> dict[str, Tensor]:
    return {"pixel_values": torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))}


@pytest.mark.parametrize(
    ("model", "config", "extra"),
    [
        ("ViTModel", "ViTConfig", 1),
        ("SiglipVisionModel", "SiglipVisionConfig", 0),
        ("Dinov2WithRegistersModel", "Dinov2WithRegistersConfig", 1 + 3),
    ],
)
def test_patches_are_tokens(model: str, config: str, extra: int) -> None:
    options = {**VISION, "num_register_tokens": 3} if extra > 1 else VISION
    network = getattr(transformers, model)(getattr(transformers, config)(**options)).eval()
    streams: list[Tensor] = []
    layers = network.get_submodule(find_sites(network, example=images()).block_paths[-1])
    handle = layers.register_forward_hook(lambda module, args, out: streams.append(out))
    with torch.no_grad():
        expected = network(**images())[0]
    handle.remove()
    probe, output = measured(network, images(), sites=["residual_post", "attention"])
    assert torch.equal(output[0], expected)
    found = probe.run.at("residual_post").isel(step=0, layer=1)
    tokens = 9 + extra
    counts = found["token_count"]
    assert counts.sel(stratum="all") == 2 * tokens
    assert counts.sel(stratum="patch") == 2 * 9
    norm = (streams[0] if isinstance(streams[0], Tensor) else streams[0][0]).double().norm(dim=-1)
    np.testing.assert_allclose(found["token_norm"].sel(stratum="all"), norm.mean(), rtol=1e-5)
    assert probe.run.at("attention").sizes["key_position"] == tokens


def test_frames_of_sound_are_tokens_and_their_padding_is_the_encoders() -> None:
    model = transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(**SOUND)).eval()
    lengths = torch.tensor([[200], [100]])
    batch = {
        "input_values": torch.randn(2, 200),
        "attention_mask": (torch.arange(200)[None] < lengths).long(),
    }
    probe, _ = measured(model, batch, sites=["residual_post"])
    frames = [int(model._get_feat_extract_output_lengths(length)) for length in (200, 100)]
    assert probe.run.at("residual_post")["token_count"][0, 0, 0] == sum(frames)


def test_labels_alone_give_a_decoder_its_tokens() -> None:
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(**SPEECH)).eval()
    batch = {"input_features": torch.randn(2, 4, 20), "labels": torch.randint(4, 60, (2, 7))}
    probe, _ = measured(model, batch, sites=["residual_post", "attention"], delimiter_ids=(3,))
    assert probe.site_map.prefix == "decoder_"
    # Ids of the decoder's own module: the start token and the labels, moved on by one.
    np.testing.assert_array_equal(probe.run.at("residual_post")["token_count"][0, 0], [14, 2, 0, 12])
    encoder = model.get_encoder()
    probe, _ = measured(encoder, {"input_features": batch["input_features"]}, sites=["residual_post"])
    assert probe.run.at("residual_post")["token_count"][0, 0, 0] == 20


class Prompted(nn.Module):
    """Learned vectors before the tokens, as prompt tuning has them."""

    def __init__(self) -> None:
        super().__init__()
        self.base = FAMILIES["llama"].build()
        self.prompt = nn.Parameter(torch.randn(3, 32))

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        vectors = self.base.get_input_embeddings()(input_ids)
        vectors = torch.cat([self.prompt.expand(len(input_ids), -1, -1), vectors], 1)
        if attention_mask is not None:
            attention_mask = nn.functional.pad(attention_mask, (3, 0), value=1)
        return self.base(inputs_embeds=vectors, attention_mask=attention_mask)


def test_learned_prompts_are_tokens_and_padding_is_that_of_the_inner_model() -> None:
    batch = FAMILIES["llama"].inputs(padded=True)
    probe, _ = measured(Prompted(), batch, sites=["residual_post", "attention"])
    valid = int(batch["attention_mask"].sum()) + 2 * 3
    assert probe.run.at("residual_post")["token_count"][0, 0, 0] == valid


class ConditionedBlock(nn.Module):
    """Norms shifted, scaled and gated by a condition, the gates 0 at first (DiT's adaLN-zero)."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(16, elementwise_affine=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.condition = nn.Linear(16, 96)
        nn.init.zeros_(self.condition.weight)
        nn.init.zeros_(self.condition.bias)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale, gate, shift2, scale2, gate2 = self.condition(c)[:, None].chunk(6, -1)
        q, k, v = (
            self.qkv(self.norm1(x) * (1 + scale) + shift).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        )
        mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + gate * self.out(mixed.transpose(1, 2).flatten(2))
        return x + gate2 * self.down(nn.functional.gelu(self.up(self.norm2(x) * (1 + scale2) + shift2)))


class DiffusionTransformer(nn.Module):
    """Patches of a latent image, and blocks that are told the time step."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.times = nn.Conv2d(4, 16, 2, 2), nn.Embedding(10, 16)
        self.blocks = nn.ModuleList(ConditionedBlock() for _ in range(2))

    def forward(self, latents: Tensor, time: Tensor) -> Tensor:
        x, c = self.patches(latents).flatten(2).mT, self.times(time)
        for block in self.blocks:
            x = block(x, c)
        return x


def test_a_diffusion_transformer_is_told_the_time_step() -> None:
    torch.manual_seed(0)
    model = DiffusionTransformer().eval()
    example = {"latents": torch.randn(2, 4, 6, 6), "time": torch.tensor([3, 7])}
    probe = Probe(model, example=example, compile=False)
    with torch.no_grad():
        for block in model.blocks:  # as training moves it from 0
            block.condition.weight.normal_(std=0.5)
        expected = model(**example)
        first = model.blocks[0](model.patches(example["latents"]).flatten(2).mT, model.times(example["time"]))
        with probe.step(0):
            output = model(**example)
    assert torch.equal(output, expected)
    found = probe.run.at("residual_post").isel(step=0)
    assert found["stratum"].values.tolist() == ["all", "patch"]
    assert found["token_count"].values.tolist() == [[18, 18]] * 2
    norms = [states.double().norm(dim=-1).mean() for states in (first, expected)]
    np.testing.assert_allclose(found["token_norm"].sel(stratum="all"), norms, rtol=1e-5)
    attention = probe.run.at("attention")
    assert (attention.sizes["head"], attention.sizes["key_position"]) == (2, 9)


# -- tokens first --------------------------------------------------------------------------------------------


class TokensFirst(nn.Module):
    """torch's own encoder, whose stream is (token, batch, channel)."""

    def __init__(self, causal: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, norm_first=True)
        self.words, self.causal = nn.Embedding(60, 16), causal
        self.stack = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        mask = nn.Transformer.generate_square_subsequent_mask(length) if self.causal else None
        return self.stack(self.words(ids).transpose(0, 1), mask=mask).transpose(0, 1)


@pytest.mark.parametrize("sequences", [1, 3, 6])
def test_a_stream_with_its_tokens_first_is_read_so(sequences: int) -> None:
    torch.manual_seed(1)
    model = TokensFirst().eval()
    ids = torch.randint(4, 60, (sequences, 6))
    ids[:, 0] = 7
    with torch.no_grad():
        model.words.weight[7] *= 50
    for example in (None, (ids,)):
        probe = Probe(model, example=example, sites=["residual_post", "linear_input:*", "attention"])
        with torch.no_grad(), probe.step(0):
            norm = model(ids).double().norm(dim=-1)
        found = probe.run.at("residual_post").isel(step=0, layer=1)["token_norm"]
        np.testing.assert_allclose(found.sel(stratum="first"), norm[:, 0].mean(), rtol=1e-5)
        np.testing.assert_allclose(found.sel(stratum="rest"), norm[:, 1:].mean(), rtol=1e-5)
        assert probe.site_map.tokens_first
        assert probe.run.at("attention").sizes["key_position"] == 6


def test_vectors_handed_over_tokens_first_are_told_by_what_attention_mixes() -> None:
    torch.manual_seed(1)
    for sequences_first in (False, True):
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=sequences_first)
        encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
        for batch in (torch.randn(5, 5, 16), torch.randn(4, 2, 16)):
            assert find_sites(encoder, example=(batch,)).tokens_first is not sequences_first


def test_xlnet_has_its_tokens_first() -> None:
    config = transformers.XLNetConfig(vocab_size=60, d_model=16, n_layer=2, n_head=2, d_inner=24)
    model = transformers.XLNetLMHeadModel(config).eval()
    probe = Probe(model, sites=["residual_post"])
    assert probe.site_map.tokens_first
    with torch.no_grad(), probe.step(0):
        model(torch.randint(4, 60, (3, 7)))
    np.testing.assert_array_equal(probe.run.at("residual_post")["token_count"][0, 0], [21, 3, 0, 18])


# -- other ways to be called -------------------------------------------------------------------------------


class Called(nn.Module):
    """A model that takes a batch dictionary, or the ids of one sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(60, 16)
        layer = nn.TransformerEncoderLayer(16, 2, 24, dropout=0.0, batch_first=True)
        self.blocks = nn.ModuleList(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).layers)

    def forward(self, batch: Any) -> Tensor:
        x = self.words(batch["input_ids"] if isinstance(batch, dict) else batch)
        for block in self.blocks:
            x = block(x)
        return x


def test_batch_dictionaries_and_single_sequences_are_read() -> None:
    model, ids = Called().eval(), torch.tensor([[4, 5, 6, 5], [7, 5, 8, 9]])
    probe = Probe(model, example={"input_ids": ids}, sites=["residual_post"], delimiter_ids=(5,))
    with torch.no_grad(), probe.step(0):
        model({"input_ids": ids})
    with torch.no_grad(), probe.step(1):
        model(ids[0])
    counts = probe.run.at("residual_post")["token_count"][:, 0]
    np.testing.assert_array_equal(counts, [[8, 2, 3, 3], [4, 1, 2, 1]])
    assert np.isfinite(numbers(probe)["/residual_post/osp_excess_kurtosis"][1, 0]).all()


def test_networks_without_tokens_are_refused_when_the_probe_is_made() -> None:
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1])
    with pytest.raises(SiteError, match="which are not vectors of tokens"):
        Probe(transformers.ResNetModel(config).eval(), example=images())


def test_a_mask_of_other_tokens_than_the_stream_s_is_noted() -> None:
    class Prompted(nn.Module):
        """Two learned tokens before those of the batch, whose mask it ignores."""

        def __init__(self) -> None:
            super().__init__()
            self.words, self.prompt = nn.Embedding(40, 16), nn.Parameter(torch.randn(2, 16))
            self.blocks = nn.ModuleList(
                nn.TransformerEncoderLayer(16, 2, 24, batch_first=True) for _ in range(2)
            )

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            x = torch.cat([self.prompt.expand(len(input_ids), -1, -1), self.words(input_ids)], dim=1)
            for block in self.blocks:
                x = block(x)
            return x

    model, ids = Prompted().eval(), torch.arange(3, 15).reshape(2, 6)
    for padded in (False, True):
        mask = torch.ones_like(ids)
        mask[1, 4:] = 0 if padded else 1
        probe = Probe(model, example={"input_ids": ids}, compile=False)
        with torch.no_grad(), probe.step(0):
            model(ids, attention_mask=mask)
        text = "padding counts as tokens: the attention mask is of 6 tokens, the stream of 8; run"
        assert any(note.startswith(text) for note in probe.run.attrs["notes"]) is padded
