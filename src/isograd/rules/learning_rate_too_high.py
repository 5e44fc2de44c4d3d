"""learning-rate-too-high."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from isograd._depth import weight_parameters
from isograd._history import Floats, History
from isograd._loss_curve import LossCurve, loss_curve, nonfinite_loss
from isograd._rule import Evidence, Finding, Level, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class LearningRateTooHigh(Rule):
    """The optimizer's steps are beyond what the curvature of the loss allows.

    Detects
        Two things together. Steps that are large against the weights: an update/weight ratio of `ratio` or more in at
        least a third of the weight tensors. And harm that began with or after them: the loss rose by `jump` times its
        starting size or more, became non-finite after such a rise, or stands still while every gradient became
        exactly zero.

    Why it matters
        Gradient descent with rate r diverges along every direction whose curvature exceeds 2 / r. What is left is a
        loss that grows, swings, or sits where a single step has switched all units off.

    Decided by
        ratio: 0.1, a hundred times the usual 1e-3 and beyond what any stable schedule shows after its first steps.
        jump: 3, a loss of four times its start: what one step at 3 / curvature, half again beyond the stable 2 /
        curvature, makes of a quadratic loss, (1 - 3)^2 = 4. Its start is the first loss where the next ones are
        lower: what fell at once and came back has not risen above where it began.

    Stays silent when
        Only one of the two is there: small networks take large relative steps at first and settle; restarts of a
        cyclic schedule raise the loss below its start; targets that move make the loss jump under small updates.

    Remedies
        lower-learning-rate, warm-up-learning-rate, find-learning-rate, clip-gradient-norm

    References
        LeCun et al. 1998, Efficient BackProp; Lewkowycz et al. 2020, arXiv:2003.02218; Cohen et al. 2021,
        arXiv:2103.00065; Karpathy 2022, makemore part 3 (update/weight ratio).
    """

    stage: ClassVar[Stage] = "optimizer"
    needs: ClassVar[tuple[str, ...]] = ("loss", "update_ratio")
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite", "weight_norm", "grad_max", "grad_nonfinite")
    explains: ClassVar[tuple[str, ...]] = (
        "loss-divergence",
        "loss-spike",
        "loss-oscillation",
        "loss-plateau",
        "exploding-gradients",
        "nonfinite-values",
        "no-gradient",
        "dead-units",
        "saturating-activations",
        "saturated-output",
    )
    remedies: ClassVar[tuple[str, ...]] = (
        "lower-learning-rate",
        "warm-up-learning-rate",
        "find-learning-rate",
        "clip-gradient-norm",
    )

    ratio: float = 0.1
    jump: float = 3.0

    def check(self, history: History) -> Iterator[Finding]:
        curve = loss_curve(history)
        large = self._large_steps(history)
        if curve is None or large is None:
            return
        harm, words = self._harm(history, curve)
        step, ratio, names = large
        if harm is None or step > harm:
            return
        yield self.finding(
            history,
            level=self._level(curve),
            message=f"Steps changed {len(names)} weight tensors by {ratio:.2g} of their size (limit "
            f"{self.ratio:g}) from step "
            f"{step} on, and {words}.",
            first_step=step,
            layers=names,
            evidence=(Evidence(statistic="update_ratio", observed=ratio, limit=self.ratio, step=step, layer=names[0]),),
            confidence=0.8,
        )

    def _large_steps(self, history: History) -> tuple[int, float, tuple[str, ...]] | None:
        """(first step, largest ratio then, tensors) where a third of the weights or more took large steps."""
        series, columns = history["update_ratio"], np.array(weight_parameters(history), dtype=np.int64)
        if not len(columns):
            return None
        values = np.where(self._started(history, columns), series.values[:, columns], np.nan)
        large = values >= self.ratio
        rows = np.flatnonzero(3 * large.sum(axis=1) >= np.maximum(1, np.isfinite(values).sum(axis=1)))
        rows = rows[large[rows].any(axis=1)]
        if not len(rows):
            return None
        row = rows[0]
        order = np.argsort(-np.nan_to_num(values[row], posinf=1e300))
        hit = [int(i) for i in order if large[row, i]]
        return (
            int(series.steps[row]),
            float(values[row, hit[0]]),
            tuple(history.parameters[columns[i]].name for i in hit),
        )

    def _started(self, history: History, columns: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[P]: tensors that did not begin near zero, where any first step is large against nothing."""
        norms = history.series.get("weight_norm")
        if norms is None or not len(norms):
            return np.ones(len(columns), dtype=bool)
        rows = np.array([max(1, history.units_of(history.parameters[index])) for index in columns])
        # A hundredth of 1 / sqrt(fan_in) in root mean square: far below every initialization but zero.
        return np.asarray(np.nan_to_num(norms.values[0, columns]) >= 0.01 * np.sqrt(rows))

    def _harm(self, history: History, curve: LossCurve) -> tuple[int | None, str]:
        """(step at which it showed, in words), or (None, "")."""
        series = history["loss"]
        start = max(curve.start, _first(series.values))
        over = np.flatnonzero(series.values >= start + self.jump * max(curve.reach, abs(start)))
        bad = nonfinite_loss(history)
        if len(over):
            lost = f", and is not finite from step {int(bad[0])}" if len(bad) and bad[0] > series.steps[over[0]] else ""
            return int(series.steps[over[0]]), f"the loss rose from {start:.4g} to {curve.peak:.4g}{lost}"
        silent = self._silenced(history)
        if silent is not None and curve.failed:
            return silent, f"every gradient is exactly zero from step {silent} on, at a loss of {curve.end:.4g}"
        return None, ""

    def _silenced(self, history: History) -> int | None:
        """The step from which no parameter receives a gradient any more, if any did before."""
        series = history.series.get("grad_max")
        if series is None or not len(series):
            return None
        bad = history.series.get("grad_nonfinite")
        moving = np.nan_to_num(series.values, nan=0.0) > 0
        if bad is not None and bad.values.shape == moving.shape:
            moving |= bad.values > 0
        alive = np.flatnonzero(moving.any(axis=1))
        if not len(alive) or len(series) - 1 - alive[-1] < 5:
            return None
        return int(series.steps[alive[-1] + 1])

    def _level(self, curve: LossCurve) -> Level:
        return "error" if curve.failed else "warning"


def _first(losses: Floats) -> float:
    """The first finite loss; there is one wherever there is a curve."""
    return float(losses[np.isfinite(losses)][0])
