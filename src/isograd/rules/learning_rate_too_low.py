"""learning-rate-too-low."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from isograd._depth import weight_parameters
from isograd._history import Floats, History
from isograd._loss_curve import loss_curve
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class LearningRateTooLow(Rule):
    """Updates are so small that the weights cannot go anywhere in the length of the run.

    Detects
        The update/weight ratio of every weight tensor stays below `ratio` at all deep readings, its sum over the run
        is below `travel`, the loss fell by less than a tenth of its start, and gradients are not zero.

    Why it matters
        The loss falls too slowly to be seen; more steps at this rate would not end in a lifetime.

    Decided by
        ratio: 1e-5, a hundredth of the usual 1e-3. travel: 0.02; weights that moved by 2 % of their size in the whole
        run are still the initialization. At least `steps` (50) steps.

    Stays silent when
        The rate was larger for a while (warm-up, decay), gradients are exactly zero, or the loss fell. Layers that
        receive no signal move little at any rate: one tensor that moves is enough.

    Remedies
        raise-learning-rate, find-learning-rate, change-optimizer

    References
        Karpathy 2022, makemore part 3 (update/weight ratio); Smith 2017, Cyclical learning rates, arXiv:1506.01186.
    """

    stage: ClassVar[Stage] = "optimizer"
    needs: ClassVar[tuple[str, ...]] = ("loss", "update_ratio")
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite", "grad_max", "learning_rate")
    explains: ClassVar[tuple[str, ...]] = ("loss-plateau", "undertrained")
    remedies: ClassVar[tuple[str, ...]] = ("raise-learning-rate", "find-learning-rate", "change-optimizer")

    ratio: float = 1e-5
    travel: float = 0.02
    steps: int = 50

    def check(self, history: History) -> Iterator[Finding]:
        curve, columns = loss_curve(history), np.array(weight_parameters(history), dtype=np.int64)
        if curve is None or curve.count < self.steps or curve.lost or not len(columns):
            return
        if not -1.0 <= curve.share < 0.1 or not self._has_gradient(history):
            return
        steps, largest = self._largest(history, columns)
        if not len(steps) or not self._optimizer_is_on(history):
            return
        peak, path = float(largest.max()), self._path(steps, largest, history.num_steps)
        # A rate of exactly zero is a schedule that has ended, not a rate that was chosen too low.
        if not 0 < peak < self.ratio or path >= self.travel:
            return
        yield self.finding(
            history,
            level="warning",
            message=f"No weight tensor ever changed by more than {peak:.1e} of its size in a step (limit "
            f"{self.ratio:g}), {path:.1e} in {history.num_steps} steps together, and the loss went from "
            f"{curve.start:.4g} to {curve.end:.4g}.",
            first_step=int(steps[0]),
            layers=tuple(history.parameters[index].name for index in columns),
            evidence=(
                Evidence(
                    statistic="update_ratio",
                    observed=peak,
                    limit=self.ratio,
                    step=int(steps[np.argmax(largest)]),
                    below=True,
                ),
            ),
            confidence=0.7,
        )

    def _largest(self, history: History, columns: NDArray[np.int64]) -> tuple[NDArray[np.int64], Floats]:
        """(steps, largest ratio of any weight tensor at each), deep readings without one left out."""
        series = history["update_ratio"]
        ratios = series.values[:, columns]
        largest = np.max(np.where(np.isfinite(ratios), ratios, -1.0), axis=1)
        return series.steps[largest >= 0], largest[largest >= 0]

    def _has_gradient(self, history: History) -> bool:
        largest = history.series.get("grad_max")
        return largest is None or bool(
            np.nanmax(np.where(np.isfinite(largest.values), largest.values, 0.0), initial=0) > 0
        )

    def _optimizer_is_on(self, history: History) -> bool:
        rates = history.series.get("learning_rate")
        return rates is None or bool(np.nanmin(np.where(np.isfinite(rates.values), rates.values, 1.0), initial=1.0) > 0)

    def _path(self, steps: NDArray[np.int64], largest: Floats, total: int) -> float:
        """Sum of the ratios over all steps; between deep readings the last one is carried on."""
        spans = np.diff(np.append(steps, total))
        return float(np.sum(largest * spans))
