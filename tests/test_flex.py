"""FlexAttention's route to the softmax statistics equals the generic tiles.

The kernel itself needs a GPU (``benchmarks/probe_overhead.py`` checks it there); here it is replaced by its
own definition, so that the score functions, the two passes and their masks are what is tested.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn.attention.flex_attention import AuxOutput

from osp_diag.capture import attention_measuring, flex
from osp_diag.capture.flex import FlexStatistics, is_expressible
from osp_diag.estimators import default_estimators
from osp_diag.estimators.attention import AttentionMask, AttentionObservation, TokenIds
from osp_diag.estimators.base import Suite
from osp_diag.schema import STRATA
from osp_diag.seams.attention import AttentionCall

BATCH, HEADS, TOKENS, WIDTH = 2, 4, 48, 16


def dense_flex_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **options: Any
) -> tuple[None, AuxOutput]:
    """FlexAttention as its documentation defines it, with every logit in memory."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    logits = query.double() @ key.double().transpose(-1, -2) * options["scale"]
    index = torch.meshgrid(*(torch.arange(n) for n in logits.shape), indexing="ij")
    logits = options["score_mod"](logits, *index)
    seen = options["block_mask"].mask_mod(*index)
    logits = torch.where(seen, logits, -float("inf"))
    return None, AuxOutput(lse=logits.logsumexp(-1).float(), max_scores=logits.amax(-1).float())


def strata(*, padded: bool) -> torch.Tensor:
    out = torch.zeros(4, BATCH, TOKENS)
    for row, start in enumerate((5 if padded else 0, 0)):
        out[0, row, start:] = 1
        out[1, row, start] = 1
        out[3, row, start + 1 :] = 1
    return out


@pytest.mark.parametrize(
    ("causal", "window", "softcap", "sinks", "groups", "padded"),
    [
        (True, None, None, False, 4, False),
        (True, 10, None, False, 2, True),
        (True, None, 20.0, True, 1, True),
        (False, None, None, True, 4, True),
    ],
)
def test_flex_equals_the_generic_tiles(
    monkeypatch: pytest.MonkeyPatch,
    causal: bool,
    window: int | None,
    softcap: float | None,
    sinks: bool,
    groups: int,
    padded: bool,
) -> None:
    monkeypatch.setattr(flex, "flex_attention", dense_flex_attention)
    generator = torch.Generator().manual_seed(0)
    query = 2 * torch.randn(BATCH, HEADS, TOKENS, WIDTH, generator=generator)
    key = 2 * torch.randn(BATCH, groups, TOKENS, WIDTH, generator=generator)
    key[1, 0, 7] = float("nan")
    options: dict[str, Any] = {
        "scale": WIDTH**-0.5,
        "mask": AttentionMask(causal=causal, window=window),
        "softcap": softcap,
        "sink_logits": torch.randn(HEADS, generator=generator) if sinks else None,
    }
    weights = strata(padded=padded)
    expected = AttentionObservation(query, key, None, weights, **options).softmax
    statistics = FlexStatistics(
        TOKENS, query.device, options["mask"], scale=options["scale"], softcap=softcap, compile=lambda f: f
    )
    found = statistics(query, key, weights, options["sink_logits"])
    for name in expected._fields:
        left, right = getattr(expected, name), getattr(found, name)
        if name != "key_mass":
            # A token that is not finite weighs nothing, so its own statistics may be anything.
            counted = (weights[0] > 0) & key.isfinite().all(-1).all(1)
            counted = counted[:, None].expand_as(left) & expected.usable
            left, right = left[counted], right[counted]
        torch.testing.assert_close(right, left, rtol=2e-5, atol=2e-5, msg=lambda m, name=name: f"{name}: {m}")


def test_masks_with_tensors_are_left_to_the_generic_tiles() -> None:
    assert is_expressible(AttentionMask(causal=True, window=4))
    assert not is_expressible(AttentionMask(tensor=torch.zeros(1, 1, 4, 4)))


def test_the_compiled_measurement_is_one_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Inductor gets on a GPU can be traced whole, and measures what the eager tiles do."""
    monkeypatch.setattr(flex, "flex_attention", dense_flex_attention)

    def compile_apart_from_the_kernels(function: Any) -> Any:
        if function.__name__ in ("_over_keys", "_over_queries"):
            return function
        return torch.compile(function, fullgraph=True, dynamic=False, backend="eager")

    monkeypatch.setattr(attention_measuring, "compile_apart", compile_apart_from_the_kernels)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(BATCH, HEADS, TOKENS, WIDTH, generator=generator) for _ in range(3))
    call = AttentionCall(
        query=query, key=key, value=value, scale=0.25, seam="attention interface", causal=True
    )
    suite = Suite(default_estimators(observes="attention", site="attention"))
    weights = strata(padded=False)
    ids = TokenIds(torch.randint(0, 5, (BATCH, TOKENS), generator=generator), 5)
    options: dict[str, Any] = {"mask": AttentionMask(causal=True), "token_ids": ids}
    _, expected = attention_measuring.measure_attention(suite, call, weights, compiled=False, **options)
    measure = attention_measuring._CompiledMeasure(
        suite, AttentionMask(causal=True), 0.25, None, query, 5, STRATA
    )
    assert expected["token_key_mass.count"].sum() > 0
    for name, increment in measure(call, weights, ids, None).items():
        torch.testing.assert_close(
            increment, expected[name], rtol=1e-4, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}"
        )
