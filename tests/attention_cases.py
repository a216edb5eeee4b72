"""Attention of every kind, small, and what the estimators of the attention site make of it on a backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from osp_diag.estimators import attention_entropy, query_key, sink_implementation, sinks, value_drain
from osp_diag.estimators import logits as logit_estimators
from osp_diag.estimators._arrays import namespace_of
from osp_diag.estimators.attention import AttentionMask, AttentionObservation
from osp_diag.estimators.base import Estimator, Suite
from tests.dense_attention import Case, make_case

MODULES = (sinks, attention_entropy, value_drain, logit_estimators, sink_implementation, query_key)
ESTIMATORS = tuple(
    found
    for module in MODULES
    for found in (getattr(module, name) for name in module.__all__)
    if isinstance(found, type) and issubclass(found, Estimator)
)
ATTENTION = Suite([e() for e in ESTIMATORS if e.observes == "attention"])
HEADS = Suite([query_key.HeadChannelNorm(), query_key.MassiveValues()])
namespace_of(torch.zeros(1))  # a compiled function has to find the namespace already there
BACKENDS = ("numpy", "torch", "jax", "torch-compiled")
NOT_DENSE = {"logit_density", "logit_quantile", "nonfinite_query_key_tokens"}


def observe(case: Case, to: Callable[[Any], Any] = np.asarray, **options: Any) -> AttentionObservation:
    tensor = case.additive if case.additive is not None else case.allowed
    mask = AttentionMask(
        causal=case.causal,
        window=case.window,
        tensor=None if tensor is None else to(tensor),
        keys=None if case.keys is None else to(case.keys),
        function=case.function,
    )
    sink_logits = None if case.sink_logits is None else to(case.sink_logits)
    arrays = [to(a) for a in (case.query, case.key, case.value, case.strata)]
    settings = {"query_sample": None, "tile": 12, "mask": mask, "softcap": case.softcap, "scale": case.scale}
    return AttentionObservation(*arrays, **settings | {"sink_logits": sink_logits} | options)


def finalised(state: Any, layout: Any, suite: Suite = ATTENTION) -> dict[str, np.ndarray]:
    return {name: np.asarray(output.values) for name, output in suite.finalise(state, layout).items()}


def run(case: Case, backend: str = "numpy", **options: Any) -> dict[str, np.ndarray]:
    """Every output of the attention site on one backend."""
    to = {"numpy": np.asarray, "jax": jnp.asarray}.get(backend, torch.as_tensor)
    tensors = {
        name: to(part)
        for name in ("query", "key", "value", "strata", "additive", "allowed", "keys", "sink_logits")
        if (part := getattr(case, name)) is not None
    }

    def increments(inputs: dict[str, Any]) -> dict[str, Any]:
        return ATTENTION.measure(observe(replace(case, **inputs), lambda array: array, **options))

    if backend == "jax":
        increments = jax.jit(increments)
    elif backend == "torch-compiled":
        torch.compiler.reset()
        increments = torch.compile(increments, fullgraph=True, backend="aot_eager")
    layout = observe(case, **options).layout
    added = increments(tensors)
    state = ATTENTION.merge(ATTENTION.init(layout, tensors["query"]), added)
    return finalised(state, layout)


def assert_same(
    found: dict[str, np.ndarray], expected: dict[str, np.ndarray], rtol: float = 2e-5, atol: float = 2e-6
) -> None:
    for name, wanted in expected.items():
        np.testing.assert_allclose(found[name], wanted, rtol=rtol, atol=atol, err_msg=name)


def alibi(heads: int, tokens: int) -> np.ndarray:
    slopes = 2.0 ** -np.arange(1, heads + 1)
    distance = np.arange(tokens)[None, :] - np.arange(tokens)[:, None]
    return (slopes[:, None, None] * distance)[None].astype(np.float32)


def causal_fill(tokens: int, dtype: Any = np.float32) -> np.ndarray:
    hidden = np.triu(np.ones((tokens, tokens), dtype=bool), 1)
    return np.where(hidden, np.finfo(dtype).min, 0.0).astype(dtype)[None, None]


RNG = np.random.default_rng(7)
CASES = {
    "causal": make_case(1),
    "one head, no sharing": make_case(2, heads=1, groups=1),
    "no sharing": make_case(3, groups=4),
    "left padding": make_case(4, left=(5, 0, 11)),
    "right padding": make_case(5, right=(0, 9, 22)),
    "right padding, not masked": replace(make_case(5, right=(0, 9, 3)), keys=None),
    "a sequence of padding": make_case(6, left=(0, 23, 2)),
    "window": make_case(7, window=6),
    "window of 1": make_case(8, window=1),
    "window, left padding": make_case(9, window=5, left=(3, 0, 8)),
    "soft cap": make_case(10, softcap=2.0, size=2.0),
    "learned sinks": make_case(11, sink_logits=np.array([0.0, 3.0, -2.0, 8.0], np.float32)),
    "softmax off by one": make_case(12, sink_logits=np.zeros(4, np.float32), right=(3, 0, 1)),
    "ALiBi": make_case(13, additive=alibi(4, 23)),
    "ALiBi, soft cap, sinks": make_case(
        14, additive=alibi(4, 23), softcap=3.0, sink_logits=np.ones(4, np.float32), left=(2, 1, 0)
    ),
    "bidirectional": make_case(15, causal=False),
    "bidirectional, padding": make_case(16, causal=False, left=(4, 0, 0), right=(0, 7, 2)),
    "bool tensor": make_case(17, allowed=RNG.random((3, 1, 23, 23)) < 0.6),
    "bool tensor by key": make_case(18, allowed=RNG.random((3, 1, 1, 23)) < 0.8),
    "additive fill": make_case(19, additive=causal_fill(23)),
    "additive fill, float16": make_case(20, additive=causal_fill(23, np.float16)),
    "two dimensions": make_case(21, additive=causal_fill(23)[0, 0]),
    "function": make_case(22, function=lambda b, h, q, k: (q // 7 == k // 7) | (h == 1)),
    "one token": make_case(23, tokens=1),
    "two tokens": make_case(24, tokens=2),
    "exactly one tile": make_case(25, tokens=12),
}


def described(name: str) -> Case:
    case = CASES[name]
    if case.additive is not None and case.additive.ndim == 2:
        return replace(case, additive=case.additive[None, None])
    return case
