"""The mixture that OSP was trained on.

The cards of the released checkpoints (dmis-lab/OSP-1.4B-*) say: "training was conducted using the
smollm-corpus, a mixture of FineWeb-Edu, Cosmopedia, and Python-Edu", "following the pre-training recipe of
SmolLM". They give no shares. The corpus as it was released (huggingface.co/blog/smollm) has 220B tokens of
FineWeb-Edu (deduplicated), 28B of Cosmopedia v2 and 4B of Python-Edu; the weights below are these sizes, so
that a run of any length reads every part equally often. SmolLM itself may have weighted them otherwise.
"""

from __future__ import annotations

__all__ = ["OSP_TOKENIZER", "osp_mixture"]

CORPUS = "HuggingFaceTB/smollm-corpus"

TOKENS = {"fineweb-edu-dedup": 220.0, "cosmopedia-v2": 28.0, "python-edu": 4.0}
"""Billions of tokens of the parts, as released."""

OSP_TOKENIZER = "dmis-lab/OSP-1.4B-1T-Muon-SSNorm-EmbProj"
"""The tokenizer of the released checkpoints, 49,152 entries."""


def osp_mixture(python_edu: str | None = None) -> dict[str, float]:
    """Data set → weight, for ``data.mixture``.

    Parameters
    ----------
    python_edu : a data set with the texts of Python-Edu. The hub's has their Software Heritage identifiers
        alone; its page tells how to fetch them. None leaves this part out, 1.6% of the tokens
    """
    weights = {f"{CORPUS}:{part}": TOKENS[part] for part in ("fineweb-edu-dedup", "cosmopedia-v2")}
    return weights if python_edu is None else {**weights, python_edu: TOKENS["python-edu"]}
