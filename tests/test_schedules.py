"""The learning rate over a run."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osp_diag.trainer.config import ScheduleConfig
from osp_diag.trainer.optimizers import learning_rate_factor


def factors(steps: int, **options) -> list[float]:
    config = ScheduleConfig(**options)
    return [learning_rate_factor(step, steps, config) for step in range(steps)]


def test_trapezoid():
    found = factors(10, warmup=0.2, decay=4.0, final=0.2)
    assert found == pytest.approx([0.5, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4, 0.2])


def test_cosine():
    found = factors(7, name="cosine", warmup=3.0, final=0.1)
    expected = [0.1 + 0.9 * (1 + math.cos(math.pi * part / 4)) / 2 for part in range(5)]
    assert found == pytest.approx([1 / 3, 2 / 3, *expected])


def test_constant():
    assert factors(4, name="constant", warmup=2.0) == pytest.approx([0.5, 1, 1, 1])
    assert factors(3, name="constant", warmup=0.0) == [1, 1, 1]


def test_fractions_are_of_all_steps_and_whole_numbers_are_steps():
    assert factors(40, warmup=0.25, decay=0.5) == factors(40, warmup=10.0, decay=20.0)


@given(
    name=st.sampled_from(["trapezoidal", "cosine", "constant"]),
    steps=st.integers(1, 200),
    warmup=st.floats(0, 0.99) | st.integers(1, 250).map(float),
    decay=st.floats(0, 0.99) | st.integers(1, 250).map(float),
    final=st.floats(0, 1),
)
def test_laws(name, steps, warmup, decay, final):
    options = {"name": name, "warmup": warmup, "decay": decay, "final": final}
    found = factors(steps, **options)
    assert all(0 <= factor <= 1 for factor in found)
    # Up, level, down: never up again.
    peak = found.index(max(found))
    assert all(left <= right + 1e-12 for left, right in pairwise(found[: peak + 1]))
    assert all(left + 1e-12 >= right for left, right in pairwise(found[peak:]))
    rising = round(warmup * steps) if warmup < 1 else warmup
    if rising:
        assert found[0] <= 1 / rising + 1e-12
    if name == "trapezoidal" and rising <= steps and (round(decay * steps) if decay < 1 else decay):
        assert found[-1] == pytest.approx(final)
    if name == "cosine" and rising < steps and steps > 1:
        assert found[-1] == pytest.approx(final)
    assert learning_rate_factor(steps + 5, steps, ScheduleConfig(**options)) == found[-1]
