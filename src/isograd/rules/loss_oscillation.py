"""loss-oscillation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._loss_curve import LossCurve, loss_curve
from isograd._robust import Floats, alternation, autocorrelation, finite, noise_scale
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class LossOscillation(Rule):
    """The loss swings up and down from step to step, more regularly or more widely than noise does.

    Detects
        In the second half of the run either a two-cycle (lag-1 autocorrelation of the loss differences below
        `regular`, and more turning points than exchangeable noise has, by 3 sigma), or a scatter from step to step
        above `amplitude` of the loss's own level.

    Why it matters
        Along a direction of curvature c, gradient descent with rate r multiplies the error by 1 - r c: beyond r c = 1
        it changes sign at each step, beyond 2 it grows. A two-cycle is the sign of the last stage before divergence.

    Decided by
        regular: -0.8, between white noise (-0.5) and a pure two-cycle (-1).
        amplitude: 0.5. Mini-batch noise of classification and regression stays below a third of the level until the
        loss is nearly zero.

    Stays silent when
        The run fell by nine tenths or more: near zero every loss scatters as widely as it is high. Swings over
        many steps, as adversarial training has. By itself info; a warning when the loss gained nothing as well.

    Remedies
        lower-learning-rate, schedule-learning-rate, change-optimizer

    References
        LeCun et al. 1998, Efficient BackProp; Cohen et al. 2021, Gradient descent on neural networks typically occurs
        at the edge of stability, arXiv:2103.00065; Kendall & Stuart 1966, The advanced theory of statistics, vol. 3
        (turning points).
    """

    stage: ClassVar[Stage] = "symptom"
    needs: ClassVar[tuple[str, ...]] = ("loss",)
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite",)
    remedies: ClassVar[tuple[str, ...]] = ("lower-learning-rate", "schedule-learning-rate", "change-optimizer")

    regular: float = -0.8
    amplitude: float = 0.5

    def check(self, history: History) -> Iterator[Finding]:
        curve = loss_curve(history)
        if curve is None or curve.count < 20 or curve.share >= 0.9:
            return
        tail = finite(history["loss"].values)[curve.count // 2 :]
        evidence = self._two_cycle(history, tail) or self._wide(history, tail)
        if evidence is not None:
            yield self._swing(history, curve, evidence)

    def _two_cycle(self, history: History, tail: Floats) -> Evidence | None:
        share, score = alternation(tail)
        regularity = autocorrelation(tail)
        if not (regularity <= self.regular and score >= 3.0 and share > 0.9):
            return None
        return Evidence(
            statistic="difference_autocorrelation",
            observed=regularity,
            limit=self.regular,
            step=history.num_steps - 1,
            below=True,
        )

    def _wide(self, history: History, tail: Floats) -> Evidence | None:
        level = float(np.median(np.abs(tail)))
        scatter = noise_scale(tail) / level if level > 0 else 0.0
        if not scatter >= self.amplitude:
            return None
        return Evidence(
            statistic="relative_scatter", observed=scatter, limit=self.amplitude, step=history.num_steps - 1
        )

    def _swing(self, history: History, curve: LossCurve, evidence: Evidence) -> Finding:
        how = (
            f"turns at nearly every step (autocorrelation of its differences {evidence.observed:.2f}, limit "
            f"{evidence.limit:g})"
            if evidence.below
            else f"scatters by {evidence.observed:.2g} times its level from step to step (limit {evidence.limit:g})"
        )
        gained = f"fell by {100 * curve.share:.0f} %" if curve.share > 0 else "did not fall"
        return self.finding(
            history,
            level="warning" if evidence.below and curve.stuck and curve.share < 0.1 else "info",
            message=f"In the second half of the run the loss {how}, and {gained} in all.",
            first_step=int(history["loss"].steps[len(history["loss"]) // 2]),
            evidence=(evidence,),
            confidence=0.6,
        )
