"""loss-plateau."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import boundary
from isograd._history import History
from isograd._loss_curve import LossCurve, loss_curve
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class LossPlateau(Rule):
    """The loss does not fall although gradients arrive, or it sits on a floor that has a name.

    Detects
        share = (start - end) / max(|start|, noise) below `share`; or less than four fifths and no fall in the second
        half that stands out of its noise (Mann-Kendall on block medians). Floors, within `near`: ln K for K outputs
        (nothing but the class frequencies is known), ln(e + K - 1) - 1 (a softmax before a loss that applies it
        again), and the variance of the targets (the prediction is their mean).

    Why it matters
        The optimizer runs, the model does not learn.

    Decided by
        share: 0.1. Fitting the output's bias alone gains a classifier 1-9 % from its initialization. near: 0.02 of
        the floor. At least `steps` (50) steps.

    Stays silent when
        The loss fell by four fifths and stays: it has converged. A plateau is info, since labels without
        information (a coin has a loss of ln 2 for ever) look the same; its cause says whether it hurts.

    Remedies
        find-learning-rate, reinitialize-layers, standardize-inputs

    References
        Mann 1945, Nonparametric tests against trend; Kendall 1975, Rank correlation methods; Glorot & Bengio 2010,
        Understanding the difficulty of training deep feedforward neural networks.
    """

    stage: ClassVar[Stage] = "symptom"
    needs: ClassVar[tuple[str, ...]] = ("loss",)
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite", "output_std")
    remedies: ClassVar[tuple[str, ...]] = ("find-learning-rate", "reinitialize-layers", "standardize-inputs")

    share: float = 0.1
    near: float = 0.02
    steps: int = 50

    def check(self, history: History) -> Iterator[Finding]:
        curve = loss_curve(history)
        if curve is None or curve.count < self.steps or curve.lost or curve.rise > 1.0:
            return
        if curve.share >= self.share and not (curve.stuck and self._floor(history, curve)):
            return
        floor = self._floor(history, curve)
        on = f" It sits on {floor}." if floor else ""
        yield self.finding(
            history,
            level="info",
            message=f"The loss went from {curve.start:.4g} to {curve.end:.4g} in {curve.count} steps, "
            f"{100 * curve.share:.1f} % of its start.{on}",
            first_step=int(history["loss"].steps[0]),
            evidence=(
                Evidence(
                    statistic="loss_fall",
                    observed=curve.share,
                    limit=self.share if curve.share <= self.share else 0.8,
                    step=int(history["loss"].steps[-1]),
                    below=True,
                ),
            ),
            confidence=0.7 if floor else 0.5,
        )

    def _floor(self, history: History, curve: LossCurve) -> str:
        """The named floor that the end of the loss is within `near` of, or an empty string."""
        for value, words in self._floors(history):
            if abs(curve.end - value) <= self.near * value:
                return words
        return ""

    def _floors(self, history: History) -> Iterator[tuple[float, str]]:
        for index in boundary(history, "prediction"):
            classes = history.layers[index].units
            if classes >= 2:
                yield math.log(classes), f"ln {classes} = {math.log(classes):.4f}, the loss of knowing nothing"
                doubled = math.log(math.e + classes - 1) - 1
                yield doubled, f"ln(e + {classes - 1}) - 1 = {doubled:.4f}, the floor of a softmax applied twice"
        spread = history.series.get("output_std")
        for index in boundary(history, "target") if spread is not None else ():
            scales = spread.values[:, index] if spread is not None else np.empty(0)
            variance = float(np.nanmedian(scales)) ** 2 if np.isfinite(scales).any() else 0.0
            if variance > 0:
                yield variance, f"the variance of the targets, {variance:.4g}: the prediction is their mean"
