"""Robust estimators over time and depth: medians instead of means, ranks instead of moments. They judge nothing.

Everything takes plain arrays, ignores NaN and infinities, and returns NaN where there is too little to say.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Mask = NDArray[np.bool_]

MAD_TO_SIGMA = 1.482602218505602
"""1 / Phi^-1(3/4): makes the median absolute deviation a consistent estimate of a normal standard deviation."""

MAX_PAIRED = 400
"""Points from which all pairs are formed; longer series are thinned evenly first (80,000 slopes at most)."""


def finite(values: ArrayLike) -> Floats:
    """The finite entries of `values`, flat."""
    array = np.asarray(values, dtype=np.float64).ravel()
    return array[np.isfinite(array)]


def log10_positive(values: ArrayLike) -> Floats:
    """log10 where a value is finite and positive, NaN elsewhere. Same shape."""
    array = np.asarray(values, dtype=np.float64)
    usable = np.isfinite(array) & (array > 0)
    return np.log10(np.where(usable, array, 1.0), out=np.full(array.shape, np.nan), where=usable)


def median(values: ArrayLike) -> float:
    """Median of the finite entries; NaN when there are none."""
    kept = finite(values)
    return float(np.median(kept)) if kept.size else float("nan")


def median_mad(values: ArrayLike) -> tuple[float, float]:
    """Median and scaled median absolute deviation of the finite entries (Rousseeuw & Croux 1993); NaN of none."""
    center = median(values)
    return center, MAD_TO_SIGMA * median(np.abs(finite(values) - center))


def row_median(values: ArrayLike) -> Floats:
    """Median of the finite entries of each row: [R, N] to [R]. NaN for a row that has none."""
    return _sorted_median(np.asarray(values, dtype=np.float64))


def _sorted_median(rows: Floats) -> Floats:
    # NaN sorts last, so the median of the finite part sits at a known index: one sort, no masked arrays.
    ordered = np.sort(np.where(np.isfinite(rows), rows, np.nan), axis=-1)
    count = np.sum(np.isfinite(ordered), axis=-1)
    if ordered.shape[-1] == 0:
        return np.full(ordered.shape[:-1], np.nan)
    low = np.take_along_axis(ordered, np.maximum(count - 1, 0)[..., None] // 2, axis=-1)[..., 0]
    high = np.take_along_axis(ordered, np.minimum(count // 2, ordered.shape[-1] - 1)[..., None], axis=-1)[..., 0]
    return np.where(count > 0, (low + high) / 2, np.nan)


@dataclass(frozen=True, kw_only=True)
class Excess:
    """How far each value stands from the run's own past. All arrays have the length of the series."""

    center: Floats
    scale: Floats
    z: Floats
    flagged: Mask


def excess(
    values: ArrayLike, *, width: int = 128, delay: int = 1, limit: float = 6.0, floor: float = 1e-6, least: int = 8
) -> Excess:
    """Robust z-scores of a series against the `width` values that end `delay` before each tested value.

    The tested value is never part of its own window. A second pass leaves out the values that the first one flagged,
    on either side, so that a spike does not widen the range against which its neighbours are judged. `floor` bounds
    the scale below (a constant window has MAD 0); a window with fewer than `least` finite values judges nothing (z is
    NaN). Width 128 and 6 sigma are those of the skip-step optimizer of OLMo-core (Allen Institute for AI, 2025).
    """
    series = np.asarray(values, dtype=np.float64)
    first = _scores(series, series, width, delay, floor, least)
    outlier = np.abs(first[2]) > limit
    center, scale, z = _scores(series, np.where(outlier, np.nan, series), width, delay, floor, least)
    return Excess(center=center, scale=scale, z=z, flagged=z > limit)


def _scores(
    tested: Floats, reference: Floats, width: int, delay: int, floor: float, least: int
) -> tuple[Floats, Floats, Floats]:
    padded = np.concatenate([np.full(width + delay - 1, np.nan), reference])
    windows = np.lib.stride_tricks.sliding_window_view(padded, width)[: len(tested)]
    center = _sorted_median(windows)
    scale = MAD_TO_SIGMA * _sorted_median(np.abs(windows - center[:, None]))
    enough = np.sum(np.isfinite(windows), axis=1) >= least
    scale = np.maximum(scale, np.maximum(floor * np.abs(center), 1e-300))
    z = np.where(enough & np.isfinite(tested), (tested - center) / scale, np.nan)
    return center, scale, z


def theil_sen(x: ArrayLike, y: ArrayLike) -> float:
    """Median of the slopes through all pairs of points with finite y (Theil 1950, Sen 1968). NaN below two points.

    Up to 29 % of arbitrary outliers leave it bounded. More than 400 points are thinned evenly before pairing.
    """
    across, along = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    kept = np.isfinite(across) & np.isfinite(along)
    across, along = _thin(across[kept]), _thin(along[kept])
    low, high = np.triu_indices(len(across), k=1)
    run = across[high] - across[low]
    apart = run != 0
    return median((along[high] - along[low])[apart] / run[apart]) if np.any(apart) else float("nan")


def _thin(values: Floats) -> Floats:
    if len(values) <= MAX_PAIRED:
        return values
    return np.asarray(values[np.linspace(0, len(values) - 1, MAX_PAIRED).round().astype(np.int64)])


def blocks(values: ArrayLike, count: int) -> list[Floats]:
    """The finite values in order of time, cut into at most `count` blocks of nearly equal size, none empty."""
    kept = finite(values)
    return [block for block in np.array_split(kept, max(1, count)) if block.size]


def block_medians(values: ArrayLike, count: int) -> Floats:
    """Median of each of at most `count` consecutive blocks."""
    return np.array([np.median(block) for block in blocks(values, count)])


def noise_scale(values: ArrayLike) -> float:
    """Standard deviation of one value about its local level, from second differences, robustly. NaN below three values.

    The second difference x[i-1] - 2 x[i] + x[i+1] cancels any locally straight trend; its variance is 6 sigma^2 for
    white noise (Gasser, Sroka & Jennen-Steinmetz 1986).
    """
    kept = finite(values)
    if kept.size < 3:
        return float("nan")
    return MAD_TO_SIGMA * median(np.abs(np.diff(kept, n=2))) / 6**0.5


def mann_kendall(values: ArrayLike) -> float:
    """Standard normal score of a monotone trend: > 0 rising, < 0 falling (Mann 1945, Kendall 1975). 0 below 4 values.

    Assumes exchangeable values when there is no trend: give it block medians, not every step of a correlated series.
    """
    kept = _thin(finite(values))
    size = len(kept)
    if size < 4:
        return 0.0
    low, high = np.triu_indices(size, k=1)
    score = float(np.sum(np.sign(kept[high] - kept[low])))
    _, ties = np.unique(kept, return_counts=True)
    tied = float(np.sum(ties * (ties - 1.0) * (2.0 * ties + 5.0)))
    variance = (size * (size - 1.0) * (2.0 * size + 5.0) - tied) / 18.0
    # The continuity correction moves the score one unit towards zero.
    return 0.0 if variance <= 0 or score == 0 else float((score - np.sign(score)) / variance**0.5)


def alternation(values: ArrayLike) -> tuple[float, float]:
    """(share of turning points, its standard normal score against white noise). (NaN, 0) below 5 values.

    Among exchangeable values a point is a turning point with probability 2/3, and their number has variance
    (16 n - 29) / 90 (Bienayme 1874; Kendall & Stuart). A two-cycle turns at every point; a smooth trend nowhere.
    """
    kept = finite(values)
    size = kept.size
    if size < 5:
        return float("nan"), 0.0
    step = np.diff(kept)
    turns = int(np.sum(step[1:] * step[:-1] < 0))
    expected, variance = 2.0 * (size - 2) / 3.0, (16.0 * size - 29.0) / 90.0
    return turns / (size - 2), float((turns - expected) / variance**0.5)


def autocorrelation(values: ArrayLike) -> float:
    """Lag-1 autocorrelation of differences about zero: -1/2 for white noise, -1 for a two-cycle. NaN if constant."""
    step = np.diff(finite(values))
    power = float(np.sum(step**2))
    return float(np.sum(step[1:] * step[:-1]) / power) if step.size >= 2 and power > 0 else float("nan")


def longest_run(mask: ArrayLike) -> tuple[int, int]:
    """(start, length) of the longest stretch of true values, the first of equals; (0, 0) when there is none."""
    edges = np.diff(np.concatenate([[0], np.asarray(mask, dtype=bool).astype(np.int8), [0]]))
    starts, ends = np.flatnonzero(edges == 1), np.flatnonzero(edges == -1)
    if not starts.size:
        return 0, 0
    best = int(np.argmax(ends - starts))
    return int(starts[best]), int(ends[best] - starts[best])


def first_true(mask: ArrayLike) -> int | None:
    """Index of the first true value, or None."""
    flags = np.asarray(mask, dtype=bool)
    return int(np.argmax(flags)) if flags.any() else None
