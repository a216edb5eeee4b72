"""What a run is made of: its groups, the sites in their order, the strata of tokens, and words for them.

Every part of the house reads these names here, and this module imports nothing, so that estimators, readers
of runs and captures in any framework can.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Literal, get_args

__all__ = [
    "ATTENTION",
    "BESIDE",
    "CHANNEL_WEIGHTS",
    "CHECKPOINT_FOLDER",
    "CROSS_ATTENTION",
    "CROSS_HEAD_SITES",
    "DEFAULT_SITES",
    "DOWN_WEIGHT",
    "GATE_WEIGHT",
    "GRADIENT",
    "HEAD_SITES",
    "HIDDEN_STATES",
    "KURTOSIS",
    "LAYER_ERRORS",
    "LINEAR_INPUT",
    "LOGGED_STEP",
    "MIXER_STATE",
    "OCCASIONAL_SITES",
    "OPTIMIZER",
    "OPTIMIZER_SETTINGS",
    "PARENT",
    "PROJECTION_WEIGHT",
    "PROTOCOLS",
    "QUANTIZATION",
    "RAW",
    "RESIDUAL_SITES",
    "ROUTER",
    "SEAM_NOTE",
    "SEGMENTS",
    "SENSITIVITY",
    "SERIES",
    "SINK_EPSILON",
    "SINK_POSITION",
    "SITES",
    "SNAPSHOT",
    "SPARED_CHANNELS",
    "STEP",
    "STRATA",
    "STRATUM_WORDS",
    "TASKS",
    "TOKEN_GROUPS",
    "TOKEN_UNIT",
    "VOCABULARY",
    "WEIGHTS",
    "WEIGHT_MAP",
    "WEIGHT_SKETCH",
    "Protocol",
    "group_path",
    "in_site_order",
    "is_site",
    "network_order",
    "ordinary_stratum",
    "site_of_path",
    "stratum_words",
]

# -- sites -----------------------------------------------------------------------------------------------

SITES: dict[str, str] = {
    "embedding": "the state that enters the first block (token embedding and whatever is added to it)",
    "residual_pre": "residual stream before attention; equals residual_post of the block before",
    "attention_input": "what the attention module receives, after its norm",
    "query_pre_rope": "queries as projected (and QK-normed), before rotary embedding",
    "key_pre_rope": "keys as projected (and QK-normed), before rotary embedding",
    "query_post_rope": "queries as they enter the product with the keys",
    "key_post_rope": "keys as they enter the product with the queries",
    "value": "values as attention averages them",
    "attention": "attention probabilities and logits: statistics only, no activation is kept",
    "attention_output": "heads' outputs concatenated: the input of the output projection",
    "attention_contribution": "what attention adds to the residual stream",
    "mixer_input": "what a mixer of tokens other than a seen attention receives, after its norm",
    "mixer_state": "what a recurrent mixer carries on after the last token: statistics only, of no token",
    "mixer_contribution": "what such a mixer (state-space, recurrent, an own kernel) adds to the stream",
    "cross_attention_input": "what attention to another sequence receives, after its norm",
    "cross_attention_query": "queries of cross-attention as they enter the product",
    "cross_attention_key": "its keys, of the other sequence's tokens, as they enter the product",
    "cross_attention_value": "its values, of the other sequence's tokens, as attention averages them",
    "cross_attention": "its probabilities and logits, over the other sequence's tokens: statistics only",
    "cross_attention_output": "its heads' outputs concatenated: the input of its output projection",
    "cross_attention_contribution": "what cross-attention adds to the residual stream",
    "residual_mid": "residual stream that the MLP reads, after attention (and cross-attention) or the mixer",
    "mlp_input": "what the MLP receives, after its norm",
    "router": "which experts a token is sent to, and what they give: statistics only, no activation is kept",
    "mlp_gate_weight": "the weights of a gated MLP's gate and up projections: statistics of two matrices",
    "mlp_hidden": "the input of the MLP's down projection",
    "mlp_down_weight": "the weights of the MLP's down projection: statistics of a matrix, not of tokens",
    "mlp_contribution": "what the MLP adds to the residual stream",
    "residual_post": "residual stream after the block",
    "final_norm": "the state after the last norm",
}
"""Site → meaning, in the order in which a token passes them."""

OCCASIONAL_SITES = (
    "mixer_input",
    "mixer_state",
    "mixer_contribution",
    "cross_attention_input",
    "cross_attention_query",
    "cross_attention_key",
    "cross_attention_value",
    "cross_attention",
    "cross_attention_output",
    "cross_attention_contribution",
    "router",
    "mlp_gate_weight",
)
"""Sites that some kinds of layer have; where no layer is of that kind, nothing is said of them."""
ATTENTION = "attention"
CROSS_ATTENTION = "cross_attention"
CROSS_HEAD_SITES = ("cross_attention_query", "cross_attention_key", "cross_attention_value")
DOWN_WEIGHT = "mlp_down_weight"
GATE_WEIGHT = "mlp_gate_weight"
MIXER_STATE = "mixer_state"
ROUTER = "router"
LINEAR_INPUT = "linear_input:"
"""How the sites begin that are the input of one projection, by its path within the block."""
PROJECTION_WEIGHT = "projection_weight:"
"""How the sites begin that are the weights of one projection, by its role (query, key, value,
attention_output, gate, up) or its path within the block."""
GRADIENT = "gradient:"
"""How the groups begin that hold gradients of the loss with respect to the activations of a site."""
HEAD_SITES = (
    "query_pre_rope",
    "key_pre_rope",
    "query_post_rope",
    "key_post_rope",
    "value",
    *CROSS_HEAD_SITES,
)
RESIDUAL_SITES = ("embedding", "residual_pre", "residual_mid", "residual_post")
DEFAULT_SITES = tuple(site for site in SITES if site != "residual_pre")
"""Every site but ``residual_pre``, which repeats ``embedding`` and ``residual_post``."""
HIDDEN_STATES = ("embedding", "residual_post", "final_norm")
"""Where the released OSP script measures: Hugging Face's ``hidden_states`` are the embedding, the outputs of
all blocks but the last, and the state after the final norm."""

KURTOSIS = "osp_excess_kurtosis"
"""The statistic whose mean over the hidden states is a run's headline number."""
SINK_EPSILON = 0.3
"""The threshold of the sink rates that are quoted (Gu et al. 2025, arXiv:2410.10781) …"""
SINK_POSITION = 0
"""… and the position of the key: the first token."""

# -- strata ----------------------------------------------------------------------------------------------

Protocol = Literal["sequence", "osp-published"]
PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
"""How tokens are fed: as real sequences, or each as a sequence of its own, as the released OSP script
does."""
STRATA = ("all", "first", "delimiter", "rest")
"""Token strata of text: every valid token, the first of each sequence, other delimiters, everything else.

A model with kinds of tokens of its own has others, decided once for a run; they begin with ``all``, the sum
of the others, and end with the ordinary tokens.
"""
STRATUM_WORDS = {
    "all": "all tokens",
    "first": "first token",
    "delimiter": "delimiters",
    "rest": "other tokens",
    "cls": "CLS token",
    "distillation": "distillation token",
    "register": "registers",
    "detection": "detection tokens",
    "patch": "patches",
    "image": "image tokens",
    "video": "video tokens",
    "audio": "audio tokens",
}
"""Stratum → how a sentence calls its tokens."""

# -- groups ----------------------------------------------------------------------------------------------

RAW = "raw"
SNAPSHOT = "snapshot"
TOKEN_GROUPS = "token_groups"
SERIES = "series"
SEGMENTS = "segments"
"""The root's attribute that lists the later segments of a run (:mod:`osp_diag.runs.segments`)."""
PARENT = "parent"
"""The attribute that says from which run's checkpoint a run, or a segment of it, began."""
CHECKPOINT_FOLDER = "checkpoint_folder"
"""The attribute that says where a loop that is not ours leaves its checkpoints."""
STEP = "step"
"""The dimension of what is probed."""
LOGGED_STEP = "logged_step"
"""The dimension of the scalars in the group ``series``."""
VOCABULARY = "vocabulary"
WEIGHT_MAP = "weight_map"
CHANNEL_WEIGHTS = "channel_weights"
QUANTIZATION = "quantization"
LAYER_ERRORS = "layer_errors"
SENSITIVITY = "sensitivity"
SPARED_CHANNELS = "spared_channels"
TASKS = "tasks"
OPTIMIZER = "optimizer"
WEIGHTS = "weights"
OPTIMIZER_SETTINGS = "optimizer_settings"
WEIGHT_SKETCH = "weight_sketch"
"""Labelled arrays by logged step: ``run.logged`` has them."""

BESIDE: dict[str, str] = {
    RAW: "the sums from which statistics can be computed anew, a group a site",
    SNAPSHOT: "raw activations of the first sequence, a group a site",
    TOKEN_GROUPS: "some of the raw sums by group of batches, a group a site",
    SERIES: "scalars by training step, and below it labelled arrays, a group each",
    VOCABULARY: "the texts of token ids",
    WEIGHT_MAP: "maps of |W|, a group a projection",
    CHANNEL_WEIGHTS: "norm gains and the embedding, by channel of the residual stream",
    QUANTIZATION: "results at few bits",
    LAYER_ERRORS: "the error of few bits by layer, and its parts",
    SENSITIVITY: "what one part of the model at few bits costs alone, by layer",
    SPARED_CHANNELS: "what few bits cost where the hottest channels stay in 16",
    TASKS: "accuracy on tasks, at full precision and at few bits",
    OPTIMIZER: "what the optimizers hold, and their last update",
    WEIGHTS: "statistics of the weights while they are trained",
}
"""Group → what it holds, of those that stand beside the sites."""

SEAM_NOTE = "attention seen through"
"""How the note of a run begins that says where its attention was seen; others are for readers of numbers."""

TOKEN_UNIT = "token id"
"""The units of variables that name tokens by their ids."""


def is_site(name: str, declared: Collection[str] = ()) -> bool:
    """Whether a group is a site: of the vocabulary, a projection's or gradient's, or ``declared``.

    Parameters
    ----------
    declared : the sites that a user named, as the attribute ``sites`` of a run lists them
    """
    return name in SITES or name.startswith((LINEAR_INPUT, PROJECTION_WEIGHT, GRADIENT)) or name in declared


def stratum_words(stratum: str) -> str:
    """How a sentence calls the tokens of a stratum, a user's own kind among them."""
    return STRATUM_WORDS.get(stratum, f"{stratum} tokens")


def ordinary_stratum(strata: Iterable[str]) -> str:
    """The stratum of the tokens that nothing sets apart: ``rest`` of text, ``patch`` of an image."""
    names = list(strata)
    return "rest" if "rest" in names else names[-1]


def group_path(site: str) -> str:
    """The path of a site's group: ``linear_input:mlp.up_proj`` is ``linear_input/mlp.up_proj``."""
    return site.replace(":", "/")


def site_of_path(path: str) -> str:
    """The site whose group is at a path: the inverse of :func:`group_path`."""
    return path.strip("/").replace("/", ":", 1)


def in_site_order(sites: Iterable[str]) -> list[str]:
    """Sites in the order in which a token passes them; those without a place follow by name."""
    rank = {site: place for place, site in enumerate(SITES)}
    return sorted(sites, key=lambda site: (rank.get(site, len(rank)), site))


def network_order(places: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """(site, layer) pairs sorted by the way of the data: embedding, the blocks one by one, the final norm.

    Sites without a place of their own (``linear_input:…``) come last within their layer.
    """
    rank = {site: place for place, site in enumerate(SITES)}

    def position(place: tuple[str, int]) -> tuple[float, int, str]:
        site, layer = place
        if site == "embedding":
            return (float("-inf"), 0, site)
        if site == "final_norm":
            return (float("inf"), 0, site)
        return (float(layer), rank.get(site, len(rank)), site)

    return sorted(places, key=position)
