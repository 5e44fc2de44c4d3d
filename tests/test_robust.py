"""The robust estimators against naive definitions and known distributions."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from isograd._robust import (
    alternation,
    autocorrelation,
    block_medians,
    excess,
    first_true,
    log10_positive,
    longest_run,
    mann_kendall,
    median,
    median_mad,
    noise_scale,
    row_median,
    theil_sen,
)

NUMBERS = st.floats(-1e6, 1e6) | st.just(float("nan")) | st.sampled_from([float("inf"), float("-inf")])
SERIES = arrays(float, st.integers(0, 40), elements=NUMBERS)


def finite(values):
    return [v for v in values if np.isfinite(v)]


@given(SERIES)
def test_median_is_the_middle_of_the_finite_values(values):
    """The median leaves out NaN and infinities, and is NaN of nothing."""
    kept = sorted(finite(values))
    middle = (kept[(len(kept) - 1) // 2] + kept[len(kept) // 2]) / 2 if kept else np.nan

    np.testing.assert_allclose(median(values), middle)


@given(arrays(float, array_shapes(min_dims=2, max_dims=2, max_side=12), elements=NUMBERS))
def test_row_median_is_the_median_of_each_row(rows):
    """The vectorized median over rows agrees with the median of each row."""
    np.testing.assert_allclose(row_median(rows), [median(row) for row in rows])


def test_median_absolute_deviation_estimates_sigma():
    """On 100,000 normal values with a tenth of gross outliers, the scale stays within 20 % of sigma."""
    rng = np.random.default_rng(0)
    values = rng.normal(5.0, 2.0, 100_000)
    values[::10] = 1e9

    center, scale = median_mad(values)

    # A tenth of the mass at +infinity moves the median by 0.14 sigma and widens the deviation by 15 %.
    assert center == pytest.approx(5.0, abs=0.4)
    assert scale == pytest.approx(2.0, rel=0.2)


@given(SERIES)
def test_log10_is_missing_where_there_is_none(values):
    """log10 of what is zero, negative or not finite is NaN, and of everything else the logarithm."""
    expected = [np.log10(v) if np.isfinite(v) and v > 0 else np.nan for v in values]

    np.testing.assert_allclose(log10_positive(values), expected)


@given(arrays(float, st.integers(2, 15), elements=st.floats(-1e3, 1e3)))
def test_theil_sen_is_the_median_of_all_slopes(values):
    """The slope agrees with the definition, pair by pair."""
    slopes = [values[j] - values[i] for i, j in itertools.combinations(range(len(values)), 2)]
    slopes = [s / (j - i) for s, (i, j) in zip(slopes, itertools.combinations(range(len(values)), 2), strict=True)]

    np.testing.assert_allclose(theil_sen(np.arange(len(values)), values), np.median(slopes), rtol=1e-9, atol=1e-9)


@given(st.floats(-5, 5), st.integers(10, 60), st.data())
def test_theil_sen_ignores_a_quarter_of_outliers(slope, size, data):
    """Up to a quarter of arbitrary values leave the slope of a line where it was, within the noise."""
    x = np.arange(size, dtype=float)
    y = slope * x
    bad = data.draw(st.lists(st.integers(0, size - 1), max_size=size // 4, unique=True))
    y[bad] = data.draw(arrays(float, len(bad), elements=st.sampled_from([1e9, -1e9, float("nan")])))

    # With a share e of outliers, (1 - e)^2 >= 9/16 of the pairs lie on the line: the median is one of them.
    assert theil_sen(x, y) == pytest.approx(slope, abs=1e-9)


def test_theil_sen_thins_long_series():
    """A line of 10,000 points keeps its slope although only 400 of them are paired."""
    x = np.arange(10_000)

    assert theil_sen(x, 3.0 * x - 7) == pytest.approx(3.0)


def test_slope_of_too_little_is_missing():
    """One point, or none, or points at one place have no slope."""
    assert np.isnan([theil_sen([], []), theil_sen([1], [1]), theil_sen([2, 2], [1, 5])]).all()


def naive_excess(values, width, limit):
    """Robust z-scores by definition, one step at a time, with the second pass over what the first one flagged."""

    def scores(reference):
        z = np.full(len(values), np.nan)
        for i, value in enumerate(values):
            window = [v for v in reference[max(0, i - width) : i] if np.isfinite(v)]
            if len(window) >= 8 and np.isfinite(value):
                center = np.median(window)
                scale = 1.482602218505602 * np.median(np.abs(np.array(window) - center))
                z[i] = (value - center) / max(scale, 1e-6 * abs(center), 1e-300)
        return z

    first = scores(values)
    return scores(np.where(np.abs(first) > limit, np.nan, values))


@given(st.integers(0, 10_000), st.sampled_from([8, 16, 33]))
def test_excess_agrees_with_its_definition(seed, width):
    """The vectorized z-scores equal those of a loop over steps, with spikes and gaps in the series."""
    rng = np.random.default_rng(seed)
    values = rng.normal(1.0, 0.1, 60)
    values[rng.integers(0, 60, 4)] *= 50
    values[rng.integers(0, 60, 4)] = np.nan

    judged = excess(values, width=width)

    np.testing.assert_allclose(judged.z, naive_excess(values, width, 6.0), rtol=1e-9)
    assert (judged.flagged == (judged.z > 6)).all()


def test_excess_never_looks_at_the_tested_value_or_beyond():
    """What comes at or after a step does not change the center and scale that it is judged by."""
    rng = np.random.default_rng(1)
    values = rng.normal(1.0, 0.1, 100)
    other = values.copy()
    other[60:] = 1e6

    one, two = excess(values), excess(other)

    np.testing.assert_array_equal(one.center[:61], two.center[:61])
    np.testing.assert_array_equal(one.scale[:61], two.scale[:61])


def test_excess_finds_the_spike_and_only_the_spike():
    """Of 500 noisy values with one spike of 30 sigma, exactly the spike is flagged."""
    values = np.random.default_rng(2).normal(1.0, 0.1, 500)
    values[300] += 3.0

    assert np.flatnonzero(excess(values, limit=8).flagged).tolist() == [300]


def test_noise_scale_does_not_see_a_trend():
    """The noise about a steep straight line is that of the values about the line, within its standard error."""
    rng = np.random.default_rng(3)
    values = 50.0 * np.arange(20_000) + rng.normal(0, 2.0, 20_000)

    # The relative standard error of a MAD of n dependent values is about 1.2 / sqrt(n / 3) = 1.5 %; four of them.
    assert noise_scale(values) == pytest.approx(2.0, rel=0.06)


def test_mann_kendall_holds_its_level():
    """Of 1000 series of exchangeable noise, about 5 % are called a trend at the two-sided 5 % level."""
    rng = np.random.default_rng(4)

    called = np.mean([abs(mann_kendall(rng.normal(size=12))) >= 1.96 for _ in range(1000)])

    # Binomial standard error 0.7 %; the continuity correction makes the test somewhat conservative.
    assert 0.02 < called < 0.07


@given(arrays(float, st.integers(4, 30), elements=st.floats(-1e3, 1e3)))
def test_mann_kendall_counts_concordant_pairs(values):
    """The score's sign is that of (pairs that rise) - (pairs that fall), and reversing time reverses it."""
    pairs = [np.sign(b - a) for a, b in itertools.combinations(values, 2)]
    expected = 0.0 if abs(sum(pairs)) <= 1 else np.sign(sum(pairs))

    assert np.sign(mann_kendall(values)) == expected
    assert mann_kendall(values[::-1]) == pytest.approx(-mann_kendall(values))


def test_a_two_cycle_turns_at_every_point():
    """A series that alternates turns everywhere; one that rises turns nowhere; noise turns at two thirds."""
    noise = np.random.default_rng(5).normal(size=30_000)

    assert alternation([1, 2] * 20)[0] == 1.0
    assert alternation(np.arange(40))[0] == 0.0
    # Variance of the number of turning points is 16 n / 90: standard error of the share 0.24 %.
    assert alternation(noise)[0] == pytest.approx(2 / 3, abs=0.01)
    assert abs(alternation(noise)[1]) < 4


def test_autocorrelation_tells_cycle_noise_and_trend():
    """Differences of a two-cycle correlate by -1, of white noise by -1/2, of a random walk by 0."""
    noise = np.random.default_rng(6).normal(size=30_000)

    assert autocorrelation([1.0, 2.0] * 200) == pytest.approx(-1, abs=0.01)
    assert autocorrelation(noise) == pytest.approx(-0.5, abs=0.02)
    assert autocorrelation(np.cumsum(noise)) == pytest.approx(0, abs=0.02)


@given(arrays(float, st.integers(0, 50), elements=st.floats(-10, 10)), st.integers(1, 12))
def test_block_medians_cover_the_series_in_order(values, count):
    """There are at most `count` blocks, and each one's median lies between the extremes of the series."""
    medians = block_medians(values, count)

    assert len(medians) == min(count, len(values))
    assert all(values.min() <= m <= values.max() for m in medians)


@given(arrays(bool, st.integers(0, 40)))
def test_longest_run_agrees_with_groupby(mask):
    """The longest stretch equals the one that itertools finds."""
    runs = [(key, len(list(group))) for key, group in itertools.groupby(mask)]
    expected = max((length for key, length in runs if key), default=0)

    start, length = longest_run(mask)

    assert length == expected
    assert mask[start : start + length].all()


@given(arrays(bool, st.integers(0, 20)))
def test_first_true_is_the_first(mask):
    """The index of the first true value equals that of a search in a list."""
    assert first_true(mask) == (list(mask).index(True) if True in list(mask) else None)
