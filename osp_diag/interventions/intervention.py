"""What is changed in a model: one operation, at one site, on some layers, tokens, heads and channels."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from osp_diag.errors import UsageError
from osp_diag.schema import STRATA
from osp_diag.wording import did_you_mean

__all__ = ["KEYS", "OF_ACTIVATIONS", "OF_WEIGHTS", "OPERATIONS", "Intervention", "Operation"]

Operation = Literal[
    "zero",
    "mean",
    "clip",
    "scale",
    "rotate",
    "mask_key",
    "scale_rows",
    "scale_columns",
    "clip_rows",
    "replace_gain",
]

OPERATIONS: dict[Operation, str] = {
    "zero": "x becomes 0",
    "mean": "x becomes its mean over the tokens that are changed, as the untouched model has it",
    "clip": "x becomes min(max(x, −value), value)",
    "scale": "x becomes value · x",
    "rotate": "the vector x of the channels becomes Qx, Q random and orthogonal, one for each layer",
    "mask_key": "no query attends to these tokens, but one that would see no other token",
    "scale_rows": "rows of a weight (output channels) are multiplied by value",
    "scale_columns": "columns of a weight (input channels) are multiplied by value",
    "clip_rows": "rows of a weight with a norm above value · the median row norm are scaled down to it",
    "replace_gain": "all gains of a norm become value, or their own root mean square",
}
"""Operation → what it does."""
KEYS: Operation = "mask_key"
OF_ACTIVATIONS: tuple[Operation, ...] = ("zero", "mean", "clip", "scale", "rotate")
OF_WEIGHTS: tuple[Operation, ...] = ("scale_rows", "scale_columns", "clip_rows", "replace_gain")
_NEED_VALUE = ("clip", "scale", "scale_rows", "scale_columns")


@dataclass(frozen=True, kw_only=True, eq=False)
class Intervention:
    """One change of a model.

    Parameters
    ----------
    operation : see :data:`OPERATIONS`
    site : where: one of a model's sites (:mod:`osp_diag.schema`); for an operation on weights a site of
        weights (``mlp_down_weight``, ``projection_weight:ROLE``) or the name of a parameter, in which ``*``
        stands for any text; nothing for ``mask_key``
    layers : of the site; None: all that have it
    channels : of the site (of one head, at sites with heads); of a weight the rows or columns; None: all
    tokens : a stratum (``all``, ``first``, ``delimiter``, ``rest``), or positions, counted from the first
        token that is not padding; of ``mask_key`` those that are masked as keys
    heads : at sites with heads, and of ``mask_key`` the query heads; None: all
    value : of the operation, in the units of the activation for ``clip``. Of ``mean`` the means, layer →
        tensor that broadcasts to (head, channel), see :func:`osp_diag.interventions.means.with_means`
    seed : of the rotation

    Raises
    ------
    UsageError : a value, stratum or field that the operation does not take
    """

    operation: Operation
    site: str = ""
    layers: tuple[int, ...] | None = None
    channels: tuple[int, ...] | None = None
    tokens: str | tuple[int, ...] = "all"
    heads: tuple[int, ...] | None = None
    value: float | Mapping[int, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.operation not in get_args(Operation):
            raise UsageError(
                f"operation {self.operation!r} is unknown; {did_you_mean(self.operation, OPERATIONS)}"
            )
        if isinstance(self.tokens, str) and self.tokens not in STRATA:
            raise UsageError(
                f"{self}: tokens {self.tokens!r} are no stratum; there are {', '.join(STRATA)}, or positions"
            )
        if self.operation != KEYS and not self.site:
            raise UsageError(f"{self}: name the site, or the weight, that is changed")
        if self.operation == KEYS and (self.site or self.channels is not None or self.value is not None):
            raise UsageError(f"{self}: masking a key takes tokens, layers and heads, and nothing else")
        if self.operation == KEYS and self.tokens == "all":
            raise UsageError(f"{self}: with all keys masked nothing is left to attend to; name tokens")
        if self.operation in OF_WEIGHTS and (self.tokens != "all" or self.heads is not None):
            raise UsageError(f"{self}: a weight has rows and columns, no tokens or heads")
        if self.operation in _NEED_VALUE and self.value is None:
            raise UsageError(f"{self}: {self.operation} needs a value")
        if self.operation in ("clip", "clip_rows") and self.value is not None and not self.number > 0:
            raise UsageError(f"{self}: {self.operation} needs a value above 0")

    @property
    def number(self) -> float:
        """The value, of an operation that takes one number."""
        if not isinstance(self.value, (int, float)):
            raise UsageError(f"{self}: {self.operation} takes one number as its value")
        return float(self.value)

    def __str__(self) -> str:
        """As the command line writes it: ``zero residual_post:11:507@first``."""
        name = self.operation.replace("_", "-")
        if self.operation == KEYS:
            places = [_written(self.tokens), _listing(self.layers), _listing(self.heads)]
        else:
            channels = _listing(self.channels)
            if self.heads is not None:
                channels = f"h{_listing(self.heads)}" + ("" if channels == "*" else f".{channels}")
            places = [self.site, _listing(self.layers), channels]
        while len(places) > 1 and places[-1] == "*":
            places.pop()
        text = f"{name} {':'.join(places)}"
        if self.operation != KEYS and self.tokens != "all":
            text += f"@{_written(self.tokens)}"
        if isinstance(self.value, (int, float)):
            text += f"={self.value:.12g}"
        return f"{text} (seed {self.seed})" if self.seed else text


def _listing(numbers: tuple[int, ...] | None) -> str:
    return "*" if numbers is None else ",".join(map(str, numbers))


def _written(tokens: str | tuple[int, ...]) -> str:
    return tokens if isinstance(tokens, str) else _listing(tokens)
