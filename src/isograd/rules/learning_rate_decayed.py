"""learning-rate-decayed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import Floats, History
from isograd._loss_curve import FALLING, loss_curve
from isograd._robust import block_medians, mann_kendall
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class LearningRateDecayed(Rule):
    """The schedule took the learning rate to nothing long before the end, while the loss was still falling.

    Detects
        The largest learning rate of all groups stays below `decay` of its peak over the last `idle` of the run or
        more, at least `steps` steps; the loss fell up to there with a trend, and ended above a twentieth of where
        it started.

    Why it matters
        The rest of the run computes gradients and does nothing with them. Often a decay that is meant once per epoch
        is applied once per batch, or a factor of 0 stands where 1 was meant.

    Decided by
        decay: 1e-3 of the peak; three drops by ten, the deepest usual schedule, reach it at their very end. idle: 0.2
        of the steps; a cosine or a line to zero is below 1e-3 only in the last 2 %. Falling: Mann-Kendall over
        the half of the live part next to the drop, at the two-sided 5 % level. steps: 20.

    Stays silent when
        The loss had converged when the rate fell (a schedule that waits for a plateau), the rate comes back (cycles,
        restarts), or the decay is slow.

    Remedies
        schedule-learning-rate, raise-learning-rate

    References
        Loshchilov & Hutter 2017, SGDR, arXiv:1608.03983; PyTorch, How to adjust learning rate (step per epoch or per
        batch).
    """

    stage: ClassVar[Stage] = "optimizer"
    needs: ClassVar[tuple[str, ...]] = ("loss", "learning_rate")
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite",)
    explains: ClassVar[tuple[str, ...]] = ("loss-plateau", "undertrained")
    remedies: ClassVar[tuple[str, ...]] = ("schedule-learning-rate", "raise-learning-rate")

    decay: float = 1e-3
    idle: float = 0.2
    steps: int = 20

    def check(self, history: History) -> Iterator[Finding]:
        curve, steps, rates = loss_curve(history), history["learning_rate"].steps, self._rates(history)
        if curve is None or curve.lost or not len(rates):
            return
        peak = float(rates.max())
        alive = np.flatnonzero(rates > self.decay * peak)
        if peak <= 0 or not len(alive) or alive[-1] + 1 >= len(rates):
            return
        begun, left = int(steps[alive[-1] + 1]), float(rates[-1])
        rest = history.num_steps - begun
        if rest < max(self.steps, self.idle * history.num_steps):
            return
        if curve.share >= 0.95 or not self._fell_before(history, begun):
            return
        share = rest / history.num_steps
        yield self.finding(
            history,
            level="warning",
            message=f"The learning rate is {left:.2g} from step {begun} on, {left / peak:.1e} of its peak of "
            f"{peak:.2g}: {100 * share:.0f} % of the run (limit {100 * self.idle:.0f} %) does nothing, though the "
            "loss was still falling.",
            first_step=begun,
            evidence=(
                Evidence(
                    statistic="learning_rate", observed=left, limit=self.decay * peak, step=int(steps[-1]), below=True
                ),
                Evidence(statistic="idle_share", observed=share, limit=self.idle, step=begun),
            ),
            confidence=0.9,
        )

    def _rates(self, history: History) -> Floats:
        """[S]: the largest rate of any group; 0 where none was read."""
        values = history["learning_rate"].values
        if values.ndim != 2 or not np.isfinite(values).any():
            return np.empty(0)
        return np.asarray(np.max(np.where(np.isfinite(values), values, 0.0), axis=1, initial=0.0))

    def _fell_before(self, history: History, step: int) -> bool:
        """Whether the loss had a falling trend over the half of the steps next to `step`."""
        series = history["loss"]
        live = series.values[series.steps < step]
        late = block_medians(live[len(live) // 2 :], 8)
        if len(late) < 4:
            return len(live) > 0
        return mann_kendall(late) <= FALLING
