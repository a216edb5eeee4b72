"""One tiny forward pass, recorded: which modules ran inside each block, on what, and gave what.

Structure alone is ambiguous (a "norm" can stand before or after, a fused projection can be laid out in
several ways); the tensors of one real forward pass settle it. The pass is eleven tokens long.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from osp_diag.checkpoints.checkpoint import evaluation_mode
from osp_diag.errors import SiteError
from osp_diag.seams.attention import AttentionCall, AttentionCapture, SkipReason
from osp_diag.seams.threads import of_this_thread

__all__ = [
    "Event",
    "Trace",
    "default_example",
    "fused_encoder_layers",
    "is_compiled",
    "outputs_of",
    "run_example",
    "trace_forward",
    "undisturbed",
    "unfused",
    "unwrap",
]

TOKENS = 11
"""No number of heads or experts that anybody uses: a router's softmax must not look like attention."""


@dataclass(eq=False)
class Event:
    """One call of one module."""

    name: str
    module: nn.Module
    inputs: dict[int | str, torch.Tensor]
    outputs: dict[int | None, torch.Tensor] = field(default_factory=dict)
    start: int = 0
    stop: int = 0
    device: torch.device | None = None
    """where the module's first activation was"""
    alone: bool = False
    """called with one tensor and nothing else"""
    attends: bool = False
    """an attention call was made during it"""
    projection: bool = False
    """an outermost linear map"""
    inside_projection: bool = False
    call: int | None = None
    """which of several calls of its module"""
    stream: int | None = None
    """which of several streams its activations are"""
    entry: Event | None = None
    """the first call in a block that does not run itself"""
    members: tuple[str, ...] = ()
    """the modules of such a block"""
    turned: frozenset[tuple[str, int | str | None]] = frozenset()
    """(side, place) of the tensors that were (batch, channel, token), and are turned here"""

    @property
    def input(self) -> torch.Tensor | None:
        return next(iter(self.inputs.values()), None)

    @property
    def output(self) -> torch.Tensor | None:
        return next(iter(self.outputs.values()), None)


@dataclass
class Trace:
    """All calls in order of their start, and the attention calls with the clock time at which they came.

    Tensors are copies on the host.
    """

    events: list[Event] = field(default_factory=list)
    attention: list[tuple[int, Any]] = field(default_factory=list)
    clock: int = 0
    skipped: list[tuple[int, str]] = field(default_factory=list)
    """attention calls that were not delivered: when, and why"""
    crossings: list[tuple[int, Any]] = field(default_factory=list)
    """calls over another sequence's keys; each is among the skipped ones too"""

    def tick(self) -> int:
        self.clock += 2
        return self.clock

    def within(self, outer: Event) -> list[Event]:
        """Calls made during ``outer``, itself left out, and what projections are made of."""
        inner = [event for event in self.events if outer.start < event.start and event.stop < outer.stop]
        return [event for event in inner if not event.inside_projection]


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside wrappers of ``torch.compile``, DDP and their like."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if inner is None and isinstance(model, nn.parallel.DistributedDataParallel):
            inner = model.module
        if not isinstance(inner, nn.Module):
            return model
        model = inner


def fused_encoder_layers(model: nn.Module) -> bool:
    """Whether torch may run layers of the model as one fused kernel, which hooks inside them switch off."""
    return any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules())


@contextmanager
def unfused(model: nn.Module) -> Iterator[None]:
    """Switch the fused path of ``nn.TransformerEncoderLayer`` off, as hooks do, so that attention is seen."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    if fused_encoder_layers(model):
        torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _on_host(call: AttentionCall) -> AttentionCall:
    """A copy of what sites are told by: tensors and mask; a mask function becomes a mask."""
    # What another sequence's keys are seen through tells no site.
    mask = None if call.crosses else call.mask
    if call.mask_function is not None and not call.crosses:
        position = torch.arange(call.lengths[1], device=call.tensor.device)
        zero = torch.zeros((), dtype=torch.long, device=call.tensor.device)
        mask = call.mask_function(zero, zero, position[:, None], position[None, :])
    tensors = {"query": call.query, "key": call.key, "value": call.value, "logits": call.logits, "mask": mask}
    copies = {n: t.detach().to("cpu", copy=True) for n, t in tensors.items() if t is not None}
    return replace(call, mask_function=None, **copies)  # type: ignore[arg-type]


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, what it wraps, or a module of it runs compiled code, which runs no hooks."""
    return any(
        hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None
        for module in (model, *unwrap(model).modules())
    )


def _floating_copies(values: Mapping[Any, Any]) -> dict[Any, torch.Tensor]:
    """Copies of the activations, on the host: a module may add to its input in place."""
    return {
        key: _finite_copy(value.detach().to("cpu", copy=True))
        for key, value in values.items()
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 2
    }


def _finite_copy(copy: torch.Tensor) -> torch.Tensor:
    """NaN and Inf as zeros: a model that makes them is still recognised by which tensors are equal."""
    if bool(copy.isfinite().all()):
        return copy
    return copy.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def outputs_of(result: Any) -> dict[int | None, Any]:
    """What a module gave, by place: the single output has the place None."""
    if isinstance(result, (tuple, list)):
        return dict(enumerate(result))
    if isinstance(result, Mapping):
        return dict(enumerate(result.values()))
    return {None: result}


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, no gradients, random state and training flags put back afterwards."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad(), evaluation_mode(model):
        yield


def _example_device(model: nn.Module) -> torch.device:
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.weight.device
    return next(model.parameters()).device


def run_example(model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...] | None) -> Any:
    """Call the model on an example batch, or on eleven tokens if none is given.

    A dictionary is the model's keyword arguments, or, for a model that takes none of these names, its batch.
    """
    if isinstance(example, Mapping):
        return model(**example) if _takes_keywords(model, example) else model(example)
    if example is not None:
        return model(*example)
    example = default_example(model)
    return model(**example) if isinstance(example, dict) else model(*example)


def default_example(model: nn.Module) -> dict[str, Any] | tuple[Any, ...]:
    """Eleven token ids, as keyword arguments of a model of transformers."""
    vocabulary = min(
        (
            m.num_embeddings
            for m in model.modules()
            if isinstance(m, nn.Embedding) and m.num_embeddings > TOKENS
        ),
        default=TOKENS + 3,
    )
    # The lowest ids are often padding and other special tokens, which a model may treat differently.
    ids = torch.arange(3, TOKENS + 3, device=_example_device(model))[None] % vocabulary
    if hasattr(model, "config") and hasattr(model, "get_input_embeddings"):
        keywords: dict[str, Any] = {"input_ids": ids}
        if getattr(model.config, "is_encoder_decoder", False):
            # Of another length, which tells whose blocks are whose.
            keywords["decoder_input_ids"] = ids[:, 1:]
        return keywords
    return (ids,)


def _takes_keywords(model: nn.Module, example: Mapping[str, Any]) -> bool:
    try:
        inspect.signature(model.forward).bind(**example)
    except TypeError:
        return False
    return True


def trace_forward(
    model: nn.Module, example: Mapping[str, Any] | tuple[Any, ...] | None = None, *, streams: int = 1
) -> Trace:
    """Run the model once and record every module call and every attention call.

    ``streams`` is how many stand one behind the other in the rows, of which the first is told of
    (:func:`~osp_diag.sites.layout.streams_in_a_row`).

    Raises
    ------
    SiteError : the model cannot be called on token ids alone; an example batch is needed.
    """
    trace = Trace()
    open_events: list[Event] = []

    def start_hook(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            inputs = _floating_copies({**dict(enumerate(args)), **kwargs})
            arguments = [value for value in (*args, *kwargs.values()) if value is not None]
            event = Event(name, module, inputs, start=trace.tick(), alone=len(arguments) == len(inputs) == 1)
            event.device = next((v.device for v in arguments if isinstance(v, torch.Tensor)), None)
            trace.events.append(event)
            open_events.append(event)

        return hook

    def stop_hook(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        event = open_events.pop()
        event.outputs, event.stop = _floating_copies(outputs_of(result)), trace.tick()

    def on_call(call: AttentionCall) -> None:
        queries, keys = call.lengths
        if call.crosses or keys > queries:
            # The traced pass has no cache: more keys than queries are of other tokens.
            reason = SkipReason.CROSS if call.crosses else SkipReason.CACHED
            trace.skipped.append((trace.tick(), reason))
            trace.crossings.append((trace.clock, _on_host(replace(call, crosses=True))))
            return
        trace.attention.append((trace.tick(), _on_host(call)))
        for event in open_events:
            event.attends = True

    def on_skip(reason: str) -> None:
        trace.skipped.append((trace.tick(), reason))

    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        for name, module in model.named_modules():
            if name:
                start, stop = of_this_thread(start_hook(name)), of_this_thread(stop_hook)
                stack.callback(module.register_forward_pre_hook(start, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(stop).remove)
        stack.enter_context(unfused(model))
        if is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        capture = stack.enter_context(
            AttentionCapture(model, on_call, on_skip=on_skip, streams=streams, cached=True, crossing=True)
        )
        try:
            run_example(model, example)
        except Exception as error:
            raise SiteError(
                f"{type(model).__name__} could not be run on {TOKENS} token ids to find its sites "
                f"({type(error).__name__}: {error}); pass "
                "`example=` a batch (a dict of arguments) that it accepts"
            ) from error
        seen = {reason for _, reason in trace.skipped}
        trace.skipped += [(0, reason) for reason in capture.skipped if reason not in seen]
    return trace
