"""update-below-precision."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._rule import Evidence, Finding, Rule, Stage

SPACING = {"bfloat16": 2.0**-8, "float16": 2.0**-11, "float8_e4m3fn": 2.0**-4, "float8_e5m2": 2.0**-3}
"""Half the distance between neighbouring numbers, relative to their size: a smaller change is rounded away."""


@dataclass(frozen=True, kw_only=True)
class UpdateBelowPrecision(Rule):
    """Weights in a type of low precision do not move: each update is smaller than the distance to the next number.

    Detects
        A trainable tensor in float16, bfloat16 or float8 that did not change at all in `share` of the deep readings
        or more (`readings` at least), though its gradient was not zero and the learning rate was not either.

    Why it matters
        bfloat16 has 8 bits: next to 1.0 it knows 1.0078 and nothing between. An update of 3e-4 is rounded away, at
        this step and at every other: the tensor is frozen, and the loss stops early. Gains of normalizations, which
        start at 1, are the first.

    Decided by
        share: 0.9 of the readings. An update of exactly 0.0 has no threshold.

    Stays silent when
        Weights are kept in float32 (autocast, master copies), the gradient is exactly zero, or the loss had fallen by
        95 %: then updates are small because nothing is left to learn.

    Remedies
        raise-precision, raise-learning-rate

    References
        Micikevicius et al. 2018, Mixed precision training, arXiv:1710.03740, section 3.1; Zamirai et al. 2020,
        Revisiting bfloat16 training, arXiv:2010.06192; pytorch/ao, pull request 1124 (stochastic rounding).
    """

    stage: ClassVar[Stage] = "numerics"
    needs: ClassVar[tuple[str, ...]] = ("update_norm", "grad_max")
    uses: ClassVar[tuple[str, ...]] = ("loss", "loss_nonfinite", "learning_rate")
    explains: ClassVar[tuple[str, ...]] = ("loss-plateau",)
    remedies: ClassVar[tuple[str, ...]] = ("raise-precision", "raise-learning-rate")

    share: float = 0.9
    readings: int = 5

    def check(self, history: History) -> Iterator[Finding]:
        curve = loss_curve(history)
        if curve is not None and curve.share >= 0.95:
            return
        still = {
            index: self._still(history, index)
            for index, parameter in enumerate(history.parameters)
            if parameter.dtype in SPACING and parameter.trainable and parameter.optimized
        }
        frozen = sorted((i for i in still if still[i] >= self.share), key=lambda i: -still[i])
        if not frozen:
            return
        steps, first = history["update_norm"].steps, history.parameters[frozen[0]]
        yield self.finding(
            history,
            level="warning",
            message=f"{len(frozen)} of {len(history.parameters)} parameters, {first.name} first, stayed exactly as "
            f"they were in {100 * still[frozen[0]]:.0f} % of the steps looked at (limit {100 * self.share:.0f} %), "
            f"with gradients: in {first.dtype} a change below {SPACING[first.dtype]:.1e} of a number is rounded away.",
            first_step=int(steps[0]),
            layers=tuple(history.parameters[i].name for i in frozen),
            evidence=(
                Evidence(
                    statistic="unmoved_share",
                    observed=still[frozen[0]],
                    limit=self.share,
                    step=int(steps[-1]),
                    layer=first.name,
                ),
            ),
            confidence=0.85,
        )

    def _still(self, history: History, index: int) -> float:
        """Share of the deep readings with a gradient and a rate at which the tensor did not move."""
        updates, largest = history["update_norm"], history["grad_max"]
        moved = [
            float(change)
            for step, change in zip(updates.steps, updates.values[:, index], strict=True)
            if np.isfinite(change) and _at(largest.at(int(step)), index) > 0 and self._is_on(history, int(step), index)
        ]
        return moved.count(0.0) / len(moved) if len(moved) >= self.readings else 0.0

    def _is_on(self, history: History, step: int, index: int) -> bool:
        series, group = history.series.get("learning_rate"), history.parameters[index].group
        row = None if series is None else series.at(step)
        return row is None or not 0 <= group < len(row) or bool(row[group] != 0)


def _at(row: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None, index: int) -> float:
    return float("nan") if row is None else float(row[index])
