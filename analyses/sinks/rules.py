"""Where the lines are drawn between one way to make an attention sink and another, and why there."""

from __future__ import annotations

from dataclasses import dataclass, fields

from osp_diag.errors import UsageError

__all__ = ["SinkRules"]


@dataclass(frozen=True, kw_only=True)
class SinkRules:
    """The thresholds of :func:`osp_diag.analyses.sinks.implementation.sink_implementation`; all are
    shares."""

    epsilon: float = 0.3
    """of the sink rate: Gu et al. 2025. The run has to hold it."""
    sink_rate: float = 0.5
    """A head sinks if it does in so many of the sequences: more often than not, as in the summary."""
    learned: float = 0.3
    """Mean attention to a learned sink from which on that is the head's sink: the same share as ε."""
    negative: float = 2 / 3
    """Part of the gap between sink and other logits that lies below 0 from which on the others make it: at
    least twice what the sink key adds above 0."""
    balanced: float = 1 / 3
    """Part up to which the sink key makes it, the others lying around 0: the mirror image."""
    mostly: float = 0.9
    """Share of the other logits below 0 that "negative infinity" asks for besides; around 0 it is 0.5."""
    concentrated: float = 0.25
    """Part of a head's channels that carries 90% of q·k_sink, up to which it is concentrated. Unrelated
    Gaussian q and k need 0.53 of them, and fewer than 0.31 in one head of a thousand (16 to 128 channels)."""
    drained: float = 0.5
    """‖v_sink‖ over the mean ‖v‖ below which the sink's value counts as drained: half of an ordinary one."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if not 0 < value <= 1:
                raise UsageError(
                    f"SinkRules: {field.name} is {value:g}; it is a share, more than 0 and at most 1"
                )
        if self.balanced >= self.negative:
            raise UsageError(
                f"SinkRules: balanced ({self.balanced:g}) has to be less than negative ({self.negative:g})"
            )
