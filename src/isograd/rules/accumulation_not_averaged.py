"""accumulation-not-averaged."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._loss_curve import LossCurve, loss_curve
from isograd._loss_graph import loss_graphs
from isograd._parameter_groups import members, steps_with_gradient
from isograd._robust import median
from isograd._rule import Evidence, Finding, Level, Rule, Stage

SCALINGS = frozenset({"Div", "Mul"})
"""Operations that divide a loss by the number of micro-batches."""


@dataclass(frozen=True, kw_only=True)
class AccumulationNotAveraged(Rule):
    """The gradients of several micro-batches are added up and not averaged: a step as many times too long.

    Detects
        `passes` or more backward passes per optimizer step in most steps, of a loss that nothing divides or multiplies
        on its way out of the loss function, under an optimizer whose step is proportional to the gradient.

    Why it matters
        A loss is an average over its micro-batch. The sum of n such gradients is n times the gradient of the whole
        batch: with plain gradient descent the same as an n times higher learning rate. Adam divides it out again.

    Decided by
        passes: 4. Two passes are often two losses (real and generated samples of a discriminator), and a factor
        of two is within what a learning rate is known to.

    Stays silent when
        The loss is divided before backward, or the optimizer ignores the gradient's scale. It is info, never an alarm,
        where the loss neither grew nor became non-finite: then the learning rate allows for the sum.

    Remedies
        average-accumulation, lower-learning-rate

    References
        PyTorch, Automatic mixed precision examples, gradient accumulation (loss / iters_to_accumulate); Goyal et al.
        2017, Accurate, large minibatch SGD, arXiv:1706.02677, section 2 (the rate that a batch allows);
        huggingface/transformers, pull request 34191.
    """

    stage: ClassVar[Stage] = "loop"
    needs: ClassVar[tuple[str, ...]] = ("micro_batches",)
    uses: ClassVar[tuple[str, ...]] = ("loss", "loss_nonfinite", "loss_scale")
    explains: ClassVar[tuple[str, ...]] = (
        "loss-divergence",
        "loss-spike",
        "loss-oscillation",
        "loss-plateau",
        "exploding-gradients",
        "nonfinite-values",
        "no-gradient",
        "learning-rate-too-high",
    )
    remedies: ClassVar[tuple[str, ...]] = ("average-accumulation", "lower-learning-rate")

    passes: int = 4

    def check(self, history: History) -> Iterator[Finding]:
        series = history["micro_batches"]
        many = np.flatnonzero(series.values >= self.passes) if series.values.ndim == 1 else np.empty(0, dtype=np.int64)
        if not 2 * len(many) > np.sum(np.isfinite(series.values)):
            return
        if not self._feels_scale(history) or not self._is_undivided(history):
            return
        number, first = median(series.values[many]), int(series.steps[many[0]])
        yield self.finding(
            history,
            level=self._level(loss_curve(history)),
            message=f"Each step adds up the gradients of {number:.0f} backward passes of a loss that is not divided by "
            f"their number: steps are {number:.0f} times as long as the average gradient's.",
            first_step=first,
            evidence=(Evidence(statistic="micro_batches", observed=number, limit=float(self.passes), step=first),),
            confidence=0.75,
        )

    def _feels_scale(self, history: History) -> bool:
        return any(
            steps_with_gradient(history, group) and members(history, group) for group in range(len(history.groups))
        )

    def _is_undivided(self, history: History) -> bool:
        """Whether, in every reading, no scaling stands between the loss and the function that averages."""
        tops = [graph.operations[:2] for graph in loss_graphs(history) if graph.operations]
        scale = history.series.get("loss_scale")
        is_scaled = scale is not None and bool(np.nanmax(scale.values, initial=1.0) != 1)
        # A gradient scaler's own multiplication comes first.
        return bool(tops) and not any(SCALINGS & set(top[1:] if is_scaled else top[:1]) for top in tops)

    def _level(self, curve: LossCurve | None) -> Level:
        if curve is None or not curve.failed:
            return "info"
        ran_away = curve.lost or curve.nonfinite > 0 or curve.peak > curve.start + curve.scale
        return ("error" if curve.lost or curve.share < 0.1 else "warning") if ran_away else "info"
