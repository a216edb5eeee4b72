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

    def __init__(self, module: nn.Module, hidden: torch.Tensor, *, reads_choice: bool) -> None:
        super().__init__()
        self.reads_choice = reads_choice
        self.hidden = hidden.untyped_storage().data_ptr()
        self.tokens = hidden.numel() // hidden.shape[-1]
        matrices = {name: p for name, p in module.named_parameters(recurse=False) if p.ndim == 3}
        self.down = {
            p.untyped_storage().data_ptr() for name, p in matrices.items() if DOWN_NAMES.search(name)
        }
        self.matrices = [p for name, p in matrices.items() if DOWN_NAMES.search(name)]
        parameters = module.named_parameters(recurse=False)
        self.biases = [p for name, p in parameters if p.ndim == 2 and DOWN_NAMES.search(name)]
        self.copies: dict[int, tuple[torch.Tensor, torch.Tensor | None]] = {}
        """address of weights picked by index → themselves and the experts that were picked"""
        self.index: torch.Tensor | None = None
        self.rows: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.choices: list[tuple[torch.Tensor, torch.Tensor] | None] = []
        """of each product: the expert of each row, and the largest |y| that it gave there"""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = getattr(function, "__name__", "")
        if name == "__getitem__":
            self._on_gather(args, result)
        elif name == "repeat_interleave" and args[0].untyped_storage().data_ptr() == self.hidden:
            slots = result.shape[0] // self.tokens
            self.index = torch.arange(self.tokens, device=result.device).repeat_interleave(slots)
        elif name in _PRODUCTS and len(args) >= 2 and all(isinstance(a, torch.Tensor) for a in args[:2]):
            others = [a for a in (*args[2:], *(kwargs or {}).values()) if isinstance(a, torch.Tensor)]
            self._on_product(args[0], args[1], result, others)
        return result

    def _on_product(
        self, left: torch.Tensor, right: torch.Tensor, result: torch.Tensor, others: list[torch.Tensor]
    ) -> None:
        """The factor that is not a down projection holds the rows, (rows, width, 1) if batched."""
        if self.index is None:
            return
        for rows, weight in ((left, right), (right, left)):
            if weight.untyped_storage().data_ptr() in self.down:
                flat = rows.squeeze(-1) if rows.ndim == 3 and rows.shape[-1] == 1 else rows
                flat = flat.reshape(-1, flat.shape[-1])
                if flat.shape[0] == self.index.numel():
                    self.rows.append((self.index.reshape(-1), flat.detach()))
                    if not self.reads_choice:
                        return
                    with unobserved(flat.device):
                        self.choices.append(self._choice(weight, result.detach(), flat.shape[0], others))
                return

    def _choice(
        self, weight: torch.Tensor, result: torch.Tensor, rows: int, others: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(expert of each row, max |y| of each row) of one product; None where the expert is not told."""
        output = result.reshape(rows, -1)
        experts = self._experts_of(weight, rows, others)
        if experts is None:
            return None
        has_bias = any(other.is_floating_point() for other in others)
        if self.biases and not has_bias:
            if len(self.biases) > 1 or self.biases[0].shape[-1] != output.shape[-1]:
                return None
            output = output + self.biases[0][experts]
        return experts, output.abs().amax(-1)

    def _experts_of(self, weight: torch.Tensor, rows: int, others: list[torch.Tensor]) -> torch.Tensor | None:
        place = weight.untyped_storage().data_ptr()
        if place in self.copies and self.copies[place][1] is not None:
            picked = self.copies[place][1]
            return picked if picked is not None and picked.numel() == rows else None
        if len(self.matrices) != 1 or place != self.matrices[0].untyped_storage().data_ptr():
            return None
        whole = self.matrices[0]
        is_one = weight.numel() == whole[0].numel()
        if is_one:
            number = (weight.storage_offset() - whole.storage_offset()) // whole.stride(0)
            return torch.full((rows,), number, device=weight.device)
        for other in others:
            if not other.is_floating_point() and other.shape == whole.shape[:1]:
                # Rows are sorted by expert, and the offsets are where each expert's rows end.
                order = torch.arange(rows, device=weight.device, dtype=other.dtype)
                return torch.searchsorted(other, order, right=True)
        return None

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
            place = result.untyped_storage().data_ptr()
            picked = index.reshape(-1) if is_index and place != storage else None
            if place != storage:
                self.copies[place] = (result, picked)
            self.down.add(place)


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
    on_choice : called with (layer, expert of each row (token, slot), max |y| of its down projection's output
        for it (token, slot)), both None where a product does not tell its expert; None if nobody asks
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Mapping[int, str],
        active: Callable[[], bool],
        on_rows: Callable[[int, torch.Tensor, int], None],
        on_failure: Callable[[int], None],
        on_choice: Callable[[int, torch.Tensor | None, torch.Tensor | None], None] | None = None,
    ) -> None:
        self.on_choice = on_choice
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
            self._watch = _Watch(module, hidden, reads_choice=self.on_choice is not None)
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
                order, slots = torch.argsort(index, stable=True), row_count // watch.tokens
                self.on_rows(layer, rows[order], slots)
                if self.on_choice is None:
                    return
                choices = [choice for choice in watch.choices if choice is not None]
                if len(choices) < len(watch.choices):
                    self.on_choice(layer, None, None)
                    return
                experts, peaks = (torch.cat(part)[order] for part in zip(*choices, strict=True))
                self.on_choice(layer, experts.reshape(-1, slots), peaks.reshape(-1, slots))

        return hook
