"""The state that a recurrent mixer carries from token to token: where it is seen as a tensor.

A state-space or linear-attention layer sums its past up in one tensor a sequence. It shows in the cache that
a model is called with, in a module that keeps it, or beside the output of a mixer that returns it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from osp_diag.schema import MIXER_STATE
from osp_diag.seams.threads import of_this_thread
from osp_diag.sites.blocks import Block
from osp_diag.sites.names import Tap
from osp_diag.sites.trace import TOKENS, default_example, run_example

__all__ = ["NO_CACHE", "MixerStates", "find_mixer_states", "state_after"]

NO_CACHE = (
    "the model was called without a cache, in which alone the states of its mixers are seen; call it with "
    "use_cache=True"
)
_RUN_BOTH_WAYS = "the state after the last token runs in both directions, so that it is of no token"


@dataclass(frozen=True)
class MixerStates:
    """What was found of the states of a model's mixers."""

    taps: tuple[Tap, ...] = ()
    absent: str = ""
    """why a mixer has no state to be read, of a model in which something like one was seen"""
    seen_with_cache: bool = False
    """whether a state is seen only where the model has a cache, which changes no bit of its output"""


def state_after(
    module: nn.Module, arguments: Sequence[Any], result: Any, *, returns: bool
) -> torch.Tensor | str | None:
    """The recurrent state that a module leaves: (batch, …), a reason why it cannot be told, or None.

    Never the memory of a convolution, which caches keep apart.

    Parameters
    ----------
    module : which has just run
    arguments : what it was called with
    result : what it gave
    returns : whether a second tensor that it gives may be its state
    """
    layer = getattr(module, "layer_idx", None)
    if isinstance(layer, int):
        for cache in arguments:
            layers = getattr(cache, "layers", None)
            if isinstance(layers, (list, tuple)) and hasattr(cache, "get_seq_length") and layer < len(layers):
                return _only(getattr(layers[layer], "recurrent_states", None))
    kept = vars(module).get("recurrent_states")
    if isinstance(kept, torch.Tensor):
        return kept
    return _returned_state(module, result) if returns or isinstance(module, nn.RNNBase) else None


def _only(states: Any) -> torch.Tensor | str | None:
    """Of a layer's recurrent states by number the only one that there is."""
    values = states.values() if isinstance(states, Mapping) else [states]
    tensors = [value for value in values if isinstance(value, torch.Tensor)]
    if len(tensors) > 1:
        return _several(len(tensors))
    return tensors[0] if tensors else None


def _several(count: int) -> str:
    return f"its mixer keeps {count} tensors, and which of them is the recurrent state cannot be told"


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)


def _returned_state(module: nn.Module, result: Any) -> torch.Tensor | str | None:
    """The state of a module that gives (output, state), or why it cannot be told which of several it is."""
    if not isinstance(result, (tuple, list)) or len(result) < 2 or not isinstance(result[0], torch.Tensor):
        return None
    states = [state for state in _tensors(result[1:]) if state.is_floating_point()]
    if len(states) != 1:
        return _several(len(states)) if states else None
    state = states[0]
    if isinstance(module, nn.RNNBase):
        return _RUN_BOTH_WAYS if module.bidirectional else state.transpose(0, 1)
    # A convolution over K tokens remembers K or K − 1 of them.
    kernels = [parameter.shape[-1] for parameter in module.parameters() if parameter.ndim == 3]
    if state.ndim > 1 and any(state.shape[-1] in (size, size - 1) for size in kernels):
        return "the state that its mixer returns cannot be told from the memory of its convolution"
    return state


@dataclass
class _Pass:
    """What one pass of the example showed."""

    output: torch.Tensor | None = None
    states: dict[str, torch.Tensor | str] = field(default_factory=dict)
    """module → the state after it, or why it cannot be told"""


def find_mixer_states(
    model: nn.Module, blocks: Sequence[Block], example: Mapping[str, Any] | tuple[Any, ...] | None
) -> MixerStates:
    """Where the states of recurrent mixers are read, by passes over the example without and with a cache.

    Called while the model is undisturbed; of a model in which nothing mixes tokens but attention that a seam
    sees, and whose modules take no such cache, nothing runs.

    Parameters
    ----------
    blocks : as they were traced
    """
    mixers = {block.mixer.name for block in blocks if block.mixer is not None}
    paths = mixers | {event.name for block in blocks for event in block.inner if _may_keep(event.module)}
    if not paths:
        return MixerStates()
    keywords = default_example(model) if example is None else example
    if not isinstance(keywords, Mapping) or not hasattr(getattr(model, "config", None), "use_cache"):
        return _where_told(_run(model, paths, mixers, example), blocks, seen_with_cache=False)
    without = _run(model, paths, mixers, {**keywords, "use_cache": False})
    cached = _run(model, paths, mixers, {**keywords, "use_cache": True})
    same = without.output is not None and cached.output is not None
    same = same and torch.equal(without.output, cached.output)  # type: ignore[arg-type]
    needs = any(
        isinstance(state, torch.Tensor) and not isinstance(without.states.get(path), torch.Tensor)
        for path, state in cached.states.items()
    )
    cached.states = {**without.states, **cached.states}
    return _where_told(cached, blocks, seen_with_cache=needs and same)


def _may_keep(module: nn.Module) -> bool:
    """Whether a module may be a mixer of its layer that a cache serves, or keeps its state itself."""
    keeps = "recurrent_states" in vars(module) or isinstance(module, nn.RNNBase)
    return keeps or (isinstance(getattr(module, "layer_idx", None), int) and _takes_cache(module))


def _takes_cache(module: nn.Module) -> bool:
    try:
        return "cache_params" in inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # compiled or built in
        return False


def _run(model: nn.Module, paths: set[str], mixers: set[str], example: Any) -> _Pass:
    """One pass with its states; an empty one where the model does not run so."""
    seen = _Pass()

    def reading(path: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            state = state_after(module, (*args, *kwargs.values()), result, returns=path in mixers)
            if state is not None:
                seen.states[path] = state

        return hook

    with ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            hook = of_this_thread(reading(path))
            stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
        try:
            result = run_example(model, example)
        except Exception:  # a model of another's, which need not run with a cache
            return _Pass()
    seen.output = next(_tensors(list(result.values()) if isinstance(result, Mapping) else result), None)
    return seen


def _where_told(seen: _Pass, blocks: Sequence[Block], *, seen_with_cache: bool) -> MixerStates:
    taps, reasons = [], []
    for block in blocks:
        # The innermost ran first: what is around a mixer may be handed the same cache.
        for event in sorted(block.inner, key=lambda event: event.stop):
            state = seen.states.get(event.name)
            is_mixer = block.mixer is not None and event.name == block.mixer.name
            if isinstance(state, torch.Tensor) and _is_of_all_tokens(state, block):
                continue
            if isinstance(state, torch.Tensor):
                taps.append(
                    Tap(
                        site=MIXER_STATE,
                        layer=block.layer,
                        module=event.name,
                        side="state",
                        call=event.call,
                        state_shape=tuple(state.shape[1:]),
                        returns_state=is_mixer,
                    )
                )
                break
            if isinstance(state, str):
                reasons.append(state)
    return MixerStates(tuple(taps), "" if taps or not reasons else reasons[0], seen_with_cache)


def _is_of_all_tokens(state: torch.Tensor, block: Block) -> bool:
    """Whether an axis is as long as the example: weights of attention, say, or a second stream."""
    stream = block.event.input
    lengths = set() if stream is None else {size for size in stream.shape[:-1] if size > 1}
    return state.ndim < 2 or bool((lengths or {TOKENS}).intersection(state.shape[1:]))
