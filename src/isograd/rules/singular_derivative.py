"""singular-derivative."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._nonfinite import Place, damaged, first_place, operation, ran_away, told
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class SingularDerivative(Rule):
    """The forward pass is finite, the backward pass is not: some operation has no finite derivative where it stood.

    Detects
        The first non-finite value of the run stands in a gradient, at a step whose loss and outputs were finite, and
        nothing had run away before: loss and gradient norm lie within `runaway` times their median. Where the operation
        was traced (it received a finite gradient and passed on another), it is named with its source line.

    Why it matters
        sqrt, norm and std at 0, acos and asin at the ends of their range, a power below 1 at 0: a finite value with
        an infinite slope. The chain rule multiplies that with 0 and gets NaN, also in the branch that `where` did
        not choose. The loss shows it one step later, when the weights are gone.

    Decided by
        runaway: 1000, as for invalid-operation: gradients that overflow grow through every decade before.

    Stays silent when
        The forward pass broke first, a gradient scaler skipped the step, or parameters are in float16, where ordinary
        gradients overflow. A warning where weights stayed finite.

    Remedies
        skip-bad-steps

    References
        PyTorch issues 8069 (acos), 16317 (where and sqrt), 4320; Griewank & Walther 2008, Evaluating derivatives,
        chapter 14 (nondifferentiable points).
    """

    stage: ClassVar[Stage] = "numerics"
    needs: ClassVar[tuple[str, ...]] = ("grad_nonfinite",)
    uses: ClassVar[tuple[str, ...]] = (
        "loss",
        "loss_nonfinite",
        "global_grad_norm",
        "weight_norm",
        "output_nonfinite",
        "input_nonfinite",
        "signal_nonfinite",
        "weight_nonfinite",
        "state_nonfinite",
        "skipped",
    )
    explains: ClassVar[tuple[str, ...]] = (
        "nonfinite-values",
        "loss-divergence",
        "exploding-gradients",
        "loss-spike",
        "no-gradient",
        "loss-plateau",
    )
    remedies: ClassVar[tuple[str, ...]] = ("skip-bad-steps",)

    runaway: float = 1000.0

    def check(self, history: History) -> Iterator[Finding]:
        place = first_place(history)
        if place is None or place.kind != "gradient" or not self._is_finite(history, place.step):
            return
        if any(parameter.dtype == "float16" for parameter in history.parameters):
            return
        if not ran_away(history, place.step, self.runaway):
            yield self._singular(history, place)

    def _is_finite(self, history: History, step: int) -> bool:
        """Whether the loss of the step was read and finite."""
        series = history.series.get("loss")
        row = None if series is None else series.at(step)
        return row is not None and bool(np.all(np.isfinite(row)))

    def _singular(self, history: History, place: Place) -> Finding:
        event, hurt = told(history, place.step, "gradient"), damaged(history)
        why = "an operation behind it has no finite derivative there" if event is None else operation(event)
        return self.finding(
            history,
            level="error" if hurt else "warning",
            message=f"At step {place.step} the loss was finite and the {place} was not ({place.entries}): {why}."
            f"{'' if hurt else ' Weights stayed finite.'}",
            first_step=place.step,
            layers=place.layers(history),
            evidence=(Evidence(**place.reading(history)),),
            confidence=0.9,
        )
