"""From the trace of one forward pass to the sites of every layer."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from osp_diag.errors import SiteError
from osp_diag.sites.names import SITES, SiteMap, Tap
from osp_diag.sites.projections import pre_rope_tap
from osp_diag.sites.stack import find_stack, is_linear, is_norm
from osp_diag.sites.trace import Event, Trace, trace_forward, unwrap

__all__ = ["find_sites"]

_FEED_FORWARD = re.compile(r"mlp|feed_?forward|ffn|moe|channel_?mix", re.IGNORECASE)
"""Names of an MLP in a block without attention, where the order of calls does not tell it from a mixer."""
_PROJECTION_NAMES = {
    "query_pre_rope": re.compile(r"^(q|query|wq|q_lin|to_q)(_?proj)?$", re.IGNORECASE),
    "key_pre_rope": re.compile(r"^(k|key|wk|k_lin|to_k)(_?proj)?$", re.IGNORECASE),
    "value": re.compile(r"^(v|value|wv|v_lin|to_v)(_?proj)?$", re.IGNORECASE),
}


def _same(left: torch.Tensor | None, right: torch.Tensor | None) -> bool:
    if left is None or right is None or left.numel() != right.numel():
        return False
    return torch.equal(left.reshape(-1), right.reshape(-1))


def _input_tap(site: str, layer: int, event: Event) -> Tap:
    return Tap(site=site, layer=layer, module=event.name, side="input", argument=next(iter(event.inputs)))


def _output_tap(site: str, layer: int, event: Event) -> Tap:
    return Tap(site=site, layer=layer, module=event.name, side="output", argument=next(iter(event.outputs)))


@dataclass
class _Block:
    """What one block did in the trace, and the taps found in it."""

    layer: int
    event: Event
    inner: list[Event]
    hidden_size: int
    call: Any = None
    call_time: int = 0
    taps: list[Tap] = field(default_factory=list)
    absent: dict[str, str] = field(default_factory=dict)
    experts: str | None = None

    def add(self, site: str, event: Event, side: str) -> None:
        tap = _input_tap(site, self.layer, event) if side == "input" else _output_tap(site, self.layer, event)
        self.taps.append(tap)

    def is_state(self, tensor: torch.Tensor | None) -> bool:
        return tensor is not None and tensor.shape[-1] == self.hidden_size and tensor.ndim >= 2


def _outermost(events: list[Event]) -> list[Event]:
    """The calls that no other of these calls encloses."""
    found: list[Event] = []
    for event in events:
        if not any(outer.start < event.start and event.stop < outer.stop for outer in found):
            found.append(event)
    return found


def _attention_event(block: _Block) -> Event | None:
    """The outermost module around the attention call with at most one projection after the call.

    A module with more (an inner block, as in ALBERT) holds the MLP too, and is looked into.
    """
    if block.call is None:
        return None
    around = [event for event in block.inner if event.start < block.call_time < event.stop]
    for event in around:
        after = [e for e in block.inner if is_linear(e.module) and block.call_time < e.start < event.stop]
        if len(after) <= 1:
            return event
    return None


def _attention_sites(block: _Block, attention: Event | None) -> None:
    inner = [e for e in block.inner if attention is None or attention.start <= e.start <= attention.stop]
    before = [event for event in inner if event.stop < block.call_time]
    linear_before = [event for event in before if is_linear(event.module)]
    linear_after = [event for event in inner if is_linear(event.module) and event.start > block.call_time]
    source = attention if attention is not None and block.is_state(attention.input) else None
    if source is None and linear_before:
        source = linear_before[0]
    if source is not None:
        block.add("attention_input", source, "input")
    if linear_after and (attention is not None or len(linear_after) > 0):
        block.add("attention_output", linear_after[0], "input")
    else:
        block.absent["attention_output"] = "no projection runs after attention in its module"
    _pre_rope_sites(block, before)


def _pre_rope_sites(block: _Block, before: list[Event]) -> None:
    call = block.call
    if call.query is None or call.key is None:
        _projections_by_name(block, before)
        return
    query_heads, key_heads = call.query.shape[1], call.key.shape[1]
    for site, wanted in (("query_pre_rope", call.query), ("key_pre_rope", call.key)):
        tap = pre_rope_tap(site, block.layer, wanted, before, query_heads=query_heads, key_heads=key_heads)
        if tap is None:
            block.absent[site] = (
                "no module output equals what enters the product at position 0 "
                "(assembled from parts, as in latent attention, or fused in an unknown layout)"
            )
        else:
            block.taps.append(tap)


def _projections_by_name(block: _Block, before: list[Event]) -> None:
    """Where only attention logits are seen, the projections are told by their names."""
    heads = block.call.logits.shape[1]
    for site in ("query_post_rope", "key_post_rope"):
        block.absent[site] = f"the model hands only attention logits to its {block.call.seam}"
    for site, name in _PROJECTION_NAMES.items():
        event = next(
            (e for e in before if is_linear(e.module) and name.search(e.name.rpartition(".")[2])), None
        )
        if event is not None and event.output is not None and event.output.shape[-1] % heads == 0:
            block.taps.append(replace(_output_tap(site, block.layer, event), heads=heads))
        else:
            block.absent[site] = (
                f"the model hands only attention logits to its {block.call.seam}, no projection is named so"
            )


def _contribution(block: _Block, site: str, candidates: list[Event], difference: torch.Tensor | None) -> None:
    """The output that was added to the stream: of those that fit the difference, the last that ran."""
    states = [event for event in candidates if block.is_state(event.output)]
    if difference is not None:
        for event in reversed(states):
            output = event.output.double().reshape(difference.shape)  # type: ignore[union-attr]
            if torch.allclose(output, difference, rtol=2e-2, atol=2e-2 * float(difference.abs().max())):
                block.add(site, event, "output")
                return
    if states:
        block.add(site, states[0], "output")
    else:
        block.absent[site] = "no module inside the block gives a tensor of the residual stream's width there"


def _minus(left: torch.Tensor | None, right: torch.Tensor | None) -> torch.Tensor | None:
    if left is None or right is None or left.shape != right.shape:
        return None
    return left.double() - right.double()


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module holds its experts' matrices stacked in one parameter."""
    return any(p.ndim == 3 and min(p.shape) > 1 for p in module.parameters(recurse=False))


def _mlp_sites(block: _Block, attention: Event | None) -> None:
    outside = [
        event
        for event in block.inner
        if (attention is None or not (attention.start <= event.start and event.stop <= attention.stop))
        and not event.start < block.call_time < event.stop
    ]
    if block.call is None:
        named = [
            event for event in _outermost(block.inner) if _FEED_FORWARD.search(event.name.rpartition(".")[2])
        ]
        outside = [event for event in outside if any(e.start <= event.start <= e.stop for e in named)]
    elif attention is None:
        # Attention's projections stand directly in the block: the first after the call is its output.
        after = [event for event in outside if event.start > block.call_time and is_linear(event.module)]
        outside = [event for event in outside if after and event.start > after[0].stop]
    linears = [event for event in outside if is_linear(event.module)]
    experts = [event for event in outside if _holds_experts(event.module)]
    feed_forward = [
        event
        for event in _outermost(outside)
        if not is_norm(event.module) and any(p.ndim >= 2 for p in event.module.parameters())
    ]
    if not linears and not experts:
        for site in ("mlp_input", "mlp_hidden", "mlp_contribution"):
            block.absent[site] = "no projection runs in the block outside attention"
        return
    whole = next(
        (e for e in feed_forward if any(e.start <= x.start <= e.stop for x in linears + experts)), None
    )
    first = whole if whole is not None and block.is_state(whole.input) else (linears or experts)[0]
    block.add("mlp_input", first, "input")
    if experts:
        block.experts = experts[0].name
    else:
        down = [event for event in linears[1:] if block.is_state(event.output)]
        narrowing = [event for event in down if not block.is_state(event.input)]
        if down:
            block.add("mlp_hidden", (narrowing or down)[-1], "input")
        else:
            block.absent["mlp_hidden"] = "no down projection back to the residual stream's width was seen"
    _residual_mid(block, first)
    middle = _value_of(block, "residual_mid")
    entry, exit_state = block.event.input, block.event.output
    if block.call is not None:
        ran = [event for event in outside if event.stop < first.start]
        own = [attention] if attention is not None else []
        inside = [e for e in block.inner if attention and attention.start < e.start < attention.stop]
        _contribution(block, "attention_contribution", own + ran + inside, _minus(middle, entry))
    later = [event for event in outside if event.start >= first.start]
    _contribution(
        block, "mlp_contribution", later, _minus(exit_state, middle if middle is not None else entry)
    )


def _value_of(block: _Block, site: str) -> torch.Tensor | None:
    for tap in block.taps:
        if tap.site == site:
            for event in block.inner:
                if event.name == tap.module:
                    values: Mapping[Any, torch.Tensor] = (
                        event.inputs if tap.side == "input" else event.outputs
                    )
                    return values[tap.argument]
    return None


def _residual_mid(block: _Block, mlp: Event) -> None:
    """The stream between attention and MLP: what the MLP's norm reads, or the MLP itself without one."""
    if block.call is None:
        block.absent["residual_mid"] = "no attention in the block"
        return
    entry = mlp.input
    norm = next(
        (e for e in block.inner if is_norm(e.module) and e.stop < mlp.start and _same(e.output, entry)), None
    )
    stream = norm.input if norm is not None else entry
    post_norm = any(is_norm(e.module) and _same(e.output, block.event.output) for e in block.inner)
    if _same(stream, block.event.input) or _same(entry, _value_of(block, "attention_input")):
        block.absent["residual_mid"] = "attention and MLP read the same state (parallel block)"
    elif norm is not None and not post_norm:
        block.add("residual_mid", norm, "input")
    else:
        # After a norm on the sum (BERT), or without one before it (OLMo 2), the MLP reads the stream itself.
        block.add("residual_mid", mlp, "input")


def _is_causal(call: Any) -> bool:
    """Whether no query sees a later key: by flag, by mask, or by the logits that were filled."""
    if call.causal:
        return True
    values = call.mask if call.logits is None else call.logits
    if call.mask_function is not None:
        position = torch.arange(call.lengths[1])
        zero = torch.zeros((), dtype=torch.long)
        values = call.mask_function(zero, zero, position[:, None], position[None, :])
    if values is None or values.ndim < 2 or values.shape[-2] != values.shape[-1]:
        return False
    later = torch.ones(values.shape[-2:], dtype=torch.bool, device=values.device).triu(1)
    hidden = ~values if values.dtype == torch.bool else values <= torch.finfo(values.dtype).min / 2
    return bool(hidden[..., later].all())


def _linear_sites(block: _Block) -> list[Tap]:
    prefix = block.event.name + "."
    return [
        _input_tap(f"linear_input:{event.name.removeprefix(prefix)}", block.layer, event)
        for event in block.inner
        if is_linear(event.module) and event.inputs
    ]


def _final_norm(trace: Trace, last: Event, layers: int) -> Tap | None:
    for event in trace.events:
        if event.start > last.stop and is_norm(event.module) and _same(event.input, last.output):
            return _output_tap("final_norm", layers - 1, event)
    return None


def find_sites(
    model: nn.Module,
    *,
    blocks: str | None = None,
    named: Mapping[str, str] | None = None,
    example: Mapping[str, Any] | tuple[Any, ...] | None = None,
) -> SiteMap:
    """Find the sites of a model by its structure and one forward pass of eight tokens.

    Parameters
    ----------
    model : any torch module; wrappers of ``torch.compile`` and DDP are looked through
    blocks : path or pattern of the stack of blocks, where the guess fails
    named : site → ``"module pattern[:input|:output]"``, where a guess fails; ``*`` stands for the layer
    example : a batch to run, for models that do not take token ids alone

    Raises
    ------
    SiteError : no stack of blocks, a pattern that matches nothing, or a model that cannot be run
    """
    model = unwrap(model)
    trace = trace_forward(model, example)
    stack, events = find_stack(model, trace, blocks)
    states = [event.input for event in events if event.input is not None]
    if not states:
        raise SiteError(f"the blocks at {stack!r} receive no activations; name the stack with `blocks=`")
    hidden_size = states[0].shape[-1]
    found = [_resolve_block(layer, event, trace, hidden_size) for layer, event in enumerate(events)]
    taps = [_input_tap("embedding", 0, events[0])]
    for block in found:
        taps += block.taps + _linear_sites(block)
    final = _final_norm(trace, events[-1], len(events))
    if final is not None:
        taps.append(final)
    taps += _outer_linears(trace, events)
    taps = _with_named(taps, named or {}, trace, events)
    return SiteMap(
        blocks=stack,
        block_paths=tuple(event.name for event in events),
        hidden_size=hidden_size,
        taps=tuple(taps),
        attention_layers=tuple(block.layer for block in found if block.call is not None),
        causal_layers=frozenset(
            block.layer for block in found if block.call is not None and _is_causal(block.call)
        ),
        absent=_absent(found, {tap.site for tap in taps}),
        notes=_notes(events, found),
        expert_layers={block.layer: block.experts for block in found if block.experts},
    )


def _resolve_block(layer: int, event: Event, trace: Trace, hidden_size: int) -> _Block:
    block = _Block(layer, event, trace.within(event), hidden_size)
    calls = [(time, call) for time, call in trace.attention if event.start < time < event.stop]
    block.add("residual_pre", event, "input")
    if calls:
        block.call_time, block.call = calls[0]
    attention = _attention_event(block)
    if block.call is not None:
        _attention_sites(block, attention)
    else:
        for site in SITES:
            if site.startswith(("attention", "query", "key", "value")):
                block.absent[site] = (
                    "no attention here (state-space, recurrent, or an attention no seam can see)"
                )
    _mlp_sites(block, attention)
    if event.outputs:
        block.add("residual_post", event, "output")
    return block


def _absent(found: list[_Block], present: set[str]) -> dict[str, str]:
    reasons: dict[str, str] = {}
    calls = [block.call for block in found if block.call is not None]
    if calls:
        present = present | {"attention"}
    if any(call.query is not None for call in calls):
        present = present | {"query_post_rope", "key_post_rope", "value"}
    for block in found:
        for site, reason in block.absent.items():
            if site not in present:
                reasons.setdefault(site, reason)
    if any(block.experts for block in found):
        reasons.pop("mlp_hidden", None)
    if "final_norm" not in present:
        reasons["final_norm"] = "no norm reads the last block's output"
    return {site: reasons[site] for site in SITES if site in reasons}


def _outer_linears(trace: Trace, events: list[Event]) -> list[Tap]:
    inside = tuple(event.name + "." for event in events)
    taps = []
    for event in trace.events:
        if is_linear(event.module) and event.inputs and not event.name.startswith(inside):
            layer = 0 if event.start < events[0].start else len(events) - 1
            taps.append(_input_tap(f"linear_input:{event.name}", layer, event))
    return taps


def _with_named(taps: list[Tap], named: Mapping[str, str], trace: Trace, events: list[Event]) -> list[Tap]:
    """Taps with the user's own patterns in place of the guesses for those sites."""
    for site, pattern in named.items():
        path, _, side = pattern.partition(":")
        side = side or "input"
        if side not in ("input", "output"):
            raise SiteError(
                f"site {site!r}: {pattern!r} ends in {side!r}; write ':input' or ':output' after the module"
            )
        expression = re.compile(re.escape(path).replace(r"\*", r"[^.]+") + "$")
        hits = [event for event in trace.events if expression.match(event.name)]
        if not hits:
            near = sorted({e.name for e in trace.events if path.rpartition(".")[2] in e.name})[:5]
            raise SiteError(
                f"site {site!r}: no module that ran matches {path!r}"
                + (f"; near: {', '.join(near)}" if near else "; `--list-sites` shows what was found")
            )
        taps = [tap for tap in taps if tap.site != site]
        for event in hits:
            layer = next((i for i, block in enumerate(events) if block.start <= event.start <= block.stop), 0)
            taps.append((_input_tap if side == "input" else _output_tap)(site, layer, event))
    return taps


def _notes(events: list[Event], found: list[_Block]) -> tuple[str, ...]:
    notes = []
    repeated = [name for name, times in Counter(event.name for event in events).items() if times > 1]
    if repeated:
        notes.append(f"blocks that run several times count as several layers: {', '.join(repeated)}")
    seams = Counter(block.call.seam for block in found if block.call is not None)
    if seams:
        notes.append(
            "attention seen through " + ", ".join(f"{seam} ({n} layers)" for seam, n in seams.items())
        )
    without = [block.layer for block in found if block.call is None]
    if without and seams:
        notes.append(f"no attention in layers {', '.join(map(str, without))}")
    return tuple(notes)
