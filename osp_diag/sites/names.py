"""The vocabulary of sites: the same names in every model and framework."""

from __future__ import annotations

from dataclasses import dataclass, field
from fnmatch import fnmatchcase

__all__ = [
    "ATTENTION",
    "DEFAULT_SITES",
    "DOWN_WEIGHT",
    "HEAD_SITES",
    "LINEAR_INPUT",
    "SITES",
    "SiteMap",
    "Tap",
    "matches",
]

SITES: dict[str, str] = {
    "embedding": "the state that enters the first block (token embedding and whatever is added to it)",
    "residual_pre": "residual stream before attention; equals residual_post of the block before",
    "attention_input": "what the attention module receives, after its norm",
    "query_pre_rope": "queries as projected (and QK-normed), before rotary embedding",
    "key_pre_rope": "keys as projected (and QK-normed), before rotary embedding",
    "query_post_rope": "queries as they enter the product with the keys",
    "key_post_rope": "keys as they enter the product with the queries",
    "value": "values as attention averages them",
    "attention_output": "heads' outputs concatenated: the input of the output projection",
    "attention_contribution": "what attention adds to the residual stream",
    "residual_mid": "residual stream between attention and MLP",
    "mlp_input": "what the MLP receives, after its norm",
    "mlp_hidden": "the input of the MLP's down projection",
    "mlp_down_weight": "the weights of the MLP's down projection: statistics of a matrix, not of tokens",
    "mlp_contribution": "what the MLP adds to the residual stream",
    "residual_post": "residual stream after the block",
    "final_norm": "the state after the last norm",
    "attention": "attention probabilities and logits: statistics only, no activation is kept",
}
"""Site → meaning, in the order in which a forward pass meets them."""

ATTENTION = "attention"
DOWN_WEIGHT = "mlp_down_weight"
LINEAR_INPUT = "linear_input:"
"""How the sites begin that are the input of one projection, by its path within the block."""
HEAD_SITES = ("query_pre_rope", "key_pre_rope", "query_post_rope", "key_post_rope", "value")
DEFAULT_SITES = tuple(site for site in SITES if site != "residual_pre")
"""Every site but ``residual_pre``, which repeats ``embedding`` and ``residual_post``."""


@dataclass(frozen=True, kw_only=True)
class Tap:
    """Where one site of one layer is read: a module, one of its sides, and how its channels are laid out.

    ``side`` is "input", "output" or, for the matrix that multiplies the input, "weight".
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
    """layers whose attention lets no query see a later key, whatever way its mask says so"""
    absent: dict[str, str] = field(default_factory=dict)
    """site → why it does not exist here"""
    notes: tuple[str, ...] = ()
    expert_layers: dict[int, str] = field(default_factory=dict)
    """layer → path of a module that holds its experts' weights as stacked parameters"""
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
            present.add("mlp_hidden")
        if self.attention_layers:
            at_the_call = {"query_post_rope", "key_post_rope", "value"}
            present |= {ATTENTION, *(at_the_call - set(self.absent))}
        known = [site for site in SITES if site in present]
        return (*known, *sorted(present - set(known)))

    def describe(self) -> str:
        """What was found, a line a site, for ``osp-diag probe M --list-sites``."""
        lines = [
            f"{self.number_of_layers} blocks at {self.blocks!r}, residual stream of width {self.hidden_size}",
        ]
        for site in self.sites:
            layers = sorted({tap.layer for tap in self.taps if tap.site == site})
            if site == "mlp_hidden" and self.expert_layers:
                layers = sorted({*layers, *self.expert_layers})
            if not layers and self.attention_layers:
                layers, where = list(self.attention_layers), "the attention call"
            else:
                example = next((tap for tap in self.taps if tap.site == site), None)
                where = f"{example.side} of {example.module}" if example else "the experts' weights"
            span = f"{layers[0]}–{layers[-1]}" if len(layers) > 1 else f"{layers[0]}"
            lines.append(f"  {site:<24} layers {span:<6} ({len(layers)})  {where}")
        by_reason: dict[str, list[str]] = {}
        for site, reason in self.absent.items():
            by_reason.setdefault(reason, []).append(site)
        lines += [f"  absent: {', '.join(sites)}: {reason}" for reason, sites in by_reason.items()]
        return "\n".join([*lines, *(f"  note: {note}" for note in self.notes)])


def matches(site: str, patterns: tuple[str, ...] | None) -> bool:
    """Whether a site is asked for: a name, or a pattern with ``*``; None asks for the default sites."""
    if patterns is None:
        return site in DEFAULT_SITES
    return any(fnmatchcase(site, pattern) for pattern in patterns)
