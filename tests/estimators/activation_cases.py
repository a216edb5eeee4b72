"""Inputs to the activation statistics, and the way to run them on each backend."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from osp_diag.estimators import ActivationObservation, Estimator, Layout, Output, Suite, default_estimators
from osp_diag.estimators._arrays import namespace_of

BATCH, TOKENS, CHANNELS = 3, 48, 64
EVERYTHING = Suite(default_estimators(observes="activation", optional=True))
namespace_of(torch.zeros(1))  # a compiled function has to find the namespace already there


def strata_for(batch: int = BATCH, tokens: int = TOKENS, *, padding: bool = True) -> np.ndarray:
    """First token, every seventh a delimiter, and padding at the end of the second sequence."""
    strata = np.zeros((4, batch, tokens), np.float32)
    strata[0] = 1
    strata[1, :, 0] = 1
    strata[2, :, 5::7] = 1
    strata[3] = 1 - strata[1] - strata[2]
    if padding and batch > 1:
        strata[:, 1, tokens - tokens // 3 :] = 0
    return strata


def planted(generator: np.random.Generator, magnitude: float = 50_000.0) -> np.ndarray:
    """Ordinary tokens, an outlier channel on all of them, and a massive one on the first of each sequence."""
    x = generator.standard_normal((BATCH, TOKENS, CHANNELS))
    x[:, :, 7] += 12.0
    x[:, 0, 3] = magnitude
    x[0, 12, 3] = -magnitude / 3
    return x


def inputs() -> dict[str, np.ndarray]:
    generator = np.random.default_rng(20)
    shape = (BATCH, TOKENS, CHANNELS)
    normal = generator.standard_normal(shape)
    cases = {
        "normal": normal,
        "shifted": normal + 3.0,
        "student": generator.standard_t(2.2, shape),
        "planted": planted(generator),
        "constant": np.full(shape, 0.1),
        "constant_per_token": np.broadcast_to(normal[..., :1], shape),
        "zero": np.zeros(shape),
        "sparse": normal * (generator.random(shape) < 0.3),
        "huge": planted(generator, 4e4) * 1e30,
        "tiny": planted(generator) * 1e-30,
        "half": planted(generator, 25_800.0).astype(np.float16),
        "odd_width": generator.standard_t(4, (2, 9, 33)),
    }
    return {name: x.astype(np.float16 if name == "half" else np.float32) for name, x in cases.items()}


def measure(suite: Suite, x: Any, strata: Any, **options: Any) -> dict[str, Any]:
    return suite.measure(ActivationObservation(x, strata, **options))


def runner(suite: Suite, backend: str, **options: Any) -> Callable[[np.ndarray, np.ndarray], dict[str, Any]]:
    """A function from NumPy inputs to the backend's state."""

    def body(x: Any, strata: Any) -> dict[str, Any]:
        return measure(suite, x, strata, **options)

    if backend.startswith("torch-compiled"):
        # Inductor, or the same graph without code for it, which takes longer to make than all that it runs.
        name = "inductor" if backend == "torch-compiled" else "aot_eager"
        body = torch.compile(body, fullgraph=True, dynamic=False, backend=name)
    if backend == "jax":
        body = jax.jit(body)
    to = converter(backend)
    return lambda x, strata: body(to(x), to(strata))


def converter(backend: str) -> Callable[[np.ndarray], Any]:
    if backend == "jax":
        return jnp.asarray
    if backend.startswith("torch"):
        return torch.as_tensor
    if backend == "strict":
        import array_api_strict

        return lambda a: array_api_strict.asarray(a, copy=True)
    return np.asarray


def layout_of(x: np.ndarray) -> Layout:
    return Layout(channels=x.shape[-1], tokens=x.shape[-2])


def state_of(increments: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """A state on the host in float64, as the store keeps it."""
    return {key: np.asarray(value, dtype=np.float64) for key, value in increments.items()}


def finalised(
    x: np.ndarray, strata: np.ndarray, estimators: Sequence[Estimator] | None = None, backend: str = "numpy"
) -> dict[str, Output]:
    suite = EVERYTHING if estimators is None else Suite(estimators)
    return suite.finalise(state_of(runner(suite, backend)(x, strata)), layout_of(x))


def values(x: np.ndarray, strata: np.ndarray, *estimators: Estimator) -> dict[str, np.ndarray]:
    return {k: np.asarray(v.values) for k, v in finalised(x, strata, estimators or None).items()}


def assert_matches(
    outputs: Mapping[str, Output], expected: Mapping[str, np.ndarray], rtol: float = 2e-5
) -> None:
    """Every expected output, within rounding of float32; kurtoses with 3 added, since they cross 0."""
    for name, wanted in expected.items():
        found = np.asarray(outputs[name].values, np.float64)
        offset = 3.0 if "kurtosis" in name else 0.0
        scale = np.max(np.abs(np.nan_to_num(wanted)), initial=0.0)
        # A median of x − x̄ near 0 is a difference of nearly equal float32 numbers.
        relative = 10 * rtol if name.startswith("centred") else rtol
        # Of a logarithm the distance counts, whatever it is.
        floor = 1e-6 if outputs[name].unit in ("1", "bits") else 0.0
        np.testing.assert_allclose(
            found + offset, wanted + offset, rtol=relative, atol=1e-6 * scale + floor, err_msg=name
        )
