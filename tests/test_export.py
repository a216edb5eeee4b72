"""Exported checkpoints: plain transformers computes what the training model did, or nothing is written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from osp_diag import Probe, open_checkpoint
from osp_diag.errors import TrainingError, UsageError
from osp_diag.trainer import export as export_module
from osp_diag.trainer.config import ModelConfig
from osp_diag.trainer.export import ExportReport, export
from tests.llama_reference import Reference, stirred, tiny
from tests.tiny_checkpoints import byte_tokenizer

CARD = {
    "recipe": "osp",
    "steps": 400,
    "tokens": 819_200,
    "training_data": "a corpus",
    "config": {"optimizer.lr": 0.002},
    "statistics": {"loss": 3.14159265, "excess kurtosis": 0.04},
}


def exported(config: ModelConfig, out: Path, **options: Any) -> tuple[Any, ExportReport]:
    model = stirred(config)
    return model, export(model.state_dict(), config, out, card=CARD, **options)


def logits(model: Any, ids: Tensor) -> np.ndarray:
    with torch.no_grad():
        return model(ids).logits.numpy()


def tokens() -> Tensor:
    return torch.randint(97, (2, 30), generator=torch.Generator().manual_seed(8))


CASES = {
    "OSP": {},
    "OSP with grouped keys and odd norm scale": {
        "norm_scale": 1.7,
        "key_value_heads": 2,
        "rope_theta": 321.0,
    },
    "tied with projections": {"tie_embeddings": True},
    "tied": {"tie_embeddings": True, "embedding_projection": False, "norm": "rmsnorm"},
    "plain Llama": {"norm": "rmsnorm", "embedding_projection": False},
    "no gains": {"norm": "srmsnorm", "norm_scale": 0.6},
    "normed queries, per channel": {"norm": "rmsnorm", "query_key_norm": True},
    "normed queries, scalar": {"query_key_norm": True, "norm_scale": 1.4},
    "normed queries, no gains": {"norm": "srmsnorm", "query_key_norm": True, "norm_scale": 0.6},
}


@pytest.mark.parametrize("changes", CASES.values(), ids=CASES.keys())
def test_logits_are_the_training_models(changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(**changes, norm_epsilon=3e-4)
    model, report = exported(config, tmp_path / "model")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    ids = tokens()
    np.testing.assert_allclose(logits(stock, ids), logits(model, ids), rtol=0, atol=2e-5)
    np.testing.assert_allclose(logits(stock, ids), Reference(model, ids).logits, rtol=0, atol=3e-5)
    assert type(stock).__name__ == report.architecture
    assert report.architecture == ("Qwen3" if config.query_key_norm else "Llama") + "ForCausalLM"
    assert report.parameters == sum(p.numel() for p in stock.parameters())
    assert report.largest_difference is not None
    assert report.largest_difference < 5e-5
    assert stock.config.tie_word_embeddings == (changes.get("tie_embeddings", False) and "norm" in changes)
    assert {path.name for path in tmp_path.iterdir()} == {"model"}


def test_folding_is_done_in_float64(tmp_path: Path) -> None:
    model, _ = exported(tiny(), tmp_path / "model")
    stock = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    state = {name: value.double().numpy() for name, value in model.state_dict().items()}
    embedding = state["model.embed_tokens.weight"] @ state["model.embedding_projection.weight"].T
    head = state["lm_head.weight"] @ state["unembedding_projection.weight"]
    assert np.array_equal(stock["model.embed_tokens.weight"], embedding.astype(np.float32))
    assert np.array_equal(stock["lm_head.weight"], head.astype(np.float32))
    assert stock["model.norm.weight"].unique().tolist() == state["model.norm.weight"].tolist()


def test_what_was_done_is_said(tmp_path: Path) -> None:
    _, report = exported(tiny(tie_embeddings=True, query_key_norm=True), tmp_path / "model")
    text = str(report)
    assert "Qwen3ForCausalLM, 0.0M parameters in float32; its logits differ" in text
    for part in ("in float64", "became two", "scalar gain", "the architecture is Qwen3"):
        assert part in text
        assert part in (tmp_path / "model" / "README.md").read_text()
    assert json.loads(json.dumps(report.as_dictionary()))["folded"] == list(report.folded)
    _, plain = exported(tiny(norm="rmsnorm", embedding_projection=False), tmp_path / "plain", check=False)
    assert plain.folded == ()
    assert "were not compared" in str(plain)


def test_the_card_tells_recipe_and_statistics(tmp_path: Path) -> None:
    exported(tiny(), tmp_path / "model")
    card = (tmp_path / "model" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    for part in (
        "# model\n",
        "- tokens: 819,200\n",
        "| loss | 3.1416 |",
        '"optimizer.lr": 0.002',
        "- norm: ssnorm",
    ):
        assert part in card


def test_the_tokenizer_comes_along(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    exported(tiny(vocabulary_size=len(tokenizer)), tmp_path / "model", tokenizer=tokenizer)
    read = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    assert read("The whale, and a sea.")["input_ids"] == tokenizer("The whale, and a sea.")["input_ids"]
    settings = json.loads((tmp_path / "model" / "generation_config.json").read_text())
    assert settings["bos_token_id"] == tokenizer.bos_token_id
    assert (tmp_path / "model" / "model.safetensors").exists()


def test_bfloat16_weights_are_the_folded_ones_rounded(tmp_path: Path) -> None:
    _, report = exported(tiny(), tmp_path / "low", dtype="bfloat16")
    exported(tiny(), tmp_path / "full")
    low, full = (
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("low", "full")
    )
    assert low.dtype == torch.bfloat16
    for name, value in full.state_dict().items():
        assert torch.equal(low.state_dict()[name], value.bfloat16()), name
    assert "before its weights were rounded to bfloat16" in str(report)


@pytest.mark.parametrize("changes", [{}, {"tie_embeddings": True, "query_key_norm": True, "norm": "rmsnorm"}])
def test_the_export_probes_like_the_training_model(changes: dict[str, Any], tmp_path: Path) -> None:
    config = tiny(**changes)
    model, _ = exported(config, tmp_path / "model")
    runs = []
    for probed in (model, open_checkpoint(tmp_path / "model").model):
        probe = Probe(probed, sites=["embedding", "residual_*", "mlp_hidden", "attention"])
        with torch.no_grad(), probe.step(0):
            probed(tokens())
        runs.append(probe.run)
    for site, names in {
        "embedding": ["osp_excess_kurtosis", "absolute_maximum"],
        "residual_mid": ["fisher_kurtosis", "channel_rms"],
        "residual_post": ["osp_excess_kurtosis", "fisher_kurtosis", "max_median_ratio", "absolute_maximum"],
        "mlp_hidden": ["absolute_maximum"],
        "attention": ["first_token_attention", "max_logit"],
    }.items():
        for name in names:
            found, expected = (run.tree[site][name].values for run in reversed(runs))
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5, err_msg=f"{site} {name}")


# -- refusals ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("softmax_off_by_one", r"adds 1 to the softmax's denominator \(gpt-oss"),
        ("learned_sink", "gpt-oss alone has sink logits"),
        ("gated", "Qwen3-Next alone gates"),
    ],
)
def test_kinds_without_a_stock_form_are_refused_before_writing(
    kind: Any, reason: str, tmp_path: Path
) -> None:
    with pytest.raises(TrainingError, match=rf"model.attention={kind} cannot be exported: .*{reason}"):
        exported(tiny(attention=kind), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_is_there_stays(tmp_path: Path) -> None:
    out = tmp_path / "model"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match="model is not empty; give another directory"):
        exported(tiny(), out)
    with pytest.raises(UsageError, match=r"notes.txt is not empty"):
        exported(tiny(), out / "notes.txt")
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    (out / "notes.txt").unlink()
    exported(tiny(), out)
    assert (out / "config.json").exists()


def test_a_difference_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny()
    state = stirred(config).state_dict()
    state["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    with pytest.raises(
        TrainingError, match=r"as folded differ from the training model's by nan, more than 0.0001"
    ):
        export(state, config, tmp_path / "model")
    monkeypatch.setattr(export_module, "_reloaded_logits", lambda *_: torch.zeros(2, 64, 97))
    with pytest.raises(TrainingError, match="as loaded from its directory differ"):
        exported(config, tmp_path / "model")
    assert not list(tmp_path.iterdir())
    export(state, config, tmp_path / "model", check=False)
    assert (tmp_path / "model").exists()


def test_foreign_weights_are_named(tmp_path: Path) -> None:
    state = stirred(tiny(norm="rmsnorm")).state_dict()
    with pytest.raises(TrainingError, match=r"input_layernorm.weight is \(32,\) and not \(1,\)"):
        export(state, tiny(), tmp_path / "model")
    with pytest.raises(TrainingError, match=r"model.embedding_projection.weight belongs to no such model"):
        export(state, tiny(norm="rmsnorm", embedding_projection=False), tmp_path / "model")
    del state["lm_head.weight"]
    with pytest.raises(TrainingError, match=r"lm_head.weight is missing; give the configuration"):
        export(state, tiny(norm="rmsnorm"), tmp_path / "model")
    with pytest.raises(UsageError, match=r"dtype='int4': weights are exported as float32 or bfloat16"):
        export(state, tiny(), tmp_path / "model", dtype="int4")
    assert not list(tmp_path.iterdir())


def test_the_random_state_is_left_alone(tmp_path: Path) -> None:
    model = stirred(tiny())
    before = torch.get_rng_state()
    export(model.state_dict(), tiny(), tmp_path / "model")
    assert torch.equal(torch.get_rng_state(), before)
