"""Laws of every learning-rate schedule, the file of each in `tuner/optim/schedules`."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.optim.schedules.constant import Constant
from tuner.optim.schedules.cosine import Cosine
from tuner.optim.schedules.linear import Linear
from tuner.plugins import Folder

SCHEDULES = Folder("tuner.optim.schedules")
every_schedule = pytest.mark.parametrize(
    "kind", [pytest.param(SCHEDULES.find(name), id=name) for name in SCHEDULES.names()]
)


@every_schedule
@given(updates=st.integers(1, 500), warmup=st.integers(0, 600), data=st.data())
def test_the_factor_is_a_share_and_depends_on_nothing_but_the_update(kind: Any, updates, warmup, data):
    order = data.draw(st.permutations(range(min(updates, 8))))
    schedule = kind(warmup=warmup)
    values = {update: schedule.factor(update, updates) for update in order}
    assert all(0 < value <= 1 for value in values.values())
    assert values == {update: kind(warmup=warmup).factor(update, updates) for update in sorted(order)}


@every_schedule
@pytest.mark.parametrize("warmup", [1, 4, 9])
def test_warm_up_rises_in_a_line_to_the_peak_and_then_never_again(kind: Any, warmup):
    factors = [kind(warmup=warmup).factor(update, 40) for update in range(40)]
    assert factors[: warmup + 1] == pytest.approx([(update + 1) / (warmup + 1) for update in range(warmup + 1)])
    assert factors[warmup] == 1
    assert all(later <= earlier for earlier, later in zip(factors[warmup:], factors[warmup + 1 :], strict=False))


@every_schedule
def test_without_warm_up_the_first_update_has_the_peak(kind: Any):
    assert kind().factor(0, 100) == 1 == kind().factor(0, 1)


@every_schedule
def test_a_warm_up_that_fills_the_run_only_rises(kind: Any):
    factors = [kind(warmup=10).factor(update, 10) for update in range(10)]
    assert factors == pytest.approx([(update + 1) / 11 for update in range(10)])


@every_schedule
def test_a_negative_warm_up_is_refused(kind: Any):
    with pytest.raises(ValueError, match="warmup must not be negative, got -1"):
        kind(warmup=-1)


@pytest.mark.parametrize("kind", [Cosine, Linear])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
def test_a_falling_rate_ends_a_step_before_what_was_asked_for(kind, final):
    """The update after the last would have exactly `final`; the last itself still learns."""
    schedule = kind(warmup=5, final=final)
    assert schedule.factor(100, 100) == pytest.approx(final, abs=1e-12)
    assert schedule.factor(99, 100) >= final
    assert schedule.factor(10_000, 100) == pytest.approx(final, abs=1e-12)


@pytest.mark.parametrize("final", [-0.1, 1.1])
def test_a_final_share_that_is_none_is_refused(final):
    for kind in (Cosine, Linear):
        with pytest.raises(ValueError, match="final must lie in"):
            kind(final=final)


TABLE = {
    Constant(): [1, 1, 1, 1, 1, 1, 1, 1],
    Constant(warmup=3): [0.25, 0.5, 0.75, 1, 1, 1, 1, 1],
    Linear(): [1, 0.875, 0.75, 0.625, 0.5, 0.375, 0.25, 0.125],
    Linear(warmup=4, final=0.2): [0.2, 0.4, 0.6, 0.8, 1, 0.8, 0.6, 0.4],
    Cosine(): [1, 0.9619398, 0.8535534, 0.6913417, 0.5, 0.3086583, 0.1464466, 0.0380602],
    Cosine(warmup=4, final=0.5): [0.2, 0.4, 0.6, 0.8, 1, 0.9267767, 0.75, 0.5732233],
}
"""Factors of a run of 8 updates, by hand: (1 + cos(pi k / 8)) / 2 and the like."""


@pytest.mark.parametrize("schedule", TABLE, ids=str)
def test_factors_are_those_of_the_table(schedule):
    assert [schedule.factor(update, 8) for update in range(8)] == pytest.approx(TABLE[schedule], abs=1e-7)


def test_the_table_has_every_schedule():
    assert {type(schedule) for schedule in TABLE} == {SCHEDULES.find(name) for name in SCHEDULES.names()}
