"""The blocks of the stack as layers: their numbers, the calls in them, and the stream after each."""

from __future__ import annotations

from collections import Counter, defaultdict

import torch
from torch import nn

from osp_diag.sites.blocks import Block, factor_of, input_tap, minus, output_tap, same
from osp_diag.sites.names import Tap
from osp_diag.sites.trace import Event, Trace

__all__ = ["count_calls", "first_shape", "number_layers", "pick_stream", "stream_after"]


def number_layers(model: nn.Module, stack: str, events: list[Event]) -> tuple[list[int], tuple[str, ...]]:
    """(number of the layer of each call, path of the block of each layer).

    A block that did not run in the traced pass keeps its number; one that runs several times is several
    layers.
    """
    names = [event.name for event in events]
    modules = dict(model.named_modules())
    if stack in modules and len(set(names)) == len(names):
        members = [f"{stack}.{child}".lstrip(".") for child, _ in modules[stack].named_children()]
        if set(names) < set(members):
            return [members.index(name) for name in names], tuple(members)
    return list(range(len(events))), tuple(names)


def count_calls(trace: Trace, blocks: list[Event]) -> None:
    """Number the calls of modules that run several times: within their block, or within the pass."""
    scopes: dict[tuple[int, str], list[Event]] = defaultdict(list)
    running = iter([*blocks, None])
    block = next(running)
    number = 0
    for event in trace.events:
        while block is not None and block.stop < event.start:
            block, number = next(running), number + 1
        inside = block is not None and block.start < event.start and event.name.startswith(f"{block.name}.")
        scopes[number if inside else -1, event.name].append(event)
    for calls in scopes.values():
        if len(calls) > 1:
            for index, event in enumerate(calls):
                event.call = index


def pick_stream(events: list[Event], batch: int, tokens: int) -> int:
    """How many streams run side by side (Gemma 3n's AltUp); of several, the first is taken from now on."""
    state = events[0].input
    if state is None or state.ndim != 4 or tuple(state.shape[1:3]) != (batch, tokens):
        return 1
    streams = state.shape[0]
    for event in events:
        event.stream = 0
        for tensors in (event.inputs, event.outputs):
            for key, tensor in tensors.items():
                if tensor.ndim == 4 and tensor.shape[0] == streams:
                    tensors[key] = tensor[0]  # type: ignore[index]
    return streams


def stream_after(block: Block, following: Event | None, trace: Trace) -> Tap | None:
    """The tap of ``residual_post``; sets ``block.after`` to the stream after the block.

    That is the block's output, or where the block returns what is added to the stream (or is a list, which
    returns nothing), what the next block reads, and after the last block what is read next.
    """
    event, layer = block.event, block.layer
    block.after = event.output
    readers = [following] if following is not None else _readers_after(trace, event)
    shared = Counter(e.name for e in trace.events)[event.name] > 1
    for reader in readers:
        if reader.input is None or not block.is_state(reader.input) or shared:
            continue
        if event.output is not None and same(event.output, reader.input):
            break
        difference = minus(reader.input, event.input)
        is_update = event.output is None or (
            difference is not None
            and block.is_state(event.output)
            and factor_of(event.output, difference) is not None
        )
        if is_update:
            block.after = reader.input
            return input_tap("residual_post", layer, reader)
    if event.output is None:
        block.absent["residual_post"] = "the block is a list of modules, and no module reads what follows it"
        return None
    if block.is_state(event.output):
        return output_tap("residual_post", layer, event)
    block.absent["residual_post"] = "the block's output has not the shape of its input"
    return None


def _readers_after(trace: Trace, last: Event) -> list[Event]:
    return [event for event in trace.events if event.start > last.stop][:4]


def first_shape(example: object, tokens: int) -> tuple[int, int]:
    """(batch, token) of the traced pass: of its example's token ids, or of the one that is made up."""
    values = example.values() if isinstance(example, dict) else example if isinstance(example, tuple) else ()
    for value in values:
        if isinstance(value, torch.Tensor) and value.ndim == 2 and not value.is_floating_point():
            return value.shape[0], value.shape[1]
    return 1, tokens
