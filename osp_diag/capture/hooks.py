"""Reading the sites of a running model with forward hooks that leave no trace.

The user's own modules are hooked, never re-implemented. A hook only reads: it returns None, runs without
gradients and outside of autocast, and acts only while a forward pass of the whole model is under way, so that
the recomputation of activation checkpointing (which runs in the backward pass) is not counted twice. It acts
in the thread that put it there alone: another one may run the model meanwhile.
"""

from __future__ import annotations

import inspect
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _disable_current_modes, _get_current_dispatch_mode

from osp_diag.seams.threads import Claim, of_this_thread
from osp_diag.sites.mixer_states import NO_CACHE, state_after
from osp_diag.sites.names import Tap
from osp_diag.sites.projections import split_fused
from osp_diag.sites.trace import unwrap

__all__ = [
    "ForwardPass",
    "SiteCapture",
    "batch_first",
    "heads_first",
    "input_of",
    "output_of",
    "unobserved",
]


_ID_DTYPES = (torch.int64, torch.int32, torch.int16, torch.uint8)
_NO_IDS = re.compile(r"mask|position|label|target|type|segment|cache|decoder", re.IGNORECASE)
"""Integer matrices that are no token ids."""


class ForwardPass:
    """The forward pass under way: what its modules were called with, and how often each block ran in it."""

    def __init__(self, arguments: Mapping[str, Any], prefix: str = "", config: Any = None) -> None:
        self.prefix = prefix
        attention = str(getattr(config, "_attn_implementation", None))
        self.makes_its_masks = hasattr(config, "_attn_implementation")
        """whether the model is of transformers, which make the masks of their blocks"""
        self.follows_positions = "flash" in attention
        """whether attention takes positions that begin again for documents"""
        self.cut_by_attention = False
        """whether documents are told by offsets alone, so that attention is asked whether it cuts there"""
        self.attends_in_chunks = getattr(config, "attention_chunk_size", None) is not None
        self.levels: list[dict[str, Any]] = [_flattened(arguments)]
        """arguments by the names that ``forward`` gives them: of the model, then of each module on the way
        from it to its first block, which come to know masks and positions that the model makes itself"""
        self.block_arguments: dict[str, Any] = {}
        """of the first block that ran"""
        self.stream: torch.Tensor | None = None
        """what entered the first block that ran"""
        self.runs: dict[str, int] = defaultdict(int)
        self.calls: dict[tuple[str, str], int] = defaultdict(int)
        """(module, side) → how often it was reached: in the block that runs now, or in the pass"""
        self.layer: int | None = None
        """the layer of the block that runs now"""

        self._prefixes = [prefix]
        """what a decoder's arguments begin with at each level: nothing inside of the decoder itself"""

    def enter(self, path: str, arguments: Mapping[str, Any]) -> None:
        """A module that holds the blocks begins to run."""
        if self.stream is None:
            self.levels.append(_flattened(arguments))
            is_inside = self.prefix and self.prefix.rstrip("_") in path.split(".")
            self._prefixes.append("" if is_inside else self.prefix)

    def _inside_out(self) -> Iterator[tuple[dict[str, Any], str]]:
        """(arguments, what those of the blocks' tokens begin with), the innermost module first."""
        return zip(reversed(self.levels), reversed(self._prefixes), strict=True)

    def named(self, name: str, shapes: Collection[tuple[int, ...]]) -> torch.Tensor | None:
        """The argument of this name and one of these shapes that stands nearest to the blocks."""
        for arguments, prefix in self._inside_out():
            value = arguments.get(f"{prefix}{name}")
            if isinstance(value, torch.Tensor) and tuple(value.shape) in shapes:
                return value
        return None

    def token_ids(self, batch: int, tokens: int, *, tokens_first: bool = False) -> torch.Tensor | None:
        """(batch, token) ids: ``input_ids``, or an integer argument of that shape not named otherwise."""
        shapes = {(batch, tokens)} | ({(tokens,)} if batch == 1 else set())
        ids = self.named("input_ids", shapes)
        if ids is not None:
            return ids.reshape(batch, tokens)
        if self.prefix:
            return None
        turned = (tokens, batch)
        for arguments in reversed(self.levels):
            for name, value in arguments.items():
                if not isinstance(value, torch.Tensor) or value.dtype not in _ID_DTYPES:
                    continue
                if _NO_IDS.search(name):
                    continue
                # Of as many sequences as tokens, ids stand as the stream does, unless they say otherwise.
                if tokens_first and tuple(value.shape) == turned and batch != tokens:
                    return value.T
                if tuple(value.shape) in shapes:
                    return value.reshape(batch, tokens)
        return None

    def of_other_sequence(self, batch: int, tokens: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """(ids, padding mask) of the other (batch, token) sequence that the blocks attend to, where known."""
        ids = mask = None
        for arguments, prefix in self._inside_out():
            mask = (
                _of_shape(arguments.get("encoder_attention_mask"), (batch, tokens)) if mask is None else mask
            )
            # Inside of the decoder itself, plain names are those of its own tokens.
            if prefix:
                ids = _of_shape(arguments.get("input_ids"), (batch, tokens)) if ids is None else ids
                mask = _of_shape(arguments.get("attention_mask"), (batch, tokens)) if mask is None else mask
        return ids, mask

    def padding_mask(self, batch: int, tokens: int) -> torch.Tensor | None:
        """(batch, token) padding mask, if there is one; of one that covers a cache too, the end."""
        for arguments, prefix in self._inside_out():
            mask = arguments.get(f"{prefix}attention_mask")
            if not isinstance(mask, torch.Tensor) or mask.ndim != 2 or mask.shape[0] != batch:
                continue
            inputs = [arguments.get(f"{prefix}{name}") for name in ("input_ids", "inputs_embeds")]
            lengths = {v.shape[1] for v in inputs if isinstance(v, torch.Tensor) and v.ndim > 1}
            if mask.shape[1] == tokens or (mask.shape[1] > tokens and lengths == {tokens}):
                return mask[:, -tokens:]
        return None

    def mask_of_other_tokens(self, batch: int) -> torch.Tensor | None:
        """The outermost (batch, token) padding mask, of whatever length."""
        masks = (arguments.get(f"{prefix}attention_mask") for arguments, prefix in self._inside_out())
        of_batch = [m for m in masks if isinstance(m, torch.Tensor) and m.ndim == 2 and m.shape[0] == batch]
        return of_batch[-1] if of_batch else None

    def position_ids(self, batch: int, tokens: int) -> torch.Tensor | None:
        """Positions that were handed to the model, of shape (batch, token), (1, token) or (token,)."""
        return self.named("position_ids", {(batch, tokens), (1, tokens), (tokens,)})


def _of_shape(value: Any, shape: tuple[int, ...]) -> torch.Tensor | None:
    return value if isinstance(value, torch.Tensor) and tuple(value.shape) == shape else None


def _flattened(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name, those inside of a batch dictionary among them."""
    values: dict[str, Any] = {}
    for name, value in arguments.items():
        if isinstance(value, Mapping):
            values |= {str(key): item for key, item in value.items()}
        else:
            values[name] = value
    return values


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
    on_product : called so with (tap, layer, input, output) where a tap's side is "product"; None leaves
        those taps out
    on_state : called so with (tap, layer, state) where a tap's side is "state", just after the module ran,
        with a reason in place of a state that is not seen; None leaves those taps out
    on_gradient : asked with (tap, layer, tensor) for what to call with the tensor's gradient, once it is
        known in a backward pass; None leaves gradients alone
    prefix : of the arguments that hold the blocks' tokens: ``"decoder_"`` if they are a decoder's
    entries : block → the module with which it begins, where it does not run itself
    channels_first : whether the stream between the blocks is (batch, channel, token)
    streams_in_a_row : how many streams stand one behind the other in each row; the first is read
    on_start, on_stop : called when a forward pass of the whole model begins and ends; ``on_stop`` learns
        whether it raised
    on_stream : called once a pass, when the stream enters the first block that runs, before any tap there
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
        on_stream: Callable[[ForwardPass], None] | None = None,
        on_product: Callable[[Tap, int, torch.Tensor, torch.Tensor], None] | None = None,
        on_state: Callable[[Tap, int, torch.Tensor | str], None] | None = None,
        on_gradient: Callable[[Tap, int, torch.Tensor], Callable[[torch.Tensor], None] | None] | None = None,
        prefix: str = "",
        entries: Mapping[str, str] | None = None,
        channels_first: bool = False,
        streams_in_a_row: int = 1,
    ) -> None:
        self.model = unwrap(model)
        self.taps = taps
        self.block_paths = block_paths
        self.on_activation = on_activation
        self.on_start, self.on_stop, self.on_weight = on_start, on_stop, on_weight
        self.on_stream, self.on_product, self.on_state = on_stream, on_product, on_state
        self.on_gradient = on_gradient
        self.prefix = prefix
        self.entries, self.channels_first = entries or {}, channels_first
        self.streams_in_a_row = streams_in_a_row
        self.current: ForwardPass | None = None
        self._handles: list[Any] = []
        self._claim: Claim | None = None
        self._layers: dict[str, list[int]] = defaultdict(list)
        for layer, path in enumerate(block_paths):
            self._layers[path].append(layer)

    def active(self) -> bool:
        """Whether a forward pass of the whole model is under way in this thread."""
        return self.current is not None and self._claim is not None and self._claim.is_held_here

    def attach(self) -> None:
        """Register the hooks, which act in this thread alone; the model's hook tables are all that changes.

        Raises
        ------
        CaptureError : another thread observes the model
        """
        try:
            self._claim = Claim([self.model])
            begin = of_this_thread(self._begin)
            self._handles.append(self.model.register_forward_pre_hook(begin, with_kwargs=True, prepend=True))
            for path in self._modules_around():
                module = self.model.get_submodule(path)
                hook = of_this_thread(self._enter_hook(path))
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            for path in self._layers:
                module = self.model.get_submodule(self.entries.get(path, path))
                hook = of_this_thread(self._block_hook(path))
                self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            by_module: dict[tuple[str, str], list[Tap]] = defaultdict(list)
            for tap in self._distinct_taps():
                by_module[tap.module, tap.side].append(tap)
            for (path, side), taps in by_module.items():
                module = self.model.get_submodule(path)
                if side == "input":
                    hook = of_this_thread(self._input_hook(taps, path))
                    self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
                elif side == "output":
                    hook = of_this_thread(self._output_hook(taps, path))
                    self._handles.append(module.register_forward_hook(hook))
                elif side == "product":
                    if self.on_product is not None:
                        hook = of_this_thread(self._product_hook(taps, path, self.on_product))
                        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
                elif side == "state":
                    if self.on_state is not None:
                        hook = of_this_thread(self._state_hook(taps, path, self.on_state))
                        self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
                elif self.on_weight is not None:
                    hook = of_this_thread(self._weight_hook(taps, self.on_weight))
                    self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))
            end = of_this_thread(self._end)
            self._handles.append(self.model.register_forward_hook(end, always_call=True))
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Remove every hook."""
        while self._handles:
            self._handles.pop().remove()
        self._abandon()
        if self._claim is not None:
            self._claim.release()
            self._claim = None

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
        self._abandon()
        self.current = ForwardPass(
            _arguments_by_name(module, args, kwargs), self.prefix, getattr(self.model, "config", None)
        )
        self.on_start(self.current)

    def _end(self, module: nn.Module, args: Any, result: Any) -> None:
        if self.current is not None:
            self.current = None
            self.on_stop(result is None)

    def _modules_around(self) -> list[str]:
        """Paths of the modules that hold the blocks, the model itself left out, from outside to inside."""
        parts = self.block_paths[0].split(".")
        return [".".join(parts[:count]) for count in range(1, len(parts))]

    def _enter_hook(self, path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if self.current is not None:
                self.current.enter(path, _arguments_by_name(module, args, kwargs))

        return hook

    def _block_hook(self, path: str) -> Callable[..., None]:
        order = self._layers[path]

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            current = self.current
            if current is None:
                return
            current.layer = order[min(current.runs[path], len(order) - 1)]
            current.runs[path] += 1
            for place in [place for place in current.calls if place[0].startswith(f"{path}.")]:
                del current.calls[place]
            if current.stream is None:
                self._stream_enters(module, args, kwargs)

        return hook

    def _stream_enters(self, module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        # The first floating input, as in the trace of a pass (see ``sites.trace``).
        stream = next((v for v in (*args, *kwargs.values()) if _is_activation(v)), None)
        if stream is None or self.current is None:
            return
        if self.channels_first and stream.ndim == 3:
            stream = stream.transpose(1, 2)
        if self.streams_in_a_row > 1:
            stream = stream[:, : stream.shape[1] // self.streams_in_a_row]
        # Several streams side by side are one axis more, and the blocks' taps read one of them.
        index = next((tap.stream for tap in self.taps if tap.stream is not None), None)
        self.current.stream = stream.detach() if index is None or stream.ndim < 4 else stream.detach()[index]
        self.current.block_arguments = _arguments_by_name(module, args, kwargs)
        if self.on_stream is not None:
            with unobserved(stream.device):
                self.on_stream(self.current)

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
                    self._read(tap, input_of(tap.argument, args, kwargs))

        return hook

    def _output_hook(self, taps: list[Tap], path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            if self.current is not None:
                for tap in self._of_this_call(taps, path, "output"):
                    self._read(tap, output_of(tap.argument, result))

        return hook

    def _product_hook(
        self, taps: list[Tap], path: str, on_product: Callable[[Tap, int, torch.Tensor, torch.Tensor], None]
    ) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
            if self.current is None:
                return
            for tap in self._of_this_call(taps, path, "product"):
                value, output = input_of(tap.argument, args, kwargs), output_of(None, result)
                if isinstance(value, torch.Tensor) and isinstance(output, torch.Tensor):
                    with unobserved(value.device):
                        pair = value.detach(), output.detach()
                        if tap.channels_first:  # a convolution over single tokens gives what it takes
                            pair = pair[0].transpose(1, 2), pair[1].transpose(1, 2)
                        on_product(tap, self._layer(tap), *pair)

        return hook

    def _state_hook(
        self, taps: list[Tap], path: str, on_state: Callable[[Tap, int, torch.Tensor | str], None]
    ) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
            if self.current is None:
                return
            for tap in self._of_this_call(taps, path, "state"):
                arguments = (*args, *kwargs.values())
                state = state_after(module, arguments, result, returns=tap.returns_state)
                if not isinstance(state, torch.Tensor):
                    on_state(tap, self._layer(tap), state or NO_CACHE)
                    continue
                with unobserved(state.device):
                    on_state(tap, self._layer(tap), state.detach())

        return hook

    def _weight_hook(
        self, taps: list[Tap], on_weight: Callable[[Tap, int, nn.Module, torch.Tensor], None]
    ) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            if self.current is None:
                return
            for tap in taps:
                value = input_of(tap.argument, args, kwargs)
                if isinstance(value, torch.Tensor):
                    with unobserved(value.device):
                        on_weight(tap, self._layer(tap), module, value.detach())

        return hook

    def _read(self, tap: Tap, value: Any) -> None:
        if not isinstance(value, torch.Tensor):
            return
        stream = None if self.current is None else self.current.stream
        tokens = stream.shape[1] if self.streams_in_a_row > 1 and stream is not None else None
        layer = self._layer(tap)
        if self.on_gradient is not None:
            self._await_gradient(tap, layer, value, tokens)
        with unobserved(value.device):
            self.on_activation(tap, layer, self._as_read(tap, value.detach(), tokens))

    def _await_gradient(self, tap: Tap, layer: int, value: torch.Tensor, tokens: int | None) -> None:
        assert self.on_gradient is not None, "asked only then"
        receive = self.on_gradient(tap, layer, value)
        if receive is None:
            return

        # Holds nothing of the pass: a graph that its own hook keeps alive would never be freed.
        def hook(gradient: torch.Tensor) -> None:
            with unobserved(gradient.device):
                receive(self._as_read(tap, gradient.detach(), tokens))

        value.register_hook(hook)

    def _as_read(self, tap: Tap, value: torch.Tensor, tokens: int | None) -> torch.Tensor:
        """The part of a tensor that the tap means, its tokens before its channels.

        Of several streams that stand one behind the other in each row the first, of ``tokens`` tokens.
        """
        if tap.stream is not None and value.ndim == 4:
            value = value[tap.stream]
        if tap.channels_first and value.ndim == 3:
            value = value.transpose(1, 2)
        if tokens is None or value.ndim < 3:
            return value
        return value[:, :tokens] if value.shape[1] == self.streams_in_a_row * tokens else value


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


def _is_activation(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 2


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


def input_of(key: int | str | None, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What stands in one place of a module's arguments; None where there is nothing."""
    if isinstance(key, int):
        return args[key] if key < len(args) else None
    return kwargs.get(str(key))


def output_of(key: int | str | None, result: Any) -> Any:
    """What stands in one place of what a module gives, or all of it; None where there is no such place."""
    if key is None or isinstance(result, torch.Tensor):
        return result
    items = list(result.values()) if isinstance(result, Mapping) else result
    return items[key] if isinstance(key, int) else None


def batch_first(tap: Tap, value: torch.Tensor, batch: int, tokens: int) -> torch.Tensor | None:
    """``value`` with its sequences leading, (batch, token, …); None where it has not one vector a token.

    Known layouts: (batch, token, …), (token, batch, …), one row a token in the order of either, (batch,
    height, width, channel) of images, and (batch, head, token, width). Where there are as many sequences as
    tokens, the traced pass tells the first two apart.
    """
    shape = tuple(value.shape)
    if tap.heads and tap.head_axis == "first":
        return value if len(shape) == 4 and (shape[0], shape[2]) == (batch, tokens) else None
    if len(shape) >= 3 and shape[:2] in ((batch, tokens), (tokens, batch)):
        is_turned = tap.tokens_first if batch == tokens else shape[0] == tokens
        return value.transpose(0, 1) if is_turned else value
    if len(shape) == 2 and shape[0] == batch * tokens:
        if tap.tokens_first and batch > 1:
            return value.reshape(tokens, batch, -1).transpose(0, 1)
        return value.reshape(batch, tokens, -1)
    if len(shape) == 4 and shape[0] == batch and shape[1] * shape[2] == tokens and not tap.heads:
        return value.reshape(batch, tokens, -1)
    return None


def heads_first(tap: Tap, value: torch.Tensor, batch: int, tokens: int) -> torch.Tensor:
    """(batch, head, token, width), whatever the layout of the tapped tensor."""
    if tap.fused is not None:
        groups, slots, _, _ = tap.fused
        width = value.shape[-1] // (groups * slots)
        return split_fused(value.reshape(batch, tokens, -1), tap.fused, width).transpose(1, 2)
    if tap.head_axis == "first":
        return value
    return value.reshape(batch, tokens, tap.heads, -1).transpose(1, 2)
