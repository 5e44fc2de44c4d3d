"""Learning rates inside a compiled step: functions of the program's own rate and of the updates made so far."""

from __future__ import annotations

import math
from typing import Any

from keras import ops

from isograd import _changes
from isograd._changes import CannotApply
from isograd.frameworks.keras._stepping import Rate


def rescaled(first: float, *, value: float | None, factor: float | None) -> Rate:
    """A factor; or a value, as the factor value / (the rate at the change), so that schedules keep their shape. A rate
    of 0 becomes the value itself.
    """
    if value is not None and not first:
        return lambda own, t: ops.full_like(ops.convert_to_tensor(own), value)
    multiple = factor if value is None else value / first
    return lambda own, t: ops.convert_to_tensor(own) * multiple


def scheduled(change: _changes.ScheduleLearningRate) -> Rate:
    """The rate times a factor of the updates t since the change, those of torch's schedulers of the same names."""
    steps, end = float(change.steps), change.end
    if change.shape == "plateau":
        raise CannotApply(
            "A compiled step shows its loss to no optimizer: give `fit` the callback keras.callbacks.ReduceLROnPlateau."
        )

    def factor(t: Any) -> Any:
        ran = ops.minimum(t, steps) / steps  # from 0 to 1, and then no further
        if change.shape == "warm-up":
            return 1 / steps + (1 - 1 / steps) * ran
        if change.shape == "linear":
            return 1 + (end - 1) * ran
        if change.shape == "step":
            return ops.power(end or 0.1, ops.floor(t / steps))
        if change.shape == "exponential":
            return ops.power(max(end, 1e-3), ran)
        if change.shape == "inverse-sqrt":
            return ops.sqrt(steps / ops.maximum(steps, t + 1))
        return end + (1 - end) * (1 + ops.cos(math.pi * ran)) / 2

    return lambda own, t: ops.convert_to_tensor(own) * factor(t)


def largest_so_far(rates: list[float], spacing: int) -> Rate:
    """The largest of a schedule's rates up to now; `rates` are those of every `spacing`-th update from the change on.

    Between two of them, and behind the last, the rate that stands there counts as well.
    """
    peaks = [max(rates[: index + 1]) for index in range(len(rates))]

    def rate(own: Any, t: Any) -> Any:
        index = ops.cast(ops.minimum(ops.floor(t / spacing), len(peaks) - 1), "int32")
        own = ops.convert_to_tensor(own)
        return ops.maximum(own, ops.cast(ops.take(ops.convert_to_tensor(peaks, dtype="float32"), index), own.dtype))

    return rate
