"""loss-divergence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._loss_curve import LossCurve, loss_curve, nonfinite_loss
from isograd._nonfinite import damaged, skipped_steps
from isograd._robust import block_medians, log10_positive
from isograd._rule import Evidence, Finding, Level, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class LossDivergence(Rule):
    """The loss ends far above where it started, or is no number any more.

    Detects
        rise = (end - start) / max(|start|, noise), medians over stretches, above `rise`; or a loss that is non-finite
        at the last step, or in more than half of all steps.

    Why it matters
        Training makes the model worse than its initialization was.

    Decided by
        rise: 1, a loss that has doubled, is info: losses of games between networks and of bootstrapped targets do
        that.
        serious: 3, four times the start, is a warning when the gradient norm has grown threefold as well, or the loss
        still rises at the end. An error is a loss that is lost, or a hundred times its start.
        A loss that falls below zero has no size that its start could stand for: a critic's score has an offset that
        drifts. What it rises is more than info only where the gradient norm has grown threefold.

    Stays silent when
        The loss rises for a while and comes back (restarts of the learning rate, the first step of a large offset),
        or starts negative and falls further.

    Remedies
        lower-learning-rate, warm-up-learning-rate, clip-gradient-norm, rewind

    References
        Lewkowycz et al. 2020, The large learning rate phase of deep learning, arXiv:2003.02218 (a loss may first rise
        and then converge); Gilmer et al. 2021, A loss curvature perspective on training instability,
        arXiv:2110.04369.
    """

    stage: ClassVar[Stage] = "symptom"
    needs: ClassVar[tuple[str, ...]] = ("loss",)
    uses: ClassVar[tuple[str, ...]] = (
        "loss_nonfinite",
        "global_grad_norm_unclipped",
        "grad_nonfinite",
        "weight_nonfinite",
        "skipped",
    )
    remedies: ClassVar[tuple[str, ...]] = (
        "lower-learning-rate",
        "warm-up-learning-rate",
        "clip-gradient-norm",
        "rewind",
    )

    rise: float = 1.0
    serious: float = 3.0

    def check(self, history: History) -> Iterator[Finding]:
        bad = [int(step) for step in nonfinite_loss(history) if step not in skipped_steps(history)]
        curve = loss_curve(history)
        steps = history["loss"].steps
        if bad and (bad[-1] >= steps[-1] or 2 * len(bad) > len(steps)):
            yield self._lost(history, bad, curve)
        elif curve is not None and curve.count >= 10 and curve.rise >= self.rise:
            yield self._risen(history, curve)

    def _lost(self, history: History, bad: list[int], curve: LossCurve | None) -> Finding:
        before = "" if curve is None else f" Before, it went from {curve.start:.4g} to {curve.peak:.4g}."
        return self.finding(
            history,
            level="error" if damaged(history) else "warning",
            message=f"The loss is not finite in {len(bad)} of {len(history['loss'])} steps, first at step {bad[0]}, "
            f"up to step {bad[-1]}.{before}",
            first_step=bad[0],
            evidence=(Evidence(statistic="loss_nonfinite", observed=1.0, limit=1.0, step=bad[0]),),
            confidence=0.95,
        )

    def _risen(self, history: History, curve: LossCurve) -> Finding:
        series = history["loss"]
        over = np.flatnonzero(series.values >= curve.start + self.rise * curve.scale)
        begun = int(series.steps[over[0]])
        return self.finding(
            history,
            level=self._level(history, curve),
            message=f"The loss rose from {curve.start:.4g} to {curve.end:.4g} (largest {curve.peak:.4g} at step "
            f"{curve.peak_step}), {curve.rise:.3g} times its starting size above its start (limit {self.rise:g}).",
            first_step=begun,
            evidence=(
                Evidence(statistic="loss_rise", observed=curve.rise, limit=self.rise, step=int(series.steps[-1])),
            ),
            confidence=0.8,
        )

    def _level(self, history: History, curve: LossCurve) -> Level:
        signed = min(curve.start, curve.lowest) < 0
        confirmed = self._gradient_grew(history) or (curve.tail_trend >= 1.96 and not signed)
        if curve.rise >= 100 and (confirmed or not signed):
            return "error"
        return "warning" if curve.rise >= self.serious and confirmed else "info"

    def _gradient_grew(self, history: History) -> bool:
        series = history.series.get("global_grad_norm_unclipped")
        logs = block_medians(log10_positive([] if series is None else series.values), 10)
        return len(logs) >= 3 and bool(logs[-1] - logs[0] >= np.log10(3))
