from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from isograd._guard import Guard, parse_guard
from isograd._judge import DELAY, LEAST, WIDTH, Judge, Ranges, Reading


def reading(loss=1.0, norms=(1.0, 2.0), update=math.nan, bad=(), sized=True):
    norms = np.array(norms, dtype=float)
    nonfinite = np.zeros(len(norms))
    nonfinite[list(bad)] = 1.0
    return Reading(
        loss=loss, loss_is_finite=math.isfinite(loss), norms=norms, nonfinite=nonfinite, update=update, sized=sized
    )


def judged(judge, readings, **how):
    return [judge.judge(one, step, **how) for step, one in enumerate(readings, start=judge.step + 1)]


def noisy(count, seed=0, spread=0.3):
    random = np.random.default_rng(seed)
    return [reading(*np.exp(random.normal(0, spread, 1)), np.exp(random.normal(0, spread, 2))) for _ in range(count)]


# ---- ranges ---------------------------------------------------------------------------------------------------------


def oracle(series, factor):
    """Median and MAD of the delayed window, the plain way."""
    window = [x for x in series[:-DELAY][-WIDTH:] if math.isfinite(x) and x > 0]
    logs = np.log(window)
    middle = np.median(logs)
    return factor * math.exp(max(middle + 6 * 1.482602218505602 * np.median(abs(logs - middle)), logs.max()))


def test_a_limit_is_that_of_the_delayed_window():
    random = np.random.default_rng(3)
    ranges, series = Ranges(10.0), []
    for count in range(1, 400):
        series.append(float(np.exp(random.normal(0, 1))))
        ranges.add(np.array([series[-1]]))
        if count >= LEAST + DELAY and (count - LEAST) % DELAY == 0:
            assert ranges.limits[0] == pytest.approx(oracle(series, 10.0), rel=1e-12)
        elif count < LEAST + DELAY:
            assert ranges.limits[0] == math.inf


def test_series_that_are_not_positive_are_judged_by_distance():
    ranges = Ranges(3.0)
    for value in np.linspace(-5, -3, WIDTH + DELAY):
        ranges.add(np.array([value]))
    assert -3 < ranges.limits[0] < 10


def test_nothing_that_is_not_finite_enters_a_range():
    clean, dirty = Ranges(10.0), Ranges(10.0)
    for value in np.exp(np.random.default_rng(0).normal(0, 0.1, 200)):
        clean.add(np.array([value]))
        dirty.add(np.array([value]))
    for bad in (math.nan, math.inf, -math.inf):
        dirty.add(np.array([bad]))
        clean.add(np.array([math.nan]))
    assert np.array_equal(clean.limits, dirty.limits)


# ---- decisions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [reading(loss=math.nan), reading(loss=math.inf), reading(bad=[1])])
@pytest.mark.parametrize("before", [0, 1, 200])
def test_what_is_not_finite_is_skipped_from_the_first_step_on(bad, before):
    judge = Judge(Guard(skip=True))
    assert not any(decision.is_bad for decision in judged(judge, noisy(before)))
    (decision,) = judged(judge, [bad])
    assert decision.action == "skip"
    assert decision.reasons[0].limit == math.inf


@pytest.mark.parametrize(
    "spike, channel",
    [
        (reading(loss=100.0), "loss"),
        (reading(norms=(1e4, 1e4)), "global_grad_norm"),
        (reading(norms=(1.0, 2e2)), "global_grad_norm"),
        (reading(norms=(math.inf, 1.0)), "global_grad_norm"),
    ],
)
def test_a_spike_is_skipped_once_there_is_a_range(spike, channel):
    judge = Judge(Guard(skip=True))
    judged(judge, noisy(LEAST + DELAY))
    (decision,) = judged(judge, [spike])
    assert decision.action == "skip" and decision.reasons[0].channel == channel
    assert not judged(judge, noisy(1))[0].is_bad


def test_a_small_layer_that_leaves_its_own_range_is_named():
    judge = Judge(Guard(skip=True), names=lambda index: f"fc{index}.weight")
    judged(judge, [reading(norms=np.array([100.0, 1e-3]) * f) for f in np.linspace(0.9, 1.1, 100)])
    (decision,) = judged(judge, [reading(norms=(100.0, 1.0))])
    assert [reason.layer for reason in decision.reasons] == ["fc1.weight"]
    assert "the gradient norm of fc1.weight is 1, above 0.0" in str(decision.reasons[0])


def test_a_bad_first_step_does_not_widen_the_range():
    judge = Judge(Guard(skip=True))
    judged(judge, [reading(norms=(1e20, 1e20)), *noisy(WIDTH + 2 * DELAY)])
    (decision,) = judged(judge, [reading(norms=(300.0, 300.0))])
    assert decision.is_bad


def test_a_constant_series_is_in_its_range():
    judge = Judge(Guard(skip=True))
    assert not any(d.is_bad for d in judged(judge, [reading()] * 300))
    assert judged(judge, [reading(norms=(50.0, 50.0))])[0].is_bad


@pytest.mark.parametrize("factor", [0.97, 1.02])
def test_a_drift_is_no_fault(factor):
    judge = Judge(Guard(skip=True))
    drifting = [reading(loss=factor**t, norms=(factor**t, 2 * factor**t)) for t in range(600)]
    assert not any(decision.is_bad for decision in judged(judge, drifting))


def test_two_bad_steps_in_a_row_are_both_found():
    judge = Judge(Guard(skip=True))
    judged(judge, noisy(100))
    spikes = [reading(norms=(1e3, 1e3)), reading(norms=(1e3, 1e3)), reading(loss=math.nan)]
    assert [decision.action for decision in judged(judge, spikes)] == ["skip"] * 3


def test_the_mildest_help_is_chosen():
    spike, broken = reading(norms=(1e4, 0.0)), reading(loss=math.nan)
    for guard, expected in [
        (Guard(), ("observe", "observe")),
        (Guard(skip=True), ("skip", "skip")),
        (Guard(clip=True), ("clip", "observe")),
        (Guard(clip=True, skip=True, rewind=True), ("clip", "skip")),
        (Guard(rewind=True), ("rewind", "rewind")),
        (Guard(stop=True), ("stop", "stop")),
        (Guard(stop=True, skip=True), ("skip", "skip")),
    ]:
        judge = Judge(guard)
        judged(judge, noisy(100))
        assert tuple(decision.action for decision in judged(judge, [spike, broken])) == expected


def test_clipping_goes_back_to_the_upper_end_of_the_range():
    judge = Judge(Guard(clip=True))
    judged(judge, [reading(norms=(3.0, 4.0))] * 100)
    (decision,) = judged(judge, [reading(norms=(300.0, 400.0))])
    assert decision.clip_to == pytest.approx(5.0)


def test_a_loss_spike_without_a_gradient_spike_has_nothing_to_clip():
    judge = Judge(Guard(clip=True))
    judged(judge, noisy(100))
    assert judged(judge, [reading(loss=1e3)])[0].action == "observe"


def test_skipping_ends_when_trouble_lasts():
    judge = Judge(Guard(skip=True, patience=4))
    judged(judge, noisy(100))
    actions = [d.action for d in judged(judge, [reading(loss=math.nan)] * 7)]
    assert actions == ["skip"] * 4 + ["give-up"] * 3
    assert [d.action for d in judged(judge, [reading(), reading(loss=math.nan)])] == ["none", "skip"]


def test_a_new_level_is_learned_where_it_stays():
    judge = Judge(Guard(skip=True, patience=4))
    judged(judge, noisy(100))
    actions = [d.action for d in judged(judge, [reading(norms=(1e4, 1e4))] * 100)]
    assert actions[:5] == ["skip"] * 4 + ["relearn"] and set(actions[5:]) == {"none"}


def test_what_is_flagged_often_is_how_the_run_is():
    judge = Judge(Guard(skip=True))
    judged(judge, noisy(200))
    mixed = [reading(norms=(1e3, 1e3)) if t % 3 == 0 else reading() for t in range(400)]
    actions = [decision.action for decision in judged(judge, mixed)]
    assert "relearn" in actions and not any(action == "skip" for action in actions[-100:])


def test_a_damaged_state_is_rewound_at_once_and_each_time_further_back():
    judge = Judge(Guard(skip=True, rewind=True, rewinds=2, patience=3))
    judged(judge, noisy(50))
    bad = reading(loss=math.nan)
    (first,) = judged(judge, [bad], state_is_bad=lambda: True)
    assert first.action == "rewind" and first.before == 51 - 3
    judge.went_back(40)
    (second,) = judged(judge, [bad], state_is_bad=lambda: True)
    assert second.action == "rewind" and second.before == 39
    (third,) = judged(judge, [bad], state_is_bad=lambda: True)
    assert third.action == "give-up"


def test_an_old_trouble_is_not_counted_against_a_new_one():
    judge = Judge(Guard(rewind=True, rewinds=1))
    judged(judge, noisy(50))
    assert judged(judge, [reading(loss=math.nan)])[0].action == "rewind"
    judged(judge, noisy(WIDTH + 2))
    assert judged(judge, [reading(loss=math.nan)])[0].action == "rewind"


def test_stop_comes_after_everything_else():
    judge = Judge(Guard(skip=True, rewind=True, rewinds=1, stop=True, patience=2))
    judged(judge, noisy(50))
    actions = [decision.action for decision in judged(judge, [reading(loss=math.nan)] * 6)]
    assert actions == ["skip", "skip", "rewind", "skip", "skip", "stop"]


def test_the_rate_is_lowered_when_trouble_lasts():
    judge = Judge(Guard(skip=True, rewind=True, lower_learning_rate=0.3, patience=1))
    judged(judge, noisy(50))
    assert [d.lower for d in judged(judge, [reading(loss=math.nan)] * 2)] == [False, True]


def test_where_size_does_not_matter_gradients_are_not_judged_by_it():
    judge = Judge(Guard(skip=True))
    judged(judge, [reading(sized=False) for _ in range(100)])
    assert not judged(judge, [reading(norms=(1e9, 1e9), sized=False)])[0].is_bad
    assert judged(judge, [reading(norms=(1e9, 1e9), sized=False, bad=[0])])[0].is_bad


# ---- between runs ---------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 300), st.integers(0, 2**16), st.lists(st.sampled_from(["good", "nan", "spike"]), max_size=30))
def test_a_judge_goes_on_from_its_state(before, seed, after):
    made = {"good": noisy(1)[0], "nan": reading(loss=math.nan), "spike": reading(norms=(1e5, 1e5))}
    one = Judge(Guard(skip=True, rewind=True, patience=2))
    judged(one, noisy(before, seed))
    two = Judge(Guard(skip=True, rewind=True, patience=2))
    state = one.state_dict()
    assert state.keys() == two.state_dict().keys()
    two.load_state_dict(state)
    rest = [made[kind] for kind in after]
    assert judged(one, rest) == judged(two, rest)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.floats(allow_nan=True, allow_infinity=True),
            st.floats(0, allow_nan=False, allow_infinity=True),
            st.floats(0, allow_infinity=False) | st.just(math.nan),
        ),
        max_size=200,
    )
)
def test_no_reading_makes_it_raise(values):
    judge = Judge(Guard(skip=True, clip=True, rewind=True, stop=True, lower_learning_rate=True))
    with np.errstate(all="raise", under="ignore"):
        for loss, norm, update in values:
            decision = judge.judge(reading(loss, (norm, norm), update), judge.step + 1)
            assert decision.is_bad or math.isfinite(loss)


# ---- what users write -----------------------------------------------------------------------------------------------


def test_a_guard_is_written_in_words():
    assert parse_guard("skip, rewind,patience=5") == Guard(skip=True, rewind=True, patience=5)
    assert parse_guard("lower-learning-rate=0.1,rewind") == Guard(rewind=True, lower_learning_rate=0.1)
    assert parse_guard("skip,memory=1e9").memory == 10**9


@pytest.mark.parametrize(
    "text", ["", "skip=3", "slip", "patience", "patience=x", "skip,,jump", "memory=-1", "rewinds=-1"]
)
def test_what_no_guard_understands_is_one_sentence(text):
    with pytest.raises(ValueError, match=r"^[^\n]+$"):
        parse_guard(text)


def test_absurd_numbers_are_refused():
    for absurd in ({"lower_learning_rate": 2.0}, {"patience": 0}, {"capsules": -1}, {"memory": 0}):
        with pytest.raises(ValueError):
            Guard(**absurd)
