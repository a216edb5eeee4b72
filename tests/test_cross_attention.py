"""Attention of a decoder over an encoder's tokens, against dense float64 weights of the model itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional

from osp_diag import Probe, Run
from osp_diag.errors import EstimatorError, SiteError
from osp_diag.estimators import get_estimator
from osp_diag.estimators.attention import AttentionMask
from osp_diag.estimators.base import Suite
from osp_diag.estimators.cross_attention import CrossAttentionObservation
from osp_diag.sites import find_sites

IDS, DECODER_IDS = torch.arange(3, 27).reshape(2, 12), torch.arange(3, 23).reshape(2, 10)
MASK = torch.ones(2, 12, dtype=torch.long)
MASK[1, :3] = 0  # on the left, so that the sink key is not the first column
DECODER_MASK = torch.ones(2, 10, dtype=torch.long)
DECODER_MASK[0, 8:] = 0
BATCH = {
    "input_ids": IDS,
    "attention_mask": MASK,
    "decoder_input_ids": DECODER_IDS,
    "decoder_attention_mask": DECODER_MASK,
}
SIZES = {"vocab_size": 60, "d_model": 32, "decoder_start_token_id": 0, "attn_implementation": "eager"}


def t5(implementation: str) -> nn.Module:
    config = transformers.T5Config(d_kv=8, d_ff=48, num_heads=4, num_layers=2, **SIZES)
    return transformers.T5ForConditionalGeneration(config)


def bart(implementation: str) -> nn.Module:
    sizes = {f"{side}_{n}": v for side in ("encoder", "decoder") for n, v in PARTS.items()}
    config = transformers.BartConfig(max_position_embeddings=32, **sizes, **SIZES)
    config._attn_implementation = implementation
    return transformers.BartForConditionalGeneration(config)


PARTS = {"layers": 2, "attention_heads": 4, "ffn_dim": 48}


def sharp(build: Callable[[str], nn.Module], implementation: str = "eager") -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build(implementation).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 and parameter.std() < 0.1 else 1)
    return model


def dense(model: nn.Module) -> tuple[list[np.ndarray], dict[str, list[np.ndarray]]]:
    """The model's own cross-attention weights in float64, and what its projections of them give."""
    double = copy.deepcopy(model).double()
    for module in double.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "eager"
    given: dict[str, list[np.ndarray]] = {"q": [], "k": [], "v": []}
    for path, module in double.named_modules():
        name = path.rpartition(".")[2].removesuffix("_proj")
        if ("EncDecAttention" in path or "encoder_attn" in path) and name in given:

            def keep(_: Any, __: Any, output: Tensor, name: str = name) -> None:
                given[name].append(output.unflatten(-1, (4, -1)).transpose(1, 2).numpy())

            module.register_forward_hook(keep)
    with torch.no_grad():
        weights = double(**BATCH, output_attentions=True).cross_attentions
    return [layer.double().numpy() for layer in weights], given


def probed(model: nn.Module, batch: dict[str, Any] = BATCH, **options: Any) -> Run:
    with Probe(model, **options) as probe, probe.step(0), torch.no_grad():
        model(**batch)
    return probe.run


def expected_statistics(weights: np.ndarray) -> dict[str, np.ndarray]:
    queries, keys = DECODER_MASK.numpy() > 0, MASK.numpy() > 0
    heads, length = weights.shape[1], weights.shape[3]
    received = np.full((2, heads, length), np.nan)
    to_first = []
    for b in range(2):
        own = weights[b][:, queries[b]]
        alpha = own[:, :, keys[b]].mean(1)
        received[b, :, : alpha.shape[1]] = alpha
        to_first.append(own[:, :, np.flatnonzero(keys[b])[0]])
    with np.errstate(invalid="ignore"):
        mass = np.nanmean(received, axis=0)
    rate = np.stack(
        [[(received[:, :, k] > e).mean(0) for k in range(4)] for e in (0.1, 0.2, 0.3, 0.5, 0.8)]
    ).transpose(2, 0, 1)
    return {
        "key_mass": mass,
        "sink_rate": rate,
        "first_token_attention": np.concatenate(to_first, axis=1).mean(1),
    }


@pytest.mark.parametrize(("build", "implementation"), [(t5, "eager"), (bart, "eager"), (bart, "sdpa")])
def test_its_sites_are_those_of_a_dense_pass(build: Callable[[str], nn.Module], implementation: str) -> None:
    model = sharp(build, implementation)
    weights, given = dense(model)
    run = probed(model)
    scale = 1.0 if build is t5 else 8**-0.5
    queries, keys = DECODER_MASK.numpy() > 0, MASK.numpy() > 0
    data = run.at("cross_attention").sel(step=0)
    for layer, layer_weights in enumerate(weights):
        ours = data.sel(layer=layer)
        expected = expected_statistics(layer_weights)
        np.testing.assert_allclose(ours["key_mass"], expected["key_mass"], atol=1e-5)
        np.testing.assert_allclose(ours["sink_rate"], expected["sink_rate"], atol=1e-12)
        first = ours["first_token_attention"].sel(stratum="all")
        np.testing.assert_allclose(first, expected["first_token_attention"], atol=1e-5)
        np.testing.assert_allclose(ours["key_mass_share"].sel(stratum="all"), 1, atol=1e-5)
        logits = scale * given["q"][layer] @ given["k"][layer].transpose(0, 1, 3, 2)
        seen = queries[:, None, :, None] & keys[:, None, None, :]
        top = np.where(seen, logits, -np.inf).max((0, 2, 3))
        np.testing.assert_allclose(ours["max_logit"], top, rtol=1e-4)
        for site, name, valid in (("query", "q", queries), ("key", "k", keys), ("value", "v", keys)):
            values = given[name][layer].transpose(0, 2, 1, 3)[valid].reshape(valid.sum(), -1)
            at = run.at(f"cross_attention_{site}").sel(step=0, layer=layer)
            assert float(at["absolute_maximum"].sel(stratum="all")) == pytest.approx(
                np.abs(values).max(), 1e-5
            )
            kurtosis = np.maximum((values**4).mean(1) / values.var(1, ddof=1) ** 2 - 3, 0).mean()
            assert float(at["osp_excess_kurtosis"].sel(stratum="all")) == pytest.approx(kurtosis, abs=1e-4)
            firsts = [values[int(valid[:b].sum())] for b in range(2)]
            largest = np.abs(firsts).max()
            assert float(at["absolute_maximum"].sel(stratum="first")) == pytest.approx(largest, 1e-5)
    assert not any("not seen" in note for note in run.attrs["notes"])


def test_which_of_the_encoders_tokens_draw_attention_is_told_by_their_ids() -> None:
    model = sharp(t5)
    weights, _ = dense(model)
    run = probed(model, estimators=[get_estimator("top_keys", minimum=1)])
    top = run.at("cross_attention").sel(step=0, layer=0)
    queries, keys = DECODER_MASK.numpy() > 0, MASK.numpy() > 0
    mass = {}
    for b in range(2):
        alpha = weights[0][b][:, queries[b]].mean((0, 1))
        mass |= {int(IDS[b, k]): alpha[k] for k in np.flatnonzero(keys[b])[1:]}
    ranked = sorted(mass, key=lambda token: -mass[token])
    ours = [int(i) for i in top["top_key_token"].values if i >= 0]
    assert ours == ranked[: len(ours)]
    np.testing.assert_allclose(top["top_key_mass"].values[0], mass[ranked[0]], rtol=1e-4)


def test_a_decoder_that_makes_its_tokens_with_a_cache_gives_the_same() -> None:
    model = sharp(bart)
    batch = {name: BATCH[name] for name in ("input_ids", "attention_mask")}
    whole = probed(model, {**batch, "decoder_input_ids": DECODER_IDS})
    with Probe(model) as probe, probe.step(0), torch.no_grad():
        cache = None
        for token in range(DECODER_IDS.shape[1]):
            part = DECODER_IDS[:, token : token + 1]
            cache = model(
                **batch, decoder_input_ids=part, past_key_values=cache, use_cache=True
            ).past_key_values
    for name in ("key_mass", "max_logit", "first_token_attention"):
        ours, expected = (r.at("cross_attention")[name].values for r in (probe.run, whole))
        np.testing.assert_allclose(ours, expected, atol=1e-5)


class Decoder(nn.Module):
    """Two layers whose attention to a memory bears no telling name."""

    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.word, self.memory = nn.Embedding(64, 16), nn.Embedding(64, 16)
        self.blocks = nn.ModuleList(DecoderBlock(attend) for _ in range(2))

    def forward(self, idx: Tensor, other: Tensor) -> Tensor:
        x, memory = self.word(idx), self.memory(other)
        for block in self.blocks:
            x = block(x, memory)
        return x


class DecoderBlock(nn.Module):
    def __init__(self, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = Attention(attend, causal=True), Attention(attend, causal=False)
        self.feed = nn.Sequential(nn.Linear(16, 40), nn.GELU(), nn.Linear(40, 16))

    def forward(self, x: Tensor, memory: Tensor) -> Tensor:
        x = x + self.first(x, x)
        x = x + self.second(x, memory)
        return x + self.feed(x)


class Attention(nn.Module):
    def __init__(self, attend: Callable[..., Tensor], *, causal: bool) -> None:
        super().__init__()
        self.attend, self.causal = attend, causal
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))

    def forward(self, x: Tensor, source: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (4, -1)).transpose(1, 2)
            for part in (self.q(x), self.k(source), self.v(source))
        )
        return self.o(self.attend(q, k, v, self.causal).transpose(1, 2).flatten(2))


def by_kernel(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal)


def by_hand(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    logits = q @ k.mT / 2
    if causal:
        logits = logits.masked_fill(torch.ones(q.shape[2], q.shape[2]).triu(1).bool(), float("-inf"))
    return logits.softmax(-1) @ v


@pytest.mark.parametrize("attend", [by_kernel, by_hand])
@pytest.mark.parametrize("keys", [9, 14])
def test_a_model_of_ones_own(attend: Callable[..., Tensor], keys: int) -> None:
    torch.manual_seed(0)
    model = Decoder(attend).eval()
    idx, other = torch.arange(24).reshape(2, 12), torch.arange(2 * keys).reshape(2, keys)
    seen: list[Tensor] = []
    with Probe(model, example=(idx, other)) as probe, probe.step(0), torch.no_grad():
        model(idx, other)
    double = copy.deepcopy(model).double()
    for block in double.blocks:
        block.second.attend = lambda q, k, v, _: seen.append((q @ k.mT / 2).softmax(-1)) or (seen[-1] @ v)
    with torch.no_grad():
        double(idx, other)
    data = probe.run.at("cross_attention").sel(step=0)
    for layer in range(2):
        np.testing.assert_allclose(data["key_mass"].sel(layer=layer), seen[layer].mean((0, 2)), atol=1e-5)
    known = "cross_attention_key" in probe.run.sites
    assert known == (attend is by_kernel)
    if not known:
        assert "only attention logits" in probe.run.absent_sites["cross_attention_key"]


@pytest.mark.parametrize("fill", [float("-inf"), -1e9, -1e4])
def test_a_key_that_no_query_may_see_is_padding_whatever_its_logit_is_filled_with(fill: float) -> None:
    bias = torch.zeros(2, 1, 1, 9)
    bias[1, ..., :2] = fill
    weights: list[Tensor] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        return functional.scaled_dot_product_attention(q, k, v, None if causal else bias, is_causal=causal)

    def dense(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
        weights.append((q @ k.mT / 2 + bias).softmax(-1))
        return weights[-1] @ v

    torch.manual_seed(0)
    model = Decoder(attend).eval()
    idx, other = torch.arange(24).reshape(2, 12), torch.arange(18).reshape(2, 9)
    with Probe(model, example=(idx, other)) as probe, probe.step(0), torch.no_grad():
        model(idx, other)
    model.blocks[0].second.attend = dense
    with torch.no_grad():
        model(idx, other)
    to_the_first = torch.stack([weights[0][0, ..., 0], weights[0][1, ..., 2]]).mean((0, 2))
    ours = probe.run.at("cross_attention")["first_token_attention"].sel(step=0, layer=0, stratum="all")
    np.testing.assert_allclose(ours, to_the_first, atol=1e-5)


def test_torchs_own_decoder_layers() -> None:
    torch.manual_seed(0)

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.word = nn.Embedding(64, 16)
            self.layers = nn.ModuleList(nn.TransformerDecoderLayer(16, 4, 32) for _ in range(2))

        def forward(self, idx: Tensor, other: Tensor) -> Tensor:
            x, memory = self.word(idx.T), self.word(other.T)
            for layer in self.layers:
                x = layer(x, memory)
            return x

    model, idx, other = Own().eval(), torch.arange(24).reshape(2, 12), torch.arange(18).reshape(2, 9)
    weights = []
    double = copy.deepcopy(model).double()
    for layer in double.layers:
        forward = layer.multihead_attn.forward

        def dense_forward(q: Tensor, k: Tensor, v: Tensor, *, forward: Any = forward, **_: Any) -> Any:
            output, each = forward(q, k, v, need_weights=True, average_attn_weights=False)
            weights.append(each)
            return output, None

        layer.multihead_attn.forward = dense_forward
    with torch.no_grad():
        double(idx, other)
    with Probe(model, example=(idx, other)) as probe, probe.step(0), torch.no_grad():
        model(idx, other)
    for layer in range(2):
        ours = probe.run.at("cross_attention")["key_mass"].sel(step=0, layer=layer)
        np.testing.assert_allclose(ours, weights[layer].mean((0, 2)), atol=1e-5)


def test_learned_sinks_take_their_share() -> None:
    random = np.random.default_rng(0)
    query, key = random.normal(size=(2, 4, 70, 8)), random.normal(size=(2, 2, 30, 8))
    sinks, cap = np.array([1.0, -2.0, 0.5, 3.0]), 5.0
    bias = random.normal(size=(2, 1, 1, 30))
    bias[1, ..., 20:] = -np.inf
    strata, key_strata = (
        np.stack([np.ones((2, n)), np.zeros((2, n))] + [np.ones((2, n))] * 2) for n in (70, 30)
    )
    strata[1:3], key_strata[1:3] = 0, 0
    key_strata[:, 1, 20:] = 0
    observation = CrossAttentionObservation(
        query, key, None, strata, key_strata, scale=0.5, softcap=cap, sink_logits=sinks,
        mask=AttentionMask(causal=False, tensor=bias),
    )  # fmt: skip
    suite = Suite([get_estimator(name) for name in ("extra_sink_mass", "key_mass", "max_logit")])
    values = suite.finalise(suite.measure(observation), observation.layout)
    logits = cap * np.tanh(0.5 * query @ np.repeat(key, 2, 1).swapaxes(2, 3) / cap) + bias
    exponential, extra = np.exp(logits), np.exp(sinks)[None, :, None]
    total = exponential.sum(-1) + extra
    np.testing.assert_allclose(values["extra_sink_mass"].values, (extra / total).mean((0, 2)), rtol=1e-5)
    received = (exponential / total[..., None]).mean(2)
    received[1, :, 20:] = np.nan
    np.testing.assert_allclose(values["key_mass"].values, np.nanmean(received, 0), rtol=1e-5)
    np.testing.assert_allclose(values["max_logit"].values, logits.max((0, 2, 3)), rtol=1e-5)


def test_what_does_not_fit_is_refused() -> None:
    query, key, strata = np.zeros((1, 2, 4, 8)), np.zeros((1, 2, 6, 8)), np.ones((4, 1, 4))
    with pytest.raises(
        EstimatorError, match=r"are of \(1, 4\) and \(1, 4\) tokens, expected \(1, 4\) and \(1, 6\)"
    ):
        CrossAttentionObservation(query, key, None, strata, strata)
    with pytest.raises(EstimatorError, match="told by query and key, or by the logits"):
        CrossAttentionObservation(query, None, None, strata, np.ones((4, 1, 6)))
    with pytest.raises(SiteError, match="'cross_attention' is seen at the attention call"):
        find_sites(sharp(t5), named={"cross_attention": "decoder.block.*"})


@pytest.mark.filterwarnings("ignore:.*hidden_state.*is deprecated:FutureWarning")
def test_layers_that_attend_to_an_image() -> None:
    """Mllama's, which attend to nothing else; keys that are no tokens of a vocabulary."""
    torch.manual_seed(0)
    config = transformers.MllamaConfig(
        text_config={
            "vocab_size": 70, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4,
            "num_attention_heads": 4, "num_key_value_heads": 2, "cross_attention_layers": [1, 3],
            "pad_token_id": 0, "rope_scaling": {"rope_type": "default"}, "max_position_embeddings": 64,
        },
        vision_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_global_layers": 1,
            "attention_heads": 4, "image_size": 28, "patch_size": 14, "max_num_tiles": 1,
            "vision_output_dim": 64, "intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1]],
        },
        image_token_index=69,
    )  # fmt: skip
    model = transformers.MllamaForConditionalGeneration(config).eval()
    batch = {
        "input_ids": torch.arange(3, 27).reshape(2, 12),
        "attention_mask": torch.ones(2, 12).long(),
        "pixel_values": torch.randn(2, 1, 1, 3, 28, 28),
        "aspect_ratio_ids": torch.ones(2, 1).long(),
        "aspect_ratio_mask": torch.ones(2, 1, 1).long(),
        "cross_attention_mask": torch.ones(2, 12, 1, 1).long(),
    }
    run = probed(model, batch, example=batch)
    assert run.attrs["stack"] == "language_model"
    double = copy.deepcopy(model).double()
    double.set_attn_implementation("eager")
    batch["pixel_values"] = batch["pixel_values"].double()
    with torch.no_grad():
        weights = double(**batch, output_attentions=True).attentions
    data = run.at("cross_attention").sel(step=0)
    assert list(data["layer"].values) == [1, 3]
    for layer in (1, 3):
        dense = weights[layer].numpy()
        np.testing.assert_allclose(data["key_mass"].sel(layer=layer), dense.mean((0, 2)), atol=1e-5)
        first = data["first_token_attention"].sel(layer=layer, stratum="all")
        np.testing.assert_allclose(first, dense[..., 0].mean((0, 2)), atol=1e-5)
