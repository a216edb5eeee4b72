"""The training model's attention alone: values and gradients, FlexAttention, block masks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from osp_diag.trainer.model import attention as attention_module
from osp_diag.trainer.model.attention import attend
from osp_diag.trainer.model.masks import attention_mask, block_mask, document_starts
from tests.llama_reference import KINDS, dense, tiny


def heads_of(seed: int = 0, size: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = [(2, 4, 19, size), (2, 2, 19, size), (2, 2, 19, size)]
    return [torch.randn(shape, generator=generator).requires_grad_() for shape in shapes]


def dense_torch(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None, allowed: Tensor) -> Tensor:
    """The definition in float64, with autograd."""
    query, key, value = query.double(), key.double(), value.double()
    key, value = (part.repeat_interleave(2, dim=1) for part in (key, value))
    weights = torch.where(allowed, (query @ key.mT / query.shape[-1] ** 0.5).exp(), 0)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks.double().exp()[:, None, None]
    return (weights / total) @ value


@pytest.mark.parametrize("way", ["dense", "flex"])
@pytest.mark.parametrize("documents", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("sinks", ["none", "zeros", "learned"])
def test_attention_and_its_gradients_are_those_of_the_definition(
    sinks: str, documents: bool, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``flex`` runs FlexAttention's own dense definition in the place of its kernel, which needs a GPU."""
    query, key, value = heads_of()
    given = {"none": None, "zeros": torch.zeros(4), "learned": torch.tensor([0.5, -2.0, 3.0, 0.0])}[sinks]
    if sinks == "learned":
        given.requires_grad_()  # type: ignore[union-attr]
    starts = (
        torch.tensor([[0] * 7 + [7] * 12, [0] * 19]) if documents else torch.zeros(2, 19, dtype=torch.int64)
    )
    position = torch.arange(19)
    allowed = ((position <= position[:, None]) & (position >= starts[:, :, None]))[:, None]
    if way == "flex":
        monkeypatch.setattr(attention_module, "_flex", on_cpu)
        mask: Any = create_block_mask(
            lambda b, h, q, k: (k <= q) & (k >= starts[b, q]), 2, None, 19, 19, device="cpu"
        )
    else:
        mask = allowed if documents else None
    inputs = [query, key, value] + ([given] if sinks == "learned" else [])
    out = attend(query, key, value, sink_logits=given, mask=mask)
    expected = dense_torch(query, key, value, given, allowed)
    torch.testing.assert_close(out.double(), expected, rtol=0, atol=2e-6)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    found = torch.autograd.grad((out * weight).sum(), inputs)  # type: ignore[arg-type]
    for gradient, right in zip(found, torch.autograd.grad((expected * weight).sum(), inputs), strict=True):  # type: ignore[arg-type]
        torch.testing.assert_close(gradient, right, rtol=1e-4, atol=1e-5)


def on_cpu(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Any:
    """FlexAttention's eager math; its own entry refuses gradients on a CPU, and needs no more than this."""
    from torch.nn.attention.flex_attention import AuxOutput

    mask = options["block_mask"]
    index = torch.meshgrid(*(torch.arange(n) for n in (*query.shape[:3], key.shape[2])), indexing="ij")
    key, value = (part.repeat_interleave(2, dim=1) for part in (key, value))
    logits = (query @ key.mT * query.shape[-1] ** -0.5).masked_fill(~mask.mask_mod(*index), -torch.inf)
    out = logits.softmax(-1) @ value
    return (out, AuxOutput(lse=logits.logsumexp(-1))) if "return_aux" in options else out


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_returns_the_log_sum_exp_that_is_used() -> None:
    """torch's own eager FlexAttention on a CPU, forward only."""
    query, key, value = (part.detach() for part in heads_of())
    starts = torch.tensor([[0] * 7 + [7] * 12, [0] * 19])
    sinks = torch.tensor([0.5, -2.0, 3.0, 0.0])
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(attention_module, "_flex", flex_attention)
        found = attend(query, key, value, sink_logits=sinks, mask=block_mask(starts))
    arrays = [part.double().numpy() for part in (query, key, value)]
    position = np.arange(19)
    allowed = (position <= position[:, None]) & (position >= starts.numpy()[:, :, None])
    expected = dense(*arrays, allowed[:, None], sinks.double().numpy())
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)


@given(
    lengths=st.lists(st.sampled_from([1, 5, 64, 127, 128, 129, 256, 400]), min_size=1, max_size=8),
    shift=st.integers(0, 300),
)
def test_block_masks_are_those_that_torch_finds_pair_by_pair(lengths: list[int], shift: int) -> None:
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    starts = document_starts(torch.stack([ids, ids.roll(shift)]))
    ours = block_mask(starts)
    theirs = create_block_mask(ours.mask_mod, 2, None, len(ids), len(ids), device="cpu")
    for way in ("kv", "full_kv", "q", "full_q"):
        found, expected = (
            visited(getattr(mask, f"{way}_num_blocks"), getattr(mask, f"{way}_indices"))
            for mask in (ours, theirs)
        )
        assert found == expected, way
    assert ours.seq_lengths == theirs.seq_lengths


def visited(numbers: Tensor, indices: Tensor) -> list[set[int]]:
    """The blocks that each block is worked on with."""
    rows = zip(numbers.flatten().tolist(), indices.flatten(0, -2).tolist(), strict=True)
    return [set(row[:number]) for number, row in rows]


def test_only_cuda_gets_block_masks() -> None:
    starts = torch.zeros(2, 9, dtype=torch.int64)
    cpu = torch.device("cpu")
    for kind in KINDS:
        assert attention_mask(tiny(attention=kind), 9, cpu, None) is None
        mask = attention_mask(tiny(attention=kind), 9, cpu, starts)
        assert isinstance(mask, Tensor)
        assert mask.shape == (2, 1, 9, 9)
