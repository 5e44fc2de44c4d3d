"""Many readings -> few columns of a chart. It knows arrays, and no statistic's meaning.

A *bin* is a range of steps that becomes one point of a line or one column of a map. Readings that were taken at every
step are binned evenly in steps, so that a gap stays as wide as it was; readings of the deep schedule evenly in number,
the first and the last by themselves, because the schedule reads most where most happens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from isograd._history import Floats, Integers


@dataclass(frozen=True, kw_only=True)
class Readings:
    """One statistic over time: S readings, each of one step or of a span of merged ones.

    `first`, `last`: int [S], the steps that each covers, increasing. `values`: [S] or [S, N]; of a span its median.
    `low`, `high`: the same shape, the smallest and largest of what was merged, or None where nothing was.
    `broken`: bool of the same shape: where a reading was NaN or infinite, not missing.
    """

    first: Integers
    last: Integers
    values: Floats
    low: Floats | None
    high: Floats | None
    broken: NDArray[np.bool_]

    def within(self, first: int | None, last: int | None) -> Readings:
        """Those that touch the steps from `first` to `last`, both included; None leaves an end open."""
        start = 0 if first is None else int(np.searchsorted(self.last, first))
        end = len(self.last) if last is None else int(np.searchsorted(self.first, last, side="right"))
        cut = slice(start, max(start, end))
        return Readings(
            first=self.first[cut],
            last=self.last[cut],
            values=self.values[cut],
            low=None if self.low is None else self.low[cut],
            high=None if self.high is None else self.high[cut],
            broken=self.broken[cut],
        )


class Bins(NamedTuple):
    """B bins: the steps `first` to `last` of each, int [B]; bin i holds the readings `start[i]` to `start[i + 1]`."""

    first: Integers
    last: Integers
    start: Integers

    @property
    def are_single(self) -> bool:
        """Whether no bin holds more than one reading."""
        return bool(np.all(np.diff(self.start) <= 1))


def even_in_steps(first: Integers, last: Integers, most: int) -> Bins:
    """At most `most` bins that cover all steps from the first to the last once; a gap is a bin without a reading."""
    if not len(first):
        return Bins(first, last, np.zeros(1, np.int64))
    holes = np.flatnonzero(first[1:] > last[:-1] + 1) + 1
    if len(first) + len(holes) <= most:
        return Bins(
            np.insert(first, holes, last[holes - 1] + 1),
            np.insert(last, holes, first[holes] - 1),
            np.append(np.sort(np.append(np.arange(len(first)), holes)), len(first)),
        )
    begin, span = int(first[0]), int(last[-1]) - int(first[0]) + 1
    number = min(most, span)
    edges = np.array([begin + span * i // number for i in range(number)], dtype=np.int64)
    # An edge inside a span of merged steps moves to where that span begins.
    inside = np.searchsorted(last, edges)
    edges = np.unique(np.where(first[inside] < edges, first[inside], edges))
    return Bins(edges, np.append(edges[1:], last[-1] + 1) - 1, np.append(np.searchsorted(first, edges), len(first)))


def even_in_number(first: Integers, last: Integers, most: int) -> Bins:
    """At most `most` bins of as many readings each, the first and the last reading in bins of their own."""
    count = len(first)
    if count <= most:
        start = np.arange(count + 1)
    else:
        inner = np.linspace(1, count - 1, most - 1).astype(np.int64) if most > 1 else np.empty(0, np.int64)
        start = np.concatenate([[0], inner, [count]])
    return Bins(first[start[:-1]], last[start[1:] - 1], start)


class Line(NamedTuple):
    """What a line shows of each bin: median, smallest and largest finite reading, NaN without one; broken readings."""

    middle: Floats
    low: Floats
    high: Floats
    broken: Integers


def fold_line(readings: Readings, bins: Bins) -> Line:
    """The bins of readings [S]."""
    low = readings.values if readings.low is None else np.fmin(readings.low, readings.values)
    high = readings.values if readings.high is None else np.fmax(readings.high, readings.values)
    parts = [slice(a, b) for a, b in zip(bins.start[:-1].tolist(), bins.start[1:].tolist(), strict=True)]
    return Line(
        np.array([_median(readings.values[part]) for part in parts]),
        np.array([_extreme(low[part], np.min) for part in parts]),
        np.array([_extreme(high[part], np.max) for part in parts]),
        np.array([np.count_nonzero(readings.broken[part]) for part in parts], dtype=np.int64),
    )


def fold_map(readings: Readings, bins: Bins) -> tuple[Floats, Integers]:
    """([B, N] medians of finite readings, NaN without one; [B, N] numbers of broken ones) of readings [S, N]."""
    shape = len(bins.first), readings.values.shape[1]
    middles, broken = np.full(shape, np.nan), np.zeros(shape, np.int64)
    for i, (a, b) in enumerate(zip(bins.start[:-1].tolist(), bins.start[1:].tolist(), strict=True)):
        if b > a:
            middles[i] = _medians(readings.values[a:b])
            broken[i] = readings.broken[a:b].sum(axis=0)
    return middles, broken


def _median(values: Floats) -> float:
    return float(_medians(values[:, None])[0]) if len(values) else np.nan


def _extreme(values: Floats, choose: Callable[[Floats], float]) -> float:
    finite = values[np.isfinite(values)]
    return float(choose(finite)) if len(finite) else np.nan


def _medians(values: Floats) -> Floats:
    """Of each column the median of what is finite."""
    if len(values) == 1:
        return np.where(np.isfinite(values[0]), values[0], np.nan)
    ordered = np.sort(np.where(np.isfinite(values), values, np.nan), axis=0)  # NaN comes last
    count = np.isfinite(ordered).sum(axis=0)
    lower, upper = np.maximum(count - 1, 0) // 2, np.minimum(count // 2, len(values) - 1)
    columns = np.arange(values.shape[1])
    low, high = ordered[lower, columns], ordered[upper, columns]
    return np.asarray(low + (high / 2 - low / 2))  # without overflow on the way
