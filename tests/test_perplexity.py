"""Perplexity against an oracle in float64, and what it refuses."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from osp_diag.errors import TokenError, UsageError
from osp_diag.quantizing import perplexity as module
from osp_diag.quantizing.perplexity import Perplexity, perplexity
from tests.tiny_checkpoints import BYTES, bert, gpt2, llama

TOKENS = np.random.default_rng(0).integers(0, BYTES, (5, 24))


class Logits(nn.Module):
    """Gives the same logits at every position, and counts its calls."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.calls = 0

    def forward(self, input_ids: torch.Tensor) -> SimpleNamespace:
        self.calls += 1
        return SimpleNamespace(logits=self.logits.expand(*input_ids.shape, -1))


def oracle(model: nn.Module, tokens: np.ndarray) -> float:
    """−mean log softmax at the next tokens, one sequence and position at a time."""
    with torch.no_grad():
        logits = model(torch.tensor(tokens)).logits.double().numpy()
    total = []
    for row, ids in zip(logits, tokens, strict=True):
        for position in range(len(ids) - 1):
            z = row[position] - row[position].max()
            total.append(np.log(np.exp(z).sum()) - z[ids[position + 1]])
    return float(np.mean(total))


@pytest.mark.parametrize("make", [llama, gpt2])
def test_it_is_the_oracles_whatever_the_batch(make, monkeypatch):
    model = make()
    expected = oracle(model, TOKENS)
    for size in (None, 1, 2, 5, 100):
        found = perplexity(model, TOKENS, batch_size=size)
        assert found.negative_log_likelihood == pytest.approx(expected, rel=1e-6)
        assert found.tokens == 5 * 23
        assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-5)
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 1000)
    assert perplexity(model, TOKENS).negative_log_likelihood == pytest.approx(expected, rel=1e-6)


def test_known_values():
    uniform = Logits(torch.zeros(50))
    assert perplexity(uniform, TOKENS % 50).perplexity == pytest.approx(50, rel=1e-12)
    certain = Logits(torch.tensor([0.0, 1e4, 0.0]))
    assert perplexity(certain, np.ones((2, 4), int)).negative_log_likelihood == 0
    assert perplexity(certain, np.zeros((2, 4), int)) == Perplexity(negative_log_likelihood=1e4, tokens=6)
    assert perplexity(certain, np.zeros((2, 4), int)).perplexity == math.inf
    broken = Logits(torch.tensor([0.0, math.nan]))
    assert math.isnan(perplexity(broken, np.zeros((2, 4), int)).perplexity)


def test_the_sum_is_in_float64():
    """In bfloat16, or in a float32 sum, 4,000 equal terms would not add up to their mean exactly."""
    logits = torch.tensor([0.0, 1.2578125], dtype=torch.bfloat16)
    found = perplexity(Logits(logits), np.zeros((4, 1001), int)).negative_log_likelihood
    assert found == pytest.approx(math.log1p(math.exp(1.2578125)), rel=1e-14)


def test_it_runs_as_many_sequences_at_a_time_as_it_is_told():
    model = Logits(torch.zeros(300))
    perplexity(model, TOKENS, batch_size=2)
    assert model.calls == 2 + 3, "two ask whether it sees ahead"
    perplexity(model, TOKENS)
    assert model.calls == 5 + 2 + 1


def test_it_leaves_the_model_as_it_was():
    model = llama().train()
    model.model.layers[0].eval()
    perplexity(model, torch.tensor(TOKENS))
    assert model.training
    assert not model.model.layers[0].training
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("shape", [(4,), (4, 1), (2, 3, 4)])
def test_tokens_of_another_shape(shape):
    with pytest.raises(
        TokenError, match=r"shape \(sequence, position\) with 2 or more positions, not of shape"
    ):
        perplexity(llama(), np.zeros(shape, int))


def test_what_it_refuses():
    with pytest.raises(TokenError, match=r"^token id 999 at position 1 of sequence 0 is outside"):
        perplexity(llama(), np.array([[3, 999]]))
    with pytest.raises(TokenError, match="token ids are integers"):
        perplexity(llama(), np.zeros((2, 3)))
    with pytest.raises(UsageError, match=r"^batch_size=0"):
        perplexity(llama(), TOKENS, batch_size=0)
    with pytest.raises(UsageError, match=r"needs a causal language model.*BaseModelOutput\w* has no logits"):
        perplexity(bert().bert, TOKENS)
