"""Attention calls of a running torch model, as the model computes them.

Five seams, tried at once in every observed forward and never counted twice: transformers' attention
interface, ``scaled_dot_product_attention`` anywhere else, ``nn.MultiheadAttention``, functions declared by
:func:`~osp_diag.seams.declared.attention_function`, and the softmax of attention written out by hand.
Everything is put in place when an observed forward of the model starts and taken away when it ends, so that
other forwards, the recomputation of activation checkpointing and compiled code see nothing of it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from osp_diag.errors import CaptureError
from osp_diag.seams.call import AttentionCall, SkipReason
from osp_diag.seams.declared import describe_declared
from osp_diag.seams.functions import (
    Arguments,
    AttentionFunctionMode,
    Frame,
    describe_scaled_dot_product,
    describe_softmax,
    remove_mode,
    suspended,
)
from osp_diag.seams.interface import InterfaceSwitch
from osp_diag.seams.multihead import describe_multihead, takes_fused_path
from osp_diag.seams.threads import Claim, of_this_thread

__all__ = ["AttentionCall", "AttentionCapture", "SkipReason"]

_CROSS_NAMES = ("cross", "encoder_attn", "encdec", "encoder_attention")


class AttentionCapture:
    """Calls ``on_call`` with every self-attention call of ``model``'s forward, and others on request.

    Args:
        model: any module; its own ``forward`` (or ``__call__``) must be what is run. A model wrapped by
            ``torch.compile`` is unwrapped, see below.
        on_call: receives an :class:`AttentionCall`, under ``no_grad`` and with autocast off, just before the
            model computes it. It must not write to the tensors nor draw random numbers.
        active: asked when a forward starts and at every call. A forward that starts inactive is not touched.
        blocks: the modules inside which a softmax may be attention. By default the members of every
            ``ModuleList``, ``ModuleDict`` and ``Sequential``, or any submodule where there are none.
        cached: deliver also calls with more keys than queries, as decoding with a cache makes them.
        on_skip: receives the reason (:class:`SkipReason`) of every call that is not delivered, at its time.
        crossing: deliver also cross-attention, as calls that say so (``crosses``).
        streams: how many streams stand one behind the other in the rows of hidden states (ProphetNet); a
            softmax over the tokens of one of them is attention.

    Attributes:
        skipped: how many calls were not delivered, by reason (:class:`SkipReason`).
        forwards: how many forwards were observed.

    A compiled model runs neither hooks nor modes: call it under ``torch.compiler.set_stance("force_eager")``,
    whether it was made by ``torch.compile(model)`` or ``model.compile()``; ``forwards == 0`` afterwards says
    that nothing was observed. Where only submodules are compiled, observed forwards set that stance
    themselves. Its results are those of the uncompiled model, and compiled code is left as it was. With
    non-reentrant activation checkpointing around compiled modules the backward pass must be under the stance
    too: recomputed by compiled code, it saves other tensors than the eager forward, and torch refuses.
    Query and key are as the model hands them over; where autocast casts them inside the attention function,
    they are delivered before that cast.

    It acts in the thread that attached it alone; what other threads run meanwhile is neither seen nor
    changed.

    Raises:
        CaptureError: attached twice, or while another thread observes the model.
    """

    def __init__(
        self,
        model: nn.Module,
        on_call: Callable[[AttentionCall], None],
        active: Callable[[], bool] = lambda: True,
        *,
        blocks: Collection[nn.Module] | None = None,
        cached: bool = False,
        on_skip: Callable[[str], None] | None = None,
        streams: int = 1,
        crossing: bool = False,
    ) -> None:
        self.model: nn.Module = getattr(model, "_orig_mod", model)
        self.skipped: Counter[str] = Counter()
        self.forwards = 0
        self._on_call, self._on_skip = on_call, on_skip
        self._active = active
        self._cached = cached
        self._streams, self._crossing = streams, crossing
        members = set(blocks) if blocks is not None else _members_of_containers(self.model)
        # With what is in them: of a block whose ``forward`` is called directly no hook tells.
        self._blocks = {inner for member in members for inner in member.modules()}
        self._handles: list[RemovableHandle] = []
        self._claim: Claim | None = None
        self._running: ExitStack | None = None
        self._suspension = ExitStack()
        self._busy = False
        self._frames: list[Frame] = []

    # -- attaching ------------------------------------------------------------------------------------------

    def attach(self) -> AttentionCapture:
        """Start observing. Until a forward runs, two hooks on ``model`` are all that is added."""
        if self._handles:
            raise CaptureError("this AttentionCapture is attached already; detach() it first")
        self._names = {module: name for name, module in self.model.named_modules()}
        self._heads = getattr(getattr(self.model, "config", None), "num_attention_heads", None)
        self._mode = AttentionFunctionMode(self._observe_function)
        self._switch = InterfaceSwitch(self.model, self._observe_interface, lambda: suspended(self._mode))
        self._claim = Claim([self.model, *self._switch.configs])
        self._handles = [
            self.model.register_forward_pre_hook(of_this_thread(self._forward_starts)),
            # First among the hooks, so that captures on one model end in the reverse order of their start.
            self.model.register_forward_hook(
                of_this_thread(self._forward_ends), always_call=True, prepend=True
            ),
        ]
        return self

    def detach(self) -> None:
        """Stop observing and leave no trace. May be called twice."""
        self._end()
        while self._handles:
            self._handles.pop().remove()
        if self._claim is not None:
            self._claim.release()
            self._claim = None

    def __enter__(self) -> AttentionCapture:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    # -- one forward ----------------------------------------------------------------------------------------

    def _forward_starts(self, module: nn.Module, args: Any) -> None:
        # A forward interrupted by Ctrl-C ends without its hooks.
        self._end()
        if not self._active():
            return
        self.forwards += 1
        running = self._running = ExitStack()
        # Why compiled code is not recompiled with hooks inside: docs/decisions.md, Capture.
        if any(_is_compiled(submodule) for submodule in self.model.modules()):
            running.enter_context(torch.compiler.set_stance("force_eager"))
        fused = self._hook_modules(running)
        running.callback(self._switch.exit)
        self._switch.enter()
        # Last in, first out: the mode goes before the configs and the hooks.
        if not fused:
            running.callback(remove_mode, self._mode)
            self._mode.__enter__()

    def _forward_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        self._end()

    def _end(self) -> None:
        self._suspension.close()
        if self._running is not None:
            self._running.close()
            self._running = None
        self._frames.clear()
        self._busy = False

    def _hook_modules(self, running: ExitStack) -> bool:
        """Follow which module runs. True where a fused encoder layer forbids hooks and modes."""
        fused = False
        starts, ends = of_this_thread(self._module_starts), of_this_thread(self._module_ends)
        starts_multihead = of_this_thread(self._multihead_starts)
        ends_multihead = of_this_thread(self._multihead_ends)
        untouchable: set[nn.Module] = set()
        for module in self.model.modules():
            if isinstance(module, nn.TransformerEncoderLayer) and takes_fused_path(module):
                # torch looks for hooks in every module of the layer, so nothing inside it is followed.
                fused = True
                self.skipped[SkipReason.FUSED_ENCODER] += 1
                untouchable |= set(module.modules())
            if module in untouchable or module is self.model or isinstance(module, torch.jit.ScriptModule):
                continue
            if isinstance(module, nn.MultiheadAttention):
                untouchable |= set(module.modules())
                handles = [
                    module.register_forward_pre_hook(starts_multihead, with_kwargs=True),
                    module.register_forward_hook(ends_multihead, always_call=True),
                ]
            elif next(module.children(), None) is None and type(module).__module__.startswith("torch.nn."):
                continue
            else:
                handles = [
                    module.register_forward_pre_hook(starts, with_kwargs=True),
                    module.register_forward_hook(ends, always_call=True),
                ]
            for handle in handles:
                running.callback(handle.remove)
        return fused

    def _module_starts(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self._frames.append((module, args, kwargs))

    def _module_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        # From the top: a module inside that was interrupted may have left its frame.
        for index in range(len(self._frames) - 1, -1, -1):
            if self._frames[index][0] is module:
                del self._frames[index:]
                return

    # -- the seams ------------------------------------------------------------------------------------------

    def _observing(self) -> bool:
        # The name under which attention is looked up is seen by other threads too.
        here = self._claim is not None and self._claim.is_held_here
        return here and self._running is not None and not self._busy and self._active()

    def _observe_interface(self, describe: Callable[[], AttentionCall], compute: Callable[[], Any]) -> Any:
        # What the function does inside is this one call; and a kernel that torch compiles (FlexAttention)
        # would be compiled once more for the mode.
        with suspended(self._mode):
            if self._observing():
                self._deliver(describe)
            return compute()

    def _multihead_starts(self, module: nn.MultiheadAttention, args: Any, kwargs: Any) -> None:
        # Under a torch function mode the module leaves its fast path, which rounds differently.
        self._suspension.enter_context(suspended(self._mode))
        if self._observing():
            self._deliver(lambda: describe_multihead(module, args, kwargs, crossing=self._crossing))

    def _multihead_ends(self, module: nn.Module, args: Any, output: Any) -> None:
        self._suspension.close()

    def _observe_function(
        self, function: Any, kind: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]
    ) -> Arguments:
        if not self._observing():
            return args, kwargs
        if kind == "declared function":
            module = self._frames[-1][0] if self._frames else None
            self._deliver(lambda: describe_declared(function, args, kwargs, module))
        elif kind == "scaled_dot_product_attention":
            self._deliver(lambda: describe_scaled_dot_product(args, kwargs, self._frames))
        elif self._inside_block():
            self._deliver(
                lambda: describe_softmax(args, kwargs, self._frames, self._heads, streams=self._streams)
            )
        return args, kwargs

    def _inside_block(self) -> bool:
        if not self._blocks:
            return bool(self._frames)
        return any(module in self._blocks for module, _, _ in self._frames)

    def _deliver(self, describe: Callable[[], AttentionCall | str | None]) -> None:
        self._busy = True
        try:
            with torch.no_grad():
                call = describe()
                reason = self._reason_to_skip(call) if isinstance(call, AttentionCall) else call
                if reason == SkipReason.CROSS and self._crossing and isinstance(call, AttentionCall):
                    call, reason = replace(call, crosses=True), None
                if reason is not None:
                    self.skipped[reason] += 1
                    if self._on_skip is not None:
                        self._on_skip(reason)
                elif isinstance(call, AttentionCall):
                    self._hand_over(call.detached())
        finally:
            self._busy = False

    def _hand_over(self, call: AttentionCall) -> None:
        kind = call.tensor.device.type
        with torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext():
            self._on_call(call)

    def _reason_to_skip(self, call: AttentionCall) -> str | None:
        queries, keys = call.lengths
        if call.crosses or keys < queries or self._is_cross_attention(call.module):
            return SkipReason.CROSS
        return SkipReason.CACHED if keys > queries and not self._cached else None

    def _is_cross_attention(self, module: nn.Module | None) -> bool:
        # Equal lengths do not make it self-attention; models tell the two apart by name or by flag.
        if module is None:
            return False
        if getattr(module, "is_cross_attention", False) is True:
            return True
        path = ".".join(self._names.get(module, "").split(".")[-2:])
        return any(word in f"{type(module).__name__} {path}".lower() for word in _CROSS_NAMES)


def _is_compiled(module: nn.Module) -> bool:
    return getattr(module, "_compiled_call_impl", None) is not None or "_orig_mod" in module._modules


def _members_of_containers(model: nn.Module) -> set[nn.Module]:
    containers = (nn.ModuleList, nn.ModuleDict, nn.Sequential)
    return {
        child for module in model.modules() if isinstance(module, containers) for child in module.children()
    }
