"""Whether attention is causal is read off each call's own mask, sequence by sequence."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from osp_diag import Probe
from osp_diag.capture.attention_measuring import mask_of
from osp_diag.seams.attention import AttentionCall
from tests.families import FAMILIES
from tests.test_probe_laws import numbers

TOKENS, PREFIX = 12, 5


def masks() -> Tensor:
    """(batch, 1, query, key): causal, a prefix that all see, a block of image tokens, everything."""
    causal = torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril()
    prefix, block = causal.clone(), causal.clone()
    prefix[:, :PREFIX] = True
    block[4:8, 4:8] = True
    return torch.stack([causal, prefix, block, torch.ones_like(causal)])[:, None]


def received(attention: Tensor, mask: Tensor) -> np.ndarray:
    """(head, key): mean over sequences of the mean over the queries that see the key; float64."""
    count = mask.sum(dim=-2).double()
    return (attention.double().sum(dim=-2) / count).mean(0).numpy()


@pytest.mark.parametrize("rows", [[0], [1], [2], [3], [0, 1], [0, 1, 2, 3]])
def test_the_mass_of_a_key_is_over_the_queries_that_see_it(rows: list[int]) -> None:
    model, mask = FAMILIES["llama"].build("eager"), masks()[rows]
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    ids = torch.randint(4, 60, (len(rows), TOKENS), generator=torch.Generator().manual_seed(2))
    additive = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    probe = Probe(model, sites=["attention"])
    with torch.no_grad(), probe.step(0):
        attention = model(input_ids=ids, attention_mask=additive, output_attentions=True).attentions
    found = numbers(probe)
    for layer in range(2):
        weights = attention[layer]
        np.testing.assert_allclose(
            found["/attention/key_mass"][layer], received(weights, mask), rtol=1e-5, atol=1e-6
        )
        first = weights[..., 0].double().mean((0, 2))
        np.testing.assert_allclose(found["/attention/first_token_attention"][layer, :, 0], first, rtol=1e-5)
        np.testing.assert_allclose(found["/attention/key_mass_share"][layer, :, 0], 1, rtol=1e-5)


@pytest.mark.parametrize("form", ["bool", "additive", "function", "logits", "shallow fill"])
@pytest.mark.parametrize("waits", [True, False])
def test_reach_of_every_form_of_mask(form: str, waits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    import osp_diag.estimators.attention_reach as attention_reach

    monkeypatch.setattr(attention_reach, "runs_on_host", lambda *_: waits)
    allowed = masks()
    tensors: dict[str, Any] = {"query": torch.randn(4, 2, TOKENS, 8), "key": torch.randn(4, 2, TOKENS, 8)}
    fill = -1e9 if form == "shallow fill" else float("-inf")
    additive = torch.zeros(allowed.shape).masked_fill(~allowed, fill)
    part: dict[str, Any] = {"mask": allowed if form == "bool" else additive}
    if form == "function":
        part = {"mask_function": lambda b, h, q, k: allowed[b, 0, q, k]}
    if form == "logits":
        tensors = {"query": None, "key": None}
        part = {"logits": additive.expand(4, 2, TOKENS, TOKENS)}
    call = AttentionCall(value=None, scale=1.0, seam="softmax", **tensors, **part)
    valid = torch.ones(4, TOKENS)
    mask = mask_of(call, valid)
    assert not mask.causal
    assert mask.partly_causal is not None
    assert mask.partly_causal.tolist() == [True, True, True, False]
    # Padding asks nobody: what it hides makes no sequence one-sided.
    hidden = allowed.clone()
    hidden[3, :, :, -2:] = False
    valid[3, -2:] = 0
    call = AttentionCall(
        query=torch.randn(4, 2, TOKENS, 8), key=torch.randn(4, 2, TOKENS, 8), value=None, scale=1.0,
        seam="softmax", mask=hidden,
    )  # fmt: skip
    mask = mask_of(call, valid)
    assert mask.partly_causal is not None
    assert mask.partly_causal.tolist() == [True, True, True, False]
