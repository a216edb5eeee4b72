"""The sites of a block around its MLP, the stream before it, and what attention and MLP add to the stream.

What is added is told by its values: the module output that equals the difference of two states of the
stream (or is proportional to it, where the model has a residual multiplier).
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import nn

from osp_diag.sites.blocks import Block, factor_of, input_tap, is_inside, minus, outermost, same
from osp_diag.sites.linear_maps import mixes_tokens
from osp_diag.sites.mixer_sites import after_unseen_mixer, cross_attention, cross_output, first_reader
from osp_diag.sites.names import Tap
from osp_diag.sites.stack import is_norm
from osp_diag.sites.trace import Event

__all__ = ["feed_forward_sites"]

_MIXED = "what is added to the stream is no module's output (it is scaled or mixed outside of modules)"
UNSEEN_NORM = "the MLP reads the stream through a norm that is no module, so that the stream is not seen"
PARALLEL = "attention and MLP read the same state (parallel block)"


def _holds_experts(module: nn.Module, hidden_size: int) -> bool:
    """Whether a module holds its experts' matrices stacked in one parameter.

    They lead from or to the stream; the block-diagonal gates of recurrent layers do not.
    """
    if isinstance(module, nn.modules.conv._ConvNd):
        return False
    stacked = [p.shape for p in module.parameters(recurse=False) if p.ndim == 3 and min(p.shape) > 1]
    return any(hidden_size in shape[1:] for shape in stacked)


def _outside_attention(block: Block, attention: Event | None) -> list[Event]:
    """Calls of the block that are no part of its self-attention or cross-attention."""
    last, output = block.calls[-1][0] if block.calls else 0, None
    crossing = cross_attention(block)
    if block.cross_time is not None and block.cross_time > last:
        last, output = block.cross_time, cross_output(block)
    elif attention is None:
        # Attention's projections stand directly in the block: the first after the call is its output.
        output = next((e for e in block.inner if e.start > last and e.projection), None)
    if attention is None or (block.cross_time is not None and crossing is None):
        return [event for event in block.inner if output is not None and event.start > output.stop]
    parts = [event for event in (attention, crossing) if event is not None]
    return [
        event
        for event in block.inner
        if not any(is_inside(event, part) for part in parts)
        and not event.start < block.call_time < event.stop
        and not event.start < last < event.stop
    ]


def feed_forward_sites(block: Block, attention: Event | None) -> None:
    """Find the MLP's input, hidden state and contribution, what is added before it, and residual_mid."""
    mixer: Event | None = None
    if block.call is None and block.cross_time is None:
        mixer, outside = after_unseen_mixer(block)
        block.mixer = mixer
    else:
        outside = _outside_attention(block, attention)
    linears = [event for event in outside if event.projection]
    experts = [event for event in outside if _holds_experts(event.module, block.hidden_size)]
    if not linears and not experts:
        for site in ("mlp_input", "mlp_hidden", "mlp_contribution"):
            block.absent[site] = _why_no_mlp(block, mixer)
        block.absent["residual_mid"] = "no MLP in the block, so that nothing lies between the two"
        _mixing_sites(block, attention, mixer, [], None, block.after)
        return
    mlp = _module_of(block, outside, linears + experts)
    first = block.past_norm(mlp) if mlp is not None and block.is_state(mlp.input) else None
    first = first or (linears or experts)[0]
    block.add("mlp_input", first, "input")
    own = [event for event in linears if mlp is not None and not mlp.projection and is_inside(event, mlp)]
    _hidden_site(block, own if len(own) > 1 else linears, experts, mlp)
    mlp_outputs = [event for event in outside if event.start >= (mlp or first).start]
    if block.call is None and block.cross_time is None and _is_first_reader(block, mixer, first):
        block.absent["residual_mid"] = "no attention in the block"
        _contribution(block, "mlp_contribution", mlp_outputs, block.event.input, block.after)
        return
    middle, tap = _stream_before(block, first)
    earlier = [event for event in outside if event.stop < first.start and event not in mlp_outputs]
    if middle is None and block.call is None and block.cross_time is None:
        block.absent["residual_mid"] = "no attention in the block" if tap is None else UNSEEN_NORM
        if mixer is None:
            _contribution(block, "mlp_contribution", mlp_outputs, block.event.input, block.after)
            return
        block.add("mixer_input", block.past_norm(mixer), "input")
        outputs = [event for event in block.inner if is_inside(event, mixer)]
        _parallel_contributions(block, outputs, mlp_outputs, "mixer_contribution")
        return
    if middle is None:
        block.absent["residual_mid"] = PARALLEL if tap is None else UNSEEN_NORM
        _parallel_contributions(block, _attention_outputs(block, attention, earlier), mlp_outputs)
        return
    block.taps += [] if tap is None else [tap]
    _mixing_sites(block, attention, mixer, earlier, first, middle)
    _contribution(block, "mlp_contribution", mlp_outputs, middle, block.after)


def _module_of(block: Block, outside: list[Event], weighty: list[Event]) -> Event | None:
    """The MLP's module: the first that holds projections or experts, or of whole MLPs the largest.

    Small ones stand beside it: Gemma 3n's LAUREL, a shared expert, an adapter.
    """
    modules = [
        event
        for event in outermost(outside)
        if not is_norm(event.module) and any(is_inside(x, event) for x in weighty)
    ]
    whole = [e for e in modules if block.is_state(e.input) and block.is_state(e.output) and not e.projection]
    if not whole:
        return modules[0] if modules else None
    if len(whole) > 1:
        # A state-space layer beside attention (Falcon-H1) is no MLP, however large.
        whole = [event for event in whole if mixes_tokens(event) is False] or whole
    return max(whole, key=lambda event: sum(p.numel() for p in event.module.parameters()))


def _why_no_mlp(block: Block, mixer: Event | None) -> str:
    outside = [e for e in block.inner if e.projection and (mixer is None or not is_inside(e, mixer))]
    if block.call is None and mixer is None and len(outside) > 2:
        return (
            "which projections are the MLP's cannot be told where attention is not seen; declare the "
            "function that computes it with osp_diag.attention_function, or name the sites"
        )
    return "no MLP in the block"


def _is_first_reader(block: Block, mixer: Event | None, first: Event) -> bool:
    """Whether nothing mixes tokens in the block before its MLP."""
    return mixer is None and not any(e.projection and e.stop < first.start for e in block.inner)


def _mixing_sites(
    block: Block,
    attention: Event | None,
    mixer: Event | None,
    earlier: list[Event],
    mlp: Event | None,
    after: torch.Tensor | None,
) -> None:
    """What self-attention, cross-attention or an unseen mixer reads and adds, up to the state ``after``."""
    before = block.event.input
    stop = block.event.stop if mlp is None else mlp.start
    if block.cross_time is not None:
        after_self, before = _cross_sites(block, [e for e in block.inner if e.stop < stop], before, after)
        if block.call is not None:
            outputs = _attention_outputs(block, attention, [])
            _contribution(block, "attention_contribution", outputs, block.event.input, after_self)
    elif block.call is not None:
        outputs = _attention_outputs(block, attention, earlier)
        _contribution(block, "attention_contribution", outputs, before, after)
    else:
        reader = block.past_norm(mixer) if mixer is not None else first_reader(block, block.event.start, stop)
        if reader is not None:
            block.add("mixer_input", reader, "input")
            start = reader.start if mixer is None else mixer.start
            outputs = [e for e in block.inner if start <= e.start and e.stop < stop]
            _contribution(block, "mixer_contribution", outputs, before, after)


def _cross_sites(
    block: Block, candidates: list[Event], before: torch.Tensor | None, after: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Cross-attention's input, output and contribution; the stream before it, twice."""
    crossing, output = cross_attention(block), cross_output(block)
    start = block.calls[-1][0] if block.calls else block.event.start
    reader = first_reader(block, start, block.cross_time or 0)
    if crossing is not None and block.is_state(crossing.input):
        reader = block.past_norm(crossing)
        start = crossing.start - 1
    if output is not None:
        block.add("cross_attention_output", output, "input")
    if reader is None:
        block.absent["cross_attention_input"] = "no module around or before the call reads the stream"
        block.absent["cross_attention_contribution"] = _MIXED
        return None, before
    block.add("cross_attention_input", reader, "input")
    stream, _ = _stream_before(block, reader)
    if stream is not None:
        before = stream
    outputs = [event for event in candidates if event.start > start]
    _contribution(block, "cross_attention_contribution", outputs, before, after)
    return before, before


def _hidden_site(block: Block, linears: list[Event], experts: list[Event], mlp: Event | None) -> None:
    if experts:
        block.experts = experts[0].name
        return
    down = [event for event in linears[1:] if event.output is not None and event.input is not None]
    down = [event for event in down if event.output.shape[-1] == block.hidden_size]  # type: ignore[union-attr]
    routed = [event for event in down if not block.has_one_row_a_token(event.input)]
    # An expert that every token of the traced pass went to has routed siblings.
    unrouted = [event for event in down if not any(event is e or _are_siblings(event, e) for e in routed)]
    narrowing = [event for event in unrouted if not block.is_state(event.input)]
    if unrouted:
        block.add("mlp_hidden", (narrowing or unrouted)[-1], "input")
    elif down:
        _expert_modules(block, routed[-1], mlp)
    else:
        block.absent["mlp_hidden"] = "no down projection back to the residual stream's width was seen"


def _are_siblings(first: Event, second: Event) -> bool:
    """Whether two modules are the same part of two members of one list: their paths differ by a number."""
    parts = list(zip(first.name.split("."), second.name.split("."), strict=False))
    differing = [pair for pair in parts if pair[0] != pair[1]]
    same_depth = first.name.count(".") == second.name.count(".")
    return same_depth and len(differing) == 1 and all(part.isdigit() for part in differing[0])


def _expert_modules(block: Block, down: Event, mlp: Event | None) -> None:
    """Experts that are modules in a list: where the list is, and the down projection within each."""
    around = [
        e
        for e in block.inner
        if is_inside(down, e) and e is not down and e is not mlp and not block.has_one_row_a_token(e.input)
    ]
    if mlp is None or not around or not block.is_state(mlp.input):
        block.absent["mlp_hidden"] = "its experts each see some of the tokens, and are no modules of a list"
        return
    expert = around[0].name
    block.experts = mlp.name
    block.expert_list = (expert.rpartition(".")[0], down.name.removeprefix(f"{expert}."))


def _stream_before(block: Block, mlp: Event) -> tuple[torch.Tensor | None, Tap | None]:
    """The stream that the MLP's norm reads (or the MLP itself without one), and where.

    (None, None) in a parallel block; (None, tap of the MLP's input) where that is not the stream, since a
    norm that is no module stands before it.
    """
    entry = mlp.input
    norm = next(
        (e for e in block.inner if is_norm(e.module) and e.stop < mlp.start and same(e.output, entry)), None
    )
    post_norm = any(is_norm(e.module) and same(e.output, block.after) for e in block.inner)
    # After a norm on the sum (BERT), or without one before it (OLMo 2), the MLP reads the stream itself.
    source = norm if norm is not None and not post_norm else mlp
    if norm is None and not post_norm:
        source = _modulated_norm(block, mlp) or mlp
    tap = input_tap("residual_mid", block.layer, source)
    of_attention = {(tap.module, tap.call) for tap in block.taps if tap.site == "attention_input"}
    attention = next((e for e in block.inner if (e.name, e.call) in of_attention), None)
    reads_the_same = attention is not None and same(entry, attention.input)
    if reads_the_same or same(source.input, block.event.input):
        return None, None
    if source is mlp and not post_norm and not _is_stream(block, entry):
        return None, tap
    return source.input, tap


def _modulated_norm(block: Block, mlp: Event) -> Event | None:
    """The norm whose output is scaled and shifted before the MLP reads it (adaLN), and that reads a sum."""
    last = block.calls[-1][0] if block.calls else block.event.start
    between = [e for e in block.inner if is_norm(e.module) and last < e.start and e.stop < mlp.start]
    for norm in reversed(between):
        is_output = any(same(e.output, norm.input) for e in block.inner if e.stop < norm.start)
        if block.is_state(norm.input) and not is_output:
            return norm
    return None


def _is_stream(block: Block, state: torch.Tensor | None) -> bool:
    """Whether a module's output leads from the block's input to a state, or from the state to its end."""
    steps = [minus(state, block.event.input), minus(block.after, state)]
    outputs = [event.output for event in block.inner if block.is_state(event.output)]
    return any(
        step is not None and factor_of(output, step) is not None  # type: ignore[arg-type]
        for step in steps
        for output in outputs
    )


def _attention_outputs(block: Block, attention: Event | None, earlier: list[Event]) -> list[Event]:
    """What may be attention's contribution: outputs of its modules, and of those between it and the MLP."""
    if block.call is None:
        return []
    inside = [e for e in block.inner if is_inside(e, attention)]
    if attention is None:
        inside = [e for e in block.inner if e.start > block.call_time and e.projection][:1]
        inside += [e for e in block.inner if e.start < block.call_time < e.stop]
    return inside + [event for event in earlier if event.start > block.call_time]


def _sum_before(block: Block, state: torch.Tensor | None) -> torch.Tensor | None:
    """A state of the stream, before the norm that made it where the block norms its sums (BERT)."""
    norm = next((e for e in block.inner if is_norm(e.module) and same(e.output, state)), None)
    return state if norm is None else norm.input


def _latest_first(block: Block, events: list[Event]) -> list[Event]:
    """Candidates of the stream's shape; what ends last comes first (a dropout after the projection).

    A module that runs twice in the block (Phi's dropout) would be read twice, and is left out.
    """
    runs = Counter(event.name for event in block.inner)
    states = [event for event in events if block.is_state(event.output) and runs[event.name] == 1]
    return sorted(states, key=lambda event: -event.stop)


def _contribution(
    block: Block,
    site: str,
    candidates: list[Event],
    before: torch.Tensor | None,
    after: torch.Tensor | None,
) -> None:
    """The output that was added to ``before`` to give ``after``: of those that fit, the last that ended."""
    if not candidates and site in block.absent:
        return
    difference = minus(_sum_before(block, after), before)
    states = _latest_first(block, candidates)
    if difference is not None:
        factors = [factor_of(event.output, difference) for event in states]  # type: ignore[arg-type]
        # An output that was added as it is goes before one that fits by a multiplier.
        for exact in (True, False):
            for event, factor in zip(states, factors, strict=True):
                if factor is not None and (abs(factor - 1) < 1e-2 or not exact):
                    block.add(site, event, "output")
                    if not exact:
                        block.factors[site] = factor
                    return
    block.absent[site] = _MIXED


def _parallel_contributions(
    block: Block,
    attention_outputs: list[Event],
    mlp_outputs: list[Event],
    site: str = "attention_contribution",
) -> None:
    """Attention's (or a mixer's) and the MLP's outputs that together make the difference across the block."""
    difference = minus(block.after, block.event.input)
    if difference is None:
        block.absent[site] = block.absent["mlp_contribution"] = _MIXED
        return
    # difference = attention + MLP: what attention leaves of it has to be the MLP's output.
    for attention in _latest_first(block, attention_outputs):
        for mlp in _latest_first(block, mlp_outputs):
            rest = minus(difference, attention.output)
            factor = factor_of(mlp.output, rest) if rest is not None else None  # type: ignore[arg-type]
            if factor is not None and abs(factor - 1) < 1e-2:
                block.add(site, attention, "output")
                block.add("mlp_contribution", mlp, "output")
                return
    block.absent[site] = block.absent["mlp_contribution"] = _MIXED
