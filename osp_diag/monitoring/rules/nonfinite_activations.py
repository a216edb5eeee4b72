"""NaN or Inf in a measured activation."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from osp_diag.monitoring.finding import Finding
from osp_diag.monitoring.moment import Moment
from osp_diag.monitoring.rule import RunningRule

COUNTS = ("nonfinite_token_count", "nonfinite_query_key_tokens")


@dataclass
class Rule(RunningRule):
    """Any token that is not finite; told when it comes, and when it comes again."""

    _were: bool = False

    def at_probe(self, moment: Moment) -> Iterable[Finding]:
        values = moment.values
        columns = [column for column in moment.table.columns_of(*COUNTS) if values[column] > 0]
        were, self._were = self._were, bool(columns)
        if not columns or were:
            return ()
        column = moment.first(columns)
        place = moment.table.places[column]
        return (
            moment.finding(
                column,
                rule="nonfinite_activations",
                severity="bad",
                last_good_step=moment.previous,
                sentence=(
                    f"NaN or Inf in {values[column]:,.0f} tokens at step {moment.step:,}, first at "
                    f"{place.words}"
                ),
            ),
        )
