"""The few array operations that the Array API standard lacks, dispatched by namespace.

Everything else in this package is written against the standard through ``array_api_compat``,
so that one body runs on NumPy, torch (eager and compiled) and JAX (eager and jitted).
Neither torch nor JAX is imported here: a function of theirs is reached only through an array
that the caller already made with them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, TypeAlias

import array_api_compat
import numpy as np
from array_api_compat import array_namespace, is_jax_namespace, is_torch_namespace

Array: TypeAlias = Any
Namespace: TypeAlias = Any

__all__ = [
    "Array",
    "Namespace",
    "accumulator_dtype",
    "array_namespace",
    "counts_by_bin",
    "kth_magnitude",
    "namespace_of",
    "once",
    "top_values",
    "weighted_row_sum",
]


def once(method: Callable[[Any], Any]) -> property:
    """A property computed on first use and kept in ``self._kept``.

    ``functools.cached_property`` takes a lock on Python 3.11, which ``torch.compile`` cannot trace.
    """
    name = method.__name__

    def read(self: Any) -> Any:
        if name not in self._kept:
            self._kept[name] = method(self)
        return self._kept[name]

    read.__doc__ = method.__doc__
    return property(read)


def namespace_of(array: Array) -> Namespace:
    """The array namespace of ``array`` (``array_api_compat``'s, so that torch speaks the standard)."""
    torch = sys.modules.get("torch")
    # array_namespace inspects types in a way that graph capture warns about; the answer is known.
    if torch is not None and isinstance(array, torch.Tensor):
        return sys.modules.get("array_api_compat.torch") or array_namespace(array)
    return array_namespace(array)


def accumulator_dtype(xp: Namespace, like: Array) -> Any:
    """float64 where the backend has it, else float32 (JAX without x64, Apple's MPS device)."""
    if is_jax_namespace(xp):
        return xp.asarray(0.0).dtype
    if is_torch_namespace(xp) and like.device.type == "mps":
        return xp.float32
    return xp.float64


def _is_compiling(xp: Namespace) -> bool:
    return is_torch_namespace(xp) and sys.modules["torch"].compiler.is_compiling()


def top_values(values: Array, count: int) -> Array:
    """The ``count`` largest entries along the last axis, largest first."""
    xp = namespace_of(values)
    count = min(count, values.shape[-1])
    if is_torch_namespace(xp):
        return sys.modules["torch"].topk(values, count, dim=-1).values
    if is_jax_namespace(xp):
        return sys.modules["jax"].lax.top_k(values, count)[0]
    if array_api_compat.is_numpy_namespace(xp):
        part = np.partition(values, values.shape[-1] - count, axis=-1)[..., -count:]
        return np.sort(part, axis=-1)[..., ::-1]
    return xp.flip(xp.sort(values, axis=-1), axis=-1)[..., :count]


def _as_bits(xp: Namespace, magnitude: Array) -> Array:
    """float32 seen as int32: for non-negative numbers the order of the bits is the order of the numbers."""
    if is_torch_namespace(xp):
        return magnitude.view(sys.modules["torch"].int32)
    if is_jax_namespace(xp):
        return sys.modules["jax"].lax.bitcast_convert_type(magnitude, xp.int32)
    return magnitude.view(np.int32)


def _from_bits(xp: Namespace, bits: Array) -> Array:
    if is_torch_namespace(xp):
        return bits.view(sys.modules["torch"].float32)
    if is_jax_namespace(xp):
        return sys.modules["jax"].lax.bitcast_convert_type(bits, xp.float32)
    return bits.view(np.float32)


def _kth_by_bits(xp: Namespace, magnitude: Array, rank: Any, significant_bits: int) -> Array:
    """Exact selection by building the answer bit by bit: one comparison and count per bit.

    A candidate bit stays set while at most ``rank`` elements are smaller than the candidate.
    """
    bits = _as_bits(xp, magnitude)
    answer = xp.zeros_like(bits[..., :1])
    if not isinstance(rank, int):
        rank = rank[..., None]
    for position in range(30, 30 - significant_bits, -1):
        candidate = answer | (1 << position)
        below = xp.sum(xp.astype(bits < candidate, xp.int32), axis=-1, keepdims=True, dtype=xp.int32)
        answer = xp.where(below <= rank, candidate, answer)
    return _from_bits(xp, answer)[..., 0]


def kth_magnitude(magnitude: Array, rank: Any, *, significant_bits: int = 31) -> Array:
    """The element of 0-based ``rank`` in ascending order along the last axis, exactly.

    Parameters
    ----------
    magnitude : float32 array, non-negative, no NaN
    rank : an int, or an integer array of the shape of the result
    significant_bits : how many leading bits (after the sign) can be non-zero in the data:
        15 for values that came from bfloat16, 31 in general.
    """
    xp = namespace_of(magnitude)
    if isinstance(rank, int):
        if array_api_compat.is_numpy_namespace(xp):
            return np.partition(magnitude, rank, axis=-1)[..., rank]
        if is_torch_namespace(xp) and not _is_compiling(xp) and magnitude.device.type == "cpu":
            # NumPy's introselect is several times faster than torch's kthvalue or sort here.
            chosen = np.partition(magnitude.numpy(force=True), rank, axis=-1)[..., rank]
            return sys.modules["torch"].from_numpy(np.ascontiguousarray(chosen))
    if hasattr(magnitude, "view") or is_jax_namespace(xp):
        return _kth_by_bits(xp, magnitude, rank, significant_bits)
    ordered = xp.sort(magnitude, axis=-1)
    if isinstance(rank, int):
        return ordered[..., rank]
    return xp.take_along_axis(ordered, rank[..., None], axis=-1)[..., 0]


def weighted_row_sum(weights: Array, values: Array) -> Array:
    """sum_n weights[s, n] · values[n, c] → (s, c) in float32.

    On an accelerator, or when compiled, as products and sums that fuse into one reading of ``values``
    and that no reduced-precision matrix unit touches; eagerly on a CPU, as one matrix product.
    """
    xp = namespace_of(values)
    on_cpu = not is_torch_namespace(xp) or values.device.type == "cpu"
    if on_cpu and not _is_compiling(xp) and not is_jax_namespace(xp):
        return xp.matmul(weights, values)
    return xp.stack([xp.sum(weights[s, :, None] * values, axis=0) for s in range(weights.shape[0])])


def counts_by_bin(index: Array, weights: Array, bins: int) -> Array:
    """Weighted histogram: sum of ``weights[..., n]`` over n with ``index[..., n] == b`` → (..., bins).

    ``index`` is integer of shape (n,) or that of ``weights``, with values in [0, bins).
    """
    xp = namespace_of(weights)
    lead, length = weights.shape[:-1], weights.shape[-1]
    rows = 1
    for size in lead:
        rows *= size
    flat_weights = xp.reshape(weights, (rows, length))
    flat_index = xp.broadcast_to(xp.reshape(index, (-1, length)), (rows, length))
    if is_torch_namespace(xp):
        torch = sys.modules["torch"]
        out = torch.zeros((rows, bins), dtype=weights.dtype, device=weights.device)
        out = out.scatter_add(1, flat_index.to(torch.int64), flat_weights)
    elif is_jax_namespace(xp):
        row_number = xp.arange(rows)[:, None]
        out = xp.zeros((rows, bins), dtype=weights.dtype).at[row_number, flat_index].add(flat_weights)
    else:
        offset = np.arange(rows)[:, None] * bins
        out = np.bincount(
            (np.asarray(flat_index) + offset).ravel(), np.asarray(flat_weights).ravel(), rows * bins
        ).reshape(rows, bins)
        out = xp.asarray(out, dtype=weights.dtype)
    return xp.reshape(out, (*lead, bins))
