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

import numpy as np
from array_api_compat import array_namespace

Array: TypeAlias = Any
Namespace: TypeAlias = Any

__all__ = [
    "Array",
    "Namespace",
    "accumulator_dtype",
    "counts_by_bin",
    "float32_matmul",
    "index_range",
    "is_jax_namespace",
    "is_numpy_namespace",
    "is_torch_namespace",
    "kth_magnitude",
    "kth_of_few",
    "leading_powers_of_two",
    "namespace_of",
    "once",
    "quotient",
    "row_blocks",
    "running_sum",
    "runs_on_host",
    "sums_by_bin",
    "take_along_last",
    "top_entries",
    "top_values",
    "weighted_row_sum",
]


# By name, because graph capture warns about array_api_compat's own (cached) tests.
def is_numpy_namespace(xp: Namespace) -> bool:
    return xp.__name__ in ("numpy", "array_api_compat.numpy")


def is_torch_namespace(xp: Namespace) -> bool:
    return xp.__name__ in ("torch", "array_api_compat.torch")


def is_jax_namespace(xp: Namespace) -> bool:
    return xp.__name__ == "jax.numpy"


def once(method: Callable[[Any], Any]) -> property:
    """A property computed on first use and kept in ``self._cache``.

    ``functools.cached_property`` takes a lock on Python 3.11, which ``torch.compile`` cannot trace.
    """
    name = method.__name__

    def read(self: Any) -> Any:
        if name not in self._cache:
            self._cache[name] = method(self)
        return self._cache[name]

    read.__doc__ = method.__doc__
    return property(read)


def namespace_of(array: Array) -> Namespace:
    """The array namespace of ``array`` (``array_api_compat``'s, so that torch speaks the standard)."""
    torch = sys.modules.get("torch")
    # array_namespace inspects types in a way that graph capture warns about; the answer is known. The import
    # loads only a thin wrapper, since torch is there already.
    if torch is not None and isinstance(array, torch.Tensor):
        import array_api_compat.torch as torch_namespace

        return torch_namespace
    return array_namespace(array)


def accumulator_dtype(xp: Namespace, like: Array) -> Any:
    """float64 where the backend has it, else float32 (JAX without x64, Apple's MPS device)."""
    # Why sums are wide and elements are not: docs/decisions.md, Estimators.
    if is_jax_namespace(xp):
        return xp.asarray(0.0).dtype
    if is_torch_namespace(xp) and like.device.type == "mps":
        return xp.float32
    return xp.float64


def _is_compiling(xp: Namespace) -> bool:
    return is_torch_namespace(xp) and sys.modules["torch"].compiler.is_compiling()


def quotient(numerator: Array, denominator: Array) -> Array:
    """numerator / denominator, NaN where the denominator is 0 (nothing was counted), without warnings."""
    xp = namespace_of(denominator)
    # The denominator is often far smaller, a count to be shared by all channels: the NaN goes there.
    return numerator / xp.where(denominator == 0, xp.nan * xp.ones_like(denominator), denominator)


def index_range(start: int, stop: int, like: Array) -> Array:
    """start, …, stop − 1 as integers on ``like``'s device, without a copy from the host."""
    xp = namespace_of(like)
    device = {"device": like.device} if is_torch_namespace(xp) else {}
    return xp.arange(start, stop, **device)


def float32_matmul(first: Array, second: Array) -> Array:
    """A float32 matrix product that no autocast region and no default precision of a backend rounds.

    torch's ``allow_tf32`` switch is the user's and is left alone.
    """
    xp = namespace_of(first)
    if is_torch_namespace(xp):
        torch = sys.modules["torch"]
        # dynamo cannot trace the question; what it compiles for, CPU and CUDA, has autocast.
        if torch.compiler.is_compiling() or torch.amp.is_autocast_available(first.device.type):
            with torch.autocast(first.device.type, enabled=False):
                return xp.matmul(first, second)
    elif is_jax_namespace(xp):
        return xp.matmul(first, second, precision="highest")
    return xp.matmul(first, second)


def runs_on_host(xp: Namespace, like: Array) -> bool:
    """Whether operations run one by one on a CPU: values can be looked at for free, and caches matter."""
    if is_torch_namespace(xp):
        return like.device.type == "cpu" and not _is_compiling(xp)
    return is_numpy_namespace(xp)


# Below torch's grain of 32,768 it starts no threads, whose meeting costs more than the work where cores are
# shared; and 128 KiB stay in the second-level cache.
_BLOCK_ELEMENTS = 32_767


def row_blocks(rows: Array, elements: int = _BLOCK_ELEMENTS) -> list[slice]:
    """Slices of rows (n, channel) to work through one after the other, of so many elements.

    On a host, blocks that stay in cache between operations, which is several times faster than
    whole tensors; elsewhere one block, since a compiler or a GPU does better by itself.
    """
    xp, count = namespace_of(rows), rows.shape[0]
    step = max(1, elements // max(rows.shape[-1], 1)) if runs_on_host(xp, rows) else count
    return [slice(start, min(start + step, count)) for start in range(0, count, max(step, 1))]


def top_entries(values: Array, count: int) -> tuple[Array, Array]:
    """The ``count`` largest entries along the last axis, largest first, and their indices."""
    xp = namespace_of(values)
    count = min(count, values.shape[-1])
    if is_torch_namespace(xp):
        largest = sys.modules["torch"].topk(values, count, dim=-1)
        return largest.values, largest.indices
    if is_jax_namespace(xp):
        return sys.modules["jax"].lax.top_k(values, count)
    if is_numpy_namespace(xp):
        index = np.argpartition(values, values.shape[-1] - count, axis=-1)[..., -count:]
        largest = np.take_along_axis(values, index, axis=-1)
        order = np.argsort(-largest, axis=-1, kind="stable")
        return np.take_along_axis(largest, order, axis=-1), np.take_along_axis(index, order, axis=-1)
    index = xp.argsort(values, axis=-1, descending=True)[..., :count]
    return xp.take_along_axis(values, index, axis=-1), index


def top_values(values: Array, count: int) -> Array:
    """The ``count`` largest entries along the last axis, largest first."""
    return top_entries(values, count)[0]


def running_sum(values: Array) -> Array:
    """Sums of the entries up to each one, along the last axis."""
    xp = namespace_of(values)
    if is_torch_namespace(xp):  # array_api_compat's wrapper inspects types, which graph capture warns about
        return sys.modules["torch"].cumsum(values, dim=-1)
    return xp.cumulative_sum(values, axis=-1)


def take_along_last(values: Array, index: Array) -> Array:
    """``values[..., index]`` with one index per leading position: both (..., n) and (...) → (...)."""
    xp = namespace_of(values)
    if is_torch_namespace(xp):
        return sys.modules["torch"].gather(values, -1, index[..., None].long())[..., 0]
    return xp.take_along_axis(values, index[..., None], axis=-1)[..., 0]


def _as_bits(xp: Namespace, magnitude: Array) -> Array:
    """float32 seen as int32: for non-negative numbers the order of the bits is the order of the numbers."""
    if is_torch_namespace(xp):
        return magnitude.view(sys.modules["torch"].int32)
    return sys.modules["jax"].lax.bitcast_convert_type(magnitude, xp.int32)


def _from_bits(xp: Namespace, bits: Array) -> Array:
    if is_torch_namespace(xp):
        return bits.view(sys.modules["torch"].float32)
    return sys.modules["jax"].lax.bitcast_convert_type(bits, xp.float32)


def leading_powers_of_two(magnitude: Array) -> Array:
    """The largest power of two up to each float32, exactly, for values from float32's normal range."""
    xp = namespace_of(magnitude)
    if is_numpy_namespace(xp):
        return (magnitude.view(np.int32) & _EXPONENT).view(np.float32)
    if is_torch_namespace(xp) or is_jax_namespace(xp):
        return _from_bits(xp, _as_bits(xp, magnitude) & _EXPONENT)
    # Of 0, which is outside, any power will do: its logarithm would be a warning.
    power = 2.0 ** xp.floor(xp.log2(xp.where(magnitude > 0, magnitude, xp.ones_like(magnitude))))
    # log₂ is rounded, and near a power of two to its wrong side.
    power = xp.where(power > magnitude, 0.5 * power, power)
    return xp.where(2.0 * power <= magnitude, 2.0 * power, power)


_EXPONENT = 0x7F800000
_BITS_AT_ONCE = 2


def _kth_by_bits(xp: Namespace, magnitude: Array, rank: Any, significant_bits: int) -> Array:
    """Exact selection by building the answer from its highest bits down.

    The next bits are the largest candidate that at most ``rank`` elements are smaller than. Two bits
    at a time: three counts in one reading of the data, and half as many readings.
    """
    bits = _as_bits(xp, magnitude)
    answer = xp.zeros_like(bits[..., :1])
    if not isinstance(rank, int):
        rank = rank[..., None]

    def refine(position: Any, step: int, answer: Array) -> Array:
        largest = answer
        for digit in range(1, 2**step):
            candidate = answer | (digit << position)
            below = xp.sum(xp.astype(bits < candidate, xp.int32), axis=-1, keepdims=True, dtype=xp.int32)
            largest = xp.where(below <= rank, candidate, largest)
        return largest

    # Bits below the lowest significant one are 0 in the data, and stay 0 in the answer.
    lowest = 31 - significant_bits
    rounds, rest = divmod(significant_bits, _BITS_AT_ONCE)
    if rest:
        answer = refine(31 - rest, rest, answer)

    def position_in(turn: Any) -> Any:
        return lowest + _BITS_AT_ONCE * (rounds - 1 - turn)

    if is_jax_namespace(xp):  # rolled, which compiles many times faster

        def body(turn: Any, answer: Array) -> Array:
            return refine(position_in(turn), _BITS_AT_ONCE, answer)

        answer = sys.modules["jax"].lax.fori_loop(0, rounds, body, answer)
    else:
        for turn in range(rounds):
            answer = refine(position_in(turn), _BITS_AT_ONCE, answer)
    return _from_bits(xp, answer)[..., 0]


def _kth_on_host(magnitude: np.ndarray, rank: Any) -> np.ndarray:
    if isinstance(rank, int):
        return np.array(np.partition(magnitude, rank, axis=-1)[..., rank])
    rows = magnitude.reshape(-1, magnitude.shape[-1])
    elements = [np.partition(row, k)[k] for row, k in zip(rows, rank.reshape(-1).tolist(), strict=True)]
    return np.asarray(elements, dtype=magnitude.dtype).reshape(magnitude.shape[:-1])


def kth_magnitude(magnitude: Array, rank: Any, *, significant_bits: int = 31) -> Array:
    """The element of 0-based ``rank`` in ascending order along the last axis, exactly.

    Parameters
    ----------
    magnitude : float32 array, non-negative, no NaN
    rank : an int, or an integer array of the shape of the result: one rank per row, as padded
        sequences need (zeros sort first, so a row with p padded zeros shifts its rank by p)
    significant_bits : how many leading bits (after the sign) can be non-zero in the data:
        15 for values that came from bfloat16, 18 from float16, 31 in general.
    """
    xp = namespace_of(magnitude)
    if is_numpy_namespace(xp):
        return _kth_on_host(magnitude, rank)
    if runs_on_host(xp, magnitude):
        # NumPy's introselect is several times faster than torch's kthvalue or sort here.
        elements = _kth_on_host(magnitude.numpy(force=True), rank)
        return sys.modules["torch"].from_numpy(elements)
    if is_torch_namespace(xp) or is_jax_namespace(xp):
        return _kth_by_bits(xp, magnitude, rank, significant_bits)
    return kth_of_few(magnitude, rank)


def kth_of_few(magnitude: Array, rank: Any) -> Array:
    """:func:`kth_magnitude` by sorting: slower on long axes, and under ``torch.vmap`` the only way.

    Bits cannot be looked at there before torch 2.13.
    """
    xp = namespace_of(magnitude)
    if is_torch_namespace(xp):
        ordered = sys.modules["torch"].sort(magnitude, dim=-1).values
    else:
        ordered = xp.sort(magnitude, axis=-1)
    return ordered[..., rank] if isinstance(rank, int) else take_along_last(ordered, rank)


def weighted_row_sum(weights: Array, values: Array) -> Array:
    """sum_n weights[s, n] · values[n, c] → (s, c) in float32.

    On an accelerator, or when compiled, as products and sums that fuse into one reading of ``values``
    and that no reduced-precision matrix unit touches; eagerly on a CPU, as one matrix product.
    """
    xp = namespace_of(values)
    if runs_on_host(xp, values):
        return float32_matmul(weights, values)
    return xp.stack([xp.sum(weights[s, :, None] * values, axis=0) for s in range(weights.shape[0])])


_FEW = 2**20
"""Elements up to which scattered additions on a GPU are no slower than a histogram (and can be vmapped)."""


def counts_by_bin(index: Array, weights: Array, bins: int) -> Array:
    """Histogram: number of n with ``index[..., n] == b`` and weight 1 → (..., bins).

    ``index`` is integer of shape (n,) or that of ``weights``, with values in [0, bins); weights are 0 or 1.
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
        if weights.device.type == "cuda" and weights.numel() > _FEW:
            # histc counts in shared memory, where scattered additions would queue for a few addresses.
            place = flat_index + torch.arange(rows, device=weights.device)[:, None] * bins
            place = torch.where(flat_weights > 0, place + 0.5, -1.0).to(torch.float32)
            out = torch.histc(place, rows * bins, min=0, max=rows * bins).to(weights.dtype)
        else:
            out = torch.zeros((rows, bins), dtype=weights.dtype, device=weights.device)
            out = out.scatter_add(1, flat_index.to(torch.int64), flat_weights)
    elif is_jax_namespace(xp):
        row_number = xp.arange(rows)[:, None]
        out = xp.zeros((rows, bins), dtype=weights.dtype).at[row_number, flat_index].add(flat_weights)
    else:
        # One histogram of rows · bins bins: row r owns the bins from r · bins on.
        offset = np.arange(rows)[:, None] * bins
        out = np.bincount(
            (np.asarray(flat_index) + offset).ravel(), np.asarray(flat_weights).ravel(), rows * bins
        ).reshape(rows, bins)
        out = xp.asarray(out, dtype=weights.dtype)
    return xp.reshape(out, (*lead, bins))


def sums_by_bin(index: Array, values: Array, bins: int) -> Array:
    """Sum over n of ``values[n]`` where ``index[n] == b`` → (bins,), in the accumulator's type.

    ``index`` is integer of shape (n,) with values in [0, bins); ``values`` is (n,), finite.
    """
    xp = namespace_of(values)
    wide = xp.astype(values, accumulator_dtype(xp, values))
    if is_torch_namespace(xp):
        torch = sys.modules["torch"]
        out = torch.zeros(bins, dtype=wide.dtype, device=wide.device)
        return out.scatter_add(0, index.to(torch.int64), wide)
    if is_jax_namespace(xp):
        return xp.zeros(bins, dtype=wide.dtype).at[index].add(wide)
    return xp.asarray(np.bincount(np.asarray(index), np.asarray(wide), bins), dtype=wide.dtype)
