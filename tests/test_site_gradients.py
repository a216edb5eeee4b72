"""Gradients at the sites: against autograd in float64, without a trace in the model, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import osp_diag
from osp_diag.errors import CaptureError, UsageError
from osp_diag.runs.run import Run
from osp_diag.schema import GRADIENT
from osp_diag.trainer.config import ProbeConfig
from osp_diag.trainer.config_values import with_changes
from osp_diag.trainer.loop import train
from osp_diag.trainer.presets import tiny
from osp_diag.trainer.recording import Recording

SITES = [
    "embedding",
    "attention_input",
    "attention_output",
    "attention_contribution",
    "residual_mid",
    "mlp_input",
    "mlp_hidden",
    "mlp_contribution",
    "residual_post",
    "final_norm",
]
LAYERS = 3


def llama(dtype: torch.dtype = torch.float32) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
    )
    return LlamaForCausalLM(config).to(dtype)


def batch() -> dict[str, Tensor]:
    ids = torch.randint(3, 90, (4, 11), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 8:], mask[2, 5:] = 0, 0
    labels = torch.where(mask > 0, ids, -100)
    labels[3, :4] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def run_of(model: nn.Module, parts: list[dict[str, Tensor]], **options: Any) -> Run:
    probe = osp_diag.Probe(model, gradients=True, **options)
    with probe.step(0):
        for part in parts:
            model(**part).loss.backward()
    return probe.run


def numbers(run: Run) -> dict[str, np.ndarray]:
    """Every statistic of gradients by site and name."""
    sites = [site for site in run.sites if site.startswith(GRADIENT)]
    return {f"{site} {name}": run.at(site)[name].values for site in sites for name in run.at(site).data_vars}


def gradients_in_float64(inputs: dict[str, Tensor]) -> dict[str, list[Tensor]]:
    """Site → of each layer ∂L/∂x, by torch.autograd.grad of the tensors that Llama's modules hand on."""
    model = llama(torch.float64)
    tensors: dict[str, list[Tensor]] = {site: [] for site in SITES}

    def output_of(module: nn.Module, *sites: str) -> None:
        module.register_forward_hook(lambda m, i, o: [tensors[s].append(o) for s in sites] and None)

    def input_of(module: nn.Module, site: str) -> None:
        module.register_forward_pre_hook(lambda m, i: tensors[site].append(i[0]))

    output_of(model.model.embed_tokens, "embedding")
    for layer in model.model.layers:
        output_of(layer.input_layernorm, "attention_input")
        input_of(layer.self_attn.o_proj, "attention_output")
        output_of(layer.self_attn.o_proj, "attention_contribution")
        input_of(layer.post_attention_layernorm, "residual_mid")
        output_of(layer.post_attention_layernorm, "mlp_input")
        input_of(layer.mlp.down_proj, "mlp_hidden")
        output_of(layer.mlp, "mlp_contribution")
        output_of(layer, "residual_post")
    output_of(model.model.norm, "final_norm")
    loss = model(**inputs).loss
    flat = [tensor for site in SITES for tensor in tensors[site]]
    found = iter(torch.autograd.grad(loss, flat))
    return {site: [next(found) for _ in tensors[site]] for site in SITES}


def test_against_autograd_in_float64() -> None:
    inputs = batch()
    run, present = run_of(llama(), [inputs]), inputs["attention_mask"] > 0
    reference = gradients_in_float64(inputs)
    assert [f"{GRADIENT}{site}" for site in SITES] == [
        s for s in run.attrs["sites"] if s.startswith(GRADIENT)
    ]
    for site, of_layers in reference.items():
        at = run.at(f"{GRADIENT}{site}").sel(step=0)
        assert at.sizes["layer"] == len(of_layers)
        for number, gradient in enumerate(of_layers):
            rows = gradient[present].numpy()
            reached = rows[np.abs(rows).max(-1) > 0]
            assert len(reached) < len(rows), "the last token of a sequence has no label"
            here = {name: at[name].isel(layer=number).sel(stratum="all").item() for name in at.data_vars}
            assert here["gradient_rms"] == pytest.approx(np.sqrt((reached**2).mean()), rel=1e-5), site
            kurtosis = stats.kurtosis(reached, axis=-1).mean()
            assert here["gradient_excess_kurtosis"] == pytest.approx(kurtosis, rel=1e-4, abs=1e-4), site
            assert here["gradient_absolute_maximum"] == pytest.approx(np.abs(rows).max(), rel=1e-5), site
            assert here["gradient_zero_share"] == pytest.approx(1 - len(reached) / len(rows)), site
            first = gradient[:, 0].numpy()
            rms = np.sqrt((first[np.abs(first).max(-1) > 0] ** 2).mean())
            assert at["gradient_rms"].isel(layer=number).sel(stratum="first") == pytest.approx(rms, rel=1e-5)


@pytest.mark.parametrize("checkpointed", [False, True], ids=["", "checkpointed"])
def test_outputs_and_parameter_gradients_are_the_models_to_the_bit(checkpointed: bool) -> None:
    plain, probed = llama().train(), llama().train()
    if checkpointed:
        for model in (plain, probed):
            model.gradient_checkpointing_enable({"use_reentrant": False})
    inputs = batch()
    loss = plain(**inputs).loss
    loss.backward()
    probe = osp_diag.Probe(probed, gradients=True)
    with probe.step(0):
        again = probed(**inputs).loss
        again.backward()
    assert torch.equal(loss, again)
    for (name, first), second in zip(plain.named_parameters(), probed.parameters(), strict=True):
        torch.testing.assert_close(first.grad, second.grad, rtol=0, atol=0, msg=name)
    # What checkpointing computes twice counts once.
    assert_equal(numbers(probe.run), numbers(run_of(llama(), [inputs])))


def assert_equal(first: dict[str, np.ndarray], second: dict[str, np.ndarray], rtol: float = 1e-6) -> None:
    assert set(first) == set(second)
    for name, values in first.items():
        np.testing.assert_allclose(values, second[name], rtol=rtol, atol=1e-9, err_msg=name)


def test_micro_batches_are_their_shares_of_the_loss() -> None:
    inputs = batch()
    halves = [{name: value[rows] for name, value in inputs.items()} for rows in (slice(0, 2), slice(2, 4))]
    model = llama()
    labels = [int((half["labels"][:, 1:] != -100).sum()) for half in halves]
    probe = osp_diag.Probe(model, gradients=True, loss_scale=8.0)
    with probe.step(0):
        for half, count in zip(halves, labels, strict=True):
            (8.0 * model(**half).loss * count / sum(labels)).backward()
    assert_equal(numbers(probe.run), numbers(run_of(llama(), [inputs])), rtol=2e-5)


def test_what_comes_after_the_step_is_not_counted_and_a_step_without_gradients_is_refused() -> None:
    model, inputs = llama(), batch()
    probe = osp_diag.Probe(model, gradients=True, sites=["residual_post"])
    with probe.step(0):
        model(**inputs).loss.backward()
        late = model(**inputs).loss
    alone = numbers(probe.run)
    late.backward()
    assert_equal(numbers(probe.run), alone)
    with pytest.raises(CaptureError, match=r"step 1: .* none came: no backward pass"), probe.step(1):
        model(**inputs)
    reason = r"none came: the forward pass reached it without gradients"
    with pytest.raises(CaptureError, match=reason), probe.step(2), torch.no_grad():
        model(**inputs)


def test_reentrant_checkpointing_and_frozen_layers_are_told_by_their_reason() -> None:
    model = llama().train()
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model.enable_input_require_grads()
    run = run_of(model, [batch()], sites=["residual_*", "final_norm"])
    # What enters a block, or is behind all of them, is no tensor of the passes without gradients.
    whole = numbers(run_of(llama(), [batch()], sites=["residual_pre", "final_norm"]))
    assert_equal(numbers(run), whole)
    reason = run.absent_sites[f"{GRADIENT}residual_post"]
    assert "reentrant activation checkpointing" in reason
    assert reason.endswith("(layers 0–2)")

    model = llama()
    for parameter in (*model.model.embed_tokens.parameters(), *model.model.layers[0].parameters()):
        parameter.requires_grad_(False)
    run = run_of(model, [batch()], sites=["embedding", "residual_post"])
    assert run.at(f"{GRADIENT}residual_post")["layer"].values.tolist() == [1, 2]
    assert "nothing that is trained comes before it (layers 0)" in run.absent_sites[f"{GRADIENT}embedding"]


def test_held_out_tokens_have_no_gradients() -> None:
    with pytest.raises(UsageError, match="held-out batches are run without gradients"):
        osp_diag.Probe(llama(), gradients=True).measure(0, [batch()])
    with pytest.raises(UsageError, match="held-out batches are run without gradients"):
        Recording(gradients=True)
    with pytest.raises(UsageError, match=r"probe.gradients=true with probe.on=held_out"):
        ProbeConfig(gradients=True)
    with pytest.raises(UsageError, match="loss_scale=0"):
        osp_diag.Probe(llama(), gradients=True, loss_scale=0.0)


def test_the_trainers_micro_batches_and_checkpointing_change_nothing(tmp_path: Any) -> None:
    changes = {
        "steps": 2,
        "probe.on": "training",
        "probe.gradients": True,
        "probe.dense_every": 1,
        "probe.sites": ("residual_post",),
        "batch_size": 4,
        "data.sequence_length": 32,
        "dtype": "float32",
    }
    runs = [
        train(with_changes(tiny(), changes | how), tmp_path / f"{number}.zarr")
        for number, how in enumerate(({}, {"micro_batch_size": 1, "activation_checkpointing": True}))
    ]
    assert runs[0].attrs["gradient_of"].startswith("the mean loss over all labels of the step")
    first, second = (
        run.at(f"{GRADIENT}residual_post")["gradient_rms"].sel(step=1, stratum="all").values for run in runs
    )
    assert (first > 0).all()
    np.testing.assert_allclose(first, second, rtol=1e-4)
