"""Sequences that a model makes token by token with a cache, put together to what one pass would have been."""

from __future__ import annotations

import re
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from osp_diag.capture.cross_attention import Crossing
from osp_diag.capture.hooks import ForwardPass
from osp_diag.estimators.attention_mask import AttentionMask, QueryRows
from osp_diag.estimators.base import Layout, State

if TYPE_CHECKING:
    from osp_diag.seams.attention import AttentionCall

__all__ = ["UNCOUNTED", "CachedPass", "CachedSequences", "cache_without_count", "cached_tokens"]

UNCOUNTED = -1
"""of the tokens in a cache that holds recurrent states alone, which do not tell how many they sum up"""

_OFFSETS = re.compile(r"^(start_pos|input_pos|cache_position|past_length|cache_len(gth)?)$")


def cached_tokens(forward_pass: ForwardPass) -> int | None:
    """How many tokens of each sequence a cache holds when a pass begins; None where there is no cache.

    ``UNCOUNTED`` of a cache of recurrent states alone, once it was written to.
    """
    cache = cache_without_count(forward_pass)
    if cache is not None:
        return UNCOUNTED if any(_was_written(layer) for layer in cache.layers) else 0
    for arguments in reversed(forward_pass.levels):
        for name, value in arguments.items():
            if hasattr(value, "get_seq_length"):
                return int(value.get_seq_length())
            if name.startswith("past") and isinstance(value, tuple) and value:
                keys = value[0][0] if isinstance(value[0], tuple) else None
                if isinstance(keys, Tensor) and keys.ndim == 4:
                    return keys.shape[-2]
            if _OFFSETS.search(name):
                if isinstance(value, int) and not isinstance(value, bool):
                    return value
                if isinstance(value, Tensor) and value.numel() > 0 and not value.is_floating_point():
                    return int(value.reshape(-1)[0])
    asked = any(arguments.get("use_cache") is True for arguments in forward_pass.levels)
    return 0 if asked else None


def cache_without_count(forward_pass: ForwardPass) -> Any:
    """A cache of transformers that holds recurrent states alone, among the arguments of a pass; or None."""
    for arguments in reversed(forward_pass.levels):
        for value in arguments.values():
            if hasattr(value, "get_seq_length") and hasattr(value, "has_previous_state"):
                layers = getattr(value, "layers", None) or ()
                if layers and not any(hasattr(layer, "get_seq_length") for layer in layers):
                    return value
    return None


def _was_written(layer: Any) -> bool:
    """Whether a layer of a cache holds the state of earlier tokens, whose flags are one for each state."""
    flags = getattr(layer, "has_previous_state", False)
    return any(flags.values()) if isinstance(flags, Mapping) else bool(flags)


@dataclass
class CachedPass:
    """What one pass over some tokens of the sequences gave."""

    ids: Tensor
    present: Tensor
    """(batch, token) bool: not padding"""
    start: int
    """tokens that were cached before"""
    activations: dict[tuple[str, int, str], Tensor] = field(default_factory=dict)
    """by (site, layer, kind): (batch, token, …)"""
    calls: dict[int, AttentionCall] = field(default_factory=dict)
    """by layer: the new queries, with the new keys and values alone"""
    crossings: dict[int, Crossing] = field(default_factory=dict)
    """by layer: attention to another sequence"""
    key_counts: dict[int, int] = field(default_factory=dict)
    """by layer: how many keys the queries were given"""
    mixer_states: dict[int, tuple[Layout, State]] = field(default_factory=dict)
    """by layer: what the states of recurrent mixers after the pass add to the statistics"""
    size: int = 0

    def keep_crossing(self, layer: int, crossing: Crossing) -> None:
        """Hold a call of cross-attention; its keys are the encoder's, which nobody writes to."""
        held = {n: getattr(crossing.call, n) for n in ("query", "logits", "mask")}
        copies: dict[str, Any] = {n: t.clone() for n, t in held.items() if t is not None}
        self.size += sum(t.numel() * t.element_size() for t in copies.values())
        self.crossings[layer] = replace(crossing, call=replace(crossing.call, **copies))

    def keep(self, key: tuple[str, int, str], values: Tensor) -> None:
        """A copy, since the model may go on to write to the tensor."""
        self.activations[key] = values.clone()
        self.size += values.numel() * values.element_size()

    def keep_call(self, layer: int, call: AttentionCall) -> None:
        """A copy of what is new in a call; the cache itself is not held."""
        count = self.ids.shape[1]
        changes: dict[str, Any] = {}
        for name in ("query", "key", "value", "logits"):
            tensor = getattr(call, name)
            if tensor is not None:
                tensor = _new(tensor, self.start, count) if name in ("key", "value") else tensor
                changes[name] = tensor.clone()
                self.size += tensor.numel() * tensor.element_size()
        self.key_counts[layer] = call.lengths[1]
        self.calls[layer] = replace(call, **changes)


class CachedSequences:
    """The passes over one batch of sequences so far, the last of which holds what came last."""

    def __init__(self) -> None:
        self.passes: list[CachedPass] = []
        self.last_keys: dict[int, Tensor] = {}
        """by layer: all keys that the last pass was given"""
        self.cache: weakref.ref[Any] | None = None
        """of recurrent states alone, which these sequences began with"""

    @property
    def tokens(self) -> int:
        return sum(part.ids.shape[1] for part in self.passes)

    @property
    def size(self) -> int:
        """Bytes that are held."""
        return sum(part.size for part in self.passes)

    def continues(self, cached: int | None, batch: int, cache: Any = None) -> bool:
        """Whether a pass after ``cached`` tokens goes on with these sequences.

        Where their number is ``UNCOUNTED``, ``cache`` tells, if it is the one of the first pass.
        """
        if bool(self.passes) and cached == UNCOUNTED:
            return self.cache is not None and self.cache() is cache and self.passes[-1].ids.shape[0] == batch
        return bool(self.passes) and self.tokens == cached and self.passes[-1].ids.shape[0] == batch

    def whole(self, name: str) -> Tensor:
        """``ids`` or ``present`` of all tokens."""
        return torch.cat([getattr(part, name) for part in self.passes], dim=1)

    def activations(self) -> dict[tuple[str, int, str], Tensor]:
        """Activations of all tokens, where every pass gave them."""
        keys = [key for key in self.passes[0].activations if all(key in p.activations for p in self.passes)]
        return {key: torch.cat([part.activations[key] for part in self.passes], dim=1) for key in keys}

    def layers(self) -> list[int]:
        """Layers whose attention call every pass gave."""
        return [layer for layer in self.passes[0].calls if all(layer in p.calls for p in self.passes)]

    def call(self, layer: int) -> AttentionCall | None:
        """The attention of one layer as one call; None where the cache was changed in between."""
        calls = [part.calls[layer] for part in self.passes]
        # One pass alone is what it is: a prompt, or an encoder's whole text, may see itself from both sides.
        causal = len(calls) > 1 or calls[0].causal
        changes: dict[str, Any] = {"mask": None, "mask_function": None, "causal": causal}
        for name in ("query", "key", "value"):
            parts = [getattr(call, name) for call in calls]
            whole = None if any(part is None for part in parts) else torch.cat(parts, dim=2)
            changes[name] = whole
        if calls[-1].logits is not None:
            rows = [
                _widened(call.logits, part.start, self.tokens)
                for call, part in zip(calls, self.passes, strict=True)
                if call.logits is not None
            ]
            return replace(calls[-1], **changes, logits=torch.cat(rows, dim=2))
        # Beams that were reordered, or a cache that was cut: earlier keys are not those that were seen.
        held = self.last_keys.get(layer)
        if held is not None and held.shape[2] == self.tokens and not torch.equal(held, changes["key"]):
            return None
        return replace(calls[-1], **{**changes, "mask": self._mask(layer)})

    def _mask(self, layer: int) -> Tensor | None:
        """The masks of all passes as one, or None where causality says it all."""
        calls = [part.calls[layer] for part in self.passes]
        if all(call.mask is None and call.mask_function is None for call in calls):
            return None
        parts = []
        for call, part in zip(calls, self.passes, strict=True):
            query = call.tensor
            batch, heads, count = query.shape[:3]
            mask = AttentionMask(causal=False, tensor=call.mask, function=call.mask_function)
            index = torch.arange(count, device=query.device)
            rows = QueryRows(index, (0, count), (0, part.key_counts[layer]))
            bias, allowed = mask.rows(rows, batch=batch, heads=heads, like=query)
            values = torch.zeros(allowed.shape, device=query.device) if bias is None else bias.float()
            values = torch.where(allowed, values, float("-inf"))
            parts.append(_widened(values, part.start, self.tokens).expand(batch, -1, -1, -1))
        most = max(values.shape[1] for values in parts)
        return torch.cat([values.expand(-1, most, -1, -1) for values in parts], dim=2)


def _new(values: Tensor, start: int, count: int) -> Tensor:
    """Keys or values of the tokens of a pass: behind what was cached, or at the end of a moving window."""
    if values.shape[2] >= start + count:
        return values[:, :, start : start + count]
    return values[:, :, -count:]


def _widened(rows: Tensor, start: int, tokens: int) -> Tensor:
    """(batch, head, query, key of that pass) → (…, key of the whole); what was not there is −Inf."""
    count, keys = rows.shape[-2:]
    seen = start + count
    if keys > seen:
        rows, keys = rows[..., :seen], seen
    return functional.pad(rows, (seen - keys, tokens - seen), value=float("-inf"))
