"""One block of the trace, and what all who look for its sites need."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from osp_diag.seams.call import SkipReason
from osp_diag.sites.names import Tap, name_within
from osp_diag.sites.stack import is_norm, parts_in_lists
from osp_diag.sites.trace import Event

__all__ = ["Block", "factor_of", "input_tap", "is_inside", "minus", "outermost", "output_tap", "same"]


def same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    """Whether two tensors hold the same numbers in the same order."""
    if left is None or right is None or left.numel() != right.numel():
        return False
    return torch.equal(left.reshape(-1), right.reshape(-1))


def factor_of(output: torch.Tensor, difference: torch.Tensor) -> float | None:
    """c such that difference = c · output, or None."""
    output = output.double().reshape(difference.shape)
    energy = float((output * output).sum())
    if energy == 0 or not bool(difference.any()):
        return None
    # Least squares, as ⟨output, difference⟩ / ⟨output, output⟩; then it has to fit everywhere.
    factor = float((output * difference).sum()) / energy
    tolerance = 2e-2 * float(difference.abs().max())
    return factor if torch.allclose(factor * output, difference, rtol=2e-2, atol=tolerance) else None


def minus(left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor | None:
    """left − right in float64, or None where there is none or their sizes differ."""
    if left is None or right is None or left.numel() != right.numel():
        return None
    return left.double() - right.double().reshape(left.shape)


def input_tap(site: str, layer: int, event: Event) -> Tap:
    """The first floating input of a module."""
    reader = event.entry or event
    return Tap(
        site=site,
        layer=layer,
        module=reader.name,
        side="input",
        argument=next(iter(reader.inputs)),
        call=reader.call,
        stream=event.stream,
        channels_first=("input", next(iter(reader.inputs))) in reader.turned,
    )


def output_tap(site: str, layer: int, event: Event) -> Tap:
    """The first floating output of a module."""
    return Tap(
        site=site,
        layer=layer,
        module=event.name,
        side="output",
        argument=next(iter(event.outputs)),
        call=event.call,
        stream=event.stream,
        channels_first=("output", next(iter(event.outputs))) in event.turned,
    )


def is_inside(event: Event, outer: Event | None) -> bool:
    """Whether a call is ``outer`` or was made during it."""
    return outer is not None and outer.start <= event.start and event.stop <= outer.stop


def outermost(events: list[Event]) -> list[Event]:
    """The calls that no other of these calls encloses."""
    outer_events: list[Event] = []
    for event in events:
        if not any(outer.start < event.start and event.stop < outer.stop for outer in outer_events):
            outer_events.append(event)
    return outer_events


@dataclass
class Block:
    """What one block did in the trace, and the taps found in it."""

    layer: int
    event: Event
    inner: list[Event]
    hidden_size: int
    calls: list[tuple[int, Any]]
    """self-attention calls, with the time of each"""
    skipped: list[tuple[int, str]] = field(default_factory=list)
    """attention calls that were not delivered: when, and why"""
    crossings: list[tuple[int, Any]] = field(default_factory=list)
    """calls over another sequence's keys, with the time of each"""
    taps: list[Tap] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    factors: dict[str, float] = field(default_factory=dict)
    """contribution → what the block multiplies it with before adding it"""
    experts: str | None = None
    expert_list: tuple[str, str] | None = None
    """(path of the list of experts that are modules, path of the down projection within one)"""
    after: torch.Tensor | None = None
    """the stream after the block"""
    mixer: Event | None = None
    """what mixes tokens where no seam sees attention"""

    def name_of(self, path: str) -> str:
        """A module's path within the block, the same in every layer; of one elsewhere the whole path."""
        return name_within(self.event.name, parts_in_lists(self.event), path) or path

    @property
    def call(self) -> Any:
        """The first attention call, or None."""
        return self.calls[0][1] if self.calls else None

    @property
    def call_time(self) -> int:
        return self.calls[0][0] if self.calls else 0

    @property
    def cross_time(self) -> int | None:
        """When cross-attention was called, or None.

        The traced pass has no cache: more keys than queries, beside a self-attention, are other tokens' keys,
        unless the queries are fewer than the block's tokens (Funnel pools them).
        """
        pooled = {time for time, call in self.crossings if not self._asks_of_all_tokens(call)}
        for time, reason in self.skipped:
            if reason == SkipReason.CROSS or (
                reason == SkipReason.CACHED and self.calls and time not in pooled
            ):
                return time
        return None

    def _asks_of_all_tokens(self, call: Any) -> bool:
        return call.tensor.shape[0] * call.tensor.shape[2] == self.rows

    @property
    def cross_call(self) -> Any:
        """The call of cross-attention, or None where there is none or it could not be read."""
        return next((call for time, call in self.crossings if time == self.cross_time), None)

    @property
    def rows(self) -> int:
        """Number of tokens in all sequences of the example."""
        state = self.event.input
        return 0 if state is None else state.numel() // state.shape[-1]

    def add(self, site: str, event: Event, side: str) -> None:
        self.taps.append((input_tap if side == "input" else output_tap)(site, self.layer, event))

    def is_state(self, tensor: torch.Tensor | None) -> bool:
        """Whether a tensor has the shape of the residual stream: one vector of its width a token."""
        return (
            tensor is not None and tensor.shape[-1] == self.hidden_size and self.has_one_row_a_token(tensor)
        )

    def has_one_row_a_token(self, tensor: torch.Tensor | None) -> bool:
        return tensor is not None and tensor.numel() == self.rows * tensor.shape[-1]

    def past_norm(self, event: Event) -> Event:
        """``event``, or what reads the norm with which it begins (T5's layers hold their own norms)."""
        inside = [e for e in self.inner if event.start < e.start and e.stop < event.stop]
        norm = next((e for e in inside if is_norm(e.module)), None)
        # Modules around the norm (a Sequential that begins with it) read the same.
        if norm is None or not all(same(e.input, event.input) for e in inside if e.start <= norm.start):
            return event
        return next((e for e in inside if e.start > norm.stop and same(e.input, norm.output)), event)
