"""Finding the stack of blocks of a model nobody here has seen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from itertools import pairwise

import torch
from torch import nn

from osp_diag.errors import SiteError
from osp_diag.sites.trace import Event, Trace

__all__ = ["find_stack", "holds_matrix", "is_linear", "is_norm", "parts_in_lists", "stack_names"]


def is_linear(module: nn.Module) -> bool:
    """A projection by its class: ``nn.Linear``, GPT-2's ``Conv1D``, adapted linears with a weight.

    Of the calls of a trace, :func:`~osp_diag.sites.linear_maps.mark_projections` tells the others too.
    """
    if isinstance(module, nn.Linear):
        return True
    weight = getattr(module, "weight", None)
    two_dimensional = getattr(weight, "ndim", 0) == 2 and not isinstance(module, nn.Embedding)
    name = type(module).__name__.lower()
    return two_dimensional and ("linear" in name or "conv1d" in name)


def is_norm(module: nn.Module) -> bool:
    """A normalisation: no weight of two dimensions, and the word in its class's name."""
    name = type(module).__name__.lower()
    flat = all(parameter.ndim <= 1 for parameter in module.parameters())
    return flat and ("norm" in name or name in {"dyt", "dynamictanh"})


def holds_matrix(module: nn.Module) -> bool:
    """Whether a module has weights of two dimensions: parameters, buffers, or torch.ao's packed objects."""
    if any(tensor.ndim >= 2 for tensor in (*module.parameters(), *module.buffers())):
        return True
    return any(_packed(inner) for inner in module.modules())


def _packed(module: nn.Module) -> bool:
    return any(isinstance(value, torch.ScriptObject) for value in vars(module).values())


def _size(module: nn.Module) -> int:
    """Number of weights, packed ones as far as their modules tell."""
    weights = sum(tensor.numel() for tensor in module.parameters())
    weights += sum(buffer.numel() for buffer in module.buffers() if buffer.dtype != torch.bool)
    for inner in module.modules():
        if any(_packed(child) for child in inner.children()):
            weights += getattr(inner, "in_features", 0) * getattr(inner, "out_features", 0)
    return weights


def _candidates(model: nn.Module) -> dict[str, nn.Module]:
    """Outermost lists of blocks: containers whose children have matrices of their own."""
    stacks: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if not isinstance(module, (nn.ModuleList, nn.Sequential, nn.ModuleDict)):
            continue
        if any(outer == "" or name.startswith(outer + ".") for outer in stacks):
            continue
        children = list(module.children())
        is_stack = bool(children) and all(
            any(True for _ in child.children()) and holds_matrix(child) for child in children
        )
        if is_stack:
            stacks[name] = module
    return stacks


def find_stack(
    model: nn.Module, trace: Trace, blocks: str | None, stack: str | None = None
) -> tuple[str, list[Event]]:
    """The path of the stack, and its blocks' calls in order of execution.

    A block that runs several times in one pass (ALBERT shares its weights) counts as several layers.

    Parameters
    ----------
    blocks : path or pattern of the blocks, of whatever kind
    stack : of several stacks that run (:func:`stack_names`) the one with a part of this name in its path;
        None: the largest

    Raises
    ------
    SiteError : there is no list of blocks, ``blocks`` names none, or ``stack`` not one alone.
    """
    if blocks is not None and stack is not None:
        raise SiteError(f"blocks={blocks!r} and stack={stack!r} both say which blocks; give one of them")
    if blocks is not None:
        calls = [event for event in trace.events if event.input is not None]
        events = [event for event in calls if _parent(event.name) == blocks]
        modules = dict(model.named_modules())
        if not events and blocks in modules:
            events = _silent_blocks(trace, blocks, modules[blocks])
        events = events or [event for event in calls if _names(blocks, event.name)]
        if not events:
            raise SiteError(
                f"no module that ran matches blocks={blocks!r}; name the list of blocks or a pattern like "
                f"'model.layers.*'. Lists in this model: {', '.join(_candidates(model)) or 'none'}"
            )
        return blocks, in_turns(model, trace, blocks, events)
    lists = _running_lists(model, trace)
    if not lists:
        raise SiteError(
            f"{type(model).__name__} has no list of blocks (an nn.ModuleList or nn.Sequential of modules "
            "with weights) that ran; name it with "
            "`blocks=` (on the command line --blocks), for example 'encoder.layers'"
        )
    # Of several stacks (encoder and decoder, or a vision tower) the largest is the model's.
    name = _largest(model, lists) if stack is None else _named_stack(model, trace, lists, stack)
    return name, in_turns(model, trace, name, lists[name])


def _running_lists(model: nn.Module, trace: Trace) -> dict[str, list[Event]]:
    """Path of each list of blocks that ran -> the calls of its blocks."""
    lists = {}
    for name, container in _candidates(model).items():
        members = {f"{name}.{child}".lstrip(".") for child, _ in container.named_children()}
        events = [event for event in trace.events if event.name in members and event.input is not None]
        events = events or _silent_blocks(trace, name, container)
        if events:
            lists[name] = events
    return lists


def _largest(model: nn.Module, lists: Iterable[str]) -> str:
    return max(lists, key=lambda name: _size(model.get_submodule(name)))


def stack_names(model: nn.Module, trace: Trace, followed: str) -> dict[str, str]:
    """Path -> name of the stacks of a model that has several, {} of one that has not.

    A stack is a list of blocks that attend: a stem of convolutions is none, and neither are the parts of
    blocks in several lists. It is called by the first part of its path in which it differs from the others.

    Parameters
    ----------
    followed : the path of the one that is measured, which counts in any case
    """
    lists = _running_lists(model, trace)
    if followed not in lists:
        return {}
    own = in_turns(model, trace, followed, lists[followed])
    stacks = {followed: own} | {
        path: events
        for path, events in lists.items()
        if (any(_attends(trace, event) for event in events) or _is_of_two_halves(model, path))
        and not any(block.start <= events[0].start <= block.stop for block in own)
    }
    parts = {path: path.split(".") for path in lists if path in stacks}
    if len(parts) < 2:
        return {}
    return {path: _distinct_part(path, parts) for path in parts}


def _is_of_two_halves(model: nn.Module, path: str) -> bool:
    """Whether a list stands in the encoder or the decoder of a model that has both."""
    has_both = bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    return has_both and not {"encoder", "decoder"}.isdisjoint(path.split("."))


def _distinct_part(path: str, parts: Mapping[str, list[str]]) -> str:
    others = [other for name, other in parts.items() if name != path]
    for place, part in enumerate(parts[path]):
        if all(other[place : place + 1] != [part] for other in others):
            return part
    return path


def _attends(trace: Trace, block: Event) -> bool:
    calls = (*trace.attention, *trace.skipped)
    return block.attends or any(block.start < time < block.stop for time, _ in calls)


def _named_stack(model: nn.Module, trace: Trace, lists: Mapping[str, list[Event]], stack: str) -> str:
    names = stack_names(model, trace, _largest(model, lists)) or {path: path for path in lists}
    hits = [path for path, name in names.items() if stack in (path, name)]
    hits = hits or [path for path in names if any(part.startswith(stack) for part in path.split("."))]
    if len(hits) != 1:
        stacks = ", ".join(name if name == path else f"{name} ({path})" for path, name in names.items())
        what = "names several stacks of blocks" if hits else "names no stack of blocks that ran"
        raise SiteError(
            f"stack={stack!r} {what}; this model has: {stacks}. A stack that runs on other inputs alone "
            "(images, say) needs `example=` with such"
        )
    return hits[0]


def _block_of_members(path: str, module: nn.Module, members: list[Event]) -> Event | None:
    """A block that never runs itself, from the calls of its members in their order."""
    readers = [event for event in members if event.input is not None]
    if not readers:
        return None
    # The clock ticks by two, so that these times are nobody's.
    return Event(
        path,
        module,
        dict(readers[0].inputs),
        start=members[0].start - 1,
        stop=members[-1].stop + 1,
        entry=readers[0],
        members=tuple(dict.fromkeys(event.name for event in members)),
    )


def _silent_blocks(trace: Trace, path: str, container: nn.Module) -> list[Event]:
    """Blocks that do not run themselves: lists of modules, or modules of which only ``forward`` is called."""
    blocks = []
    for name, module in container.named_children():
        block = f"{path}.{name}".lstrip(".")
        members = [event for event in trace.events if _parent(event.name) == block]
        blocks.append(_block_of_members(block, module, members) if members else None)
    return sorted((block for block in blocks if block is not None), key=lambda event: event.start)


def in_turns(model: nn.Module, trace: Trace, path: str, events: list[Event]) -> list[Event]:
    """The blocks whose parts stand in several lists that take turns, as XLM's attentions and MLPs do.

    Where a list's members hand the stream from one to the next they are blocks themselves, and ``events``
    is returned as it is.
    """
    modules = dict(model.named_modules())
    if path not in modules or any(event.entry is not None for event in events) or _is_passed_on(events):
        return events
    parent, size = _parent(path), len(list(modules[path].children()))
    lists = {
        f"{parent}.{name}".lstrip("."): module
        for name, module in (modules[parent].named_children() if parent in modules else ())
        if isinstance(module, nn.ModuleList) and len(module) == size
    }
    calls = [event for event in trace.events if _parent(event.name) in lists]
    places = [int(event.name.rpartition(".")[2]) for event in calls]
    of_lists = {_parent(event.name) for event in calls}
    each_once = len(calls) == size * len(of_lists) == len({event.name for event in calls})
    # A list that runs as a whole before the other begins (an encoder, then a decoder) takes no turns.
    whole = [event for event in calls if holds_matrix(event.module)]
    alone = size == 1 and sum(event.attends for event in whole) != 1
    if len({_parent(event.name) for event in whole}) < 2 or not each_once or alone:
        return events
    if places != sorted(places):
        return events
    blocks = []
    for place in range(size):
        members = [event for event, own in zip(calls, places, strict=True) if own == place]
        blocks.append(_block_of_members(members[0].name, members[0].module, members))
    return [block for block in blocks if block is not None]


def parts_in_lists(block: Event) -> tuple[str, ...]:
    """The modules of a block whose parts stand in several lists; () of any other."""
    return () if any(_parent(name) == block.name for name in block.members) else block.members


def _is_passed_on(events: list[Event]) -> bool:
    """Whether each member reads what the one before gave, or a sum of that with what it read."""
    pairs = [(one, other) for one, other in pairwise(events) if one.output is not None]
    if not pairs:
        return len(events) > 1
    return any(_follows(one, other) for one, other in pairs)


def _follows(one: Event, other: Event) -> bool:
    given, read, before = one.output, other.input, one.input
    if given is None or read is None or before is None or given.numel() != read.numel():
        return True
    given, read = given.double().reshape(-1), read.double().reshape(-1)
    if torch.equal(given, read) or before.numel() != given.numel():
        return True
    return torch.allclose(before.double().reshape(-1) + given, read, rtol=1e-2, atol=1e-3)


def _names(pattern: str, name: str) -> bool:
    """Whether a pattern names this module: ``*`` stands for one part of the path, not for several."""
    return pattern.count(".") == name.count(".") and fnmatchcase(name, pattern)


def _parent(name: str) -> str:
    return name.rpartition(".")[0]
