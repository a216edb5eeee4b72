"""Exact softmax statistics of attention at the speed of fused attention, through FlexAttention.

Two passes over the logits, neither of which leaves the chip:

1. query against key, with the sink key masked out: each query's log-sum-exp and largest logit;
2. key against query, adding −log-sum-exp of the query to each logit: the log-sum-exp over queries is then the
   logarithm of the exact attention mass that the key receives.

Their values are narrow slices of the inputs, since FlexAttention wants some; what it averages is not used.
The kernels are compiled apart from what comes before and after them: Inductor does not let a score function
read a tensor that is computed in the same graph.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

from osp_diag.estimators.attention import AttentionObservation
from osp_diag.estimators.attention_mask import AttentionMask
from osp_diag.estimators.attention_tiles import ProductLogits, SoftmaxStatistics
from osp_diag.schema import STRATA

__all__ = ["FlexStatistics", "is_expressible"]

_NARROWEST_VALUE = 16
"""FlexAttention's kernels take no narrower values."""

Compile = Callable[[Callable[..., Any]], Callable[..., Any]]


def is_expressible(mask: AttentionMask) -> bool:
    """Whether FlexAttention's block masks hold this mask: causality and windows, no tensors or functions."""
    return mask.tensor is None and mask.function is None and mask.keys is None


@lru_cache(maxsize=16)
def _block_masks(
    tokens: int, causal: bool, window: int | None, device: torch.device
) -> tuple[BlockMask, BlockMask]:
    """Which blocks of (query, key), and of (key, query), hold anything."""

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        allowed = key >= 0
        if causal:
            allowed = allowed & (key <= query)
        if window is not None:
            allowed = allowed & (query - key < window)
        return allowed

    def seen_by(batch: Tensor, head: Tensor, key: Tensor, query: Tensor) -> Tensor:
        return sees(batch, head, query, key)

    forward = create_block_mask(sees, None, None, tokens, tokens, device=device)
    return forward, create_block_mask(seen_by, None, None, tokens, tokens, device=device)


def _sink_logit(source: ProductLogits, sink: Tensor) -> Tensor:
    """(batch, head, token): the sink key's logit, −Inf where the query cannot see it."""
    batch, heads, tokens, width = source.query.shape
    groups = source.key.shape[1]
    index = sink[:, None, None, None].expand(batch, groups, 1, width)
    sink_key = source.key.gather(2, index).repeat_interleave(heads // groups, dim=1)
    logit = (source.query * sink_key).sum(-1) * source.scale
    if source.softcap is not None:
        logit = source.softcap * torch.tanh(logit / source.softcap)
    query = torch.arange(tokens, device=sink.device)[None]
    sees = source.usable.gather(1, sink[:, None]).expand(batch, tokens)
    if source.mask.causal:
        sees = sees & (query >= sink[:, None])
    if source.mask.window is not None:
        sees = sees & (query - sink[:, None] < source.mask.window)
    return torch.where(sees[:, None], logit, -float("inf"))


# Why two passes, and what was rejected: docs/decisions.md, Capture.
class FlexStatistics:
    """Softmax statistics of calls that share their length, mask, scale and soft-cap.

    Half-precision inputs are multiplied as they are: their products are exact in float32.

    Parameters
    ----------
    tokens, device : of the calls
    mask : causality and window, see :func:`is_expressible`
    scale, softcap : logits are softcap · tanh(scale · q·k / softcap), or scale · q·k
    stratum_names : of the strata of tokens that come with each call
    compile : ``torch.compile``, which the kernels need
    """

    def __init__(
        self,
        tokens: int,
        device: torch.device,
        mask: AttentionMask,
        *,
        scale: float,
        softcap: float | None,
        stratum_names: tuple[str, ...] = STRATA,
        compile: Compile,
    ) -> None:
        self.mask, self.scale, self.softcap = mask, scale, softcap
        self.stratum_names = stratum_names
        self.forward_blocks, self.backward_blocks = _block_masks(tokens, mask.causal, mask.window, device)
        self.prepare = compile(self._prepare)
        self.over_keys = compile(self._over_keys)
        self.combine = compile(self._combine)
        self.over_queries = compile(self._over_queries)
        self.complete = compile(self._complete)

    def __call__(
        self, query: Tensor, key: Tensor, strata: Tensor, sink_logits: Tensor | None
    ) -> SoftmaxStatistics:
        """Statistics of (batch, head, token, …) queries and (batch, key_value_head, token, …) keys."""
        weight, sink, bias, sink_logit = self.prepare(query, key, strata)
        other_sum, other_maximum = self.over_keys(query, key, bias)
        statistics, log_sum_exp = self.combine(weight, sink_logit, sink_logits, other_sum, other_maximum)
        log_mass = self.over_queries(query, key, log_sum_exp)
        # Replaced here, because what dynamo makes of a named tuple's _replace has lost its fields.
        return statistics._replace(key_mass=self.complete(statistics.key_mass, log_mass, sink, bias))

    def _prepare(self, query: Tensor, key: Tensor, strata: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(weight of each token, sink positions, 0 or −Inf for each key, sink logits).

        −Inf keeps the sink key and keys that are not finite out of the first pass.
        """
        observation = AttentionObservation(
            query,
            key,
            None,
            strata,
            stratum_names=self.stratum_names,
            scale=self.scale,
            mask=self.mask,
            softcap=self.softcap,
        )
        source: Any = observation.source
        position = torch.arange(query.shape[2], device=query.device)[None]
        is_other_key = source.usable & (position != observation.sink[:, None])
        bias = torch.where(is_other_key, 0.0, -float("inf"))
        return observation.valid, observation.sink, bias, _sink_logit(source, observation.sink)

    def _capped(self, value: Tensor) -> Tensor:
        return value if self.softcap is None else self.softcap * torch.tanh(value / self.softcap)

    def _over_keys(self, query: Tensor, key: Tensor, bias: Tensor) -> tuple[Any, Any]:
        """(log-sum-exp, maximum) of each query over the allowed keys other than the sink key."""

        def score(value: Tensor, batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
            # Selected, not added: a NaN would survive an addition.
            return torch.where(bias[batch, column] == 0.0, self._capped(value), -float("inf"))

        _, aux = flex_attention(
            query,
            key,
            key[..., :_NARROWEST_VALUE],
            score_mod=score,
            block_mask=self.forward_blocks,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
            return_aux=AuxRequest(lse=True, max_scores=True),
        )
        return aux.lse, aux.max_scores

    def _over_queries(self, query: Tensor, key: Tensor, log_sum_exp: Tensor) -> Any:
        """Logarithm of Σ over queries of exp(logit − log-sum-exp), for every key.

        A query that does not count has the log-sum-exp +Inf.
        """

        def score(value: Tensor, batch: Tensor, head: Tensor, column: Tensor, row: Tensor) -> Tensor:
            # logit − log Z is log A[query, key]; its log-sum-exp over queries is the log of the key's mass.
            total = log_sum_exp[batch, head, row]
            return torch.where(total < float("inf"), self._capped(value) - total, -float("inf"))

        _, aux = flex_attention(
            key.repeat_interleave(query.shape[1] // key.shape[1], dim=1),
            query,
            query[..., :_NARROWEST_VALUE],
            score_mod=score,
            block_mask=self.backward_blocks,
            scale=self.scale,
            return_aux=AuxRequest(lse=True),
        )
        return aux.lse

    def _combine(
        self,
        weight: Tensor,
        sink_logit: Tensor,
        sink_logits: Tensor | None,
        other_sum: Tensor,
        other_maximum: Tensor,
    ) -> tuple[SoftmaxStatistics, Tensor]:
        """The statistics but ``key_mass``, and the log-sum-exp of the queries that count, +Inf for others."""
        absent = torch.full_like(sink_logit, -float("inf"))
        extra = absent if sink_logits is None else sink_logits.float()[None, :, None].expand_as(absent)
        # log Z over the three parts of the softmax: the other keys, the sink key and the learned sinks.
        total = torch.logaddexp(torch.logaddexp(other_sum, sink_logit), extra)
        nonfinite = torch.isnan(total) | (total == float("inf"))
        usable = ~nonfinite & (total > -float("inf"))
        total = torch.where(usable, total, 0.0)
        sink_logit = torch.where(usable, sink_logit, absent)
        sink_probability = torch.exp(sink_logit - total)
        statistics = SoftmaxStatistics(
            log_sum_exp=total,
            other_maximum=torch.where(usable, other_maximum, absent),
            sink_logit=sink_logit,
            sink_probability=sink_probability,
            extra_probability=torch.exp(torch.where(usable, extra, absent) - total),
            usable=usable,
            nonfinite=nonfinite,
            key_mass=weight[:, None] * sink_probability,
        )
        return statistics, torch.where((weight[:, None] > 0) & usable, total, float("inf"))

    def _complete(self, sink_mass: Tensor, log_mass: Tensor, sink: Tensor, bias: Tensor) -> Tensor:
        """The mass of every key: the sink's from each query's own share of it, the others' from its log."""
        position = torch.arange(log_mass.shape[-1], device=sink.device)[None, None]
        mass = torch.where(bias[:, None] == 0.0, log_mass.exp(), 0.0)
        return torch.where(position == sink[:, None, None], sink_mass.sum(-1)[..., None], mass)
