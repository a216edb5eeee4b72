"""A model as if it computed with few-bit integers: rotated, its weights, inputs, keys and values rounded."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int64
from torch import Tensor, nn

from osp_diag.errors import UsageError
from osp_diag.quantizing.conventions import Convention, convention_named
from osp_diag.quantizing.gptq import gptq_weights
from osp_diag.quantizing.grid import Grid
from osp_diag.quantizing.key_values import KEYS, VALUES, KeyValueRounding, rounded_key_values
from osp_diag.quantizing.learned_rotations import learned_rotations
from osp_diag.quantizing.linears import BlockLinear, block_linears
from osp_diag.quantizing.methods import Method, method_named
from osp_diag.quantizing.rotations import rotated
from osp_diag.quantizing.setting import UNQUANTIZED, Setting
from osp_diag.sites import SiteMap, find_sites
from osp_diag.sites.trace import unwrap

__all__ = ["QuantizedWeights", "Simulation", "quantized", "quantized_weights"]

Progress = Callable[[int, int], None]
"""Told (parts done, parts in all) of what takes long: layers, or sequences that rotations are learned on."""


@dataclass(frozen=True)
class Simulation:
    """What a simulation does.

    Attributes
    ----------
    linears
        paths of the Linears that are quantized.
    of_weights
        what is to be said of rotations and weights, one sentence each.
    key_values
        what the rounding of keys and values has done so far, where they are rounded.
    """

    linears: tuple[str, ...]
    of_weights: tuple[str, ...] = ()
    key_values: KeyValueRounding | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is to be said of it, one sentence each, with that of the passes so far."""
        return self.of_weights if self.key_values is None else (*self.of_weights, *self.key_values.notes)


@dataclass(frozen=True, kw_only=True)
class QuantizedWeights:
    """A model whose weights are rotated and rounded, ready for passes with rounded activations.

    Attributes
    ----------
    linears
        that are quantized.
    notes
        what is to be said of rotations and weights, one sentence each.
    """

    model: nn.Module
    sites: SiteMap
    convention: Convention
    linears: tuple[BlockLinear, ...]
    rotates_keys: bool
    chosen: Callable[[str, int], bool]
    full_precision_channels: Mapping[str, Int64[Tensor, " channel"]]
    notes: tuple[str, ...] = ()

    @contextmanager
    def passes(self, setting: Setting) -> Iterator[Simulation]:
        """Passes in which inputs, keys and values have the bits of ``setting``; its weights are there.

        Raises
        ------
        UsageError : keys and values that cannot be reached
        """
        key_values = None
        with ExitStack() as undo:
            if setting.activation_bits != UNQUANTIZED:
                for linear in self.linears:
                    grid = self._input_grid(linear, setting.activation_bits)
                    hook = _rounding_of_input(grid, self.full_precision_channels.get(linear.path))
                    undo.callback(linear.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
            if setting.key_value_bits != UNQUANTIZED and self._any_key_values():
                rounding = rounded_key_values(
                    self.model,
                    self.sites,
                    self.convention,
                    setting.key_value_bits,
                    rotated=self.rotates_keys,
                    chosen=self.chosen,
                )
                key_values = undo.enter_context(rounding)
            yield Simulation(tuple(linear.path for linear in self.linears), self.notes, key_values)

    def _input_grid(self, linear: BlockLinear, bits: int) -> Grid:
        if linear.head_width:
            return self.convention.attention_output(bits, linear.head_width)
        return self.convention.activations(bits)

    def _any_key_values(self) -> bool:
        # Where no attention was seen, that is refused rather than passed over.
        layers = self.sites.attention_layers or (0,)
        return any(self.chosen(part, layer) for part in (KEYS, VALUES) for layer in layers)


@contextmanager
def quantized(
    model: nn.Module,
    setting: Setting,
    *,
    method: str = "rtn",
    convention: str = "plain",
    calibration: Any = None,
    seed: int = 0,
    only: Collection[tuple[str, int]] | None = None,
    full_precision_channels: Mapping[str, Int64[Tensor, " channel"]] | None = None,
    blocks: str | None = None,
    sites: SiteMap | None = None,
    progress: Progress | None = None,
) -> Iterator[Simulation]:
    """The model as if every ``nn.Linear`` inside its blocks multiplied few-bit integers, while this lasts.

    Quantized are, of each such Linear (in a Llama q, k, v, o, gate, up and down of every layer), its
    weight, once, and its input, at every call; and the keys and values that attention reads, in every pass,
    with a cache or without. On which grids is for the convention to say,
    :class:`osp_diag.quantizing.grid.Grid` has the formulas; before it, the method may rotate the model,
    which leaves what it computes unchanged.

    Left alone are embedding, head, norms, biases, and weights that are in no Linear (experts stacked in one
    parameter). Products run in the model's dtype. No gradient passes through the rounding. Afterwards the
    model has its own weights back, also after an error. Meanwhile the blocks' weights take twice their
    memory.

    Parameters
    ----------
    model : any model whose blocks osp_diag finds; one pass of eleven tokens finds them
    setting : bits of weights, activations, keys and values; at 16 each stays bit for bit what it is
    method : of :data:`osp_diag.quantizing.methods.METHODS`
    convention : of :data:`osp_diag.quantizing.conventions.CONVENTIONS`
    calibration : token ids of shape (sequence, position), for methods that look at activations
    seed : of the random numbers of rotations
    only : parts to round, the others stay as they are: (role, layer), where a role is one of
        :data:`osp_diag.quantizing.linears.ROLES`, ``"keys"`` or ``"values"``
    full_precision_channels : path of a Linear → channels of its input that stay as they are, with the columns
        of its weight that read them; the grids are of the others
    blocks : path or pattern of the stack of blocks, where the guess fails
    sites : of the model, where they are at hand
    progress : told of layers, by methods that go through them one by one

    Raises
    ------
    UsageError : no such method or convention, parts that the model does not have, no calibration where one
        is needed, or what a method refuses
    CheckpointError : blocks without Linears, or with weights that cannot be rounded
    SiteError : no blocks were found
    """
    weights = quantized_weights(
        model,
        setting.weight_bits,
        method=method,
        convention=convention,
        calibration=calibration,
        seed=seed,
        only=only,
        full_precision_channels=full_precision_channels,
        blocks=blocks,
        sites=sites,
        progress=progress,
    )
    with weights as prepared, prepared.passes(setting) as simulation:
        yield simulation


@contextmanager
def quantized_weights(
    model: nn.Module,
    weight_bits: int,
    *,
    method: str = "rtn",
    convention: str = "plain",
    calibration: Any = None,
    seed: int = 0,
    only: Collection[tuple[str, int]] | None = None,
    full_precision_channels: Mapping[str, Int64[Tensor, " channel"]] | None = None,
    blocks: str | None = None,
    sites: SiteMap | None = None,
    progress: Progress | None = None,
) -> Iterator[QuantizedWeights]:
    """The first half of :func:`quantized`, which may take long: several settings can share its weights.

    Parameters and errors are those of :func:`quantized`.
    """
    way, rules = method_named(method), convention_named(convention)
    model = unwrap(model)
    sites = sites or find_sites(model, blocks=blocks)
    linears = block_linears(model, sites=sites)
    chosen = _selection(only, linears, sites)
    linears = tuple(x for x in linears if any(chosen(role, x.layer) for role in x.roles))
    _check_calibration(way, calibration)
    channels = _checked_channels(full_precision_channels or {}, linears, way)
    notes: list[str] = []
    # Whatever fails in between, what was exchanged up to there is put back, in reverse order.
    with ExitStack() as undo:
        # Not at the rounding, which would keep rotated weights in memory beside those and the rounded ones.
        for linear in linears:
            undo.callback(setattr, linear.module, "weight", linear.module.weight)
        rotates_keys = rules.rotates_keys
        if way.rotation != "none":
            learned = None
            if way.rotation == "learned":
                learned = learned_rotations(
                    model, calibration, convention=rules, seed=seed, blocks=blocks, progress=progress
                )
            applied = undo.enter_context(
                rotated(model, way.rotation, seed=seed, rotations=learned, blocks=blocks)
            )
            notes += applied.notes
            rotates_keys = rotates_keys or applied.key_rotation is not None
        if weight_bits != UNQUANTIZED:
            notes += _round_weights(
                model, linears, rules.weights(weight_bits), way, calibration, channels, progress, blocks
            )
        yield QuantizedWeights(
            model=model,
            sites=sites,
            convention=rules,
            linears=linears,
            rotates_keys=rotates_keys,
            chosen=chosen,
            full_precision_channels=channels,
            notes=tuple(notes),
        )


def _selection(
    only: Collection[tuple[str, int]] | None, linears: tuple[BlockLinear, ...], sites: SiteMap
) -> Callable[[str, int], bool]:
    if only is None:
        return lambda part, layer: True
    parts = frozenset(only)
    there = {(role, linear.layer) for linear in linears for role in linear.roles}
    there |= {(part, layer) for part in (KEYS, VALUES) for layer in sites.attention_layers}
    foreign = sorted(parts - there)
    if foreign or not parts:
        wrong = f"no {foreign[0][0]} in layer {foreign[0][1]}" if foreign else "nothing to round"
        roles = ", ".join(dict.fromkeys(role for role, _ in sorted(there)))
        raise UsageError(
            f"only={only!r}: there is {wrong}; parts are (role, layer), with {roles} in layers 0 to "
            f"{sites.number_of_layers - 1}"
        )
    return lambda part, layer: (part, layer) in parts


def _check_calibration(method: Method, calibration: Any) -> None:
    if method.calibrated and calibration is None:
        raise UsageError(
            f"{method.name} looks at activations on a text: give `calibration`, token ids of shape "
            "(sequence, position) other than those that are evaluated"
        )


def _round_weights(
    model: nn.Module,
    linears: tuple[BlockLinear, ...],
    grid: Grid,
    method: Method,
    calibration: Any,
    channels: Mapping[str, Int64[Tensor, " channel"]],
    progress: Progress | None,
    blocks: str | None,
) -> tuple[str, ...]:
    """Exchange parameters, not their values: whoever else holds one (a tied head) keeps its numbers.

    The caller puts the others back.
    """
    if method.rounding == "gptq":
        rounding = gptq_weights(
            model, linears, grid, calibration, blocks=blocks, in_place=True, progress=progress
        )
        return rounding.notes
    for linear in linears:
        rounded = _rounded(grid, linear.module.weight.detach(), channels.get(linear.path))
        linear.module.weight = nn.Parameter(rounded, requires_grad=False)
    return ()


def _checked_channels(
    channels: Mapping[str, Int64[Tensor, " channel"]], linears: tuple[BlockLinear, ...], method: Method
) -> Mapping[str, Int64[Tensor, " channel"]]:
    modules = {linear.path: linear.module for linear in linears}
    if channels and (method.rotation != "none" or method.rounding != "nearest"):
        raise UsageError(f"single channels stay at full precision by rtn alone, not by {method.name}")
    for path, indices in channels.items():
        if path not in modules:
            raise UsageError(f"full_precision_channels: {path} is no Linear that is rounded")
        width = modules[path].in_features
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < width:
            raise UsageError(f"full_precision_channels: {path} reads channels 0 to {width - 1}")
    return {path: indices.to(modules[path].weight.device) for path, indices in channels.items()}


def _rounded(
    grid: Grid, values: Float[Tensor, "... channel"], unrounded: Int64[Tensor, " channel"] | None
) -> Float[Tensor, "... channel"]:
    """``values`` on the grid, but for channels that stay; the grid is of the others."""
    if unrounded is None or not unrounded.numel():
        return grid.rounded(values)
    return grid.rounded(values.index_fill(-1, unrounded, 0)).index_copy(
        -1, unrounded, values.index_select(-1, unrounded)
    )


def _rounding_of_input(grid: Grid, unrounded: Int64[Tensor, " channel"] | None) -> Any:
    """A hook before the forward pass of a Linear."""

    def rounded_input(
        module: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if inputs:
            return (_rounded(grid, inputs[0], unrounded), *inputs[1:]), keywords
        return inputs, keywords | {"input": _rounded(grid, keywords["input"], unrounded)}

    return rounded_input
