"""unbalanced-objective."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import permutations
from typing import ClassVar

import numpy as np

from isograd._depth import boundary
from isograd._history import History
from isograd._loss_curve import LossCurve, loss_curve
from isograd._robust import Floats, median
from isograd._rule import Evidence, Finding, Level, Rule, Stage

DISTANCES = frozenset({"MseLoss", "SmoothL1Loss", "HuberLoss"})
"""Losses that compare a number with a number."""

REDUCED = frozenset({"Mean", "NllLoss", "NllLoss2D", "NllLossNd", *DISTANCES})
"""What is averaged over the batch, or by default is; a bare Sum is not."""


@dataclass(frozen=True, kw_only=True)
class UnbalancedObjective(Rule):
    """One term of the loss drowns another that the run was to learn.

    Detects
        In a loss of several terms, one whose gradient into what they share is `drowned` times another's or more, at
        most readings or at the last fifth of them (or at the first five, of a run that has come to rest since: where a
        sum is at rest its terms pull equally), while the weaker one is not learned: a distance whose predictions
        explain `explained` of the targets' variance at most, or a classification whose probabilities are still equal.
        Or a term that is summed over the batch drowns one that is averaged, in a run whose loss is stuck.

    Why it matters
        The step goes where the sum of the gradients points: of a term a hundred times smaller, nothing is left in
        it. Terms get out of proportion by a reduction (a sum over 64 samples of 20 numbers against a mean is a factor
        of 1280), by a unit (a price beside a class), or by a weight.

    Decided by
        drowned: 100, a hundredth of the step and below the noise between batches. explained: 0.25. The mean squared
        error is at least (sigma_t - sigma_p)^2 + (mu_t - mu_p)^2, from standard deviations and means of targets and
        predictions (Cauchy-Schwarz), and a predictor that explains a quarter has half the targets' deviation.
        Equal probabilities: -mean log p within `equal` (1.1) of ln K, its least value, where all are 1 / K.

    Stays silent when
        The weaker term is learned, or is no task of its own (weight decay, an entropy bonus, a prior with a small
        weight: their gradients are meant to be small), or terms share nothing.

    Remedies
        standardize-targets

    References
        Kendall, Gal & Cipolla 2018, Multi-task learning using uncertainty, arXiv:1705.07115; Chen et al. 2018,
        GradNorm, arXiv:1711.02257; Bowman et al. 2016, arXiv:1511.06349 (a prior that drowns the reconstruction).
    """

    stage: ClassVar[Stage] = "output"
    needs: ClassVar[tuple[str, ...]] = ("loss", "signal_norm")
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite", "output_mean", "output_std")
    explains: ClassVar[tuple[str, ...]] = ("loss-plateau", "exploding-gradients", "loss-oscillation")
    remedies: ClassVar[tuple[str, ...]] = ("standardize-targets",)

    drowned: float = 100.0
    explained: float = 0.25
    equal: float = 1.1

    def check(self, history: History) -> Iterator[Finding]:
        curve, columns = loss_curve(history), boundary(history, "term")
        if curve is None or curve.lost or len(columns) < 2:
            return
        signals = {int(i): history["signal_norm"].values[:, i] for i in columns}
        for strong, weak in permutations(signals, 2):
            ratio = signals[strong] / np.where(signals[weak] > 0, signals[weak], np.nan)
            if self._is_drowned(ratio, curve):
                why = self._unlearned(history, weak) or self._summed(history, strong, weak, curve)
                if why:
                    yield self._drowning(history, strong, weak, ratio, why, curve)
                    return

    def _is_drowned(self, ratio: Floats, curve: LossCurve) -> bool:
        known = ratio[np.isfinite(ratio)]
        if len(known) < 5:
            return False
        late, first = median(known[-max(5, len(known) // 5) :]), median(known[:5])
        lasting = max(late, median(known)) >= self.drowned
        return lasting or (first >= self.drowned and curve.flat)

    def _drowning(self, history: History, strong: int, weak: int, ratio: Floats, why: str, curve: LossCurve) -> Finding:
        row = int(np.flatnonzero(np.nan_to_num(ratio) >= self.drowned)[0])
        names, step = history.layers, int(history["signal_norm"].steps[row])
        evidence = Evidence(
            statistic="term_signal_ratio",
            observed=float(ratio[row]),
            limit=self.drowned,
            step=step,
            layer=names[weak].name,
        )
        level: Level = "error" if curve.failed else "warning"
        return self.finding(
            history,
            level=level,
            message=f"Of the loss's terms {names[strong].name} ({names[strong].type}) sends {ratio[row]:.3g} times the "
            f"gradient of {names[weak].name} ({names[weak].type}) into what they share (limit {self.drowned:g}), and "
            f"{why}.",
            first_step=step,
            layers=(names[strong].name, names[weak].name),
            evidence=(evidence,),
            confidence=0.8,
        )

    def _summed(self, history: History, strong: int, weak: int, curve: LossCurve) -> str:
        mismatch = history.layers[strong].type == "Sum" and history.layers[weak].type in REDUCED
        return (
            f"one is a sum, the other a mean, at a loss that stays at {curve.end:.4g}"
            if mismatch and curve.stuck
            else ""
        )

    def _unlearned(self, history: History, term: int) -> str:
        """In words, what a term's own predictions still miss at the end; empty where nothing, or where unknown."""
        operation, number = history.layers[term].type, _number(history, term)
        predictions = [int(i) for i in boundary(history, "prediction") if history.layers[i].type == operation]
        if number >= len(predictions):
            return ""
        prediction = predictions[number]
        mean, spread = _end(history, "output_mean", prediction), _end(history, "output_std", prediction)
        if operation in DISTANCES:
            return self._unexplained(history, prediction, mean, spread)
        uniform = math.log(max(2, history.layers[prediction].units))
        if operation.startswith("NllLoss") and 0 < -mean <= self.equal * uniform:
            return f"its probabilities are still equal (mean log p {mean:.3g}, all equal {-uniform:.3g})"
        return ""

    def _unexplained(self, history: History, prediction: int, mean: float, spread: float) -> str:
        name = history.layers[prediction].name.removesuffix("prediction") + "target"
        target = next((int(i) for i in boundary(history, "target") if history.layers[i].name == name), None)
        if target is None:
            return ""
        center, width = _end(history, "output_mean", target), _end(history, "output_std", target)
        least = ((width - spread) ** 2 + (center - mean) ** 2) / width**2 if width > 0 else 0.0
        # A predictor that explains a share r^2 of the variance and no more has r times the targets' deviation.
        if not least >= (1 - self.explained**0.5) ** 2:
            return ""
        return f"its answers spread by {spread:.3g} where its targets spread by {width:.3g}"


def _number(history: History, term: int) -> int:
    """Which of the terms with the same loss function this one is."""
    own = history.layers[term].type
    return [int(i) for i in boundary(history, "term") if history.layers[i].type == own].index(term)


def _end(history: History, statistic: str, column: int) -> float:
    """The median of the last fifth of a statistic's readings of a layer."""
    series = history.series.get(statistic)
    known = np.empty(0) if series is None else series.values[np.isfinite(series.values[:, column]), column]
    return median(known[-max(1, len(known) // 5) :])
