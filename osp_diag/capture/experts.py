"""The hidden activations of mixture-of-experts layers whose experts are stacked in one parameter.

Such experts are not modules, so no hook sees the input of a down projection. While the experts' module
runs, a torch function mode watches two things that every implementation of it (a loop over experts, batched,
grouped) must do: gather rows of its input by token index, and multiply rows by the down projection's weights.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from osp_diag.capture.hooks import unobserved
from osp_diag.seams.threads import of_this_thread

__all__ = ["DOWN_NAMES", "ExpertCapture"]

DOWN_NAMES = re.compile(r"down|w2|output|wo\b", re.IGNORECASE)
_PRODUCTS = {"linear", "matmul", "__matmul__", "bmm", "_grouped_mm", "grouped_mm", "mm"}


class _Watch(TorchFunctionMode):
    """Collects (token index, rows) of every product with a down projection during one call."""

    def __init__(self, module: nn.Module, hidden: torch.Tensor) -> None:
        super().__init__()
        self.hidden = hidden.untyped_storage().data_ptr()
        self.tokens = hidden.numel() // hidden.shape[-1]
        matrices = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
        self.down = {
            p.untyped_storage().data_ptr() for name, p in matrices.items() if DOWN_NAMES.search(name)
        }
        self.copies: list[torch.Tensor] = []
        self.index: torch.Tensor | None = None
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name == "__getitem__":
            self._on_gather(args, result)
        elif name == "repeat_interleave" and args[0].untyped_storage().data_ptr() == self.hidden:
            slots = result.shape[0] // self.tokens
            self.index = torch.arange(self.tokens, device=result.device).repeat_interleave(slots)
        elif name in _PRODUCTS and len(args) >= 2 and all(isinstance(a, torch.Tensor) for a in args[:2]):
            self._on_product(args[0], args[1])
        return result

    def _on_product(self, left: torch.Tensor, right: torch.Tensor) -> None:
        """The factor that is not a down projection holds the rows, (rows, width, 1) if batched."""
        if self.index is None:
            return
        for rows, weight in ((left, right), (right, left)):
            if weight.untyped_storage().data_ptr() in self.down:
                flat = rows.squeeze(-1) if rows.ndim == 3 and rows.shape[-1] == 1 else rows
                flat = flat.reshape(-1, flat.shape[-1])
                if flat.shape[0] == self.index.numel():
                    self.rows.append((self.index.reshape(-1), flat.detach()))
                return

    def _on_gather(self, args: Any, result: Any) -> None:
        source, index = args[0], args[-1]
        if not isinstance(result, torch.Tensor):
            return
        storage = source.untyped_storage().data_ptr()
        is_index = (
            isinstance(index, torch.Tensor) and not index.is_floating_point() and index.dtype != torch.bool
        )
        if storage == self.hidden and is_index and result.shape[-1] == source.shape[-1]:
            self.index = index
        elif storage in self.down:
            # Picking experts by index copies their weights; kept alive so that the address stays theirs.
            self.copies.append(result)
            self.down.add(result.untyped_storage().data_ptr())


# Why experts are watched and not re-computed: docs/decisions.md, Capture.
class ExpertCapture:
    """Hands over the down projections' inputs of each expert layer as (batch · slots, token, channel).

    Parameters
    ----------
    model : the model that runs
    layers : layer → path of the module that holds its experts' stacked weights
    active : whether a forward pass of the whole model is under way
    on_rows : called with (layer, rows sorted by token (tokens · slots, channel), slots), where slots is the
        number of experts a token goes to
    on_failure : called with a layer when the products were not recognised
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[int, str],
        active: Callable[[], bool],
        on_rows: Callable[[int, torch.Tensor, int], None],
        on_failure: Callable[[int], None],
    ) -> None:
        self.model, self.layers, self.active = model, dict(layers), active
        self.on_rows, self.on_failure = on_rows, on_failure
        self._handles: list[Any] = []
        self._watch: _Watch | None = None

    def __enter__(self) -> ExpertCapture:
        begin = of_this_thread(self._begin)
        for layer, path in self.layers.items():
            end = of_this_thread(self._end_hook(layer))
            module = self.model.get_submodule(path)
            self._handles.append(module.register_forward_pre_hook(begin, with_kwargs=True))
            self._handles.append(module.register_forward_hook(end, always_call=True))
        return self

    def __exit__(self, *exception: object) -> None:
        self._leave()
        while self._handles:
            self._handles.pop().remove()

    def _begin(self, module: nn.Module, args: Any, kwargs: Mapping[str, Any]) -> None:
        if not self.active():
            return
        hidden = next(
            (v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.is_floating_point()),
            None,
        )
        if hidden is not None:
            self._watch = _Watch(module, hidden)
            self._watch.__enter__()

    def _leave(self) -> _Watch | None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.__exit__(None, None, None)
        return watch

    def _end_hook(self, layer: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, result: Any) -> None:
            watch = self._leave()
            if watch is None or result is None:
                return
            row_count = sum(rows.shape[0] for _, rows in watch.rows)
            if row_count == 0 or row_count % watch.tokens:
                self.on_failure(layer)
                return
            with unobserved(watch.rows[0][1].device):
                index = torch.cat([index for index, _ in watch.rows])
                rows = torch.cat([rows for _, rows in watch.rows])
                self.on_rows(layer, rows[torch.argsort(index, stable=True)], row_count // watch.tokens)

        return hook
