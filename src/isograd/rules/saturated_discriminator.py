"""saturated-discriminator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History, Series
from isograd._loss_curve import LossCurve, loss_curve
from isograd._loss_graph import loss_graphs
from isograd._robust import finite, median
from isograd._rule import Evidence, Finding, Rule, Stage

PROBABILITIES = frozenset(
    {"Sigmoid", "LogSigmoid", "Softplus", "BinaryCrossEntropy", "BinaryCrossEntropyWithLogits", "Log"}
)
"""Operations by which a loss turns a score into a probability that something is real, or into its logarithm."""


@dataclass(frozen=True, kw_only=True)
class SaturatedDiscriminator(Rule):
    """The discriminator tells real from generated without fail, and the generator gets no gradient any more.

    Detects
        In a program that trains two models: one whose loss, made of probabilities, has fallen to `won` of its start
        or less; and this one, whose loss is made of probabilities too and is no better than at its start, and
        whose gradient norm has fallen to `starved` of what it began with, or less, for the last fifth of its steps.

    Why it matters
        The gradient of log(1 - D(G(z))) is proportional to D(G(z)), the probability that the discriminator is fooled:
        once that is a millionth, the generator moves a millionth as fast, and never catches up.

    Decided by
        starved: 1e-3; the gradient is proportional to the probability, which starts near 1/2, so fakes are then
        taken for real with a chance of a two-thousandth. won: 0.05 of the starting loss.

    Stays silent when
        Losses swing about ln 4 or drift, as those of a balanced game do; the discriminator wins and the generator's
        gradient stays (a loss that does not saturate); the generator's own loss has fallen: it has converged; or the
        second model is no discriminator (a critic that fits values).

    Remedies
        lower-learning-rate, change-optimizer

    References
        Goodfellow et al. 2014, Generative adversarial nets, arXiv:1406.2661, section 3 (the loss that does not
        saturate); Arjovsky & Bottou 2017, Towards principled methods for training GANs, arXiv:1701.04862, theorem 2.4.
    """

    stage: ClassVar[Stage] = "output"
    needs: ClassVar[tuple[str, ...]] = ("loss", "global_grad_norm")
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite",)
    explains: ClassVar[tuple[str, ...]] = ("vanishing-gradients", "loss-plateau", "no-gradient", "loss-divergence")
    remedies: ClassVar[tuple[str, ...]] = ("lower-learning-rate", "change-optimizer")
    moves_objective: ClassVar[bool] = True

    won: float = 0.05
    starved: float = 1e-3

    def check(self, history: History) -> Iterator[Finding]:
        curve, gradient = loss_curve(history), history["global_grad_norm"]
        if curve is None or curve.lost or curve.share >= 0.1 or not _takes_probabilities(history):
            return
        begun, faded = self._faded(gradient)
        if faded is None:
            return
        for name, companion in history.companions.items():
            other = loss_curve(companion)
            if other is not None and self._has_won(companion, other):
                yield self._starving(history, name, other, curve, begun, faded)
                return

    def _starving(
        self, history: History, name: str, other: LossCurve, curve: LossCurve, begun: float, faded: Evidence
    ) -> Finding:
        return self.finding(
            history,
            level="error",
            message=f"The loss of {name} has fallen from {other.start:.4g} to {other.end:.2g}: nothing that "
            f"{history.subject} makes deceives it. The gradient of {history.subject} fell with it, from {begun:.2g} to "
            f"{faded.observed * begun:.2g}, and its own loss went from {curve.start:.4g} to {curve.end:.2g}.",
            first_step=faded.step,
            evidence=(faded,),
            confidence=0.9,
        )

    def _faded(self, gradient: Series) -> tuple[float, Evidence | None]:
        """(norm at the start, its share at the end and since when), the latter None where the gradient stayed."""
        values = np.where(np.isfinite(gradient.values), gradient.values, np.nan)
        fifth = max(1, len(values) // 5)
        # The largest of the first steps, not their median: a discriminator can win within a dozen.
        begun, end = float(np.max(finite(values[:20]), initial=0.0)), median(values[-fifth:])
        limit = self.starved * begun
        if len(values) < 20 or not begun > 0 or not end <= limit:
            return begun, None
        # Single quiet steps are noise: half of the fifth that follows must be quiet for one to count.
        quiet = (int(i) for i in np.flatnonzero(values <= limit) if median(values[i : i + fifth]) <= limit)
        since = next(quiet, len(values) - 1)
        step = int(gradient.steps[since])
        share = end / begun
        return begun, Evidence(
            statistic="global_grad_norm_share", observed=share, limit=self.starved, step=step, below=True
        )

    def _has_won(self, companion: History, other: LossCurve) -> bool:
        return _takes_probabilities(companion) and other.start > 0 and abs(other.end) <= self.won * other.start


def _takes_probabilities(history: History) -> bool:
    return any(PROBABILITIES & set(graph.operations) for graph in loss_graphs(history)[:1])
