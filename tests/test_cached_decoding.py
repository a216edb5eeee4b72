"""Tokens made with a cache give the numbers of one pass over the same tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from osp_diag import Probe
from osp_diag.capture import collector
from tests.families import FAMILIES
from tests.test_probe_laws import numbers, probed

# Of the head, generate() wants the last token alone.
SITES = ["embedding", "residual_*", "attention*", "mlp_*", "query_*", "key_*", "value", "final_norm"]
OPTIONS: dict[str, Any] = {"sites": SITES, "delimiter_ids": (5, 6, 7, 8, 9)}


OF_ALL_TOKENS = (
    "super_weight",
    "super_weight_same_token",
    "product_peak.same_token",
    "product_peak.sequences",
)
"""Which token of all has the largest activation is not known where they are made one by one."""


def assert_same_statistics(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Products of one row and of many round differently; sums are as far off as their terms."""
    assert set(found) == set(expected)
    for name, value in expected.items():
        if not name.endswith(OF_ALL_TOKENS) and "logit_density" not in name and "histogram" not in name:
            np.testing.assert_allclose(found[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def prompt(padded: bool = False) -> dict[str, Tensor]:
    ids = torch.randint(4, 60, (2, 7), generator=torch.Generator().manual_seed(3))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    return {"input_ids": ids, "attention_mask": mask}


def generated(model: Any, batch: dict[str, Tensor], **options: Any) -> tuple[Probe, Tensor]:
    probe = Probe(model, **OPTIONS)
    with probe.step(0):
        out = model.generate(
            **batch, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **options
        )
    return probe, out


@pytest.mark.parametrize(
    ("name", "implementation", "padded"),
    [("llama", "sdpa", False), ("llama", "eager", True), ("mistral", "sdpa", False), ("gptj", "eager", True)],
)
def test_generated_tokens_are_one_sequence(name: str, implementation: str, padded: bool) -> None:
    model, batch = FAMILIES[name].build(implementation), prompt(padded)
    probe, out = generated(model, batch)
    mask = torch.nn.functional.pad(batch["attention_mask"], (0, 5), value=1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    whole = {"input_ids": out[:, :-1], "attention_mask": mask, "position_ids": positions, "use_cache": False}
    assert_same_statistics(numbers(probe), probed(model, whole, **OPTIONS))
    assert np.isnan(numbers(probe)["/mlp_down_weight/super_weight"]).all()


def by_hand(model: Any, ids: Tensor, probe: Probe, step: int, *, cut: int = 4) -> None:
    with torch.no_grad(), probe.step(step):
        out = model(input_ids=ids[:, :cut], use_cache=True)
        for position in range(cut, ids.shape[1]):
            out = model(input_ids=ids[:, position : position + 1], past_key_values=out.past_key_values)


def test_a_loop_of_ones_own_and_passes_between() -> None:
    model, ids = FAMILIES["llama"].build(), prompt()["input_ids"]
    probe = Probe(model, **OPTIONS)
    by_hand(model, ids, probe, 0)
    expected = probed(model, {"input_ids": ids, "use_cache": False}, **OPTIONS)
    assert_same_statistics(numbers(probe), expected)
    # Two generations and a plain pass in one step, of other lengths.
    probe = Probe(model, **OPTIONS)
    with torch.no_grad(), probe.step(0):
        model.generate(ids, max_new_tokens=2, do_sample=False, pad_token_id=0)
        model(input_ids=ids, use_cache=False)
        model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0)
    assert numbers(probe)["/residual_post/token_count"][0, 1] == 3 * 2


def test_a_prompt_too_large_to_hold_is_folded_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collector, "HELD_BYTES", 100)
    model, ids = FAMILIES["llama"].build(), prompt()["input_ids"]
    probe = Probe(model, **OPTIONS)
    with probe.step(0):
        model.generate(ids, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert_same_statistics(numbers(probe), probed(model, {"input_ids": ids, "use_cache": False}, **OPTIONS))
    probe, _ = generated(model, prompt())
    assert numbers(probe)["/residual_post/token_count"][0].tolist()[:2] == [2 * 12, 2]
    assert any("went on with a cache" in note for note in probe.run.attrs["notes"])


def test_a_cache_from_before_has_no_first_tokens() -> None:
    model, ids = FAMILIES["llama"].build(), prompt()["input_ids"]
    probe = Probe(model, **OPTIONS)
    with torch.no_grad():
        out = model(input_ids=ids, use_cache=True)
        with probe.step(0):
            model(input_ids=ids[:, :2], past_key_values=out.past_key_values)
    assert numbers(probe)["/residual_post/token_count"][0, :2].tolist() == [4, 0]
    assert any("went on with a cache" in note for note in probe.run.attrs["notes"])


def test_reordered_beams_have_no_attention() -> None:
    model = FAMILIES["llama"].build()
    probe, _ = generated(model, prompt(), num_beams=3)
    if "attention" in probe.run.absent_sites:
        assert "beam search" in probe.run.absent_sites["attention"]
    else:  # no beam overtook another
        assert np.isfinite(numbers(probe)["/attention/first_token_attention"][:, :, 0]).all()


def test_a_pass_that_raises_leaves_the_others() -> None:
    model, ids = FAMILIES["llama"].build(), prompt()["input_ids"]
    probe = Probe(model, sites=["residual_post"])
    with torch.no_grad(), probe.step(0):
        out = model(input_ids=ids, use_cache=True)
        with pytest.raises(IndexError):
            model(input_ids=torch.full((2, 1), 10**6), past_key_values=out.past_key_values)
    assert numbers(probe)["/residual_post/token_count"][0, 0] == ids.numel()


@pytest.mark.parametrize("name", ["CpmAnt", "Esm"])
def test_one_pass_may_see_itself_from_both_sides(name: str) -> None:
    """CPM-Ant has a cache, and a prompt that sees itself whole; there all keys' mass adds up to 1."""
    import transformers

    sizes = {"CpmAnt": {"dim_head": 8, "dim_ff": 24}, "Esm": {"intermediate_size": 24, "mask_token_id": 3}}
    common = {"vocab_size": 60, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    configuration = getattr(transformers, f"{name}Config")(**common, **sizes[name], pad_token_id=0)
    model_class = getattr(transformers, {"CpmAnt": "CpmAntForCausalLM", "Esm": "EsmForMaskedLM"}[name])
    model = model_class(configuration).eval()
    probe = Probe(model, sites=["attention"])
    with torch.no_grad(), probe.step(0):
        model(prompt()["input_ids"])
    mass = probe.run.tree["attention"]["key_mass"].sel(step=0).sum("key_position")
    np.testing.assert_allclose(mass, 1, atol=1e-6)
