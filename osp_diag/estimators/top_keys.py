"""Which tokens draw attention away from position 0: the mass that their keys receive, by token id."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from osp_diag.errors import EstimatorError
from osp_diag.estimators._arrays import Array, namespace_of, quotient, sums_by_bin, top_entries
from osp_diag.estimators.attention import AttentionObservation
from osp_diag.estimators.base import Estimator, Field, Layout, Measurement, Output, Source

__all__ = ["TokenKeyMass", "TopKeys"]

GU = Source(
    "Gu et al. 2025, When Attention Sink Emerges in Language Models", "https://arxiv.org/abs/2410.10781"
)
AN = Source(
    "An et al. 2025, Systematic Outliers in Large Language Models", "https://arxiv.org/abs/2502.06415"
)

NO_TOKEN = -1


# Why a table over the vocabulary, heads together: docs/decisions.md, Estimators.
@dataclass(frozen=True)
class TokenKeyMass(Measurement):
    """Attention received by every key but the first of a sequence, added up by the key's token id.

    A table over the vocabulary, and so a sum like any other: it merges over batches and ranks, and what
    is ranked, and from how many occurrences on, can be chosen later. It holds heads together; a table of
    each head would be as many times larger.
    """

    name = "token_key_mass"

    def fields(self, layout: Layout) -> Mapping[str, Field]:
        return {"alpha": Field(("token_id",)), "count": Field(("token_id",))}

    def measure(self, observation: AttentionObservation) -> Mapping[str, Array]:
        alpha, is_defined = observation.received_attention_in_place
        xp = namespace_of(alpha)
        weight = xp.astype(is_defined, alpha.dtype)
        # α_k of a token, averaged over the heads where it is defined.
        heads = xp.sum(weight, axis=1)
        mean = xp.sum(alpha * weight, axis=1) / xp.where(heads > 0, heads, xp.ones_like(heads))
        # In packed rows each document has a first token of its own.
        later = (heads > 0) & ~observation.is_sink & ~observation.is_first
        tokens = observation.token_ids
        if tokens is None:
            index, token_weight = xp.astype(xp.zeros_like(heads), xp.int32), xp.zeros_like(heads)
        else:
            is_id = (tokens.ids >= 0) & (tokens.ids < tokens.vocabulary)
            index = xp.where(is_id, tokens.ids, xp.zeros_like(tokens.ids))
            token_weight = xp.astype(later & is_id, heads.dtype)
        index, bins = xp.reshape(index, (-1,)), observation.layout.vocabulary
        return {
            "alpha": sums_by_bin(index, xp.reshape(mean * token_weight, (-1,)), bins),
            "count": sums_by_bin(index, xp.reshape(token_weight, (-1,)), bins),
        }


@dataclass(frozen=True)
class TopKeys(Estimator):
    """The token ids that receive the most attention away from position 0, ranked layer by layer.

    Of each occurrence of a token as a key, other than as the first of its sequence, α_k is the mean of
    A[i, k] over the n − k queries at or after it (Gu et al.'s, see ``sink_rate``), averaged over heads;
    with a bidirectional mask over all queries. Queries from which a sliding window hides the key count, too.
    Of each id, the mean over its occurrences. Ids seen fewer
    than ``minimum`` times are not ranked: the last keys of a sequence are seen by few queries, each of
    which attends to itself, and one such key would lead the list.

    Compare with ``later_key_mass``, which any token receives on the average. Where fewer than ``top`` ids
    were seen often enough, the remaining ranks hold the id −1. Ids are unknown where the model is called
    with embeddings. A run that knows its tokenizer gives the tokens' text as the coordinate
    ``top_key_token_text``.
    """

    top: int = 16
    minimum: int = 4

    name = "top_keys"
    title = "Tokens that receive the most attention"
    formula = (
        "largest over token ids v of mean over k > 0 with token v of mean_h α_k, "
        "α_k = 1/(n − k) Σ_{i ≥ k} A[i, k]"
    )
    range = "[0, 1]"
    floor = (
        "`later_key_mass`, what keys receive whatever their token; uniform causal attention gives "
        "(1/(n − k)) Σ_{i ≥ k} 1/(i + 1) at position k"
    )
    ceiling = "1"
    sources = (GU, AN)
    also_used_by = (
        "An et al. sort the tokens that attract attention into initial, delimiter, weak semantic and others.",
        "The share of all attention that goes to delimiters is `key_mass_share`.",
    )
    observes = "attention"
    sites = ("attention", "cross_attention")

    def __post_init__(self) -> None:
        if self.top < 1 or self.minimum < 1:
            raise EstimatorError(
                f"top_keys: top is {self.top} and minimum {self.minimum}; give how many tokens to rank and "
                "how often one must have been seen, both at least 1"
            )

    @property
    def measurements(self) -> tuple[Measurement, ...]:
        return (TokenKeyMass(),)

    def finalise(self, state: Mapping[str, Array], layout: Layout) -> dict[str, Output]:
        alpha, count = state["token_key_mass.alpha"], state["token_key_mass.count"]
        xp = namespace_of(count)
        is_frequent = count >= self.minimum
        mean = xp.where(is_frequent, quotient(alpha, count), -xp.inf * xp.ones_like(alpha))
        unfilled = self.top - count.shape[-1]
        if unfilled > 0:
            padding = xp.zeros_like(count[..., :1])
            padding = xp.broadcast_to(padding, (*count.shape[:-1], unfilled))
            mean, count = xp.concat([mean, padding - xp.inf], axis=-1), xp.concat([count, padding], axis=-1)
        mass, token = top_entries(mean, self.top)
        ranked = mass > -xp.inf
        occurrences = xp.where(ranked, xp.take_along_axis(count, token, axis=-1), xp.zeros_like(mass))
        dims, coords = ("key_rank",), {"key_rank": range(1, self.top + 1)}
        candidates = f"of the ids seen at least {self.minimum} times as keys away from position 0"
        return {
            "top_key_token": Output(
                xp.where(ranked, token, NO_TOKEN * xp.ones_like(token)),
                dims,
                "token id",
                f"{candidates}, the one with the k-th largest mean attention received; −1 beyond the last",
                coords,
            ),
            "top_key_mass": Output(
                xp.where(ranked, mass, xp.nan * xp.ones_like(mass)),
                dims,
                "1",
                f"mean over the id's occurrences and over heads of α_k, {candidates}",
                coords,
                floor=0.0,
                ceiling=1.0,
            ),
            "top_key_count": Output(
                occurrences, dims, "tokens", "occurrences of the id away from position 0", coords, floor=0.0
            ),
            "top_key_candidates": Output(
                xp.sum(xp.astype(is_frequent, alpha.dtype), axis=-1),
                (),
                "token ids",
                f"number {candidates}",
                floor=0.0,
            ),
            "later_key_mass": Output(
                quotient(xp.sum(alpha, axis=-1), xp.sum(state["token_key_mass.count"], axis=-1)),
                (),
                "1",
                "mean over all keys away from position 0, and over heads, of α_k",
                floor=0.0,
                ceiling=1.0,
            ),
        }
