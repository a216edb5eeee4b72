"""Which matrices write the residual stream and which read it: measured in one pass, not told by names."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise

from torch import Tensor, nn

from osp_diag.errors import CheckpointError
from osp_diag.schema import PROJECTION_WEIGHT
from osp_diag.sites.blocks import factor_of, minus, same
from osp_diag.sites.linear_maps import mark_projections
from osp_diag.sites.names import SiteMap, Tap
from osp_diag.sites.stack import find_stack
from osp_diag.sites.trace import Event, Trace, trace_forward, undisturbed, unwrap
from osp_diag.sites.zero_weights import nonzero_weights

__all__ = ["StreamStructure", "ValuePath", "measure_structure"]

ADVICE = "the methods rtn, gptq, ffn-hadamard and ffn-hadamard+gptq need no rotation of the stream"
"""What can be done with a model whose stream cannot be rotated."""


@dataclass(frozen=True, kw_only=True)
class ValuePath:
    """Where the values of a layer come from and go to."""

    layer: int
    value: str
    """the Linear that gives them"""
    output: str
    """the Linear that reads what attention made of them"""
    width: int
    """of a head"""
    fused: tuple[int, int, int, int] | None
    """(groups, slots a group, first slot, slots taken) where the values are a part of that Linear's rows"""


@dataclass(frozen=True, kw_only=True)
class StreamStructure:
    """What a rotation of the stream, of values, and of the MLP's hidden state has to change."""

    width: int
    embeddings: tuple[str, ...]
    """embeddings whose rows are the stream that the first block reads"""
    writers: tuple[str, ...]
    """Linears whose outputs are (up to a factor) added to the stream, or are it"""
    readers: dict[str, str | None]
    """Linear that reads the stream, the head among them → the norm before it, or None"""
    head: tuple[str, ...]
    """those of the readers that stand behind the blocks"""
    values: tuple[ValuePath, ...]
    notes: tuple[str, ...]
    """layers whose values cannot be rotated, and why"""


def measure_structure(model: nn.Module, sites: SiteMap, *, blocks: str | None = None) -> StreamStructure:
    """Find what reads and writes the residual stream, by which tensors of one pass of eleven tokens are
    equal.

    Parameters
    ----------
    model : causal language model
    sites : of the model
    blocks : path or pattern of the stack of blocks, where the guess fails

    Raises
    ------
    CheckpointError : a model whose stream is written or read by something else than embeddings, Linears and
        norms (parallel blocks, norms behind the Linears, experts, added positions, no head)
    """
    model = unwrap(model)
    with undisturbed(model), nonzero_weights(model):
        trace = trace_forward(model)
        mark_projections(trace)
        _, events = find_stack(model, trace, blocks)
    return _Measuring(model, sites, trace, events).structure()


class _Measuring:
    """One trace, looked through from the embedding to the head."""

    def __init__(self, model: nn.Module, sites: SiteMap, trace: Trace, blocks: list[Event]) -> None:
        self.name = type(model).__name__
        self.sites, self.trace, self.blocks = sites, trace, blocks
        self.readers: dict[str, str | None] = {}
        self.writers: list[str] = []
        self.embeddings: list[str] = []

    def structure(self) -> StreamStructure:
        first, last = self.blocks[0], self.blocks[-1]
        paths = [event.name for event in self.blocks]
        if len(set(paths)) < len(paths) or any(event.entry is not None for event in self.blocks):
            raise self._refusal("blocks run several times, or are lists of modules")
        if self.sites.streams_in_a_row > 1 or first.input is None or first.input.ndim != 3:
            raise self._refusal("several streams run side by side")
        self._embedding(first)
        for layer, event in enumerate(self.blocks):
            following = self.blocks[layer + 1] if event is not last else None
            self._block(layer, event, following)
        inside = set(self.readers)
        behind = [event for event in self.trace.events if event.start > last.stop]
        self._read(last.output, behind, "the head")
        values, notes = self._values()
        return StreamStructure(
            width=self.sites.hidden_size,
            embeddings=tuple(self.embeddings),
            writers=tuple(self.writers),
            readers=self.readers,
            head=tuple(path for path in self.readers if path not in inside),
            values=values,
            notes=notes,
        )

    def _refusal(self, reason: str) -> CheckpointError:
        return CheckpointError(f"the residual stream of {self.name} cannot be rotated: {reason}; {ADVICE}")

    def _embedding(self, first: Event) -> None:
        """What gives the state that the first block reads: an embedding, or a projection of one."""
        assert first.input is not None, "checked before"
        for event in reversed(self.trace.events):
            if event.stop > first.start or event.output is None:
                continue
            if event.output.shape != first.input.shape:
                continue
            if factor_of(event.output, first.input.double()) is None:
                continue
            if isinstance(event.module, nn.Embedding):
                self.embeddings.append(event.name)
                return
            if event.projection:
                self.writers.append(event.name)
                return
        raise self._refusal(
            "what its first block reads is the output of no embedding or Linear (positions are added to it, "
            "or a norm stands behind it)"
        )

    def _block(self, layer: int, event: Event, following: Event | None) -> None:
        inner = self.trace.within(event)
        # What follows the state is the next block's own input, not a copy that this one returns beside it.
        after = event.output if following is None else following.input
        if not same(event.output, after):
            raise self._refusal(f"block {layer} does not hand its output on to what follows")
        middle = self._middle(layer, inner)
        states = [event.input, *([] if middle is None else [middle]), after]
        for before, behind in pairwise(states):
            self._write(layer, inner, minus(behind, before))
        for state in states[:-1]:
            self._read(state, inner, f"block {layer}")

    def _middle(self, layer: int, inner: list[Event]) -> Tensor | None:
        """The stream between attention and MLP."""
        for tap in self.sites.taps:
            if tap.site == "residual_mid" and tap.layer == layer:
                event = next((e for e in inner if (e.name, e.call) == (tap.module, tap.call)), None)
                return None if event is None else event.inputs.get(tap.argument)  # type: ignore[arg-type]
        return None

    def _write(self, layer: int, inner: list[Event], difference: Tensor | None) -> None:
        """The Linear whose output (up to a factor) leads from one state of the stream to the next."""
        fitting = [
            event.name
            for event in inner
            if event.projection
            and event.output is not None
            and difference is not None
            and event.output.numel() == difference.numel()
            and factor_of(event.output, difference) is not None
        ]
        if not fitting:
            raise self._refusal(
                f"what block {layer} adds to it is not the output of one Linear (attention and MLP side by "
                "side, a norm behind them as in Gemma 2 and OLMo 2, or experts)"
            )
        self.writers.append(fitting[-1])

    def _read(self, state: Tensor | None, events: Iterable[Event], where: str) -> None:
        """All that reads a state: norms, whose readers follow, and Linears."""
        events, readers = list(events), len(self.readers)
        for event in events:
            if self._is_container(event) or not self._reads(event, state):
                continue
            if event.projection:
                self._add_reader(event.name, None)
            elif not same(event.output, event.input):
                self._read_norm(event, [later for later in events if later.start > event.stop], where)
        if len(self.readers) == readers:
            raise self._refusal(f"no norm or Linear in {where} reads the stream")

    def _read_norm(self, norm: Event, events: list[Event], where: str) -> None:
        inward = [e for e in events if not self._is_container(e) and self._reads(e, norm.output)]
        for event in inward:
            if event.projection:
                self._add_reader(event.name, norm.name)
            elif not same(event.output, event.input):
                raise self._refusal(
                    f"{event.name}, a {type(event.module).__name__}, reads the norm {norm.name} and is no "
                    "Linear"
                )
        if not any(event.projection for event in inward):
            raise self._refusal(f"the output of {norm.name} in {where} is read by no Linear")

    def _add_reader(self, linear: str, norm: str | None) -> None:
        if self.readers.setdefault(linear, norm) != norm:
            raise self._refusal(f"{linear} reads the stream in two places")

    @staticmethod
    def _reads(event: Event, state: Tensor | None) -> bool:
        return any(same(value, state) for value in event.inputs.values())

    def _is_container(self, event: Event) -> bool:
        """Whether a call is made of others; what a projection is made of does not count."""
        if event.projection:
            return False
        return any(event.start < other.start and other.stop < event.stop for other in self.trace.events)

    def _values(self) -> tuple[tuple[ValuePath, ...], tuple[str, ...]]:
        paths, lacking = [], []
        of_layers: dict[tuple[str, int], Tap] = {(tap.site, tap.layer): tap for tap in self.sites.taps}
        for layer in self.sites.attention_layers:
            value = of_layers.get((f"{PROJECTION_WEIGHT}value", layer))
            output = of_layers.get(("attention_output", layer))
            call = self._call_of(layer)
            if value is None or output is None or call is None or call.value is None:
                lacking.append(layer)
                continue
            width = call.value.shape[-1]
            paths.append(
                ValuePath(
                    layer=layer, value=value.module, output=output.module, width=width, fused=value.fused
                )
            )
        notes = [f"values are not rotated in layers {', '.join(map(str, lacking))}: no Linear gives them"]
        return tuple(paths), tuple(notes if lacking else ())

    def _call_of(self, layer: int):  # type: ignore[no-untyped-def]
        block = self.blocks[layer]
        return next((call for time, call in self.trace.attention if block.start < time < block.stop), None)
