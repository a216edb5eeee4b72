"""Where the sites of one model are read, and which of them are asked for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from osp_diag.schema import (
    ATTENTION,
    CROSS_ATTENTION,
    CROSS_HEAD_SITES,
    DEFAULT_SITES,
    ROUTER,
    SITES,
)

__all__ = ["SiteMap", "Tap", "matches", "name_within"]

AT_THE_CALL = frozenset({ATTENTION, "query_post_rope", "key_post_rope", "value"})
"""Sites that are read where the model calls attention …"""
AT_THE_CROSS_CALL = frozenset({CROSS_ATTENTION, *CROSS_HEAD_SITES})
"""… and where it calls attention to another sequence."""


@dataclass(frozen=True, kw_only=True)
class Tap:
    """Where one site of one layer is read: a module, one of its sides, and how its channels are laid out.

    ``side`` is "input", "output" or, for the matrix that multiplies the input, "weight" ("gate" for that of a
    gate beside its up projection's), and for what it is given with what it gives, "product"; "state" for what
    a recurrent mixer carries on when it has run.
    ``argument`` is the position or keyword of the tensor among the module's inputs, or its index in an
    output tuple (None for a bare tensor). ``heads`` > 0 says that the channels are (heads, head_channels);
    ``head_axis`` is where the head axis stands in the tensor itself: "flat" for (…, heads · width),
    "last" for (batch, token, head, width), "first" for (batch, head, token, width).
    ``fused`` says which part of a fused projection's output the heads are.
    """

    site: str
    layer: int
    module: str
    side: str
    argument: int | str | None = None
    heads: int = 0
    head_axis: str = "flat"
    fused: tuple[int, int, int, int] | None = None
    """(groups, slots per group, first slot, slots taken) of a fused projection's output"""
    tokens_first: bool = False
    """whether the tensor is (token, batch, …) and not (batch, token, …)"""
    call: int | None = None
    """which call of a module that runs several times: in its block, or in the pass if it is in none"""
    scores: str = ""
    """of a router's output: "logits", "probabilities", or "choice" (0 for experts that are not chosen)"""
    stream: int | None = None
    """which of several streams, where (stream, batch, token, channel) run side by side"""
    channels_first: bool = False
    """whether the tensor is (batch, channel, token), as convolutions read it"""
    state_shape: tuple[int, ...] = ()
    """of a state, its axes but the first, which is sequences: they do not depend on the number of tokens"""
    returns_state: bool = False
    """whether the state may be what the module gives beside its output"""


@dataclass(frozen=True)
class SiteMap:
    """What was found in a model, and what was not."""

    blocks: str
    """path of the stack of blocks"""
    block_paths: tuple[str, ...]
    """path of the block executed as layer 0, 1, …"""
    hidden_size: int
    taps: tuple[Tap, ...]
    attention_layers: tuple[int, ...]
    causal_layers: frozenset[int] = frozenset()
    """layers whose attention let no query see a later key in the traced pass, by whatever mask"""
    absent: dict[str, str] = field(default_factory=dict)
    """site → why it does not exist here"""
    notes: tuple[str, ...] = ()
    expert_layers: dict[int, str] = field(default_factory=dict)
    """layer → path of a module that holds its experts: as stacked parameters, or as modules"""
    expert_modules: dict[int, tuple[tuple[str, str], ...]] = field(default_factory=dict)
    """layer → (path of an expert, path of its down projection), where experts are modules"""
    expert_counts: dict[int, int] = field(default_factory=dict)
    """layer → how many experts its router chooses among"""
    tokens_first: bool = False
    """whether the stream between the blocks is (token, batch, channel) and not (batch, token, channel)"""
    channels_first: bool = False
    """whether the stream between the blocks is (batch, channel, token)"""
    streams_in_a_row: int = 1
    """how many streams stand one behind the other in each row, of which the first is measured"""
    entries: dict[str, str] = field(default_factory=dict)
    """block → the module with which it begins, where it does not run itself"""
    members: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """block → the paths of its parts, where they stand in several lists"""
    cross_attention: dict[int, str] = field(default_factory=dict)
    """layer → the module that calls attention to another sequence"""
    cross_key_copies: dict[int, int] = field(default_factory=dict)
    """as ``key_copies``, of cross-attention"""
    key_copies: dict[int, int] = field(default_factory=dict)
    """layer → how often each key head stands in the keys that the model multiplies, where more than once"""
    states_with_cache: bool = False
    """whether mixers' states are seen only in a cache, which changes no bit of the model's output"""
    stack: str = ""
    """the name of the stack, of a model that has several"""
    stacks: tuple[str, ...] = ()
    """the names of all stacks that ran, of a model that has several"""
    prefix: str = ""
    """of the arguments that hold the blocks' tokens: "decoder_" where an encoder stands beside them"""

    @property
    def number_of_layers(self) -> int:
        return len(self.block_paths)

    @property
    def sites(self) -> tuple[str, ...]:
        """Sites that exist, in network order, ``linear_input:…`` last."""
        present = {tap.site for tap in self.taps}
        if self.expert_layers:
            present |= {"mlp_hidden", ROUTER}
        if self.attention_layers:
            present |= {ATTENTION, *(AT_THE_CALL - set(self.absent))}
        if self.cross_attention:
            present |= {CROSS_ATTENTION, *(AT_THE_CROSS_CALL - set(self.absent))}
        in_order = [site for site in SITES if site in present]
        return (*in_order, *sorted(present - set(in_order)))

    def layers_of(self, site: str) -> tuple[int, ...]:
        """The layers that have a site."""
        layers = {tap.layer for tap in self.taps if tap.site == site}
        if site in ("mlp_hidden", ROUTER):
            layers |= set(self.expert_layers)
        if site in AT_THE_CALL:
            layers |= set(self.attention_layers)
        if site in AT_THE_CROSS_CALL:
            layers |= set(self.cross_attention)
        return tuple(sorted(layers))

    def within_block(self, layer: int, path: str) -> str | None:
        """The path of a module within the block of a layer, or None where it stands in another."""
        block = self.block_paths[layer]
        return name_within(block, self.members.get(block, ()), path)

    def idle_layers(self, block_runs: Mapping[str, int]) -> dict[str, tuple[int, ...]]:
        """Site → its layers whose block did not run (LayerDrop, say), by how often each block ran."""
        order: Counter[str] = Counter()
        idle = set()
        for layer, path in enumerate(self.block_paths):
            if order[path] >= block_runs.get(path, 0):
                idle.add(layer)
            order[path] += 1
        if not idle:
            return {}
        return {site: tuple(idle.intersection(self.layers_of(site))) for site in self.sites}

    def describe(self) -> str:
        """What was found, a line a site, for ``osp-diag probe M --list-sites``."""
        lines = [
            f"{self.number_of_layers} blocks at {self.blocks!r}, residual stream of width {self.hidden_size}",
        ]
        for site in self.sites:
            layers = self.layers_of(site)
            example = next((tap for tap in self.taps if tap.site == site), None)
            where = "the attention call" if site in AT_THE_CALL else "the experts' weights"
            where = "the call of cross-attention" if site in AT_THE_CROSS_CALL else where
            if example is not None:
                where = f"{example.side} of {example.module}"
            span = f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
            lines.append(f"  {site:<24} layers {span:<6} ({len(layers)})  {where}")
        by_reason: dict[str, list[str]] = {}
        for site, reason in self.absent.items():
            by_reason.setdefault(reason, []).append(site)
        lines += [f"  absent: {', '.join(sites)}: {reason}" for reason, sites in by_reason.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def name_within(block: str, members: tuple[str, ...], path: str) -> str | None:
    """The path of a module within its block: of ``members`` in several lists with the list's name first."""
    if not members:
        return path.removeprefix(f"{block}.") if path.startswith(f"{block}.") else None
    for member in members:
        if f"{path}.".startswith(f"{member}."):
            return member.rpartition(".")[0].rpartition(".")[2] + path.removeprefix(member)
    return None


def matches(site: str, patterns: tuple[str, ...] | None) -> bool:
    """Whether a site is asked for: a name, or a pattern with ``*``; None asks for the default sites."""
    if patterns is None:
        return site in DEFAULT_SITES
    return any(fnmatchcase(site, pattern) for pattern in patterns)
