"""Hadamard matrices of any size, and products with them that never make the whole matrix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from jaxtyping import Float, Int8
from torch import Tensor

from osp_diag.errors import UsageError

__all__ = ["Hadamard", "SignedHadamard", "core_matrix", "hadamard", "signed_hadamard"]

_LARGEST_CORE = 1024
"""The order up to which a Hadamard matrix that is no power of two is multiplied as it is."""
_POWER_AT_ONCE = 7
"""A power of two is multiplied in Kronecker factors of order 2⁷ at most, which matrix units like best."""


@dataclass(frozen=True, kw_only=True)
class Hadamard:
    """An orthogonal matrix I ⊗ H / √n, where H is a Hadamard matrix: ±1, rows orthogonal.

    H itself is a Kronecker product of small Hadamard matrices, one after the other along the channels.
    """

    size: int
    """d, of the vectors that are multiplied"""
    factors: tuple[int, ...]
    """orders of the Kronecker factors of H; their product n is its order"""

    @property
    def order(self) -> int:
        """n, the order of each block: d where the Hadamard matrix is a full one."""
        return math.prod(self.factors)

    @property
    def is_full(self) -> bool:
        """Whether every channel is mixed with every other."""
        return self.order == self.size

    @property
    def description(self) -> str:
        """``Hadamard 576``, or ``block Hadamard 4 of 92`` where none of the size is made here."""
        if self.is_full:
            return f"Hadamard {self.size}"
        return f"block Hadamard {self.order} of {self.size}"

    def apply(self, values: Float[Tensor, "*rows channel"]) -> Float[Tensor, "*rows channel"]:
        """Rows times the matrix: x (I ⊗ H) / √n, in float32 (float64 for float64), in the dtype of ``values``.

        It costs Σ factors multiplications a channel. Gradients pass.

        Raises
        ------
        UsageError : rows of another size
        """
        return self._product(values, transposed=False)

    def undo(self, values: Float[Tensor, "*rows channel"]) -> Float[Tensor, "*rows channel"]:
        """Rows times the transpose, which is the inverse."""
        return self._product(values, transposed=True)

    def matrix(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "channel channel"]:
        """The dense matrix, for tests and for rotations that are learned from it."""
        return self.apply(torch.eye(self.size, dtype=dtype))

    def _product(self, values: Tensor, *, transposed: bool) -> Tensor:
        if values.shape[-1] != self.size:
            raise UsageError(
                f"rows of {values.shape[-1]} channels cannot be multiplied by a {self.description}; its rows "
                f"have {self.size}"
            )
        working = values if values.dtype == torch.float64 else values.float()
        # (row and block, factor 1, factor 2, …); each product moves its factor behind the others.
        product = working.reshape(-1, self.order)
        for factor in self.factors:
            core = _core_on(factor, working.device, working.dtype)
            core = core.T if transposed else core
            product = (product.reshape(-1, factor, self.order // factor).transpose(1, 2) @ core).reshape(
                -1, self.order
            )
        return (product / math.sqrt(self.order)).reshape(values.shape).to(values.dtype)


@dataclass(frozen=True, eq=False, kw_only=True)
class SignedHadamard:
    """diag(±1) times a Hadamard matrix: the random rotation of QuaRot, as quick as the matrix itself."""

    hadamard: Hadamard
    signs: Float[Tensor, " channel"]

    def apply(self, values: Float[Tensor, "*rows channel"]) -> Float[Tensor, "*rows channel"]:
        """Rows times the matrix: (x · signs) H."""
        return self.hadamard.apply(values * self.signs.to(values.device, values.dtype))

    def matrix(self, dtype: torch.dtype = torch.float32) -> Float[Tensor, "channel channel"]:
        """The dense matrix."""
        return self.apply(torch.eye(self.hadamard.size, dtype=dtype))


def hadamard(size: int) -> Hadamard:
    """The Hadamard matrix of a size, or blocks of the largest power of two that divides it.

    Full are sizes 2ᵏ · m where a Hadamard matrix of order m, or of m = m₁ · m₂ each, comes from Paley's first
    (m − 1 a prime power, 3 modulo 4) or second construction (m/2 − 1 a prime power, 1 modulo 4) and m is at
    most 1,024: among them 576 = 16 · 36, 1536 = 128 · 12 and 5504 = 16 · 344. (Paley, J. Math. Phys. 12, 1933.)

    Raises
    ------
    UsageError : no positive size
    """
    if size < 1:
        raise UsageError(f"size={size}: a Hadamard matrix has 1 or more rows")
    power = (size & -size).bit_length() - 1
    cores = _cores(size >> power, power)
    if cores is None:
        cores = ()
    elif cores:
        power = (size // math.prod(cores)).bit_length() - 1
    parts = -(-power // _POWER_AT_ONCE)
    split = [2 ** (power // parts + (index < power % parts)) for index in range(parts)]
    return Hadamard(size=size, factors=(*split, *cores) or (1,))


def signed_hadamard(size: int, generator: torch.Generator) -> SignedHadamard:
    """A Hadamard matrix whose rows have random signs."""
    signs = 1.0 - 2.0 * torch.randint(2, (size,), generator=generator)
    return SignedHadamard(hadamard=hadamard(size), signs=signs)


@lru_cache(maxsize=64)
def _cores(odd: int, power: int) -> tuple[int, ...] | None:
    """Orders that are no powers of two, with the product odd · 2ʲ, j ≤ power; None where none are known."""
    if odd == 1:
        return ()
    for twos in range(2, power + 1):
        order = odd << twos
        if order > _LARGEST_CORE:
            break
        if _paley_field(order) is not None:
            return (order,)
    for divisor in range(3, math.isqrt(odd) + 1, 2):
        if odd % divisor == 0:
            for twos in range(2, power - 1):
                first, second = _cores(divisor, twos), _cores(odd // divisor, power - twos)
                if first and second:
                    return (*first, *second)
    return None


def _paley_field(order: int) -> tuple[int, int] | None:
    """(prime, exponent) of the field from which a Hadamard matrix of the order is made."""
    for size, residue in ((order - 1, 3), (order // 2 - 1, 1)):
        if size % 4 == residue and (field := _prime_power(size)):
            return field
    return None


def _prime_power(number: int) -> tuple[int, int] | None:
    """(p, e) with pᵉ = number."""
    if number < 2:
        return None
    prime = next((p for p in range(2, math.isqrt(number) + 1) if number % p == 0), number)
    exponent = round(math.log(number, prime))
    return (prime, exponent) if prime**exponent == number else None


@lru_cache(maxsize=64)
def _core_on(order: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    with torch.inference_mode(False):
        return torch.from_numpy(core_matrix(order)).to(device, dtype)


@lru_cache(maxsize=64)
def core_matrix(order: int) -> Int8[np.ndarray, "order order"]:
    """A Hadamard matrix of ±1: Sylvester's for a power of two, else Paley's.

    Raises
    ------
    UsageError : neither construction gives one of this order
    """
    if order & (order - 1) == 0:
        matrix = np.ones((1, 1), dtype=np.int8)
        while len(matrix) < order:
            matrix = np.kron(np.array([[1, 1], [1, -1]], dtype=np.int8), matrix)
        return matrix
    field = _paley_field(order)
    if field is None:
        raise UsageError(
            f"no Hadamard matrix of order {order} comes from Sylvester's or Paley's constructions"
        )
    character = _characters_of_differences(*field)
    size = len(character)
    bordered = np.zeros((size + 1, size + 1), dtype=np.int8)
    bordered[0, 1:], bordered[1:, 1:] = 1, character
    if size % 4 == 3:
        bordered[1:, 0] = -1
        return bordered + np.eye(size + 1, dtype=np.int8)
    bordered[1:, 0] = 1
    return np.kron(bordered, np.array([[1, 1], [1, -1]], dtype=np.int8)) + np.kron(
        np.eye(size + 1, dtype=np.int8), np.array([[1, -1], [-1, -1]], dtype=np.int8)
    )


def _characters_of_differences(prime: int, exponent: int) -> Int8[np.ndarray, "field field"]:
    """χ(a − b) over a field: 1 for squares, −1 for other elements, 0 for 0."""
    size = prime**exponent
    powers = _powers_of_generator(prime, exponent)
    place = prime ** np.arange(exponent)
    character = np.zeros(size, dtype=np.int8)
    character[powers @ place] = 1 - 2 * (np.arange(size - 1) % 2)
    digits = np.arange(size)[:, None] // place % prime
    differences = (digits[:, None] - digits[None]) % prime @ place
    return character[differences]


def _powers_of_generator(prime: int, exponent: int) -> np.ndarray:
    """Coefficients of x⁰, x¹, … modulo a polynomial for which they are all elements but 0.

    Of degree 1 the polynomial is x − g, and these are the powers of a primitive root g.
    """
    size = prime**exponent
    for number in range(1, size):
        lower = number // prime ** np.arange(exponent) % prime  # x^e = −(lower)
        element = np.zeros(exponent, dtype=np.int64)
        element[0] = 1
        powers = np.empty((size - 1, exponent), dtype=np.int64)
        for index in range(size - 1):
            powers[index] = element
            carried = element[-1]
            element = (np.concatenate([[0], element[:-1]]) - carried * lower) % prime
            if index < size - 2 and element[0] == 1 and not element[1:].any():
                break  # back at 1 too early
        else:
            if element[0] == 1 and not element[1:].any():
                return powers
    raise AssertionError("every finite field has a generator")
