"""docs/models.md is what was measured, and a few of its rows, others every day, are measured again."""

from __future__ import annotations

import os
import random
import time

import pytest

from benchmarks.models.cases import all_cases
from benchmarks.models.measuring import Row, measure, regressions
from benchmarks.models.page import PAGE, headline, page, read_results

ROWS = 6
SEED = int(os.environ.get("OSP_DIAG_MODELS_SEED", time.time() // 86_400))


def of_today() -> list[str]:
    """Names of measured rows that this installation can build, drawn anew every day."""
    cases, rows = all_cases(), read_results().values()
    measured = [row["name"] for row in rows if row["state"] == "measured" and cases[row["name"]].is_buildable]
    return random.Random(SEED).sample(sorted(measured), ROWS)


def test_the_page_is_what_was_measured() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read_results()), "run `python -m benchmarks.models`"


def test_the_readme_has_its_sentence() -> None:
    text = " ".join((PAGE.parents[1] / "README.md").read_text(encoding="utf-8").split())
    assert headline(read_results()) in text


def test_every_architecture_has_a_row() -> None:
    """Also those that a newer transformers brings, once constraints.txt takes it."""
    assert list(read_results()) == list(all_cases()), "run `python -m benchmarks.models`"


@pytest.mark.slow
def test_rows_of_today_hold() -> None:
    """Sites, errors and bits of six models are no worse than the table says."""
    print(f"OSP_DIAG_MODELS_SEED={SEED}")
    cases, table = all_cases(), read_results()
    worse = {}
    for name in of_today():
        if complaints := regressions(measure(cases[name]), table[name]):
            worse[name] = complaints
    assert not worse, f"seed {SEED}: {worse}"


def test_what_is_worse_is_named() -> None:
    earlier = Row("a", "decoder", "A", sites=["embedding", "value"], bit_identical=True)
    earlier.kurtosis_error, earlier.attention_error = 1e-7, 1e-3
    now = Row("a", "decoder", "A", sites=["embedding"], bit_identical=False)
    now.kurtosis_error, now.attention_error = 2e-6, 0.3
    assert regressions(now, earlier.as_json()) == [
        "without value",
        "outputs are not bit-identical",
        "attention_error 0.3, was 0.001",
    ]
    assert regressions(earlier, now.as_json()) == []
    now.state, now.reason = "refused", "no blocks"
    assert regressions(now, earlier.as_json()) == ["refused (no blocks), was measured"]
