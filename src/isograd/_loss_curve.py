"""How the loss went: where it started, where it ended, and whether what happened between is more than noise.

Losses may be negative and may have any offset, so nothing here divides one loss by another without a scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isograd._history import History
from isograd._robust import Floats, block_medians, mann_kendall, noise_scale

READS = ("loss", "loss_nonfinite")
"""The statistics that `loss_curve` reads."""

ENOUGH = 20
"""Steps below which no run is called stuck: the deep schedule's own first stretch."""

SMALL_SHARE = 0.1
"""A fall below a tenth of the starting scale is no learning: a network that only fits its output bias gains 1-9 %
(classification from log K at initialization), one that learns passes 10 % within tens of steps."""

LARGE_SHARE = 0.8
"""A run that fell by four fifths and then stays flat has converged; one that fell less and stays flat may be stuck."""

FALLING = -1.96
"""Mann-Kendall score of a falling trend at the two-sided 5 % level."""


@dataclass(frozen=True, kw_only=True)
class LossCurve:
    """The course of a loss. `start`, `end`, `lowest` are medians over stretches; `noise` is the scatter at first.

    `peak` is the largest finite loss, at `peak_step`. `nonfinite` counts steps with a NaN or Inf loss, `lost` says
    that the last step was one of them. `tail_trend` is the Mann-Kendall score of the second half.
    """

    count: int
    start: float
    end: float
    lowest: float
    peak: float
    peak_step: int
    noise: float
    nonfinite: int
    lost: bool
    tail_trend: float
    tail_fall: float

    @property
    def scale(self) -> float:
        """What a change of the loss is compared with: the size of its start, at least its noise."""
        return max(abs(self.start), self.noise if np.isfinite(self.noise) else 0.0, 1e-12)

    @property
    def reach(self) -> float:
        """What a rise is compared with: the scale or, where zero is no floor, how far below zero the loss went."""
        return max(self.scale, -self.lowest)

    @property
    def share(self) -> float:
        """The fall from start to end in units of the scale; negative when the loss rose."""
        return (self.start - self.end) / self.scale

    @property
    def rise(self) -> float:
        """How far the end lies above the start, in units of the scale."""
        return -self.share

    @property
    def flat(self) -> bool:
        """Whether the second half shows no fall that stands out of its noise."""
        return not (self.tail_trend <= FALLING and self.tail_fall > 0.01 * self.scale)

    @property
    def stuck(self) -> bool:
        """Enough steps were seen, and the loss hardly fell, or fell partly and then stayed where it was."""
        if self.count < ENOUGH:
            return False
        return self.share < SMALL_SHARE or (self.flat and self.share < LARGE_SHARE)

    @property
    def failed(self) -> bool:
        """Stuck, or ended non-finite, or ended above its start by more than the start itself."""
        return self.lost or self.stuck or (self.count >= ENOUGH and self.rise > 1.0)


def loss_curve(history: History) -> LossCurve | None:
    """The course of the loss, or None when no finite loss was read."""
    series = history.series.get("loss")
    if series is None or series.values.ndim != 1 or not np.isfinite(series.values).any():
        return None
    values, steps = series.values, series.steps
    kept = values[np.isfinite(values)]
    medians = block_medians(kept, 20)
    tail = block_medians(kept[len(kept) // 2 :], 8)
    bad = nonfinite_loss(history)
    peak = int(np.nanargmax(np.where(np.isfinite(values), values, np.nan)))
    return LossCurve(
        count=len(kept),
        start=_start(kept),
        end=float(np.median(kept[-min(50, max(1, len(kept) // 10)) :])),
        lowest=float(medians.min()),
        peak=float(values[peak]),
        peak_step=int(steps[peak]),
        noise=noise_scale(kept[: min(50, max(10, len(kept) // 10))]),
        nonfinite=len(bad),
        lost=bool(len(bad)) and int(bad[-1]) >= int(steps[-1]),
        tail_trend=mann_kendall(tail),
        tail_fall=float(tail[: max(1, len(tail) // 4)].mean() - tail[-max(1, len(tail) // 4) :].mean()),
    )


def _start(kept: Floats) -> float:
    """The median of the first five values at most, or the first one where the loss left it threefold within these."""
    first, typical = float(kept[0]), float(np.median(kept[: min(5, max(1, len(kept) // 10))]))
    return first if abs(first - typical) > 2 / 3 * max(abs(first), abs(typical)) else typical


def nonfinite_loss(history: History) -> Floats:
    """The steps at which the loss was NaN or Inf, in order."""
    series = history.series.get("loss_nonfinite")
    if series is None or series.values.ndim != 1:
        return np.empty(0)
    return series.steps[series.values > 0].astype(np.float64)
