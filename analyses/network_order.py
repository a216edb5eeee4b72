"""In which order a token passes the sites of a model."""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["WITHIN_A_LAYER", "network_order"]

WITHIN_A_LAYER = (
    "residual_pre", "attention_input", "query_pre_rope", "key_pre_rope", "query_post_rope", "key_post_rope",
    "value", "attention", "attention_output", "attention_contribution", "residual_mid", "mlp_input",
    "mlp_hidden", "mlp_contribution", "residual_post",
)  # fmt: skip
"""The sites of one block; the embedding comes before all blocks and the final norm after them."""


def network_order(places: Iterable[tuple[str, int]]) -> list[tuple[str, int]]:
    """(site, layer) pairs sorted by the way of the data.

    Sites without a known place (``linear_input:…``) come last within their layer.
    """
    rank = {site: index for index, site in enumerate(WITHIN_A_LAYER)}

    def key(place: tuple[str, int]) -> tuple[float, int, str]:
        site, layer = place
        if site == "embedding":
            return (float("-inf"), 0, site)
        if site == "final_norm":
            return (float("inf"), 0, site)
        return (float(layer), rank.get(site, len(rank)), site)

    return sorted(places, key=key)
