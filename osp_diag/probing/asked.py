"""What a user asks a probe for: estimators by name or instance, delimiters by tokenizer or id, groups."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from osp_diag.capture.collector import EstimatorChoice
from osp_diag.errors import UsageError
from osp_diag.estimators import get_estimator
from osp_diag.estimators.base import Estimator

__all__ = ["Asked", "checked_token_groups", "delimiters", "instances"]

Asked = Sequence[str | Estimator] | Mapping[str, Sequence[str | Estimator]]
"""Estimators by name or instance, for every site or by pattern of sites."""


def instances(estimators: Asked | None) -> EstimatorChoice:
    """Estimators from names or instances; None stays None, which stands for the default ones."""
    if estimators is None:
        return None
    if isinstance(estimators, Mapping):
        return {pattern: _each(chosen) for pattern, chosen in estimators.items()}
    return _each(estimators)


def _each(estimators: Sequence[str | Estimator]) -> list[Estimator]:
    return [get_estimator(entry) if isinstance(entry, str) else entry for entry in estimators]


def checked_token_groups(count: int) -> int:
    """How many groups of batches are kept apart: none, or enough to tell how much they differ."""
    if count < 0 or count == 1:
        raise UsageError(
            f"token_groups={count}: a bootstrap over groups of batches needs 2 or more; 0 keeps none apart"
        )
    return count


def delimiters(tokenizer: Any, given: Sequence[int] | None) -> tuple[int, ...]:
    """The ids of the delimiter stratum: those given, else the tokenizer's, else none."""
    if given is not None:
        return tuple(given)
    if tokenizer is None:
        return ()
    from osp_diag.tokens import delimiter_ids_of

    return tuple(delimiter_ids_of(tokenizer))
