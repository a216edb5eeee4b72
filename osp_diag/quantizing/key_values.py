"""Keys and values at few bits, in any forward pass: rounded where attention reads them, not in a cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from osp_diag.errors import UsageError
from osp_diag.quantizing.conventions import Convention
from osp_diag.quantizing.hadamard import hadamard
from osp_diag.seams.call import AttentionCall
from osp_diag.seams.editing import AttentionEditing
from osp_diag.seams.threads import of_this_thread
from osp_diag.sites.names import SiteMap

__all__ = ["KEYS", "VALUES", "KeyValueRounding", "rounded_key_values"]

KEYS, VALUES = "keys", "values"
"""The parts that are rounded here, beside the Linears' roles."""


@dataclass
class KeyValueRounding:
    """What the rounding of keys and values has done so far.

    Attributes
    ----------
    calls
        layer → how many of its attention calls were changed.
    block_rotations
        descriptions of the matrices that queries and keys were multiplied by, where they mix blocks alone.
    layers
        of the model in all.
    """

    calls: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    block_rotations: set[str] = field(default_factory=set)
    layers: int = 0

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of it, one sentence each."""
        notes = [f"queries and keys are rotated by a {name}" for name in sorted(self.block_rotations)]
        if self.calls and len(self.calls) < self.layers:
            notes.append(
                f"keys and values are rounded in {len(self.calls)} of {self.layers} layers; in the others no "
                "attention is seen"
            )
        return tuple(notes)


@contextmanager
def rounded_key_values(
    model: nn.Module,
    sites: SiteMap,
    convention: Convention,
    bits: int,
    *,
    rotated: bool = False,
    chosen: Callable[[str, int], bool] = lambda part, layer: True,
) -> Iterator[KeyValueRounding]:
    """While this lasts, self-attention reads keys and values of ``bits`` bits, whether it generates or not.

    Each token has a grid of its own in each head. Keys are rounded as they enter the product, after the
    rotary embedding; where they are ``rotated``, queries and keys are multiplied by a Hadamard matrix
    before, which leaves their products what they were.

    Parameters
    ----------
    sites : of the model
    bits : 2 to 8
    chosen : whether a part (:data:`KEYS`, :data:`VALUES`) of a layer is to be rounded

    Raises
    ------
    UsageError : no attention is seen, it makes its logits itself (so that keys and values are out of
        reach), or a layer's attention was not reached in a pass
    """
    if not sites.attention_layers:
        raise UsageError(
            f"keys and values of {type(model).__name__} cannot be rounded: no attention was seen in it; give "
            "16 bits for them, as in 4-4-16"
        )
    rounding = KeyValueRounding(layers=sites.number_of_layers)
    layers = _LayerUnderWay(sites)

    def edit(call: AttentionCall) -> AttentionCall:
        if call.crosses or layers.current is None:
            return call
        if call.query is None or call.key is None or call.value is None:
            raise UsageError(
                f"keys and values of {type(model).__name__} cannot be rounded: its attention (layer "
                f"{layers.current}) multiplies queries and keys by hand, out of reach; give 16 bits for "
                "them, as in 4-4-16, open the model with --attention sdpa, or declare its function with "
                "osp_diag.attention_function"
            )
        rounding.calls[layers.current] += 1
        changes: dict[str, Tensor] = {}
        if chosen(KEYS, layers.current):
            query, key = call.query, call.key
            if rotated:
                matrix = hadamard(key.shape[-1])
                query, key = matrix.apply(query), matrix.apply(key)
                if not matrix.is_full:
                    rounding.block_rotations.add(matrix.description)
            changes = {"query": query, "key": convention.keys(bits).rounded(key)}
        if chosen(VALUES, layers.current):
            changes["value"] = convention.values(bits).rounded(call.value)
        return replace(call, **changes) if changes else call

    editing = AttentionEditing(model, edit, masks=False)

    def end(module: nn.Module, inputs: Any, output: Any) -> None:
        unreached = sorted(set(sites.attention_layers) - set(rounding.calls))
        if unreached:
            raise UsageError(
                f"keys and values of {type(model).__name__} cannot be rounded: the attention of layers "
                f"{', '.join(map(str, unreached))} was not reached in a forward pass; give 16 bits for "
                "them, as in 4-4-16"
            )

    with ExitStack() as undo:
        layers.attach(model, undo)
        undo.callback(model.register_forward_hook(of_this_thread(end)).remove)
        editing.start()
        undo.callback(editing.stop)
        yield rounding


class _LayerUnderWay:
    """Which layer runs: blocks may share a module, which is then the next of its layers at each call."""

    def __init__(self, sites: SiteMap) -> None:
        self.current: int | None = None
        self._layers: dict[str, list[int]] = defaultdict(list)
        for layer, path in enumerate(sites.block_paths):
            self._layers[sites.entries.get(path, path)].append(layer)
        self._runs: dict[str, int] = defaultdict(int)

    def attach(self, model: nn.Module, undo: ExitStack) -> None:
        def begin(module: nn.Module, inputs: Any) -> None:
            self.current = None
            self._runs.clear()

        undo.callback(model.register_forward_pre_hook(of_this_thread(begin)).remove)
        for path in self._layers:
            hook = of_this_thread(self._hook(path))
            undo.callback(model.get_submodule(path).register_forward_pre_hook(hook).remove)

    def _hook(self, path: str) -> Callable[..., None]:
        def enter(module: nn.Module, inputs: Any) -> None:
            layers = self._layers[path]
            self.current = layers[min(self._runs[path], len(layers) - 1)]
            self._runs[path] += 1

        return enter
