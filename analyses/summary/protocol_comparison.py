"""The OSP kurtosis under two protocols, and why they differ."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from osp_diag.analyses.in_notebook import in_notebook
from osp_diag.errors import StoreError, UsageError
from osp_diag.runs.headline import headline_kurtosis
from osp_diag.runs.naming import model_name
from osp_diag.runs.run import Run

__all__ = ["ProtocolComparison", "compare_protocols", "protocols_text"]


@dataclass(frozen=True, kw_only=True)
class ProtocolComparison:
    """One model, the same estimator, two ways of feeding tokens."""

    model: str
    sequence: float
    """on real sequences"""
    published: float
    """every token as a sequence of its own, as the released OSP script does"""
    sequence_first: float | None
    """on real sequences, of the tokens at position 0 alone"""
    sequence_length: int | None
    explanation: str

    def as_dict(self) -> dict[str, Any]:
        """The fields as plain values that JSON knows."""
        return asdict(self)

    def text(self) -> str:
        """Both numbers, and one line that says why they differ."""
        from osp_diag.wording import number

        length = f" of {self.sequence_length:,} tokens" if self.sequence_length else ""
        return (
            f"OSP kurtosis by protocol: {number(self.sequence)} on real sequences{length}, "
            f"{number(self.published)} as the released OSP script feeds tokens.\n{self.explanation}"
        )

    def _repr_html_(self) -> str:
        return in_notebook(self.text())


def compare_protocols(sequence_run: Run, published_run: Run) -> ProtocolComparison:
    """The headline OSP kurtosis of two runs of one model, on real sequences and as the OSP script runs.

    Raises
    ------
    UsageError : the runs are not of these protocols, or not of one model
    StoreError : a run lacks the OSP kurtosis of a hidden state
    """
    for run, protocol in ((sequence_run, "sequence"), (published_run, "osp-published")):
        if run.attrs.get("protocol") != protocol:
            raise UsageError(
                f"compare_protocols takes a run of the protocol `sequence` and one of `osp-published`, in "
                f"that order; where {protocol!r} belongs, it was given {run.attrs.get('protocol')!r}"
            )
    # Two protocols are two runs, so that both are of one model has to be checked: docs/decisions.md, Runs.
    prints = {run.attrs.get("model_fingerprint") for run in (sequence_run, published_run)}
    if len(prints) > 1:
        raise UsageError(
            "compare_protocols: the two runs are of different models; probe one model under both"
        )
    sequence, published = headline_kurtosis(sequence_run), headline_kurtosis(published_run)
    for headline, name in ((sequence, "sequence"), (published, "osp-published")):
        if "all" not in headline:
            raise StoreError(
                f"compare_protocols: the {name} run has no headline kurtosis to compare, and its summary "
                "says why; it takes the sites embedding, residual_post and final_norm, and finite activations"
            )
    return ProtocolComparison(
        model=model_name(sequence_run.attrs),
        sequence=sequence["all"],
        published=published["all"],
        sequence_first=sequence.get("first"),
        sequence_length=sequence_run.attrs.get("sequence_length"),
        explanation=_explanation(sequence["all"], published["all"]),
    )


def _explanation(sequence: float, published: float) -> str:
    fed = "The script feeds every token as a sequence of length 1, so that every token sits at position 0"
    # Within a quarter of each other they are said to agree.
    if published > 1.25 * sequence:
        return f"{fed} and becomes a sink or spike token, as only the first token of a real sequence does."
    if published < 0.8 * sequence:
        return f"{fed}, without the context in which this model's outliers arise."
    return f"{fed}; in this model position 0 is hardly different from the others, so the two agree."


def protocols_text(sequence_run: Run, published_run: Run) -> str:
    """The comparison in words, or why there is none."""
    try:
        return compare_protocols(sequence_run, published_run).text()
    except StoreError as reason:
        return f"OSP kurtosis by protocol: not compared ({reason})."
