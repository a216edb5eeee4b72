"""What mixes tokens in a block beside the self-attention that a seam sees: unseen mixers, cross-attention."""

from __future__ import annotations

import re

from osp_diag.sites.attention_sites import event_around
from osp_diag.sites.blocks import Block, is_inside, outermost
from osp_diag.sites.linear_maps import mixes_tokens
from osp_diag.sites.stack import is_norm
from osp_diag.sites.trace import Event

__all__ = ["after_unseen_mixer", "cross_attention", "cross_output", "first_reader"]

_FEED_FORWARD = re.compile(r"mlp|feed_?forward|ffn|moe|channel_?mix", re.IGNORECASE)
"""Names of an MLP in a block without attention, where the order of calls does not tell it from a mixer."""


def _reads_the_stream(block: Block, event: Event) -> bool:
    """Whether a module, no norm and no single projection, reads the stream and holds weights."""
    if is_norm(event.module) or event.projection or not block.is_state(event.input):
        return False
    return any(True for _ in event.module.parameters()) or any(
        inner.projection for inner in block.inner if is_inside(inner, event)
    )


def after_unseen_mixer(block: Block) -> tuple[Event | None, list[Event]]:
    """(the mixer's call or None, the calls that are the MLP's) of a block whose attention no seam sees.

    An MLP is told by its module's name, or else by giving for each token what does not depend on the
    others. Where projections stand in the block itself, those after the second reading of the stream are
    the MLP's.
    """
    modules = outermost([e for e in block.inner if _reads_the_stream(block, e)])
    named = [e for e in outermost(block.inner) if _FEED_FORWARD.search(e.name.rpartition(".")[2])]
    if named:
        rest = [event for event in block.inner if any(is_inside(event, e) for e in named)]
        return _before(modules, named[0].start), rest
    if mixes_tokens(block.event) is False:
        return None, block.inner
    for module in reversed(modules):
        if mixes_tokens(module) is False:
            return _before(modules, module.start), [e for e in block.inner if is_inside(e, module)]
    mixer = modules[-1] if modules else None
    start = mixer.stop if mixer is not None else _second_reading(block)
    rest = [] if start is None else [event for event in block.inner if event.start > start]
    return mixer, rest if sum(event.projection for event in rest) > 1 else []


def _before(modules: list[Event], time: int) -> Event | None:
    return next((module for module in modules if module.stop < time), None)


def _second_reading(block: Block) -> int | None:
    """When the last norm begins that two projections follow, and that reads another state than the block."""
    projections = [event.start for event in block.inner if event.projection]
    first = min(projections, default=0)
    for event in reversed(block.inner):
        later = sum(start > event.start for start in projections)
        if is_norm(event.module) and block.is_state(event.input) and later > 1 and event.start > first:
            return event.start
    return None


def cross_attention(block: Block) -> Event | None:
    """The outermost module around a call of cross-attention with at most one projection after the call."""
    time = block.cross_time
    return None if time is None else event_around(block, time, time)


def cross_output(block: Block) -> Event | None:
    """The first projection after the call of cross-attention."""
    time = block.cross_time
    if time is None:
        return None
    return next((e for e in block.inner if e.projection and e.start > time), None)


def first_reader(block: Block, start: int, stop: int) -> Event | None:
    """The first projection of the stream that runs between two times."""
    for event in block.inner:
        if start < event.start < stop and event.projection and block.is_state(event.input):
            return event
    return None
