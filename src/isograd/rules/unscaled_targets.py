"""unscaled-targets."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import WEIGHTED, boundary, columns_of, weight_parameters
from isograd._history import History, Series
from isograd._loss_curve import LossCurve, loss_curve
from isograd._loss_graph import loss_graphs
from isograd._robust import median
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class UnscaledTargets(Rule):
    """Regression targets far from unit scale, which the output does not reach in the length of the run.

    Detects
        Floating-point targets with a root mean square of `scale` or more, in a run whose loss is stuck, while the
        predictions stay below `reached` of that size and the steps are of an ordinary size, an update/weight ratio
        below `step` in most weights; or of `breaking` or more, in a run whose loss became non-finite.

    Why it matters
        A fresh network answers with numbers of order one, and each step changes them by about the learning rate: to
        reach 1000 takes a thousand times as many. With a squared error the first gradients are as large as the
        targets, and the run may break at once.

    Decided by
        scale: 10 root mean square, as for unscaled-inputs. reached: 0.5 of the targets' size at the end of the run.
        step: 0.1, from where learning-rate-too-high calls steps large: those would get anywhere. breaking: 100; the
        first gradient of a squared error is proportional to the targets, so a step of the usual 1e-3 of the weights
        (Karpathy 2022) becomes one of 0.1, and squared errors begin 10,000 times as large.

    Stays silent when
        The loss falls in spite of it (an offset is learned within a few hundred steps), or an activation bounds the
        output: then bounded-output says so.

    Remedies
        standardize-targets, lower-learning-rate

    References
        Bishop 1995, Neural networks for pattern recognition, section 8.2 (rescaling targets); Stack Overflow 52800582.
    """

    stage: ClassVar[Stage] = "data"
    needs: ClassVar[tuple[str, ...]] = ("loss", "output_rms")
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite", "update_ratio")
    explains: ClassVar[tuple[str, ...]] = (
        "loss-plateau",
        "loss-divergence",
        "loss-spike",
        "loss-oscillation",
        "exploding-gradients",
        "nonfinite-values",
        "learning-rate-too-high",
        "dead-units",
    )
    remedies: ClassVar[tuple[str, ...]] = ("standardize-targets", "lower-learning-rate")

    scale: float = 10.0
    reached: float = 0.5
    step: float = 0.1
    breaking: float = 100.0

    def check(self, history: History) -> Iterator[Finding]:
        curve, series = loss_curve(history), history["output_rms"]
        if curve is None or not curve.failed or not len(series) or self._is_bounded(history):
            return
        for target in boundary(history, "target"):
            size, layer = median(series.values[:, target]), history.layers[target]
            if "float" not in layer.type or not size >= self.scale:
                continue
            answer = self._answer(history, series)
            if not (size >= self.breaking if curve.lost else self._out_of_reach(history, curve, answer / size)):
                continue
            end = "is not finite" if curve.lost else f"ends at {curve.end:.4g}"
            yield self.finding(
                history,
                level="error",
                message=f"The targets have a root mean square of {size:.3g} (limit {self.scale:g}), the model's "
                f"answers {answer:.3g}, and the loss {end}.",
                first_step=int(series.steps[0]),
                layers=(layer.name,),
                evidence=(
                    Evidence(
                        statistic="output_rms",
                        observed=size,
                        limit=self.scale,
                        step=int(series.steps[0]),
                        layer=layer.name,
                    ),
                ),
                confidence=0.7,
            )
            return

    def _out_of_reach(self, history: History, curve: LossCurve, part: float) -> bool:
        """Whether the answers got to no more than `part` of the targets by steps that were not large."""
        ratios, weights = history.series.get("update_ratio"), weight_parameters(history)
        if not curve.stuck or part >= self.reached:
            return False
        if ratios is None or not len(ratios) or not weights:
            return True
        known = np.where(np.isfinite(ratios.values[:, weights]), ratios.values[:, weights], 0.0)
        return median(known.max(axis=0)) < self.step

    def _answer(self, history: History, series: Series) -> float:
        """The last finite size of what the model answers: the prediction, or else the last layer's output."""
        found = boundary(history, "prediction")
        columns = found if len(found) else columns_of(history, WEIGHTED)[-1:]
        known = series.values[:, columns[0]] if len(columns) else np.empty(0)
        known = known[np.isfinite(known)]
        return float(np.median(known[-3:])) if len(known) else 0.0

    def _is_bounded(self, history: History) -> bool:
        return any(graph.output_operation in ("Sigmoid", "Tanh", "Softmax") for graph in loss_graphs(history))
