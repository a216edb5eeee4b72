"""Runs of models that give NaN: every figure is drawn or refused with its reason, and the page comes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

import osp_diag
from osp_diag import figures
from osp_diag.errors import OspDiagError
from osp_diag.figures.report import write_report

ELSEWHERE = {
    "ablation_table",
    "bit_sensitivity",
    "bit_width_sweep",
    "block_lens",
    "first_jumps",
    "kurtosis_dynamics",
    "quantization_error",
    "quantization_scatter",
    "remedy_curve",
    "replay_agreement",
    "task_scatter",
    "weight_surface",
}
"""Figures of what these runs do not hold."""
OF_THE_HEADLINE = {"diagnosis_timeline"}
"""Figures of the mean over hidden states, which is no number where one of them is none."""


@pytest.fixture(scope="module")
def model() -> transformers.LlamaForCausalLM:
    torch.manual_seed(3)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2
    )
    return transformers.LlamaForCausalLM(config).eval()


def probed(model: torch.nn.Module, broken: torch.nn.Parameter) -> osp_diag.Run:
    """The run of a model of which one parameter is NaN."""
    before = broken.data.clone()
    ids = torch.arange(48).reshape(2, 24)
    with osp_diag.Probe(model, compile=False, snapshot_tokens=8, token_groups=2) as probe:
        for step in (0, 1):
            broken.data.fill_(float("nan"))
            probe.measure(step, [{"input_ids": ids, "use_cache": False}] * 2)
            broken.data.copy_(before)
        return probe.run


@pytest.fixture(scope="module")
def all_nan(model: transformers.LlamaForCausalLM) -> osp_diag.Run:
    return probed(model, model.model.embed_tokens.weight)


@pytest.fixture(scope="module")
def half_nan(model: transformers.LlamaForCausalLM) -> osp_diag.Run:
    """Finite up to the MLP of the last block."""
    return probed(model, model.model.layers[1].mlp.down_proj.weight)


@pytest.mark.parametrize("name", sorted(set(figures.names()) - ELSEWHERE))
def test_a_figure_of_nothing_finite_says_so(all_nan: osp_diag.Run, name: str) -> None:
    with pytest.raises(OspDiagError, match=r"holds no finite number in the run of LlamaForCausalLM"):
        figures.draw(name, all_nan)


@pytest.mark.parametrize("name", sorted(set(figures.names()) - ELSEWHERE - OF_THE_HEADLINE))
def test_what_is_finite_is_drawn(half_nan: osp_diag.Run, name: str) -> None:
    assert figures.draw(name, half_nan, backend="plotly").data


def test_a_layer_of_nan_that_is_asked_for_is_refused(half_nan: osp_diag.Run) -> None:
    with pytest.raises(OspDiagError, match="layer 1 of the snapshot of 'residual_post' holds no finite"):
        figures.draw("activation_surface", half_nan, sites="residual_post", layer=1)


def test_the_summary_says_what_was_not_measured(all_nan: osp_diag.Run, half_nan: osp_diag.Run) -> None:
    text = " ".join(all_nan.summary().text().split())
    assert "NaN or Inf: 96 tokens are not finite. It begins at embedding, layer 0" in text
    assert "OSP kurtosis: not measured, because 3 of 3 hidden states have no finite token." in text
    assert "Massive activations" not in text
    assert "outlier features" not in text
    # The embedding and the first block are finite, but their mean would be another number.
    text = half_nan.summary().text()
    assert "OSP kurtosis: not measured, because 1 of 3 hidden states have no finite token." in text


def test_the_page_comes_with_its_verdict(all_nan: osp_diag.Run, tmp_path: Path) -> None:
    page = tmp_path / "nan.html"
    write_report([all_nan], page)
    text = page.read_text(encoding="utf-8")
    assert "NaN or Inf in 96 tokens, beginning at embedding, layer 0" in text
    assert "holds no finite number" in text
    assert not np.isfinite(all_nan.at("residual_post")["channel_rms"].values).any()
