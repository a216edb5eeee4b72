"""Reading the sites of a running model with forward hooks that leave no trace.

The user's own modules are hooked, never re-implemented. A hook only reads: it returns None, runs without
gradients and outside of autocast, and acts only while a forward pass of the whole model is under way, so that
the recomputation of activation checkpointing (which runs in the backward pass) is not counted twice.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from osp_diag.sites.names import Tap
from osp_diag.sites.projections import split_fused
from osp_diag.sites.stack import is_list
from osp_diag.sites.trace import unwrap

__all__ = ["ForwardPass", "SiteCapture", "heads_first", "unobserved"]


_ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
_NO_IDS = re.compile(r"mask|position|label|target|type|segment|cache|decoder", re.IGNORECASE)
"""Integer matrices that are no token ids."""


class ForwardPass:
    """The forward pass under way: its inputs, and how often each block ran in it."""

    def __init__(self, arguments: Mapping[str, Any], prefix: str = "") -> None:
        self.prefix = prefix
        self.arguments = dict(arguments)
        """by the names that the model's own ``forward`` gives them"""
        self.runs: dict[str, int] = defaultdict(int)
        self.calls: dict[tuple[str, str], int] = defaultdict(int)
        """(module, side) → how often it was reached: in the block that runs now, or in the pass"""
        self.layer: int | None = None
        """the layer of the block that runs now"""

    @property
    def token_ids(self) -> torch.Tensor | None:
        """(batch, token) ids: ``input_ids``, or the first integer matrix not named like something else."""
        ids = self.arguments.get(f"{self.prefix}input_ids")
        if isinstance(ids, torch.Tensor):
            return ids
        if self.prefix:
            return None
        for name, value in self.arguments.items():
            matrix = isinstance(value, torch.Tensor) and value.ndim == 2 and value.dtype in _ID_DTYPES
            if matrix and not _NO_IDS.search(name):
                return value
        return None

    @property
    def embeddings(self) -> torch.Tensor | None:
        """What stands in for missing ids: embeddings, or any tensor that starts with (batch, token)."""
        embeddings = self.arguments.get(f"{self.prefix}inputs_embeds")
        if isinstance(embeddings, torch.Tensor) or self.prefix:
            return embeddings
        tensors = (v for v in self.arguments.values() if isinstance(v, torch.Tensor) and v.ndim >= 2)
        return next(tensors, None)

    @property
    def attention_mask(self) -> torch.Tensor | None:
        """(batch, token) padding mask, if the caller passed one."""
        mask = self.arguments.get(f"{self.prefix}attention_mask")
        return mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None

    @property
    def position_ids(self) -> torch.Tensor | None:
        positions = self.arguments.get(f"{self.prefix}position_ids")
        return positions if isinstance(positions, torch.Tensor) and positions.ndim == 2 else None


class SiteCapture:
    """Hooks at the taps of a model.

    Parameters
    ----------
    model : the module that the caller runs; wrappers are looked through for the taps
    taps : where to read
    block_paths : the block executed as layer 0, 1, … (a path may occur several times)
    on_activation : called with (tap, layer, tensor), under ``no_grad`` and outside of autocast
    on_weight : called so with (tap, layer, module, its input) where a tap's side is "weight", just before
        the module runs; None leaves those taps out
    prefix : of the arguments that hold the blocks' tokens: ``"decoder_"`` if they are a decoder's
    on_start, on_stop : called when a forward pass of the whole model begins and ends; ``on_stop`` learns
        whether it raised
    """

    def __init__(
        self,
        model: nn.Module,
        taps: tuple[Tap, ...],
        block_paths: tuple[str, ...],
        on_activation: Callable[[Tap, int, torch.Tensor], None],
        *,
        on_start: Callable[[ForwardPass], None],
        on_stop: Callable[[bool], None],
        on_weight: Callable[[Tap, int, nn.Module, torch.Tensor], None] | None = None,
        prefix: str = "",
    ) -> None:
        self.model = unwrap(model)
        self.taps = taps
        self.block_paths = block_paths
        self.on_activation = on_activation
        self.on_start, self.on_stop, self.on_weight = on_start, on_stop, on_weight
        self.prefix = prefix
        self.current: ForwardPass | None = None
        self._handles: list[Any] = []
        self._layers: dict[str, list[int]] = defaultdict(list)
        for layer, path in enumerate(block_paths):
            self._layers[path].append(layer)

    def active(self) -> bool:
        """Whether a forward pass of the whole model is under way."""
        return self.current is not None

    def attach(self) -> None:
        """Register the hooks. Nothing in the model changes but its hook tables."""
        try:
            self._handles.append(
                self.model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True)
            )
            for path in self._layers:
                block = self.model.get_submodule(path)
                # A block that is a list does not run; the modules in it do.
                for module in block.children() if is_list(block) else (block,):
                    self._handles.append(module.register_forward_pre_hook(self._block_hook(path, block)))
            by_module: dict[tuple[str, str], list[Tap]] = defaultdict(list)
            for tap in self._distinct_taps():
                by_module[tap.module, tap.side].append(tap)
            for (path, side), taps in by_module.items():
                module = self.model.get_submodule(path)
                if side == "input":
                    hook = self._input_hook(taps, path)
                    self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                elif side == "output":
                    self._handles.append(module.register_forward_hook(self._output_hook(taps, path)))
                elif self.on_weight is not None:
                    hook = self._weight_hook(taps, self.on_weight)
                    self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            self._handles.append(self.model.register_forward_hook(self._end, always_call=True))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove every hook."""
        while self._handles:
            self._handles.pop().remove()
        self._abandon()

    def _abandon(self) -> None:
        """A pass that Ctrl-C interrupted ends without its hooks."""
        if self.current is not None:
            self.current = None
            self.on_stop(True)

    def __enter__(self) -> SiteCapture:
        self.attach()
        return self

    def __exit__(self, *exception: object) -> None:
        self.detach()

    def _distinct_taps(self) -> list[Tap]:
        """One tap where a shared block makes several layers read the same module."""
        taps: dict[tuple[Any, ...], Tap] = {}
        for tap in self.taps:
            place = (tap.site, tap.module, tap.side, tap.argument, tap.fused, tap.call, tap.stream)
            taps.setdefault(place, tap)
        return list(taps.values())

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if torch.compiler.is_compiling():
            return
        self._abandon()
        self.current = ForwardPass(_arguments_by_name(module, args, kwargs), self.prefix)
        self.on_start(self.current)

    def _end(self, module: nn.Module, args: Any, result: Any) -> None:
        if self.current is not None:
            self.current = None
            self.on_stop(result is None)

    def _block_hook(self, path: str, block: nn.Module) -> Callable[..., None]:
        order = self._layers[path]

        def hook(module: nn.Module, args: Any) -> None:
            current = self.current
            if current is None or (is_list(block) and current.layer == order[0]):
                return
            current.layer = order[min(current.runs[path], len(order) - 1)]
            current.runs[path] += 1
            for place in [place for place in current.calls if place[0].startswith(f"{path}.")]:
                del current.calls[place]

        return hook

    def _layer(self, tap: Tap) -> int:
        """The tap's layer; in a block that runs several times, the run under way."""
        for path, order in self._layers.items():
            if len(order) > 1 and (tap.module == path or tap.module.startswith(path + ".")):
                return tap.layer if self.current is None or self.current.layer is None else self.current.layer
        return tap.layer

    def _of_this_call(self, taps: list[Tap], path: str, side: str) -> list[Tap]:
        """The taps that are meant by the call under way, of a module that runs several times."""
        if self.current is None:
            return []
        number = self.current.calls[path, side]
        self.current.calls[path, side] += 1
        return [tap for tap in taps if tap.call is None or tap.call == number]

    def _input_hook(self, taps: list[Tap], path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if self.current is not None:
                for tap in self._of_this_call(taps, path, "input"):
                    self._read(tap, _input_of(tap.argument, args, kwargs))

        return hook

    def _output_hook(self, taps: list[Tap], path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            if self.current is not None:
                for tap in self._of_this_call(taps, path, "output"):
                    self._read(tap, _output_of(tap.argument, result))

        return hook

    def _weight_hook(
        self, taps: list[Tap], on_weight: Callable[[Tap, int, nn.Module, torch.Tensor], None]
    ) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if self.current is None or torch.compiler.is_compiling():
                return
            for tap in taps:
                value = _input_of(tap.argument, args, kwargs)
                if isinstance(value, torch.Tensor):
                    with unobserved(value.device):
                        on_weight(tap, self._layer(tap), module, value.detach())

        return hook

    def _read(self, tap: Tap, value: Any) -> None:
        if not isinstance(value, torch.Tensor) or torch.compiler.is_compiling():
            return
        if tap.stream is not None and value.ndim == 4:
            value = value[tap.stream]
        with unobserved(value.device):
            self.on_activation(tap, self._layer(tap), value.detach())


@contextmanager
def unobserved(device: torch.device, *, traced: bool = False) -> Iterator[None]:
    """Compute without gradients, without autocast, and seen by none of the modes that are active.

    Function modes watch for the model's attention, and statistics are none. Dispatch modes belong to the
    caller: selective activation checkpointing keeps what ops return, in the order of their calls, and would
    give the model our products in its backward pass; a FLOP counter counts the model's.

    ``traced`` leaves function modes on, for what may be compiled inside: FlexAttention traces its score
    functions through one of its own.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        if torch.amp.is_autocast_available(device.type):
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if not traced:
            stack.enter_context(torch._C.DisableTorchFunction())
        if _get_current_dispatch_mode() is not None:
            stack.enter_context(_disable_current_modes())
        yield


def _arguments_by_name(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments by name: an attention mask may come as the second positional one."""
    try:
        bound = inspect.signature(module.forward).bind_partial(*args, **kwargs)
    except (TypeError, ValueError):
        return {**{str(index): value for index, value in enumerate(args)}, **kwargs}
    arguments: dict[str, Any] = {}
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_KEYWORD:
            arguments |= value
        elif kind is inspect.Parameter.VAR_POSITIONAL:
            arguments |= {str(index): item for index, item in enumerate(value)}
        else:
            arguments[name] = value
    return arguments


def _input_of(key: int | str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    if isinstance(key, int):
        return args[key] if key < len(args) else None
    return kwargs.get(str(key))


def _output_of(key: int | str | None, result: Any) -> Any:
    if key is None or isinstance(result, torch.Tensor):
        return result
    items = list(result.values()) if isinstance(result, Mapping) else result
    return items[key] if isinstance(key, int) else None


def heads_first(tap: Tap, value: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
    """(batch, head, token, width), whatever the layout of the tapped tensor."""
    if tap.fused is not None:
        groups, slots, _, _ = tap.fused
        width = value.shape[-1] // (groups * slots)
        return split_fused(value.reshape(batch, tokens, -1), tap.fused, width).transpose(1, 2)
    if tap.head_axis == "first":
        return value
    return value.reshape(batch, tokens, tap.heads, -1).transpose(1, 2)
