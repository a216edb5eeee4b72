"""docs/models.md is what was measured, and a few of its rows, others every day, are measured again."""

from __future__ import annotations

import os
import random
import time

import pytest

from benchmarks.models.cases import Case, all_cases
from benchmarks.models.measuring import Row, measure
from benchmarks.models.page import AGREES, PAGE, errors, page, read_results

ROWS = 6
SEED = int(os.environ.get("OSP_DIAG_MODELS_SEED", time.time() // 86_400))


def of_today() -> list[str]:
    """Names of measured rows, drawn anew every day."""
    measured = [name for name, row in read_results().items() if row["state"] == "measured"]
    return random.Random(SEED).sample(sorted(measured), ROWS)


def test_the_page_is_what_was_measured() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(read_results()), "run `python -m benchmarks.models`"


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
        if name == "LoRA (peft) on Llama":
            pytest.importorskip("peft")
        if complaints := regressions(measure(cases[name]), table[name]):
            worse[name] = complaints
    assert not worse, f"seed {SEED}: {worse}"
