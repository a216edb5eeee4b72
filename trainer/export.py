"""A trained model as a stock Hugging Face checkpoint, which needs no code of ours."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from osp_diag.errors import TrainingError, UsageError
from osp_diag.quiet import quietly
from osp_diag.trainer.config import ModelConfig
from osp_diag.trainer.folding import (
    check_exactness,
    check_state,
    folded_weights,
    folding_sentences,
    stock_architecture,
)
from osp_diag.trainer.folding import is_tied as is_exported_tied
from osp_diag.trainer.model import Llama
from osp_diag.trainer.model_card import model_card

__all__ = ["ExportReport", "export"]

TOLERANCE = 1e-4
"""How far a logit may be from the training model's, both in float32."""

_CHECKED_SEQUENCES, _CHECKED_TOKENS = 2, 64


@dataclass(frozen=True)
class ExportReport:
    """What was written.

    Attributes
    ----------
    directory : where
    architecture : the stock class that loads it
    parameters : number of weights, a tied head once
    dtype : of the weights
    folded : what was done to the weights, one sentence each
    largest_difference : of any logit of the folded float32 weights from the training model's; None where it
        was not checked
    """

    directory: str
    architecture: str
    parameters: int
    dtype: str
    folded: tuple[str, ...]
    largest_difference: float | None

    def as_dictionary(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self) | {"folded": list(self.folded)}

    def __str__(self) -> str:
        checked = "its logits were not compared with the training model's"
        if self.largest_difference is not None:
            checked = f"its logits differ from the training model's by {self.largest_difference:.1e} at most"
            checked += "" if self.dtype == "float32" else f" before its weights were rounded to {self.dtype}"
        size = f"{self.parameters / 1e6:.1f}M parameters in {self.dtype}"
        head = f"{self.directory}: {self.architecture}, {size}; {checked}"
        return "\n".join([head, *(f"  {sentence}" for sentence in self.folded)])


def export(
    state: Mapping[str, Tensor],
    config: ModelConfig,
    out: Path,
    *,
    tokenizer: Any = None,
    card: Mapping[str, Any] | None = None,
    dtype: str = "float32",
    check: bool = True,
) -> ExportReport:
    """Write a stock Hugging Face directory: weights, configurations, tokenizer, model card.

    Parameters
    ----------
    state : ``state_dict()`` of a :class:`osp_diag.trainer.model.Llama`
    config : of that model
    out : the directory to make; nothing is there until everything is written and checked
    tokenizer : a Hugging Face tokenizer to write beside the weights, or None
    card : what the model card tells: see :func:`osp_diag.trainer.model_card.model_card`
    dtype : of the weights, "float32" or "bfloat16"
    check : load the directory with plain transformers and compare it, see :class:`ExportReport`

    Raises
    ------
    TrainingError : the model has no exact stock form, the weights are another model's, or logits differ
    UsageError : ``out`` holds something already, or ``dtype`` is another
    """
    check_exactness(config)
    if dtype not in ("float32", "bfloat16"):
        raise UsageError(f"dtype={dtype!r}: weights are exported as float32 or bfloat16")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UsageError(f"{out} is not empty; give another directory, or remove it first")
    check_state(state, config)
    with quietly(), _all_or_nothing(out) as directory:
        stock = _stock_model(state, config, tokenizer)
        trained_logits = _logits(_trained_model(state, config), config) if check else None
        difference = None
        if trained_logits is not None:
            difference = _compared(_logits(stock, config), trained_logits, "as folded")
        _round(stock, getattr(torch, dtype))
        # Rounded weights are another model, which is what must come back from the directory.
        expected = _logits(stock, config) if check and dtype != "float32" else trained_logits
        stock.to(getattr(torch, dtype))
        stock.save_pretrained(directory, max_shard_size="5GB")
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        report = ExportReport(
            directory=str(out),
            architecture=stock_architecture(config),
            parameters=sum(parameter.numel() for parameter in stock.parameters()),
            dtype=dtype,
            folded=tuple(folding_sentences(config)),
            largest_difference=difference,
        )
        text = model_card(out.name, config, card or {}, report.folded)
        readme = directory / "README.md"
        readme.write_text(text, encoding="utf-8")
        for file in directory.iterdir():  # safetensors are born readable by their owner alone
            file.chmod(readme.stat().st_mode)
        if expected is not None:
            _compared(_reloaded_logits(directory, config), expected, "as loaded from its directory")
    return report


@contextmanager
def _all_or_nothing(out: Path) -> Iterator[Path]:
    """A directory beside ``out`` that takes its place if all went well, and vanishes if not."""
    out = out.absolute()
    out.parent.mkdir(parents=True, exist_ok=True)
    directory = out.with_name(f".{out.name}.{os.getpid()}.partial")
    directory.mkdir()
    try:
        yield directory
        directory.replace(out)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def _stock_model(state: Mapping[str, Tensor], config: ModelConfig, tokenizer: Any) -> Any:
    """The stock model in float32."""
    import transformers

    architecture = stock_architecture(config)
    options: dict[str, Any] = {}
    kind: Any = transformers.LlamaConfig
    if architecture == "Qwen3ForCausalLM":
        kind, options = transformers.Qwen3Config, {"use_sliding_window": False}
    else:
        options = {"mlp_bias": False}
    stock_config = kind(
        vocab_size=config.vocabulary_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.feed_forward_size,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.number_of_key_value_heads,
        head_dim=config.head_size,
        hidden_act="silu",
        attention_bias=False,
        max_position_embeddings=config.max_length,
        initializer_range=config.initializer_range,
        rms_norm_eps=config.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=is_exported_tied(config),
        bos_token_id=getattr(tokenizer, "bos_token_id", None),
        eos_token_id=getattr(tokenizer, "eos_token_id", None),
        pad_token_id=getattr(tokenizer, "pad_token_id", None),
        **options,
    )
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, architecture)(stock_config).float().eval()
    weights = dict(model.named_parameters())
    folded = set()
    with torch.no_grad():
        for name, value in folded_weights(state, config):
            weights[name].copy_(value)
            folded.add(name)
    assert folded == set(weights), "every weight of the stock model comes from the trained one"
    return model


@torch.no_grad()
def _round(model: nn.Module, dtype: torch.dtype) -> None:
    """Weights as numbers of ``dtype`` that are kept in float32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.to(dtype))


def _trained_model(state: Mapping[str, Tensor], config: ModelConfig) -> nn.Module:
    """The training model in float32, without drawing weights first."""
    with torch.device("meta"):
        model = Llama(config)
    weights = {name: value.detach().cpu().float() for name, value in state.items()}
    model.load_state_dict(weights, assign=True)
    return model.eval()


@torch.no_grad()
def _logits(model: nn.Module, config: ModelConfig) -> Float[Tensor, "sequence position vocabulary"]:
    """Of random tokens, the same at every call."""
    shape = (_CHECKED_SEQUENCES, min(_CHECKED_TOKENS, config.max_length))
    ids = torch.randint(config.vocabulary_size, shape, generator=torch.Generator().manual_seed(0))
    return model(ids).logits


def _reloaded_logits(directory: Path, config: ModelConfig) -> Float[Tensor, "sequence position vocabulary"]:
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return _logits(model.eval(), config)


def _compared(logits: Tensor, expected: Tensor, how: str) -> float:
    """The largest difference of any logit."""
    difference = float((logits - expected).abs().max())
    if not difference <= TOLERANCE:
        raise TrainingError(
            f"the logits of the exported model {how} differ from the training model's by {difference:.3g}, "
            f"more than {TOLERANCE:g}; nothing was written. NaN, Inf or logits in the thousands do this, "
            "which the run's last probes show; without the check it is written all the same"
        )
    return difference
