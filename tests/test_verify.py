"""The verdict on a treatment: right on planted effects, silent on none, whatever the loss's unit."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.random import default_rng

from isograd._diagnose import Cause, Diagnosis
from isograd._history import History, Series
from isograd._rule import Finding
from isograd._verify import _T975, Arm, compare, interval


def diagnosis(*names):
    found = [Finding(name=n, subject="m", level="error", message="1", first_step=0, last_step=9) for n in names]
    return Diagnosis(run="", subjects=("m",), steps=10, causes=tuple(Cause(finding=f) for f in found))


def arm(seed, end, *, start=2.3, steps=100, causes=(), error="", noise=0.0, step_seconds=0.01):
    """A loss that falls exponentially from `start` to `end`."""
    losses = end + (start - end) * np.exp(-np.arange(steps) / (steps / 20))
    losses = losses + noise * default_rng([seed, round(1e6 * abs(end))]).normal(size=steps)
    return Arm(seed=seed, losses=losses, diagnosis=diagnosis(*causes), error=error, step_seconds=step_seconds)


def arms(*ends, **more):
    return [arm(seed, end, **more) for seed, end in enumerate(ends)]


def test_a_cure_is_resolved():
    """A stuck loss that falls with the treatment, and its cause gone from every run, is resolved."""
    verdict = compare(arms(2.3, 2.29, 2.31, causes=["dead-units"]), arms(0.1, 0.12, 0.09), cause="dead-units")

    assert "resolved" == verdict.outcome
    assert ("dead-units",) == verdict.resolved
    assert verdict.effect.low > 0.9
    assert verdict.helps


def test_an_improvement_that_leaves_the_cause_is_no_resolution():
    """A better loss with the cause still there is an improvement and no more."""
    sick = {"causes": ["dead-units"]}

    assert "improved" == compare(arms(2.3, 2.2, 2.3, **sick), arms(0.1, 0.1, 0.2, **sick), cause="dead-units").outcome


def test_a_new_fault_is_told():
    """What only treated runs have is told as introduced, and then nothing is called resolved."""
    verdict = compare(
        arms(2.3, 2.2, 2.3, causes=["dead-units"]),
        arms(0.1, 0.1, 0.2, causes=["unscaled-inputs"]),
        cause="dead-units",
    )

    assert ("improved", ("unscaled-inputs",)) == (verdict.outcome, verdict.introduced)


def test_harm_is_worse():
    """A treatment that stops a run that learned is worse, and is not recommended."""
    verdict = compare(arms(0.1, 0.12, 0.09), arms(2.2, 2.3, 2.1))

    assert "worse" == verdict.outcome
    assert not verdict.helps


def test_the_same_run_twice_is_no_effect():
    """A treatment that changes no bit has the effect 0 with the interval [0, 0]."""
    verdict = compare(arms(0.1, 0.2, 0.3), arms(0.1, 0.2, 0.3))

    assert ("no-effect", 0.0, 0.0) == (verdict.outcome, verdict.effect.low, verdict.effect.high)


def test_one_pair_proves_nothing():
    """From a single seed no interval follows, so the outcome is inconclusive."""
    assert "inconclusive" == compare(arms(2.3), arms(0.1)).outcome


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_run_that_ends_in_nan_has_made_no_progress(broken):
    """Against runs that end in NaN or Inf, treated runs that learn are an improvement."""
    bad = []
    for a in arms(0.1, 0.1, 0.1):
        losses = a.losses.copy()
        losses[40:] = broken
        bad.append(Arm(seed=a.seed, losses=losses, diagnosis=diagnosis("invalid-operation")))

    assert "resolved" == compare(bad, arms(0.1, 0.12, 0.09), cause="invalid-operation").outcome


def test_a_run_that_raises_has_made_no_progress():
    """A program that raises at step 40 is compared at the length of the run that does not."""
    raising = [arm(s, 0.1, steps=40, error="ValueError", causes=["loss-divergence"]) for s in range(3)]

    assert "resolved" == compare(raising, arms(0.1, 0.12, 0.09), cause="loss-divergence").outcome


def test_a_treatment_that_breaks_the_program_is_worse():
    """A treated program that raises where the untreated one does not is worse, with the reason."""
    verdict = compare(arms(2.3, 2.3, 2.3), arms(0.1, 0.1, 0.1, error="TypeError: no"))

    assert ("worse", "the treated program fails: TypeError: no") == (verdict.outcome, verdict.why)


@given(
    st.floats(1e-6, 1e6),
    st.floats(-1e3, 1e3),
    st.lists(st.tuples(st.floats(0.05, 2.3), st.floats(0.05, 2.3)), min_size=2, max_size=5),
)
def test_the_unit_of_the_loss_does_not_matter(factor, offset, ends):
    """A loss multiplied by a positive number and shifted gets the same effect."""

    def rescaled(runs):
        return [Arm(seed=a.seed, losses=factor * (a.losses + offset), diagnosis=a.diagnosis) for a in runs]

    untreated, treated = arms(*(a for a, _ in ends)), arms(*(b for _, b in ends))
    plain, other = compare(untreated, treated), compare(rescaled(untreated), rescaled(treated))

    assert plain.effect.value == pytest.approx(other.effect.value, abs=1e-3)


def test_a_null_treatment_is_seldom_called_an_improvement():
    """Two thousand comparisons of runs that differ by chance alone: at most 5 % are called an improvement."""
    rng, called = default_rng(0), 0
    for _ in range(2000):
        ends = rng.normal(1.0, 0.3, size=(3, 2))
        called += compare(arms(*ends[:, 0], steps=20), arms(*ends[:, 1], steps=20)).helps

    assert called / 2000 <= 0.05


def test_a_second_look_keeps_the_level():
    """Undecided after three pairs, judged again on six: of two thousand null treatments at most 5 % are recommended."""
    rng, called = default_rng(2), 0
    for _ in range(2000):
        ends = rng.normal(1.0, 0.3, size=(6, 2))
        untreated, treated = arms(*ends[:, 0], steps=20), arms(*ends[:, 1], steps=20)
        verdict = compare(untreated[:3], treated[:3])
        if verdict.outcome == "inconclusive":
            verdict = compare(untreated, treated)
        called += verdict.helps

    assert called / 2000 <= 0.05


def test_a_planted_effect_is_found():
    """An effect of a third of the progress under noise of a tenth of it is found nearly always."""
    rng, found = default_rng(1), 0
    for _ in range(300):
        noise = rng.normal(0, 0.05, size=(3, 2))
        found += compare(arms(*(1.0 + noise[:, 0]), steps=20), arms(*(0.3 + noise[:, 1]), steps=20)).helps

    assert found / 300 >= 0.95


def test_a_transient_does_not_dwarf_what_is_learned():
    """Losses of thousands at the first steps of untreated runs, and one odd first loss, do not hide it."""
    untreated, treated = arms(0.7, 0.71, 0.69, steps=200), arms(0.1, 0.1, 0.1, steps=200)
    for run in untreated:
        run.losses[:9] = 8000 / 2.0 ** np.arange(9)
        run.losses[9:] = run.losses[-1]
    for run in treated:
        run.losses[:] = np.linspace(0.75, 0.1, 200)
    treated[1].losses[0] = 1e-3
    verdict = compare(untreated, treated)

    assert "improved" == verdict.outcome
    assert 0.4 < verdict.effect.value < 1


def test_what_learns_within_a_twentieth_keeps_its_progress():
    """A run that is done after a few steps began where the untreated one stands."""
    fast = [Arm(seed=s, losses=np.r_[300.0, 200.0, 90.0, np.full(397, 3.0)], diagnosis=diagnosis()) for s in range(3)]
    verdict = compare(arms(301, 300, 299, start=302, steps=400), fast)

    assert "improved" == verdict.outcome
    assert verdict.effect.low > 0.9


@pytest.mark.parametrize("count", [1, 2, 5, 19, 20, 40, 100])
def test_a_twentieth_of_the_end_is_cut(count):
    """Of the last quarter every twentieth loss may be anything; fewer than twenty are all counted."""
    spared = count // 20
    for spikes in (spared, spared + 1):
        untreated, treated = arms(2.3, 2.3, 2.3, steps=4 * count), arms(0.1, 0.1, 0.1, steps=4 * count)
        for run in treated:
            run.losses[:] = 0.1
            run.losses[:count] = 2.3
            run.losses[4 * count - spikes :] = 1e9

        assert (spikes == spared) == (compare(untreated, treated).effect.value > 0.5)


def test_a_step_without_a_loss_is_not_one_that_broke():
    """A loss that was not recorded stands where the last one stood; one that was not finite does not."""
    steps = np.arange(6)
    values = np.array([2.0, np.nan, 1.0, np.nan, 0.5, np.nan])
    history = History(
        series={
            "loss": Series(steps=steps, values=values),
            "loss_nonfinite": Series(steps=steps, values=np.array([0.0, 0, 0, 1, 0, 0])),
        }
    )
    run = Arm.of(history, diagnosis(), seed=0)

    assert np.array_equal([2.0, 2.0, 1.0, np.nan, 0.5, 0.5], run.losses, equal_nan=True)


def test_rare_spikes_are_cut_and_nan_is_not():
    """A step in twenty may be anything finite; a loss that is NaN once in the last quarter is a run that broke."""
    spiked, broken = (arms(0.1, 0.12, 0.09) for _ in range(2))
    for run in spiked:
        run.losses[90] = 1e30  # one of the last 25
    for run in broken:
        run.losses[90] = np.nan

    assert "improved" == compare(arms(2.3, 2.2, 2.3), spiked).outcome
    assert not compare(arms(2.3, 2.2, 2.3), broken).helps
    assert math.isnan(compare(arms(2.3, 2.2, 2.3), broken).means[1])


def test_noise_above_the_start_is_no_progress():
    """Losses that swing about twice the start are as far from learning as those that stay at it."""
    noisy = [Arm(seed=s, losses=2.3 * default_rng(s).uniform(0, 4, 400), diagnosis=diagnosis()) for s in range(3)]
    for run in noisy:
        run.losses[:20] = 2.3

    assert compare(noisy, arms(2.0, 2.1, 2.0, steps=400)).helps


def test_a_loss_that_moves_with_its_networks_decides_nothing():
    """Where the target is the network's own, a lower loss is no better one, and nothing is recommended for it."""
    verdict = compare(
        arms(2.3, 2.2, 2.3, causes=["bootstrapped-target"]), arms(0.1, 0.1, 0.2), cause="bootstrapped-target"
    )

    assert "inconclusive" == verdict.outcome
    assert "learns as well" in verdict.why


def test_what_is_chosen_from_shares_one_measure():
    """Of two treated runs on one seed the better one sets the progress in which both are told."""
    best = arms(0.1)
    alone = compare(arms(2.3), arms(2.1)).effect.value
    beside = compare(arms(2.3), arms(2.1), others=best).effect.value

    start = 2.1 + 0.2 * math.exp(-2 / 5)  # the median of the first five steps
    assert (1.0, pytest.approx((start - 2.1) / (start - 0.1), rel=0.01)) == (pytest.approx(alone), beside)


def test_where_another_one_begins_is_no_progress():
    """Of 1000 to 10 and 1000 to 0.5 the first is nothing and the second something, where a third begins at 1."""
    untreated, lower = arms(10.0, start=1000.0), arms(0.5, start=1000.0)
    standardized = [Arm(seed=0, losses=np.linspace(1.0, 0.9, 100), diagnosis=diagnosis())]

    assert compare(untreated, lower).effect.value < 0.02
    assert compare(untreated, lower, others=standardized).effect.value == pytest.approx(1.0)
    assert compare(untreated, standardized, others=lower).effect.value == pytest.approx(0.2, abs=0.05)


def test_the_table_is_student_s():
    """Quantiles of Student's t from its density, integrated numerically."""
    for freedom in range(1, 10):
        c = math.gamma((freedom + 1) / 2) / (math.sqrt(freedom * math.pi) * math.gamma(freedom / 2))
        x = np.linspace(0, _T975[freedom], 400_001)
        density = c * (1 + x**2 / freedom) ** (-(freedom + 1) / 2)

        assert 0.475 == pytest.approx(np.trapezoid(density, x), abs=2e-5)


@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=9))
def test_an_interval_holds_its_mean(values):
    """The interval is centered on the mean, and is a point where all pairs agree."""
    effect = interval(values)

    assert effect.low <= effect.value <= effect.high
    assert interval([values[0]] * 3).low == pytest.approx(values[0])


def test_nothing_to_compare():
    """Without a common seed, or without a step, the outcome is inconclusive."""
    assert "inconclusive" == compare(arms(1.0), [arm(7, 1.0)]).outcome
    assert "inconclusive" == compare([], []).outcome
    assert "inconclusive" == compare(arms(1.0, steps=0), arms(1.0, steps=0)).outcome


@given(st.integers(0, 2**32 - 1))
def test_any_losses_get_a_verdict(seed):
    """Runs of any length, with NaN and infinities anywhere, get a verdict that JSON can hold."""
    rng = default_rng(seed)

    def any_arm(s):
        losses = rng.choice([1.0, -3.0, 1e30, -1e30, np.nan, np.inf, 0.0], size=rng.integers(0, 30))
        return Arm(seed=s, losses=losses, diagnosis=diagnosis(), error=str(rng.choice(["", "Killed"])))

    verdict = compare([any_arm(s) for s in range(3)], [any_arm(s) for s in range(3)])

    assert not any(isinstance(x, float) and not math.isfinite(x) for x in verdict.to_dict()["effect"].values())
