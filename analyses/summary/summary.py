"""What a run says, in a few numbers and one verdict.

Every number is taken from the run under its estimator's own definition; what is added here is only
which layers, heads and strata are looked at; each field says which. A statistic that the run
does not hold is None, and the text leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from osp_diag.analyses.in_notebook import in_notebook
from osp_diag.analyses.summary.experts import experts
from osp_diag.analyses.summary.few_bits import few_bits
from osp_diag.analyses.summary.numbers import everyday, kurtosis, largest, massive, nonfinite, sinks
from osp_diag.analyses.summary.rules import judged, verdict_words
from osp_diag.analyses.summary.super_weights import super_weights
from osp_diag.analyses.summary.tasks import task_accuracy
from osp_diag.errors import StoreError
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run
from osp_diag.runs.steps import at_step, step_of
from osp_diag.schema import CROSS_ATTENTION

__all__ = ["Summary", "summarise"]


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The numbers behind the verdict on a run at one step. None: not measured, or not applicable."""

    model: str
    protocol: str
    bos: str
    tokens: int | None
    sequence_length: int | None
    token_source: str
    dtype: str
    step: int
    width: int | None

    hidden_states: int
    """tensors in the mean: embedding, outputs of all blocks but the last, the final norm"""
    osp_kurtosis: float | None
    """osp_excess_kurtosis of all tokens, mean over the hidden states, as the OSP script takes it"""
    osp_kurtosis_of_ceiling: float | None
    osp_kurtosis_over_floor: float | None
    osp_kurtosis_by_stratum: dict[str, float] = field(default_factory=dict)
    note: str = ""
    """why there is no headline number, or what is special about it"""

    massive_emergence_layer: int | None = None
    """first block whose output has a massive activation (|x| > 100 and 1000 times the median)"""
    massive_last_layer: int | None = None
    """last layer that has any"""
    massive_per_sequence: float | None = None
    """mean number in a sequence, in the layer that has most"""
    massive_on_first: float | None = None
    """share of them on the first token; None where the run has no such stratum"""
    massive_by_stratum: dict[str, float] = field(default_factory=dict)
    """share of them in each stratum"""
    massive_channels: tuple[int, ...] = ()
    jump_layer: int | None = None
    """block whose largest |x| exceeds that of the block before by the largest factor, if that is 5 or more"""
    jump_factor: float | None = None
    largest_magnitude: float | None = None
    largest_site: str = ""
    largest_layer: int | None = None
    largest_channel: int | None = None

    ordinary_stratum: str = "rest"
    """the tokens that nothing sets apart: neither first nor delimiters in text, patches of an image"""
    everyday_kurtosis: float | None = None
    """as osp_kurtosis, of the ordinary tokens"""
    everyday_max_median_ratio: float | None = None
    """of block outputs on these tokens, mean over layers"""
    outlier_feature_channels: dict[str, tuple[int, ...]] = field(default_factory=dict)
    """LLM.int8() outlier features by site: |x| ≥ 6 in at least 25% of the layers and 6% of the positions"""

    sink_rate: float | None = None
    """mean over layers, heads and sequences at ε = 0.3, position 0"""
    sink_heads: int | None = None
    """heads that sink in at least half of the sequences"""
    heads: int | None = None
    first_token_attention: float | None = None
    largest_logit: float | None = None
    largest_logit_layer: int | None = None
    largest_logit_head: int | None = None
    heads_above_qk_clip: int | None = None

    super_weights: tuple[tuple[int, int, int, float], ...] | None = None
    """(layer, row, column, value) of down projections' entries that count as super weights"""

    experts: int | None = None
    """that a router chooses among, in the layer that has most"""
    router_entropy: float | None = None
    """nats, mean over tokens and layers"""
    idle_experts: int | None = None
    """experts of all layers that no token was sent to"""
    expert_load_max: float | None = None
    """the largest load of an expert over the mean load of its layer"""
    expert_load_max_layer: int | None = None
    expert_load_max_expert: int | None = None

    nonfinite_counted: bool = False
    nonfinite_tokens: int = 0
    """tokens with a NaN or Inf at the site that has most"""
    nonfinite_site: str = ""
    """first such site in network order"""
    nonfinite_layer: int | None = None
    nonfinite_token: int | None = None
    nonfinite_channel: int | None = None
    verdict: str = ""

    stack: str = ""
    """which stack of a model of several all layers and sites here are of"""
    cross_attention: dict[str, Any] = field(default_factory=dict)
    """sink_rate, sink_heads, heads, first_token_attention and the largest logit of attention to another
    sequence, whose first token it is"""
    task_accuracy: dict[str, dict[str, float]] = field(default_factory=dict)
    """setting → task, or mean of a whole group of tasks → share of documents answered rightly"""
    few_bits: dict[str, Any] = field(default_factory=dict)
    """what 4 bits cost, where the run holds results: setting, method, convention, ratio (of perplexities, to
    16-16-16), divergence (nat by token), and the method that loses least at the setting"""
    notes: tuple[str, ...] = ()
    """what else the reader of these numbers should know"""
    absent_sites: dict[str, str] = field(default_factory=dict)
    """sites that were looked for and not measured, with the reason"""
    measured_sites: int = 0

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON knows; NaN becomes None, what few runs have is left out."""
        values = {key: _plain(value) for key, value in asdict(self).items()}
        return {key: value for key, value in values.items() if value or key not in _OF_FEW}

    def text(self) -> str:
        """For a reader who has never heard of any of these numbers."""
        from osp_diag.analyses.summary.text import text_of

        return text_of(self)

    def _repr_html_(self) -> str:
        return in_notebook(self.text())


_OF_FEW = ("stack", "cross_attention", "few_bits", "task_accuracy", "notes", "absent_sites")
"""Fields that most runs have nothing in."""


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def summarise(run: Run, *, step: int | None = None) -> Summary:
    """The summary of a run at ``step``, the last one by default.

    Raises
    ------
    UsageError : the run has no such step
    StoreError : the run holds no site
    """
    probed = step_of(run, step)
    sites = {site: at_step(run.at(site), probed) for site in run.sites}
    if not sites:
        raise StoreError(
            "the run holds no statistics; probe again without restricting --sites to absent ones"
        )
    attrs = run.attrs
    fields: dict[str, Any] = {
        "model": model_name(attrs),
        "stack": str(attrs.get("stack", "")),
        "protocol": str(attrs.get("protocol", "unknown")),
        "bos": str(attrs.get("bos", "unknown")),
        "tokens": _integer(attrs.get("tokens")),
        "sequence_length": _integer(attrs.get("sequence_length")),
        "token_source": str(attrs.get("token_source", "")),
        "dtype": str(attrs.get("dtype", "unknown")),
        "step": probed,
    }
    fields |= kurtosis(sites, _integer(attrs.get("hidden_size")), run.declared_absent)
    # Later numbers read earlier ones: which tokens are ordinary depends on the kurtosis by stratum.
    fields |= massive(sites) | largest(sites) | everyday(sites, fields)
    if fields["sequence_length"] != 1:  # one token attends to nothing but itself
        fields |= sinks(sites)
        fields["cross_attention"] = sinks(sites, CROSS_ATTENTION)
    fields |= super_weights(sites) | experts(sites) | nonfinite(sites)
    fields |= few_bits(run, probed) | task_accuracy(run)
    return Summary(
        **fields,
        notes=run.notes,
        absent_sites=run.absent_sites,
        measured_sites=len(sites),
        verdict=verdict_words(judged(fields).values()),
    )


def _integer(value: Any) -> int | None:
    try:
        return int(value)
    except (TypeError, ValueError):
        return None
