"""Every model of the table: how to build it and what to feed it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.models.configurations import (
    VOCABULARY,
    sharpen,
    tiny_configuration,
    tiny_model,
)
from benchmarks.models.handwritten import DiffusionModel, FlexModel, NanoModel, TimeFirstEncoder, quantise

__all__ = ["KINDS", "Case", "all_cases"]

BATCH, TOKENS, PADDED = 2, 12, 3
KINDS = (
    "decoder",
    "encoder",
    "encoder-decoder",
    "vision",
    "audio",
    "adapted",
    "quantised",
    "written by hand",
)


@dataclass(frozen=True)
class Case:
    """One row.

    Attributes:
        name: unique in the table.
        kind: one of ``KINDS``.
        build: makes the model; whether its weights are sharpened is the argument.
        inputs: makes the batch for a model.
        as_example: the probe is given the batch as ``example``; text alone needs none.
        model: the name of its class.
        package: what it needs besides, and osp_diag does not bring.
    """

    name: str
    kind: str
    build: Callable[[bool], nn.Module]
    inputs: Callable[[nn.Module], dict[str, Tensor]]
    as_example: bool = False
    model: str = ""
    package: str | None = None

    @property
    def is_buildable(self) -> bool:
        """Whether what it needs is installed."""
        return self.package is None or find_spec(self.package) is not None


def all_cases() -> dict[str, Case]:
    """By name: every architecture in transformers' tables of language models, then the others."""
    cases = [*_text(), *_vision(), *_audio(), *_others()]
    return {case.name: case for case in cases}


def _text() -> Iterator[Case]:
    from transformers.models.auto import modeling_auto

    tables = {
        "decoder": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "encoder": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "encoder-decoder": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    }
    done: set[str] = set()
    for kind, table in tables.items():
        architectures: dict[str, str] = {}
        for architecture, names in sorted(table.items(), key=lambda item: len(item[0])):
            architectures.setdefault(names if isinstance(names, str) else names[0], architecture)
        for name, architecture in sorted(architectures.items(), key=lambda item: item[1]):
            if name in done:
                continue
            done.add(name)
            pair = kind == "encoder-decoder"
            yield Case(
                architecture if kind == "decoder" else f"{architecture} ({kind})",
                kind,
                _builder(architecture, name),
                two_sequences if pair else tokens,
                as_example=pair,
                model=name,
            )


def _builder(architecture: str, name: str, **options: Any) -> Callable[[bool], nn.Module]:
    def build(sharp: bool) -> nn.Module:
        import transformers
        from transformers.models.auto.configuration_auto import CONFIG_MAPPING

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model_class = getattr(transformers, name)
            configuration = model_class.config_class or CONFIG_MAPPING[architecture]
        return tiny_model(model_class, tiny_configuration(configuration, **options), sharp=sharp)

    return build


def tokens(model: nn.Module) -> dict[str, Tensor]:
    """Two sequences, of which one is padded at its end."""
    ids = torch.randint(4, VOCABULARY, (BATCH, TOKENS), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, -PADDED:] = 0
    return {"input_ids": ids, "attention_mask": mask}


def two_sequences(model: nn.Module) -> dict[str, Tensor]:
    """For an encoder and, shorter, for its decoder; some models of that table are decoders alone."""
    batch = tokens(model)
    if not model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return batch
    batch["attention_mask"][:] = 1
    return batch | {"decoder_input_ids": batch["input_ids"].flip(0)[:, :9]}


def _plain_tokens(model: nn.Module) -> dict[str, Tensor]:
    return {"input_ids": tokens(model)["input_ids"]}


def _images(size: int = 12) -> Callable[[nn.Module], dict[str, Tensor]]:
    def inputs(model: nn.Module) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(1)
        batch = {"pixel_values": torch.randn(2, 3, size, size, generator=generator)}
        if "ViTMAE" in type(model).__name__:  # which leaves out random patches
            batch["noise"] = torch.rand(2, 9, generator=generator)
        return batch

    return inputs


def _vision() -> Iterator[Case]:
    plain = {
        "ViT": "ViTModel", "DeiT": "DeiTModel", "DINOv2": "Dinov2Model",
        "DINOv2 with registers": "Dinov2WithRegistersModel", "DINOv3": "DINOv3ViTModel",
        "CLIP vision": "CLIPVisionModel", "SigLIP vision": "SiglipVisionModel", "BEiT": "BeitModel",
        "Data2Vec vision": "Data2VecVisionModel", "ViT-MAE": "ViTMAEModel", "I-JEPA": "IJepaModel",
    }  # fmt: skip
    for title, name in plain.items():
        yield Case(title, "vision", _builder("", name), _images(), as_example=True, model=name)
    swin = _builder("swin", "SwinModel", depths=[2, 2], num_heads=[2, 4], embed_dim=16, window_size=2,
                    image_size=32, patch_size=4)  # fmt: skip
    yield Case("Swin", "vision", swin, _images(32), as_example=True, model="SwinModel")
    yield Case("CLIP text", "encoder", _builder("", "CLIPTextModel"), tokens, model="CLIPTextModel")
    yield Case("SigLIP text", "encoder", _builder("", "SiglipTextModel"), tokens, model="SiglipTextModel")


def _audio() -> Iterator[Case]:
    small: dict[str, Any] = {
        "conv_dim": (8, 8), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2,
        "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    }  # fmt: skip

    def waves(model: nn.Module) -> dict[str, Tensor]:
        return {"input_values": torch.randn(2, 160, generator=torch.Generator().manual_seed(1))}

    def mels(model: nn.Module) -> dict[str, Tensor]:
        features = torch.randn(2, 4, 40, generator=torch.Generator().manual_seed(1))
        return {"input_features": features}

    def speech(model: nn.Module) -> dict[str, Tensor]:
        return mels(model) | {"decoder_input_ids": tokens(model)["input_ids"]}

    for title, name in {"wav2vec 2": "Wav2Vec2Model", "HuBERT": "HubertModel", "WavLM": "WavLMModel"}.items():
        yield Case(title, "audio", _builder("", name, **small), waves, as_example=True, model=name)
    yield Case("Whisper", "audio", _builder("", "WhisperForConditionalGeneration", **_whisper()), speech,
               as_example=True, model="WhisperForConditionalGeneration")  # fmt: skip
    yield Case("Whisper's encoder", "audio", _whisper_encoder, mels, as_example=True, model="WhisperEncoder")


def _whisper() -> dict[str, Any]:
    return {"max_source_positions": 20, "num_mel_bins": 4, "encoder_layers": 3}


def _whisper_encoder(sharp: bool) -> nn.Module:
    return _builder("", "WhisperForConditionalGeneration", **_whisper())(sharp).get_encoder()  # type: ignore[operator]


def _others() -> Iterator[Case]:
    yield Case("LoRA (peft) on Llama", "adapted", _lora, tokens, model="PeftModelForCausalLM", package="peft")
    prompt = "Prompt tuning (peft) on Llama"
    yield Case(prompt, "adapted", _prompt_tuned, _unpadded, model="PeftModelForCausalLM", package="peft")
    yield Case("DiT-like, adaLN", "vision", _by_hand(DiffusionModel), _latents, as_example=True)
    yield Case("8-bit Linears in buffers, Llama", "quantised", _quantised, tokens, model="LlamaForCausalLM")
    for title, make in {
        "nanoGPT-like": NanoModel,
        "nanoGPT-like, softmax written out": lambda: NanoModel(fused=False),
        "flex_attention called directly": FlexModel,
        "nn.TransformerEncoder, time first": TimeFirstEncoder,
    }.items():
        yield Case(title, "written by hand", _by_hand(make), _plain_tokens)


def _by_hand(make: Callable[[], nn.Module]) -> Callable[[bool], nn.Module]:
    def build(sharp: bool) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = make()
        if sharp:
            sharpen(model)
        return model.eval()

    return build


def _unpadded(model: nn.Module) -> dict[str, Tensor]:
    # Padding is told by a mask as long as the batch, and the states are longer by the tuned prompt.
    return {"input_ids": tokens(model)["input_ids"]}


def _latents(model: nn.Module) -> dict[str, Tensor]:
    latents = torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    return {"latents": latents, "time": torch.tensor([3, 7])}


def _prompt_tuned(sharp: bool) -> nn.Module:
    import peft

    with torch.random.fork_rng():
        torch.manual_seed(0)
        settings = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=5)
        return peft.get_peft_model(_builder("llama", "LlamaForCausalLM")(sharp), settings).eval()


def _quantised(sharp: bool) -> nn.Module:
    return quantise(_builder("llama", "LlamaForCausalLM")(sharp))


def _lora(sharp: bool) -> nn.Module:
    import peft

    model = _builder("llama", "LlamaForCausalLM")(sharp)
    settings = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(model, settings)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(2))
    return adapted.eval()
