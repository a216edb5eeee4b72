"""The hidden activations of experts that are modules of their own, each of which sees some of the tokens.

Which tokens an expert got is told by the rows themselves: its input is made of rows of the mixture's input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from osp_diag.capture.hooks import unobserved
from osp_diag.seams.threads import of_this_thread

__all__ = ["ExpertModuleCapture"]


class _Part(NamedTuple):
    """What one expert did in a pass."""

    state: torch.Tensor
    """(row, channel) that it was given"""
    hidden: torch.Tensor
    """(row, channel) that its down projection was given"""
    expert: int
    peaks: torch.Tensor
    """(row) max |y| of what the projection gave"""


_BITS = {8: torch.int64, 4: torch.int32, 2: torch.int16}


def _row_hashes(rows: torch.Tensor) -> torch.Tensor:
    """One integer a row, made of its bits; sums of integers do not depend on their order."""
    bits = rows.contiguous().view(_BITS[rows.element_size()]).to(torch.int64)
    generator = torch.Generator().manual_seed(0)
    factors = torch.randint(-(2**62), 2**62, (rows.shape[-1],), generator=generator)
    return (bits * factors.to(bits.device)).sum(-1)


def token_indices(hashes: torch.Tensor, rows: torch.Tensor) -> torch.Tensor | None:
    """For each row the token whose state it is; equal states in their order. None where one is nobody's.

    Parameters
    ----------
    hashes : (token,) of the mixture's input
    rows : (row, channel) of one expert's input, no token twice
    """
    wanted = _row_hashes(rows)
    in_order, order = hashes.sort(stable=True)
    sorted_wanted, wanted_order = wanted.sort(stable=True)
    places = torch.arange(len(wanted), device=wanted.device)
    # The second of two equal rows is the second of two equal tokens.
    rank = places - torch.searchsorted(sorted_wanted, sorted_wanted)
    position = torch.searchsorted(in_order, sorted_wanted) + rank
    position = position.clamp(max=len(in_order) - 1)
    if not torch.equal(in_order[position], sorted_wanted):
        return None
    index = torch.empty_like(wanted)
    index[wanted_order] = order[position]
    return index


class ExpertModuleCapture:
    """Hands over the inputs of the experts' down projections of each layer, a pass at a time.

    Parameters
    ----------
    model : the model that runs
    mixtures : layer → path of the module that routes tokens to the experts
    experts : layer → (path of an expert, path of its down projection) for all its experts
    active : whether a forward pass of the whole model is under way
    on_rows : called with (layer, rows sorted by token (tokens · slots, channel), slots), where slots is the
        number of experts a token goes to
    on_failure : called with a layer whose experts do not get rows of the mixture's input
    on_choice : called with (layer, expert of each row (token, slot), max |y| of its down projection's output
        for it (token, slot)); None if nobody asks
    """

    def __init__(
        self,
        model: nn.Module,
        mixtures: Mapping[int, str],
        experts: Mapping[int, tuple[tuple[str, str], ...]],
        active: Callable[[], bool],
        on_rows: Callable[[int, torch.Tensor, int], None],
        on_failure: Callable[[int], None],
        on_choice: Callable[[int, torch.Tensor | None, torch.Tensor | None], None] | None = None,
    ) -> None:
        self.on_choice = on_choice
        self.model, self.mixtures, self.experts = model, dict(mixtures), dict(experts)
        self.active, self.on_rows, self.on_failure = active, on_rows, on_failure
        self._handles: list[Any] = []
        self._state: torch.Tensor | None = None
        self._input: torch.Tensor | None = None
        self._parts: list[_Part] = []

    def __enter__(self) -> ExpertModuleCapture:
        begin, enter = of_this_thread(self._begin), of_this_thread(self._expert_hook)
        for layer, pairs in self.experts.items():
            end = of_this_thread(self._end_hook(layer))
            mixture = self.model.get_submodule(self.mixtures[layer])
            self._handles.append(mixture.register_forward_pre_hook(begin, with_kwargs=True))
            self._handles.append(mixture.register_forward_hook(end, always_call=True))
            for number, (expert, down) in enumerate(pairs):
                module, projection = self.model.get_submodule(expert), self.model.get_submodule(down)
                self._handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
                hook = of_this_thread(self._down_hook(number))
                self._handles.append(projection.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *exception: object) -> None:
        while self._handles:
            self._handles.pop().remove()
        self._state, self._input, self._parts = None, None, []

    def _begin(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._parts = []
        self._state = _first_activation(args, kwargs) if self.active() else None

    def _expert_hook(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        self._input = None if self._state is None else _first_activation(args, kwargs)

    def _down_hook(self, number: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Mapping[str, Any], result: Any) -> None:
            hidden = None if self._input is None else _first_activation(args, kwargs)
            if hidden is not None and self._input is not None and isinstance(result, torch.Tensor):
                with unobserved(hidden.device):
                    output = result.detach().reshape(len(hidden), -1)
                    peaks = output.abs().amax(-1) if len(output) else output[:, 0]
                    self._parts.append(_Part(self._input, hidden, number, peaks))
            self._input = None

        return hook

    def _end_hook(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            state, parts = self._state, self._parts
            self._state, self._parts = None, []
            if state is None or result is None:
                return
            with unobserved(state.device):
                order = _token_order(state, parts)
                if order is None:
                    self.on_failure(layer)
                    return
                slots = len(order) // len(state)
                self.on_rows(layer, torch.cat([part.hidden for part in parts])[order], slots)
                if self.on_choice is not None:
                    experts = torch.cat([torch.full_like(p.peaks, p.expert, dtype=torch.long) for p in parts])
                    peaks = torch.cat([part.peaks for part in parts])
                    self.on_choice(layer, experts[order].reshape(-1, slots), peaks[order].reshape(-1, slots))

        return hook


def _first_activation(args: Any, kwargs: Mapping[str, Any]) -> torch.Tensor | None:
    """(row, channel) of the first floating argument."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.is_floating_point() and value.ndim >= 2:
            return value.detach().reshape(-1, value.shape[-1])
    return None


def _token_order(state: torch.Tensor, parts: list[_Part]) -> torch.Tensor | None:
    """The order in which the rows of all parts are sorted by token.

    None where a row is no token's, or tokens go to different numbers of experts.
    """
    hashes = _row_hashes(state)
    parts = [part for part in parts if len(part.state)]
    same_type = all(p.state.dtype == state.dtype and len(p.state) == len(p.hidden) for p in parts)
    same_width = all(part.state.shape[-1] == state.shape[-1] for part in parts)
    indices = [token_indices(hashes, part.state) for part in parts] if same_type and same_width else []
    if not indices or any(index is None for index in indices):
        return None
    index = torch.cat(indices)  # type: ignore[arg-type]
    slots = len(index) // len(state)
    if not bool((torch.bincount(index, minlength=len(state)) == slots).all()) or slots == 0:
        return None
    return torch.argsort(index, stable=True)
