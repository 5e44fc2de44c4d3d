"""recurrent-explosion."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._loss_curve import LossCurve, loss_curve
from isograd._recurrence import recurrences
from isograd._robust import first_true
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class RecurrentExplosion(Rule):
    """The gradient grows on its way back through time, until one step along it throws the weights away.

    Detects
        The gradient signal of a recurrent cell gains `decades` or more from the last call back to the first in some
        deep reading, and the loss then rose to `jump` times its start above it, or was lost.

    Why it matters
        Each step back multiplies by the recurrent Jacobian. Above 1 the product grows exponentially with the length
        of the sequence, and a small change of the weights can cross from quiet to violent within a few steps.

    Decided by
        decades: 1; a cell that keeps its signal stays within half a decade. calls: 8 or more. jump: 3, a loss of four
        times its start.

    Stays silent when
        The gradient is clipped and the loss falls, the signal shrinks back through time, or the loss swings about zero
        (a policy's, weighed by advantages) and rises no further than three times as far as it went below.

    Remedies
        clip-gradient-norm, reinitialize-layers, lower-learning-rate

    References
        Pascanu, Mikolov & Bengio 2013, On the difficulty of training recurrent neural networks, arXiv:1211.5063.
    """

    stage: ClassVar[Stage] = "architecture"
    needs: ClassVar[tuple[str, ...]] = ("loss",)
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite", "call_signal_norm", "micro_batches")
    explains: ClassVar[tuple[str, ...]] = (
        "exploding-gradients",
        "nonfinite-values",
        "loss-divergence",
        "loss-spike",
        "loss-oscillation",
        "loss-plateau",
        "learning-rate-too-high",
        "dead-units",
    )
    remedies: ClassVar[tuple[str, ...]] = ("clip-gradient-norm", "reinitialize-layers", "lower-learning-rate")

    decades: float = 1.0
    calls: int = 8
    jump: float = 3.0

    def check(self, history: History) -> Iterator[Finding]:
        curve = loss_curve(history)
        if curve is None or not (curve.lost or curve.peak >= curve.start + self.jump * curve.reach):
            return
        for recurrence in recurrences(history, least=self.calls):
            index = first_true(-recurrence.lost >= self.decades)
            if index is not None:
                gained, step = float(np.nanmax(-recurrence.lost)), int(recurrence.steps[index])
                yield self._exploded(history, curve, recurrence.layer, recurrence.calls, gained, step)
                return

    def _exploded(
        self, history: History, curve: LossCurve, layer: str, calls: int, gained: float, step: int
    ) -> Finding:
        end = "is not finite at the end" if curve.lost else f"rose to {curve.peak:.4g}"
        return self.finding(
            history,
            level="error" if curve.failed else "warning",
            message=f"Back through the {calls} calls of {layer} the gradient signal gains up to {gained:.1f} decades "
            f"(limit {self.decades:g}, first at step {step}), and the loss, {curve.start:.4g} at first, {end}.",
            first_step=step,
            layers=(layer,),
            evidence=(
                Evidence(
                    statistic="decades_gained_through_time",
                    observed=gained,
                    limit=self.decades,
                    step=step,
                    layer=layer,
                ),
            ),
            confidence=0.85,
        )
