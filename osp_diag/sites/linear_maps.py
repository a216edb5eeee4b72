"""Which calls of the trace are projections: by their class, by what wraps one, or by what they compute."""

from __future__ import annotations

import torch
from torch import nn

from osp_diag.sites.stack import holds_matrix, is_linear, is_norm
from osp_diag.sites.trace import Event, Trace, outputs_of

__all__ = ["mark_projections", "mixes_tokens"]

_TOLERANCE = 0.05
"""Of the largest output: a projection that quantises its input as it runs is linear to about 1%."""
_ROUNDING = 0.02
"""Of the largest output: what other tokens change where a quantised input shares its scale with them."""
_SPREAD = 8.0
"""Standard deviation of the inputs that are tried: far outside of where activation functions are straight."""


# Why what a module computes, and not what it is called: docs/decisions.md, Capture.
def mark_projections(trace: Trace) -> None:
    """Set ``projection`` on the outermost calls of linear maps, and ``inside_projection`` on what they call.

    Call it in evaluation mode without gradients: a module whose class says nothing is run on other numbers.
    """
    by_class: dict[type, bool] = {}
    ends = _ends(trace.events)
    for index in reversed(range(len(trace.events))):
        # Later calls first: what a call made comes before the call itself.
        event, inner = trace.events[index], trace.events[index + 1 : ends[index]]
        event.projection = is_linear(event.module) or _wraps_projection(event, inner)
        if not event.projection and not inner and _may_be_projection(event):
            kind = type(event.module)
            if kind not in by_class:
                by_class[kind] = _is_linear_map(event)
            event.projection = by_class[kind]
        if event.projection:
            for nested in inner:
                nested.projection, nested.inside_projection = False, True


def _ends(events: list[Event]) -> list[int]:
    """For each call the index after the last call that it made; calls are in order of their start."""
    ends = [len(events)] * len(events)
    running: list[int] = []
    for index, event in enumerate(events):
        while running and events[running[-1]].stop < event.start:
            ends[running.pop()] = index
        running.append(index)
    return ends


def _wraps_projection(event: Event, inner: list[Event]) -> bool:
    """Whether a module is one projection with something of low rank or a scale beside it (LoRA, DoRA, IA³).

    It reads what its projection reads and gives what that gives, it has further matrices, and its other
    projections, if any, are of lower rank.
    """
    if event.input is None or event.output is None or any(is_norm(call.module) for call in inner):
        return False
    projections = [call for call in inner if call.projection]
    whole = [
        call
        for call in projections
        if call.input is not None
        and call.output is not None
        and call.input.shape == event.input.shape
        and call.output.shape == event.output.shape
    ]
    if len(whole) != 1 or event.attends:
        return False
    base = whole[0]
    if len(projections) > 1 and not torch.equal(base.input, event.input):  # type: ignore[arg-type]
        return False
    rank = min(base.input.shape[-1], base.output.shape[-1])  # type: ignore[union-attr]
    others = [call for call in projections if call is not base]
    narrow = all(_narrowest(call) < rank for call in others)
    return narrow and (bool(others) or _has_matrices_besides(event.module, base.module))


def _narrowest(event: Event) -> float:
    widths = [tensor.shape[-1] for tensor in (event.input, event.output) if tensor is not None]
    return min(widths, default=float("inf"))


def _has_matrices_besides(module: nn.Module, base: nn.Module) -> bool:
    own = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
    return any(t.ndim >= 2 and id(t) not in own for t in (*module.parameters(), *module.buffers()))


def _may_be_projection(event: Event) -> bool:
    """Whether a module that calls no other, and is none of torch's own, maps rows to rows with a matrix."""
    if type(event.module).__module__.startswith("torch.nn.modules") or event.attends:
        return False
    x, y = event.input, event.output
    if x is None or y is None or not event.alone or len(event.outputs) != 1:
        return False
    return x.shape[:-1] == y.shape[:-1] and x.shape[-2] > 1 and holds_matrix(event.module)


def _is_linear_map(event: Event) -> bool:
    """Whether a module applies one affine map to every token, and one that mixes channels."""
    shape = event.input.shape  # type: ignore[union-attr]
    generator = torch.Generator().manual_seed(0)
    left, right = (_SPREAD * torch.randn(shape, generator=generator) for _ in range(2))
    bumped = left.clone()
    bumped[..., 0] += _SPREAD
    inputs = (left, right, (left + right) / 2, left.roll(1, dims=-2), bumped)
    outputs = [_call_again(event, x) for x in inputs]
    if any(y is None for y in outputs):
        return False
    y_left, y_right, y_middle, y_rolled, y_bumped = (y.double() for y in outputs)  # type: ignore[union-attr]
    size = _TOLERANCE * float(y_left.abs().max())
    affine = torch.allclose((y_left + y_right) / 2, y_middle, rtol=0, atol=size)
    same_for_all = torch.allclose(y_left.roll(1, dims=-2), y_rolled, rtol=0, atol=size)
    changed = ((y_bumped - y_left).abs().amax(dim=tuple(range(y_left.ndim - 1))) > 0).sum()
    return affine and same_for_all and int(changed) > 1


def _call_again(event: Event, x: torch.Tensor) -> torch.Tensor | None:
    """What the module of a recorded call gives for another input, on the host; None where it fails.

    The module must have been called with one argument alone.
    """
    name = next(iter(event.inputs))
    x = x.to(event.device, event.inputs[name].dtype)
    try:
        result = event.module.forward(**{name: x}) if isinstance(name, str) else event.module.forward(x)
    except Exception:
        # A foreign module may refuse other numbers in any way; then nothing is learnt of it.
        return None
    tensors = [t for t in outputs_of(result).values() if isinstance(t, torch.Tensor) and t.ndim >= 2]
    return tensors[0].detach().cpu() if tensors else None


def mixes_tokens(event: Event) -> bool | None:
    """Whether what a module gives for a token depends on the other tokens; None where it cannot be asked.

    It is run once more, with one token as it was and noise in place of the others.
    """
    x, y = event.input, event.output
    if not event.alone or event.attends or x is None or y is None or x.ndim < 3 or x.shape[1] < 2:
        return True if event.attends else None
    place = x.shape[1] // 2
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    other = (float(x.float().std()) * noise).to(x.dtype)
    other[:, place] = x[:, place]
    result = _call_again(event, other)
    if result is None or result.shape != y.shape:
        return None
    # A module that adds to the stream itself is judged by what it adds.
    parts = [y.double(), y.double() - x.double()] if y.shape == x.shape else [y.double()]
    size = _ROUNDING * min(float(part.abs().max()) for part in parts)
    return not torch.allclose(result[:, place].double(), y[:, place].double(), rtol=0, atol=size)
