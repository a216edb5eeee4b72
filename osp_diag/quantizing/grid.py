"""Few-bit integers and what they stand for: the grids on which weights and activations are rounded.

The arithmetic is our own; tests compare it with that of ``compressed-tensors``, element by element.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from osp_diag.errors import UsageError

__all__ = ["Grid", "Scales"]

_CLIPS = tuple(1 - step / 100 for step in range(80))
"""Shares of a row's largest magnitude that the clip search tries, as the OSP release does."""
_CLIP_POWER = 2.4
"""Of the rounding errors that the clip search adds up."""
_VALUES_AT_ONCE = 2**15
"""Values whose clip is searched together: they fit a processor's cache."""


@dataclass(frozen=True)
class Scales:
    """Where the grids lie: a code c stands for scale · (c − zero_point).

    Attributes
    ----------
    scale, zero_point
        of shape (…, 1); with a group size (…, group, 1).
    """

    scale: Float[Tensor, "... 1"]
    zero_point: Float[Tensor, "... 1"]


@dataclass(frozen=True, kw_only=True)
class Grid:
    """2ᵇ evenly spaced points for each row (the last axis) of a tensor, or for each group of a row.

    Codes are the integers from −2ᵇ⁻¹ to 2ᵇ⁻¹ − 1. A value x has the code
    clamp(round(x/s + z), −2ᵇ⁻¹, 2ᵇ⁻¹ − 1), halves to even, and stands for s · (code − z) afterwards. The
    scale s and the zero point z are

    - *symmetric*: z = 0 and s = max|x| / ((2ᵇ − 1)/2) with ``full_range`` (7.5 at 4 bits: the largest |x| is
      half a step off), else max|x| / (2ᵇ⁻¹ − 1) (7 at 4 bits);
    - *asymmetric*: s = (max x − min x) / (2ᵇ − 1) and z = round(−2ᵇ⁻¹ − min x / s); with ``zero_in_range``
      the maximum is no less than 0 and the minimum no more, so that 0 is a point of the grid.

    With ``clip_search`` s is p times as large, p the one of 1, 0.99 … 0.21 for which Σ|error|^2.4 of the row
    (or group) is least; of equal ones the largest.

    Attributes
    ----------
    bits
        2 to 8.
    symmetric
        whether the grid lies about 0.
    group_size
        how many neighbouring channels share a grid; None: all of a row.
    full_range, zero_in_range, clip_search
        see above; the first and the last are of symmetric grids, the second of asymmetric ones.
    """

    bits: int
    symmetric: bool
    group_size: int | None = None
    full_range: bool = True
    zero_in_range: bool = True
    clip_search: bool = False

    @property
    def lowest(self) -> int:
        """The least code."""
        return -(2 ** (self.bits - 1))

    @property
    def highest(self) -> int:
        """The largest code."""
        return 2 ** (self.bits - 1) - 1

    def scales(self, values: Float[Tensor, "... channel"]) -> Scales:
        """Where the grids of these values lie, in float32 (float64 for float64), without gradient.

        Raises
        ------
        UsageError : the group size does not divide the number of channels
        """
        return self._scales(self._grouped(_working(values.detach())))

    def codes(
        self, values: Float[Tensor, "... channel"], scales: Scales | None = None
    ) -> Float[Tensor, "... channel"]:
        """The integers, as floating-point numbers.

        Parameters
        ----------
        scales : grids to use; None: those of these values

        Raises
        ------
        UsageError : as :meth:`scales`
        """
        working = self._grouped(_working(values))
        return self._codes(working, scales or self._scales(working.detach())).reshape(values.shape)

    def rounded(
        self, values: Float[Tensor, "... channel"], scales: Scales | None = None
    ) -> Float[Tensor, "... channel"]:
        """The nearest points of the grid, in the dtype of the values; rounding passes no gradient.

        Parameters
        ----------
        scales : grids to use; None: those of these values

        Raises
        ------
        UsageError : as :meth:`scales`
        """
        if values.numel() == 0:
            return values
        with torch.no_grad():
            working = self._grouped(_working(values))
            grids = scales or self._scales(working)
            points = (self._codes(working, grids) - grids.zero_point) * grids.scale
        return points.reshape(values.shape).to(values.dtype)

    def rounded_straight_through(
        self, values: Float[Tensor, "... channel"], scales: Scales | None = None
    ) -> Float[Tensor, "... channel"]:
        """As :meth:`rounded`, with the gradient of the identity (Bengio et al. 2013, arXiv 1308.3432).

        Raises
        ------
        UsageError : as :meth:`scales`
        """
        return values + (self.rounded(values, scales) - values).detach()

    def _grouped(self, values: Float[Tensor, "... channel"]) -> Shaped[Tensor, "..."]:
        if self.group_size is None:
            return values
        if values.shape[-1] % self.group_size:
            raise UsageError(
                f"a grid for each group of {self.group_size} channels needs a multiple of that, and there "
                f"are {values.shape[-1]}"
            )
        return values.unflatten(-1, (-1, self.group_size))

    def _codes(self, values: Tensor, scales: Scales) -> Tensor:
        # In place, on the quotient's own memory: a token's activations are rounded at every call.
        shifted = values / scales.scale
        shifted = shifted if self.symmetric else shifted.add_(scales.zero_point)
        return shifted.clamp_(self.lowest, self.highest).round_()

    def _scales(self, values: Tensor) -> Scales:
        if self.symmetric:
            return self._symmetric_scales(values)
        low, high = torch.aminmax(values, dim=-1, keepdim=True)
        if self.zero_in_range:
            low, high = low.clamp(max=0), high.clamp(min=0)
        scale = (high - low) / (2**self.bits - 1)
        # Where all values of a row are equal any scale does by which they stay what they are.
        constant = torch.where(low == 0, torch.finfo(scale.dtype).eps, low.abs())
        scale = torch.where(scale == 0, constant, scale)
        return Scales(scale, (self.lowest - low / scale).round_())

    def _symmetric_scales(self, values: Tensor) -> Scales:
        largest = values.abs().amax(-1, keepdim=True)
        steps = (2**self.bits - 1) / 2 if self.full_range else self.highest
        scale = largest / steps
        scale = torch.where(scale == 0, torch.finfo(scale.dtype).eps, scale)
        zero = torch.zeros_like(scale)
        if not self.clip_search:
            return Scales(scale, zero)
        rows, scales = values.reshape(-1, values.shape[-1]), scale.reshape(-1, 1)
        at_once = max(1, _VALUES_AT_ONCE // rows.shape[-1])
        parts = [
            self._clipped(part, of_part)
            for part, of_part in zip(rows.split(at_once), scales.split(at_once), strict=True)
        ]
        return Scales(torch.cat(parts).reshape(scale.shape), zero)

    def _clipped(self, rows: Float[Tensor, "row channel"], scale: Float[Tensor, "row 1"]) -> Tensor:
        zero, best, least = torch.zeros_like(scale), scale, torch.full_like(scale, torch.inf)
        for share in _CLIPS:
            candidate = share * scale
            points = self._codes(rows, Scales(candidate, zero)).mul_(candidate)
            # |e|^2.4 by its logarithm takes a fifth of a power's time; log 0 is −∞, and exp(−∞) is 0.
            error = points.sub_(rows).abs_().log_().mul_(_CLIP_POWER).exp_().sum(-1, keepdim=True)
            better = error < least
            best, least = torch.where(better, candidate, best), torch.where(better, error, least)
        return best


def _working(values: Tensor) -> Tensor:
    return values if values.dtype == torch.float64 else values.float()
