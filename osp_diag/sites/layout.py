"""How the stream between the blocks is laid out: which axis holds sequences and which tokens."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from osp_diag.errors import SiteError
from osp_diag.seams.threads import of_this_thread
from osp_diag.sites.names import Tap
from osp_diag.sites.stack import is_linear, is_norm
from osp_diag.sites.trace import Event, Trace, default_example, is_compiled, run_example, undisturbed

__all__ = ["has_tokens_first", "keep_first_stream", "streams_in_a_row", "turn_channels", "with_layout"]


def turn_channels(trace: Trace, blocks: list[Event]) -> bool:
    """Turn activations that the blocks pass on as (batch, channel, token), and say whether they do.

    So does SqueezeBERT, whose projections are convolutions of width 1: nothing in its first block multiplies
    the stream's last axis. In the trace these activations are (batch, token, channel) afterwards, and the
    convolutions are projections.
    """
    stream = blocks[0].input
    if stream is None or stream.ndim != 3 or stream.shape[1] == stream.shape[2]:
        return False
    channels, tokens = stream.shape[1:]
    inside = trace.within(blocks[0])
    linear = any(is_linear(e.module) and e.input is not None and e.input.shape[-1] == tokens for e in inside)
    if linear or not any(_is_pointwise(e.module) and e.module.in_channels == channels for e in inside):
        return False
    for event in trace.events:
        if not blocks[0].start <= event.start <= blocks[-1].stop:
            continue
        event.projection = event.projection or _is_pointwise(event.module)
        _turn(event, tokens)
    for block in blocks:
        if block.entry is not None:
            block.inputs, block.turned = block.entry.inputs, block.entry.turned
    return True


def streams_in_a_row(
    model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...] | None, block: Event
) -> int:
    """How many streams stand one behind the other in each row, of which the first alone holds the tokens.

    ProphetNet's decoder has such: behind T tokens stand T placeholders for each further token that it
    predicts. A stream of k·T vectors is taken for k of them if, with the ids in another order, nothing but
    the first T changes.
    """
    stream = block.input
    inputs = default_example(model) if example is None else example
    named: dict[Any, Any] = dict(inputs) if isinstance(inputs, Mapping) else dict(enumerate(inputs))
    ids = [
        v for v in named.values() if isinstance(v, torch.Tensor) and v.ndim == 2 and not v.is_floating_point()
    ]
    if stream is None or stream.ndim != 3:
        return 1
    lengths = [v.shape[1] for v in ids if v.shape[0] == stream.shape[0] and 1 < v.shape[1] < stream.shape[1]]
    tokens = next((length for length in lengths if stream.shape[1] % length == 0), None)
    if tokens is None:
        return 1
    turned = {name: v.roll(1, dims=1) if any(v is value for value in ids) else v for name, v in named.items()}
    states: list[torch.Tensor] = []

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        name = next(iter(block.inputs))
        states.append((args[name] if isinstance(name, int) else kwargs[name]).detach().cpu())
        raise _EnoughError

    compiled = torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()
    handle = model.get_submodule((block.entry or block).name).register_forward_pre_hook(
        of_this_thread(keep), with_kwargs=True
    )
    try:
        with undisturbed(model), compiled:
            run_example(model, turned if isinstance(inputs, Mapping) else tuple(turned.values()))
    except _EnoughError:
        pass
    finally:
        handle.remove()
    if len(states) != 1 or states[0].shape != stream.shape:
        return 1
    same = (states[0] == stream).all(-1).all(0)
    return stream.shape[1] // tokens if bool(same[tokens:].all()) and not bool(same[:tokens].all()) else 1


def keep_first_stream(trace: Trace, blocks: list[Event], streams: int) -> None:
    """Leave of ``streams`` that stand one behind the other in each row the first, in all of the trace."""
    stream = blocks[0].input
    if streams == 1 or stream is None:
        return
    width = stream.shape[1]
    for event in (*trace.events, *(block for block in blocks if block.entry is not None)):
        for tensors in (event.inputs, event.outputs):
            for place, tensor in tensors.items():
                if tensor.ndim >= 3 and tensor.shape[1] == width:
                    tensors[place] = tensor[:, : width // streams]  # type: ignore[index]


def _is_pointwise(module: nn.Module) -> bool:
    """Whether a module is a convolution over single tokens, which is a projection (in groups, perhaps)."""
    return isinstance(module, nn.Conv1d) and module.kernel_size == (1,) and module.stride == (1,)


def _turn(event: Event, tokens: int) -> None:
    turned = []
    for side, tensors in (("input", event.inputs), ("output", event.outputs)):
        for place, tensor in tensors.items():
            if tensor.ndim == 3 and tensor.shape[2] == tokens != tensor.shape[1]:
                tensors[place] = tensor.transpose(1, 2)  # type: ignore[index]
                turned.append((side, place))
    event.turned = frozenset(turned)


# Why this is asked of the model and not of names: docs/decisions.md, Capture.
def has_tokens_first(
    model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...] | None, trace: Trace, blocks: list[Event]
) -> bool:
    """Whether the stream is (token, batch, channel), as fairseq, Megatron and torch's own layers have it.

    An attention call says it, since its queries are (batch, head, token, width). Where none was seen, or
    there are as many sequences as tokens, the first block does: if the first axis holds tokens, a change in
    one half of it changes the block's output in the other.

    Raises
    ------
    SiteError : the blocks pass on no vectors of tokens, as those of convolutional networks do
    """
    stream = blocks[0].input
    assert stream is not None, "blocks are calls that have an input"
    _refuse_other_than_tokens(model, trace, blocks[0], stream)
    if stream.ndim != 3:
        return False
    leading, second = stream.shape[:2]
    inside = [call for time, call in trace.attention if blocks[0].start < time < blocks[-1].stop]
    for call in inside:
        shape = (call.tensor.shape[0], call.tensor.shape[2])
        if shape[0] != shape[1] and shape in ((leading, second), (second, leading)):
            return shape == (second, leading)
    if min(leading, second) == 1:
        return leading > 1
    return _mixes_along_first_axis(model, example, blocks[0])


def _refuse_other_than_tokens(model: nn.Module, trace: Trace, block: Event, stream: torch.Tensor) -> None:
    width = stream.shape[-1]
    readers = [
        event
        for event in trace.within(block)
        if is_linear(event.module) or is_norm(event.module)
        if event.input is not None and event.input.shape[-1] == width
        # A batch norm reads an image whose last axis is its width.
        if any(parameter.shape[-1] == width for parameter in event.module.parameters())
    ]
    if stream.ndim > 4 or (stream.ndim == 4 and not readers):
        raise SiteError(
            f"the blocks of {type(model).__name__} pass on tensors of shape {tuple(stream.shape)}, which are "
            "not vectors of tokens (batch, token, channel); osp-diag measures transformers and other models "
            "of sequences. Name another list of blocks with `blocks=`"
        )


def _mixes_along_first_axis(model: nn.Module, example: Any, block: Event) -> bool:
    """Whether a change in the first half of the block's input, along its first axis, reaches the second."""
    outputs: list[torch.Tensor] = []
    assert block.input is not None, "a block has an input"
    half = block.input.shape[0] // 2

    def with_changed_input(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = next(iter(block.inputs))
        value = args[key] if isinstance(key, int) else kwargs[key]
        # Turned round, and neither scaled nor shifted: a norm would take that back.
        for changed in (value, torch.cat([value[:half].flip(-1), value[half:]])):
            # Copies: a cache of keys and values grows by each run, and the second would see the first's.
            positional, named = copy.deepcopy((args, kwargs))
            if isinstance(key, int):
                result = module.forward(*positional[:key], changed, *positional[key + 1 :], **named)
            else:
                result = module.forward(*positional, **{**named, key: changed})
            outputs.append(result if isinstance(result, torch.Tensor) else _first_tensor(result))
        raise _EnoughError

    compiled = torch.compiler.set_stance("force_eager") if is_compiled(model) else nullcontext()
    hook = of_this_thread(with_changed_input)
    handle = model.get_submodule(block.name).register_forward_pre_hook(hook, with_kwargs=True)
    try:
        with undisturbed(model), compiled:
            run_example(model, example)
    except _EnoughError:
        pass
    finally:
        handle.remove()
    return len(outputs) == 2 and not torch.equal(outputs[0][half:], outputs[1][half:])


class _EnoughError(Exception):
    """Ends a forward pass of which nothing further is needed."""


def _first_tensor(result: Any) -> torch.Tensor:
    values = result.values() if isinstance(result, Mapping) else result
    return next(value for value in values if isinstance(value, torch.Tensor) and value.is_floating_point())


def with_layout(tap: Tap, trace: Trace, stream: torch.Tensor, *, tokens_first: bool) -> Tap:
    """The tap, with which of the first two axes of its tensor holds the tokens.

    A tensor of another leading shape than the stream's has its sequences first where the stream has its
    tokens first, and the other way round; where both axes are as long, all are laid out like the stream.
    """
    event = next((e for e in trace.events if e.name == tap.module), None)
    if event is None or stream.ndim != 3:
        return tap
    side = event.outputs if tap.side == "output" else event.inputs
    tensor = side.get(tap.argument)  # type: ignore[arg-type]
    if tensor is None or tensor.ndim < 3:
        return replace(tap, tokens_first=tokens_first)
    leading, turned = tuple(stream.shape[:2]), (stream.shape[1], stream.shape[0])
    is_turned = leading != turned and tuple(tensor.shape[:2]) == turned
    return replace(tap, tokens_first=tokens_first != is_turned)
