"""From the trace of one forward pass to the sites of every layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from osp_diag.errors import SiteError
from osp_diag.schema import (
    ATTENTION,
    CROSS_ATTENTION,
    CROSS_HEAD_SITES,
    DOWN_WEIGHT,
    HEAD_SITES,
    MIXER_STATE,
    SEAM_NOTE,
    SITES,
)
from osp_diag.sites.attention_sites import attention_event, attention_sites, is_causal
from osp_diag.sites.blocks import Block, input_tap, output_tap, same
from osp_diag.sites.feed_forward_sites import feed_forward_sites
from osp_diag.sites.layers import count_calls, first_shape, number_layers, pick_stream, stream_after
from osp_diag.sites.layout import (
    has_tokens_first,
    keep_first_stream,
    streams_in_a_row,
    turn_channels,
    with_layout,
)
from osp_diag.sites.linear_maps import mark_projections
from osp_diag.sites.mixer_states import find_mixer_states
from osp_diag.sites.names import AT_THE_CALL, AT_THE_CROSS_CALL, SiteMap, Tap
from osp_diag.sites.projections import distinct_heads
from osp_diag.sites.router_sites import router_taps
from osp_diag.sites.stack import find_stack, is_norm, parts_in_lists, stack_names
from osp_diag.sites.trace import (
    TOKENS,
    Event,
    Trace,
    fused_encoder_layers,
    trace_forward,
    undisturbed,
    unwrap,
)
from osp_diag.sites.weight_sites import projection_weights
from osp_diag.sites.zero_weights import nonzero_weights

__all__ = ["find_sites"]


def _linear_sites(block: Block) -> list[Tap]:
    return [
        input_tap(f"linear_input:{block.name_of(event.name)}", block.layer, event)
        for event in block.inner
        if event.projection and block.has_one_row_a_token(event.input)
    ]


def _final_norm_tap(trace: Trace, last: Block) -> Tap | None:
    for event in trace.events:
        if event.start > last.event.stop and is_norm(event.module) and same(event.input, last.after):
            return output_tap("final_norm", last.layer, event)
    return None


# Why one traced pass, matched by values and not by names: docs/decisions.md, Capture.
def find_sites(
    model: nn.Module,
    *,
    blocks: str | None = None,
    stack: str | None = None,
    named: Mapping[str, str] | None = None,
    example: Mapping[str, Any] | tuple[Any, ...] | None = None,
) -> SiteMap:
    """Find the sites of a model by its structure and one forward pass of eleven tokens.

    Parameters
    ----------
    model : any torch module; wrappers of ``torch.compile`` and DDP are looked through
    blocks : path or pattern of the stack of blocks, where the guess fails
    stack : of several stacks that run (encoder and decoder, a vision tower and a language model) the one to
        follow, by a part of its path; None: the largest
    named : site → ``"module pattern[:input|:output]"``, where a guess fails; ``*`` stands for the layer
    example : a batch to run, for models that do not take token ids alone

    Raises
    ------
    SiteError : no stack of blocks, a pattern that matches nothing, or a model that cannot be run
    """
    model = unwrap(model)
    with undisturbed(model), nonzero_weights(model):
        trace = trace_forward(model, example)
        mark_projections(trace)
        path, events = find_stack(model, trace, blocks, stack)
        in_a_row = streams_in_a_row(model, example, events[0])
        if in_a_row > 1:
            trace = trace_forward(model, example, streams=in_a_row)
            mark_projections(trace)
            path, events = find_stack(model, trace, blocks, stack)
            keep_first_stream(trace, events, in_a_row)
        channels_first = turn_channels(trace, events)
        first = events[0].input
        if first is None:
            raise SiteError(f"the blocks at {path!r} receive no activations; name the stack with `blocks=`")
        tokens_first = has_tokens_first(model, example, trace, events)
        streams = pick_stream(events, *first_shape(example, TOKENS))
        count_calls(trace, events)
        layers, paths = number_layers(model, path, events)
        traced_blocks = [
            _resolve_block(layer, event, following, trace, first.shape[-1])
            for layer, event, following in zip(layers, events, [*events[1:], None], strict=True)
        ]
        states = find_mixer_states(model, traced_blocks, example)
    # Why the embedding is what the first block reads: docs/decisions.md, Capture.
    taps = [input_tap("embedding", 0, events[0])]
    for block in traced_blocks:
        taps += block.taps + _linear_sites(block)
    names_of_stacks = stack_names(model, trace, path)
    names = {module: name for name, module in model.named_modules()}
    final_norm = _final_norm_tap(trace, traced_blocks[-1])
    if final_norm is not None:
        taps.append(final_norm)
    taps += _outer_linear_sites(trace, events, traced_blocks[0], layers[-1])
    taps = _with_named_taps(taps, named or {}, trace, events, traced_blocks)
    taps += _down_weights(taps, trace, traced_blocks)
    expert_modules = {b.layer: _experts_in(model, *b.expert_list) for b in traced_blocks if b.expert_list}
    expert_counts = {
        block.layer: len(expert_modules.get(block.layer, ())) or _stacked_experts(model, block.experts)
        for block in traced_blocks
        if block.experts
    }
    for block in traced_blocks:
        if block.experts:
            taps += router_taps(block, expert_counts[block.layer])
    taps += [tap for block in traced_blocks for tap in projection_weights(block, taps)]
    return SiteMap(
        blocks=path,
        stack=names_of_stacks.get(path, ""),
        stacks=tuple(names_of_stacks.values()),
        block_paths=paths,
        hidden_size=first.shape[-1],
        taps=(*(with_layout(tap, trace, first, tokens_first=tokens_first) for tap in taps), *states.taps),
        attention_layers=tuple(block.layer for block in traced_blocks if block.calls),
        causal_layers=frozenset(
            block.layer for block in traced_blocks if block.calls and is_causal(block.call)
        ),
        absent=_absent_sites(traced_blocks, {tap.site for tap in taps})
        | ({MIXER_STATE: states.absent} if states.absent else {}),
        notes=(
            *_notes(model, trace, traced_blocks, {(tap.site, tap.layer) for tap in taps}),
            *_notes_of_stacks(names_of_stacks, path),
            *_notes_of_layers(paths, layers, streams, in_a_row),
        ),
        cross_attention={b.layer: names[b.cross_call.module] for b in traced_blocks if _has_cross_call(b)},
        key_copies=_key_copies({b.layer: b.call for b in traced_blocks}),
        cross_key_copies=_key_copies({b.layer: b.cross_call for b in traced_blocks}),
        tokens_first=tokens_first,
        channels_first=channels_first,
        streams_in_a_row=in_a_row,
        entries={event.name: event.entry.name for event in events if event.entry is not None},
        members={event.name: members for event in events if (members := parts_in_lists(event))},
        states_with_cache=states.seen_with_cache,
        prefix="decoder_" if _is_decoder(model, path) else "",
        expert_layers={block.layer: block.experts for block in traced_blocks if block.experts},
        expert_modules=expert_modules,
        expert_counts=expert_counts,
    )


def _experts_in(model: nn.Module, path: str, down: str) -> tuple[tuple[str, str], ...]:
    """(path of an expert, path of its down projection) for all members of a list."""
    names = [f"{path}.{name}" for name, _ in model.get_submodule(path).named_children()]
    modules = dict(model.named_modules())
    return tuple((name, f"{name}.{down}") for name in names if f"{name}.{down}" in modules)


def _stacked_experts(model: nn.Module, path: str) -> int:
    """How many experts a module holds in its parameters."""
    return next(p.shape[0] for p in model.get_submodule(path).parameters(recurse=False) if p.ndim == 3)


def _is_decoder(model: nn.Module, stack: str) -> bool:
    """Whether the blocks are the decoder of a model that also has an encoder, whose tokens are others."""
    if not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return "decoder" in stack.split(".")


def _resolve_block(
    layer: int, event: Event, following: Event | None, trace: Trace, hidden_size: int
) -> Block:
    calls = [(time, call) for time, call in trace.attention if event.start < time < event.stop]
    skipped = [(time, reason) for time, reason in trace.skipped if event.start < time < event.stop]
    crossings = [(time, call) for time, call in trace.crossings if event.start < time < event.stop]
    block = Block(layer, event, trace.within(event), hidden_size, calls, skipped, crossings)
    block.add("residual_pre", event, "input")
    post = stream_after(block, following, trace)
    attention = attention_event(block)
    attention_sites(block, attention)
    feed_forward_sites(block, attention)
    if post is not None:
        block.taps.append(post)
    return block


def _sites_at_the_call(block: Block) -> set[str]:
    """Sites that the attention calls themselves hand over."""
    sites: set[str] = set()
    if block.call is not None:
        sites |= {ATTENTION} if block.call.query is None else AT_THE_CALL
    if _has_cross_call(block):
        sites |= {CROSS_ATTENTION} if block.cross_call.query is None else AT_THE_CROSS_CALL
    return sites


def _has_cross_call(block: Block) -> bool:
    """Whether cross-attention is measured at its call; where it is not, the block says why."""
    if block.cross_time is None:
        return False
    call, own = block.cross_call, block.call
    reason = ""
    if call is None:
        reason = "its call of cross-attention cannot be read"
    elif own is not None and own.module is call.module:
        reason = "one module calls self-attention and cross-attention, so that the two cannot be told apart"
    elif call.query is None:
        logits_only = f"the model hands only attention logits to its {call.seam}"
        block.absent |= dict.fromkeys(CROSS_HEAD_SITES, logits_only)
    if reason:
        block.absent |= dict.fromkeys(AT_THE_CROSS_CALL, reason)
    return not reason


def _down_weights(taps: list[Tap], trace: Trace, blocks: list[Block]) -> list[Tap]:
    """The matrices that read ``mlp_hidden``: of a projection, or of the experts of a mixture."""
    hidden = {tap.layer: tap for tap in taps if tap.site == "mlp_hidden"}
    projections = {event.name for event in trace.events if event.projection}
    weights = []
    for block in blocks:
        tap = hidden.get(block.layer)
        if tap is not None and tap.side == "input" and tap.module in projections:
            weights += [replace(tap, site=DOWN_WEIGHT, side=side) for side in ("weight", "product")]
        elif tap is None and block.experts:
            experts = next(event for event in block.inner if event.name == block.experts)
            weights.append(replace(input_tap(DOWN_WEIGHT, block.layer, experts), side="weight"))
        elif tap is not None:
            block.absent[DOWN_WEIGHT] = "mlp_hidden is named at a place that is not a projection's input"
        else:
            block.absent[DOWN_WEIGHT] = block.absent.get("mlp_hidden", "mlp_hidden is not named here")
    return weights


def _absent_sites(blocks: list[Block], present: set[str]) -> dict[str, str]:
    present = present.union(*map(_sites_at_the_call, blocks))
    if any(block.experts for block in blocks):
        present.add("mlp_hidden")
    reasons: dict[str, str] = {"final_norm": "no norm reads the last block's output"}
    for block in blocks:
        for site, reason in block.absent.items():
            reasons.setdefault(site, reason)
    return {site: reasons[site] for site in SITES if site in reasons and site not in present}


def _outer_linear_sites(trace: Trace, events: list[Event], first: Block, last: int) -> list[Tap]:
    taps = []
    for event in trace.events:
        inside = any(block.start < event.start < block.stop for block in events)
        if inside or not event.projection:
            continue
        if first.has_one_row_a_token(event.input):
            layer = 0 if event.start < events[0].start else last
            taps.append(input_tap(f"linear_input:{event.name}", layer, event))
    return taps


def _with_named_taps(
    taps: list[Tap], named: Mapping[str, str], trace: Trace, events: list[Event], blocks: list[Block]
) -> list[Tap]:
    """Taps with the user's own patterns in place of the guesses for those sites."""
    for site, pattern in named.items():
        if site in (ATTENTION, CROSS_ATTENTION):
            raise SiteError(f"site {site!r} is seen at the attention call and cannot be named as a module")
        if site == MIXER_STATE:
            raise SiteError(
                f"site {site!r} is what a mixer carries on, no vector of a token, and cannot be named; "
                "return it from the mixer beside its output, as (output, state)"
            )
        if site == DOWN_WEIGHT:
            raise SiteError(
                f"site {site!r} is the weight of the projection whose input is mlp_hidden; name that input "
                "as mlp_hidden"
            )
        path, _, side = pattern.partition(":")
        side = side or "input"
        if side not in ("input", "output"):
            raise SiteError(
                f"site {site!r}: {pattern!r} ends in {side!r}; write ':input' or ':output' after the module"
            )
        expression = re.compile(re.escape(path).replace(r"\*", r"[^.]+") + "$")
        hits = [event for event in trace.events if expression.match(event.name)]
        if not hits:
            similar = sorted({e.name for e in trace.events if path.rpartition(".")[2] in e.name})[:5]
            raise SiteError(
                f"site {site!r}: no module that ran matches {path!r}"
                + (f"; near: {', '.join(similar)}" if similar else "; `--list-sites` shows what was found")
            )
        taps = [tap for tap in taps if tap.site != site]
        taps += [_named_tap(site, event, side, events, blocks) for event in hits]
    return taps


def _named_tap(site: str, event: Event, side: str, events: list[Event], blocks: list[Block]) -> Tap:
    tensor = event.input if side == "input" else event.output
    if not blocks[0].has_one_row_a_token(tensor):
        what = "no activation" if tensor is None else f"a tensor of shape {tuple(tensor.shape)}"
        raise SiteError(
            f"site {site!r}: the {side} of {event.name!r} is {what}, not one vector a token; "
            f"try ':{'output' if side == 'input' else 'input'}'"
        )
    after = len(events) - 1 if event.start > events[-1].stop else 0
    place = next((i for i, block in enumerate(events) if block.start <= event.start <= block.stop), after)
    tap = (input_tap if side == "input" else output_tap)(site, blocks[place].layer, event)
    call = blocks[place].cross_call if site in CROSS_HEAD_SITES else blocks[place].call
    if site in HEAD_SITES and call is not None:
        key = call.tensor if call.key is None else call.key
        heads = (call.tensor if "query" in site else key).shape[1]
        return replace(tap, heads=heads)
    return tap


def _notes(
    model: nn.Module, trace: Trace, blocks: list[Block], taps: set[tuple[str, int]]
) -> tuple[str, ...]:
    notes = []
    paths = [path for path, times in Counter(b.event.name for b in blocks).items() if times > 1]
    if paths:
        notes.append(f"blocks that run several times count as several layers: {', '.join(paths)}")
    seams = Counter(block.call.seam for block in blocks if block.calls)
    if seams:
        listing = ", ".join(f"{seam} ({n} layers)" for seam, n in seams.items())
        notes.append(f"{SEAM_NOTE} {listing}")
    layers_of_several = [block.layer for block in blocks if len(block.calls) > 1]
    if layers_of_several:
        notes.append(
            f"several attention calls in layers {_listing(layers_of_several)}: the first one is measured"
        )
    crossings = {block.cross_time for block in blocks if _has_cross_call(block)}
    reasons = dict.fromkeys(reason for time, reason in trace.skipped if time not in crossings)
    notes += [f"attention calls not seen: {reason}" for reason in reasons]
    layers_by_factor: dict[str, list[int]] = {}
    for block in blocks:
        for site, factor in block.factors.items():
            note = f"the stream receives {factor:.3g} times {site}"
            layers_by_factor.setdefault(note, []).append(block.layer)
    notes += [f"{note} (layers {_listing(layers)})" for note, layers in layers_by_factor.items()]
    if fused_encoder_layers(model):
        notes.append(
            "nn.TransformerEncoderLayer leaves its fused inference path while probed: in evaluation mode "
            "without gradients, outputs agree to rounding and not bit by bit"
        )
    return (*notes, *_gaps(blocks, taps))


def _notes_of_stacks(stacks: Mapping[str, str], followed: str) -> list[str]:
    if not stacks:
        return []
    others = ", ".join(f"{name} ({path})" for path, name in stacks.items() if path != followed)
    return [
        f"every layer and site here is of the stack {stacks[followed]} ({followed}); beside it runs "
        f"{others}, which `stack=` (--stack) chooses"
    ]


def _notes_of_layers(paths: tuple[str, ...], layers: list[int], streams: int, in_a_row: int) -> list[str]:
    notes = []
    idle = sorted(set(range(len(paths))) - set(layers))
    if idle:
        notes.append(
            f"layers {_listing(idle)} did not run in the pass that finds the sites, and are not measured: "
            "`example=` a batch that they run on"
        )
    if streams > 1:
        notes.append(f"{streams} streams run side by side: residual sites are those of the first")
    if in_a_row > 1:
        notes.append(f"{in_a_row} streams stand one behind the other in each row: all sites are the first's")
    return notes


def _key_copies(calls: Mapping[int, Any]) -> dict[int, int]:
    """layer → how often the model repeats each key and value head before the product, where it does."""
    copies = {}
    for layer, call in calls.items():
        key, value = (None, None) if call is None else (call.key, call.value)
        if key is None or value is None or key.shape[1] != value.shape[1]:
            continue
        distinct = distinct_heads(key).shape[1]
        if distinct < key.shape[1] and distinct_heads(value).shape[1] <= distinct:
            copies[layer] = key.shape[1] // distinct
    return copies


def _listing(layers: Iterable[int]) -> str:
    return ", ".join(map(str, layers))


def _gaps(blocks: list[Block], taps: set[tuple[str, int]]) -> list[str]:
    """Sites that some layers have and others have not."""
    sites_anywhere = {site for site, _ in taps}.union(*map(_sites_at_the_call, blocks))
    layers_by_site: dict[tuple[str, str], list[int]] = {}
    for block in blocks:
        sites_here = {site for site, layer in taps if layer == block.layer} | _sites_at_the_call(block)
        if block.experts:
            sites_here.add("mlp_hidden")
        for site, reason in block.absent.items():
            if site in sites_anywhere and site not in sites_here:
                layers_by_site.setdefault((site, reason), []).append(block.layer)
    sites_by_layers: dict[tuple[str, tuple[int, ...]], list[str]] = {}
    for (site, reason), layers in layers_by_site.items():
        sites_by_layers.setdefault((reason, tuple(layers)), []).append(site)
    return [
        f"not in layers {_listing(layers)}: {', '.join(sites)} ({reason})"
        for (reason, layers), sites in sites_by_layers.items()
    ]
