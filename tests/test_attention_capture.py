"""Attention calls taken from running models: right, undisturbed, and without a trace."""

from __future__ import annotations

import copy
import functools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from osp_diag.errors import CaptureError
from osp_diag.seams.attention import AttentionCall, AttentionCapture, SkipReason
from osp_diag.seams.interface import ObservedName
from tests.attention_reference import dense_weights, no_trace, observed
from tests.families import FAMILIES, Family

ATTENTIVE = [family for family in FAMILIES.values() if family.has_attention]
EVERY_IMPLEMENTATION = [
    pytest.param(family, name, id=f"{family.name}-{name}")
    for family in ATTENTIVE
    for name in family.implementations
]
ONCE = [pytest.param(family, id=family.name) for family in FAMILIES.values()]


@functools.cache
def _built(name: str, implementation: str | None) -> nn.Module:
    return FAMILIES[name].build(implementation)


def built(name: str, implementation: str | None = None) -> nn.Module:
    """One model for all tests that leave it as it was."""
    return _built(name, implementation).eval()


# -- the calls are what the model computes -----------------------------------------------------------------


@pytest.mark.parametrize(("family", "implementation"), EVERY_IMPLEMENTATION)
def test_calls_give_the_models_own_weights(family: Family, implementation: str) -> None:
    model = built(family.name, implementation)
    for padded in (False, True):
        batch = family.inputs(padded=padded)
        with torch.no_grad():
            undisturbed = model(**batch)[0]
        with no_trace(model):
            output, calls, capture = observed(model, batch)
        assert torch.equal(output[0], undisturbed)
        assert len(calls) == family.calls
        assert not capture.skipped
        if implementation == family.implementations[0]:
            assert {call.seam for call in calls} == {family.seam}
        if implementation == "sdpa" and family.output_projection is not None:
            compare_mixed_values(calls, inputs_of(model, family.output_projection, batch))
            continue
        with torch.no_grad():
            expected = built(family.name, "eager")(**batch, output_attentions=True).attentions
        for call, weights in zip(calls, expected, strict=True):
            torch.testing.assert_close(dense_weights(call).float(), weights.float(), atol=1e-5, rtol=0)
        if implementation == "eager":
            again, _, _ = observed(model, {**batch, "output_attentions": True})
            assert all(torch.equal(a, b) for a, b in zip(again.attentions, expected, strict=True))


@pytest.mark.parametrize("family", [p for p in ONCE if not p.values[0].has_attention])
def test_models_without_attention_give_no_calls(family: Family) -> None:
    model = built(family.name)
    with no_trace(model):
        _, calls, capture = observed(model, family.inputs())
    assert (calls, capture.skipped, capture.forwards) == ([], {}, 1)


def compare_mixed_values(calls: list[AttentionCall], expected: list[Tensor]) -> None:
    for call, mixed in zip(calls, expected, strict=True):
        assert call.value is not None
        value = call.value.double().repeat_interleave(call.tensor.shape[1] // call.value.shape[1], dim=1)
        own = (dense_weights(call) @ value).transpose(1, 2).flatten(2).float()
        torch.testing.assert_close(own, mixed, atol=1e-5, rtol=1e-5)


def inputs_of(model: nn.Module, name: str, batch: dict[str, Any]) -> list[Tensor]:
    """What the modules of that name received in one forward."""
    seen: list[Tensor] = []
    modules = [module for path, module in model.named_modules() if path.split(".")[-1] == name]
    hooks = [m.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach())) for m in modules]
    with torch.no_grad():
        model(**batch)
    for hook in hooks:
        hook.remove()
    return seen


def test_special_quantities_arrive() -> None:
    def first(name: str, implementation: str | None = None) -> AttentionCall:
        family = FAMILIES[name]
        return observed(built(name, implementation), family.inputs(padded=True))[1][0]

    assert first("llama").key.shape[1] == 2  # type: ignore[union-attr]
    assert first("gpt_bigcode").key.shape[1] == 1  # type: ignore[union-attr]
    assert first("gemma2", "eager").softcap == 2.0
    assert first("gemma2", "eager").scale == pytest.approx(7**-0.5)
    assert first("granite").scale == 0.2
    sinks = first("gpt_oss").sink_logits
    assert sinks is not None
    assert torch.equal(sinks, built("gpt_oss").model.layers[0].self_attn.sinks)
    assert first("deepseek_v3").value.shape[-1] == 8  # type: ignore[union-attr]
    assert first("deepseek_v3").query.shape[-1] == 10  # type: ignore[union-attr]
    assert type(first("llama").module).__name__ == "LlamaAttention"
    assert not first("llama").query.requires_grad  # type: ignore[union-attr]


def test_an_unpadded_causal_call_carries_no_mask_tensor() -> None:
    _, calls, _ = observed(
        FAMILIES["llama"].build("sdpa"), {"input_ids": FAMILIES["llama"].inputs()["input_ids"]}
    )
    assert all(call.causal and call.mask is None and call.mask_function is None for call in calls)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "bloom", "falcon"])
def test_left_padding(name: str) -> None:
    family = FAMILIES[name]
    batch = family.inputs()
    batch["attention_mask"][1, :3] = 0
    with torch.no_grad():
        expected = family.build("eager")(**batch, output_attentions=True).attentions
    _, calls, _ = observed(family.build(), batch)
    for call, weights in zip(calls, expected, strict=True):
        real = dense_weights(call).float()
        torch.testing.assert_close(real[0], weights[0], atol=1e-5, rtol=0)
        torch.testing.assert_close(real[1, :, 3:], weights[1, :, 3:], atol=1e-5, rtol=0)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.filterwarnings("ignore:_compile flag on create_block_mask")
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2"])
def test_flex_attention_hands_over_a_mask_function(name: str) -> None:
    family = FAMILIES[name]
    model, batch = family.build("flex_attention"), family.inputs(padded=True)
    with torch.no_grad():
        expected = family.build("eager")(**batch, output_attentions=True).attentions
    with torch.compiler.set_stance("force_eager"), no_trace(model), torch.no_grad():
        undisturbed = model(**batch).logits
        output, calls, _ = observed(model, batch)
    assert torch.equal(output.logits, undisturbed)
    for call, weights in zip(calls, expected, strict=True):
        assert call.mask_function is not None
        # FlexAttention gives no row to queries that are padding themselves; the others must agree.
        torch.testing.assert_close(dense_weights(call).float(), weights, atol=1e-5, rtol=0)


# -- the model is undisturbed ------------------------------------------------------------------------------


def train_step(model: nn.Module, batch: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Output and gradients of one step with dropout, from a fixed random state."""
    torch.manual_seed(3)
    model.zero_grad()
    output = model(**batch)[0]
    output.float().square().mean().backward()
    return output.detach(), [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("family", ONCE)
def test_training_steps_are_bit_identical(family: Family) -> None:
    model, batch = built(family.name).train(), family.inputs(padded=True)
    expected, gradients = train_step(model, batch)
    random = torch.get_rng_state()
    calls: list[AttentionCall] = []
    with AttentionCapture(model, calls.append):
        output, captured = train_step(model, batch)
    assert torch.equal(output, expected)
    assert all(torch.equal(a, b) for a, b in zip(captured, gradients, strict=True))
    assert torch.equal(torch.get_rng_state(), random)
    assert len(calls) == family.calls


@pytest.mark.parametrize("family", ONCE)
def test_autocast_is_bit_identical_and_off_in_the_callback(family: Family) -> None:
    model, batch = built(family.name), family.inputs(padded=True)
    states: list[tuple[bool, bool]] = []

    def on_call(call: AttentionCall) -> None:
        states.append((torch.is_autocast_enabled("cpu"), torch.is_grad_enabled()))

    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected = model(**batch)[0]
        with AttentionCapture(model, on_call):
            output = model(**batch)[0]
        assert torch.is_autocast_enabled("cpu")
    assert torch.equal(output, expected)
    assert output.requires_grad
    assert states == [(False, False)] * family.calls


@pytest.mark.filterwarnings("ignore:.*use_reentrant")
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("family", [p for p in ONCE if p.values[0].checkpointing])
def test_recomputation_is_not_counted_twice(family: Family, reentrant: bool) -> None:
    model, batch = built(family.name).train(), family.inputs()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    expected, gradients = train_step(model, batch)
    calls: list[AttentionCall] = []
    with AttentionCapture(model, calls.append):
        output, captured = train_step(model, batch)
    model.gradient_checkpointing_disable()
    assert len(calls) == family.calls
    assert torch.equal(output, expected)
    assert all(torch.equal(a, b) for a, b in zip(captured, gradients, strict=True))


# -- no trace ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("name", ["llama", "bloom", "falcon"])
def test_a_forward_that_raises_leaves_nothing(name: str, error: type[BaseException]) -> None:
    model, batch = FAMILIES[name].build(), FAMILIES[name].inputs()
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-2]

    def fail(*_: Any) -> None:
        raise error("planted")

    with no_trace(model):
        with AttentionCapture(model, lambda call: None) as capture:
            hook = last.register_forward_hook(fail)
            with pytest.raises(error, match="planted"):
                model(**batch)
            hook.remove()
            if error is RuntimeError:
                assert not _get_current_function_mode_stack()
                assert type(model.config._attn_implementation) is str
            calls: list[AttentionCall] = []
            capture._on_call = calls.append
            model(**batch)
            assert len(calls) == 2
        capture.detach()


def test_a_callback_that_raises_is_heard_and_leaves_nothing() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()

    def fail(call: AttentionCall) -> None:
        raise ValueError("planted")

    with no_trace(model), pytest.raises(ValueError, match="planted"), AttentionCapture(model, fail):
        model(**batch)


def test_inactive_forwards_are_not_touched() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    calls: list[AttentionCall] = []
    active = False
    seen: list[type] = []
    model.model.layers[0].register_forward_hook(
        lambda *_: seen.append(type(model.config._attn_implementation))  # type: ignore[func-returns-value]
    )
    with AttentionCapture(model, calls.append, lambda: active) as capture:
        model(**batch)
        assert (capture.forwards, len(calls)) == (0, 0)
        active = True
        model(**batch)
        assert (capture.forwards, len(calls)) == (1, 2)
    assert seen == [str, ObservedName]


def test_two_captures_on_one_model_both_see_every_call() -> None:
    model, batch = FAMILIES["gemma2"].build("eager"), FAMILIES["gemma2"].inputs()
    first: list[AttentionCall] = []
    second: list[AttentionCall] = []
    with torch.no_grad():
        expected = model(**batch).logits
        with no_trace(model), AttentionCapture(model, first.append), AttentionCapture(model, second.append):
            output = model(**batch).logits
            assert type(model.config._attn_implementation) is str
    assert torch.equal(output, expected)
    assert len(first) == len(second) == 2
    assert torch.equal(dense_weights(first[0]), dense_weights(second[0]))


def test_attaching_twice_is_refused() -> None:
    capture = AttentionCapture(FAMILIES["llama"].build(), lambda call: None).attach()
    with pytest.raises(CaptureError, match="attached already; detach"):
        capture.attach()
    capture.detach()
    capture.detach()


def test_an_observed_name_reads_as_the_original_and_copies_to_it() -> None:
    name = ObservedName("sdpa")
    assert name == "sdpa"
    assert name in ("eager", "sdpa")
    assert "flash" not in name
    table = {"sdpa": 1, name: 2}
    assert (table["sdpa"], table[name]) == (1, 2)
    assert type(copy.deepcopy(name)) is str
    assert json.dumps({"a": name}) == '{"a": "sdpa"}'


# -- what is not self-attention over the tokens at hand ----------------------------------------------------


def test_cached_keys_are_skipped_and_counted() -> None:
    model, batch = FAMILIES["llama"].build(), FAMILIES["llama"].inputs()
    calls: list[AttentionCall] = []
    with torch.no_grad(), AttentionCapture(model, calls.append) as capture:
        past = model(**batch, use_cache=True).past_key_values
        model(input_ids=batch["input_ids"][:, :1], past_key_values=past)
    assert len(calls) == 2
    assert capture.skipped == {SkipReason.CACHED: 2}


def test_cross_attention_is_skipped_even_at_equal_lengths() -> None:
    import transformers

    config = transformers.T5Config(
        vocab_size=96, d_model=32, d_kv=8, d_ff=48, num_heads=4, num_layers=2, decoder_start_token_id=0
    )
    model, ids = transformers.T5Model(config).eval(), FAMILIES["llama"].inputs()["input_ids"]
    _, calls, capture = observed(model, {"input_ids": ids, "decoder_input_ids": ids})
    assert len(calls) == 4
    assert capture.skipped == {SkipReason.CROSS: 2}


def test_one_token_sequences_count() -> None:
    family = FAMILIES["llama"]
    _, calls, _ = observed(family.build(), family.inputs(tokens=1))
    assert [call.lengths for call in calls] == [(1, 1), (1, 1)]
