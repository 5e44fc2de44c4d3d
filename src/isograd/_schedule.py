"""When the deep tier is read: early, log-spaced, then regularly; at once if a reading is unusual; within a budget."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

ALLOWANCE = 2.0
"""Seconds that the watcher may spend once, before the budget applies: short runs are seen completely."""

EARLY = 20
"""The first steps are all read: what stands before step 1 shows there."""

GROWTH = 1.25
"""Ratio between log-spaced deep steps after the early ones: ten readings a decade."""

UNUSUAL_SIGMAS = 6.0
"""Log-domain deviations that make a reading unusual (Wortsman et al. 2023 and OLMo use 6 sigma for spikes)."""


@dataclass(kw_only=True)
class Schedule:
    """Decides before each step whether it is deep.

    `every`: largest distance between deep steps. `budget`: largest share of wall time that watching may take, as a
    fraction. All inputs are the same on every rank, and so are the decisions.
    """

    every: int = 100
    budget: float = 0.01
    allowance: float = ALLOWANCE
    _last_deep: int = -1
    _deep_seconds: float = 0.0
    _spent: float = 0.0
    _elapsed: float = 0.0
    _trackers: dict[str, Tracker] = field(default_factory=dict)
    _calm_until: int = 0
    _wanted: bool = False
    _pause: int = 10

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ValueError(f"every must be at least 1 step, not {self.every}")
        if not self.budget >= 0:
            raise ValueError(f"budget must be a fraction of wall time of at least 0, not {self.budget}")

    def observe(
        self, step: int, *, deep: bool, seconds: float, watch_seconds: float, readings: dict[str, float]
    ) -> None:
        """Take in what step `step` cost (`seconds` of wall time, `watch_seconds` of them watching) and read.

        `readings`: name -> value, loss and gradient norms; NaN or Inf is unusual, and so is a jump.
        """
        self._elapsed += seconds
        self._spent += watch_seconds
        if deep:
            self._deep_seconds = max(watch_seconds, 0.7 * self._deep_seconds)
        unusual = [name for name, value in readings.items() if self._track(name, value)]
        if unusual and step >= self._calm_until:
            # The pause doubles, so that a lasting disturbance does not make every step deep.
            self._calm_until, self._pause = step + 1 + self._pause, self._pause * 2
            self._wanted = True

    def _track(self, name: str, value: float) -> bool:
        return self._trackers.setdefault(name, Tracker()).is_unusual(value)

    def is_deep(self, step: int) -> bool:
        """Whether `step`, which is about to begin, is deep. Ask once a step."""
        deep = step == 0 or self._wanted or (self._is_due(step) and self._is_affordable())
        if deep:
            self._last_deep, self._wanted = step, False
        return deep

    @property
    def overhead(self) -> float:
        """Share of wall time spent watching so far, as a fraction."""
        return self._spent / self._elapsed if self._elapsed > 0 else 0.0

    def state_dict(self) -> dict[str, list[float]]:
        """What is usual so far: (mean, variance, count) of the logarithm of each reading."""
        return {name: [one.mean, one.variance, float(one.count)] for name, one in self._trackers.items()}

    def load_state_dict(self, state: Mapping[str, Sequence[float]]) -> None:
        """Go on from there; which steps are deep begins anew."""
        self._trackers = {name: Tracker(mean, variance, int(count)) for name, (mean, variance, count) in state.items()}

    def _is_due(self, step: int) -> bool:
        if step < EARLY:
            return True
        return step >= min(math.ceil(max(self._last_deep, 1) * GROWTH), self._last_deep + self.every)

    def _is_affordable(self) -> bool:
        allowed = self.allowance + (self.budget * self._elapsed if self._elapsed > 0 else self.budget)
        return self._spent + self._deep_seconds <= allowed


@dataclass
class Tracker:
    """Running mean and variance of log|x|, to notice a jump at once; diagnosis uses robust estimators afterwards."""

    mean: float = 0.0
    variance: float = 0.0
    count: int = 0

    def is_unusual(self, value: float) -> bool:
        """Whether `value` is non-finite or, after 20 readings, `UNUSUAL_SIGMAS` above the running log-mean."""
        if not math.isfinite(value):
            return True
        magnitude = math.log(max(abs(value), 1e-300))
        gap = magnitude - self.mean
        unusual = self.count >= EARLY and gap > UNUSUAL_SIGMAS * max(math.sqrt(self.variance), 0.1)
        self.count += 1
        weight = max(1 / self.count, 0.02) if not unusual else 0.0
        self.mean += weight * gap
        self.variance = (1 - weight) * (self.variance + weight * gap * gap)
        return unusual
