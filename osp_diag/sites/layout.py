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
from osp_diag.sites.trace import Event, Trace, is_compiled, run_example, undisturbed

__all__ = ["has_tokens_first", "with_layout"]


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
