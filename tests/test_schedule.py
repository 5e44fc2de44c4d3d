"""When the deep tier is read: the schedule's promises, one by one and for any run."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isograd._schedule import ALLOWANCE, EARLY, GROWTH, Schedule, Tracker


def play(schedule, steps, *, seconds=1.0, cost=0.0, deep_cost=0.0, loss=lambda step: 1.0):
    """The deep steps of a run whose steps take `seconds`; watching takes `cost` of them, `deep_cost` more when deep."""
    deep = []
    for step in range(steps):
        if schedule.is_deep(step):
            deep.append(step)
        spent = cost + deep_cost * (deep[-1:] == [step])
        readings = {"loss": loss(step)}
        schedule.observe(step, deep=deep[-1:] == [step], seconds=seconds, watch_seconds=spent, readings=readings)
    return deep


def test_the_early_steps_are_all_deep():
    """Each of the first twenty steps is deep."""
    assert list(range(EARLY)) == play(Schedule(), EARLY)


def test_after_the_early_steps_distances_grow_by_a_quarter():
    """Until they reach `every`, deep steps after the early ones stand in the ratio 1.25, rounded up."""
    deep = play(Schedule(every=10**9), 10_000)[EARLY:]
    expected, last = [], EARLY - 1
    while (last := math.ceil(last * GROWTH)) < 10_000:
        expected.append(last)

    assert expected == deep


@given(every=st.integers(1, 300), steps=st.integers(1, 1500))
def test_no_two_deep_steps_are_further_apart_than_every(every, steps):
    """With time to spare, two deep steps in a row are never more than `every` steps apart."""
    deep = play(Schedule(every=every, budget=math.inf), steps)
    gaps = [after - before for before, after in zip(deep, [*deep[1:], steps], strict=True)]

    assert max(gaps) <= max(every, 1)


@given(every=st.integers(1, 300), steps=st.integers(EARLY, 1500))
def test_regular_distances_follow_the_log_spaced_ones(every, steps):
    """In an unremarkable run a deep step follows the last after a quarter more steps, or `every` if fewer."""
    deep = play(Schedule(every=every, budget=math.inf), steps)
    for before, after in zip(deep[EARLY - 1 :], deep[EARLY:], strict=False):
        assert after == min(math.ceil(before * GROWTH), before + every)


def test_every_step_is_deep_when_asked_for():
    """With every=1 and no budget each step is deep, whatever it costs."""
    assert list(range(500)) == play(Schedule(every=1, budget=math.inf), 500, cost=0.5, deep_cost=5.0)


def test_an_infinite_budget_needs_no_clock():
    """With no budget a step is deep also before any step's cost is known, as on a device that answers late."""
    schedule = Schedule(every=1, budget=math.inf)

    assert all(schedule.is_deep(step) for step in range(10))


@given(
    budget=st.floats(0, 0.5),
    seconds=st.floats(1e-4, 10.0),
    deep_cost=st.floats(1e-3, 5.0),
    steps=st.integers(1, 2000),
)
def test_watching_stays_within_its_budget(budget, seconds, deep_cost, steps):
    """Deep readings never take more than the allowance, the budget's share of wall time, and one reading on top."""
    schedule = Schedule(every=1, budget=budget)
    deep = play(schedule, steps, seconds=seconds, deep_cost=deep_cost)

    # The first reading is taken without knowing its price.
    assert deep_cost * len(deep) <= max(deep_cost, ALLOWANCE + budget * steps * seconds + 1e-6)


def test_a_run_shorter_than_the_allowance_is_seen_completely():
    """While watching has taken less than two seconds in all, even a budget of 0 spaces nothing out."""
    assert list(range(20)) == play(Schedule(every=1, budget=0.0), 20, deep_cost=0.05)


def test_a_budget_of_nothing_stops_deep_readings_once_the_allowance_is_spent():
    """With a budget of 0 the deep tier takes its allowance of two seconds and no more."""
    deep = play(Schedule(every=1, budget=0.0), 1000, deep_cost=0.1)

    assert 19 <= len(deep) <= 20


def test_overhead_is_the_share_of_wall_time():
    """`overhead` is watching seconds over wall seconds, and 0 before anything was timed."""
    schedule = Schedule()

    assert schedule.overhead == 0.0
    play(schedule, 10, seconds=2.0, cost=0.25)
    assert schedule.overhead == 0.125


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 100.0])
def test_the_step_after_an_unusual_reading_is_deep(value):
    """A loss that turns non-finite or jumps a hundredfold makes the next step deep, at once."""
    deep = play(Schedule(every=10**9), 400, loss=lambda step: value if step == 300 else 1.0)

    assert 301 in deep


def test_an_unusual_reading_does_not_wait_for_the_budget():
    """Something unusual is looked at although the budget is spent."""
    deep = play(Schedule(every=10**9, budget=0.0), 400, deep_cost=1.0, loss=lambda s: math.nan if s == 300 else 1.0)

    assert deep == [0, 1, 301]


def test_ordinary_noise_is_not_unusual():
    """A loss that falls hundredfold and wavers by 20 % from step to step calls for no extra reading."""
    quiet = play(Schedule(), 2000)
    noisy = play(Schedule(), 2000, loss=lambda step: math.exp(-step / 400) * (1.2 if step % 3 else 0.8))

    assert quiet == noisy


def test_a_lasting_disturbance_makes_ever_fewer_steps_deep():
    """A loss that is NaN for good makes only a handful of steps deep in ten thousand: the pause doubles."""
    deep = play(Schedule(every=10**9), 10_000, loss=lambda step: math.nan if step >= 100 else 1.0)
    quiet = play(Schedule(every=10**9), 10_000)

    assert len(deep) - len(quiet) <= math.log2(10_000 / 10) + 2


def test_every_reading_is_followed_by_itself():
    """A gradient norm that jumps is noticed beside a loss that was unusual before."""
    schedule = Schedule(every=10**9)
    for step in range(301):
        schedule.is_deep(step)
        readings = {"loss": math.nan if step == 50 else 1.0, "global_grad_norm": 1e4 if step == 300 else 1.0}
        schedule.observe(step, deep=False, seconds=1.0, watch_seconds=0.0, readings=readings)

    assert schedule.is_deep(301)


@given(st.lists(st.floats(allow_nan=True, allow_infinity=True), max_size=200))
def test_a_tracker_takes_any_number(values):
    """Any sequence of floats is taken in; only what is not finite counts as unusual within the first twenty."""
    tracker = Tracker()
    for index, value in enumerate(values):
        unusual = tracker.is_unusual(value)
        if index < EARLY:
            assert unusual == (not math.isfinite(value))
    assert math.isfinite(tracker.mean)
    assert tracker.variance >= 0


@given(st.lists(st.floats(1e-6, 1e6), min_size=2, max_size=EARLY))
def test_the_running_moments_are_those_of_the_logarithms(values):
    """Over the first readings the tracker's mean and variance are the plain mean and variance of log|x|."""
    tracker = Tracker()
    for value in values:
        tracker.is_unusual(value)
    logs = [math.log(value) for value in values]
    mean = sum(logs) / len(logs)

    assert mean == pytest.approx(tracker.mean, abs=1e-9)
    assert sum((x - mean) ** 2 for x in logs) / len(logs) == pytest.approx(tracker.variance, abs=1e-9)


@given(st.lists(st.tuples(st.floats(0.001, 10), st.floats(0, 0.1), st.floats(allow_nan=True)), max_size=300))
def test_equal_inputs_give_equal_decisions(rows):
    """Two schedules that see the same costs and readings take the same steps: ranks stay in lock-step."""
    first, second = Schedule(every=7), Schedule(every=7)
    for step, (seconds, cost, loss) in enumerate(rows):
        assert first.is_deep(step) == second.is_deep(step)
        for schedule in (first, second):
            schedule.observe(step, deep=True, seconds=seconds, watch_seconds=cost, readings={"loss": loss})


@pytest.mark.parametrize("options", [{"every": 0}, {"every": -3}, {"budget": -0.1}, {"budget": math.nan}])
def test_options_out_of_range_are_refused(options):
    """A distance below one step or a negative budget is a ValueError that names the number."""
    with pytest.raises(ValueError, match=str(next(iter(options.values())))):
        Schedule(**options)


def test_a_restart_knows_what_is_usual():
    """A jump right after a restart is unusual to a schedule that goes on, and not to one that begins."""
    one, anew = Schedule(every=1000), Schedule(every=1000)
    for step in range(100):
        one.observe(step, deep=False, seconds=0.1, watch_seconds=0.0, readings={"loss": 1.0 + 0.01 * (step % 3)})
    going_on = Schedule(every=1000)
    going_on.load_state_dict(one.state_dict())
    for schedule in (going_on, anew):
        schedule.is_deep(0)
        schedule.observe(30, deep=False, seconds=0.1, watch_seconds=0.0, readings={"loss": 1e6})
    assert going_on._wanted
    assert not anew._wanted
