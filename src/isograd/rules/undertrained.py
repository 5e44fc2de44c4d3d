"""undertrained."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import profiles, weight_parameters
from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._robust import median
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class Undertrained(Rule):
    """All is well and the run is simply too short: its steps together hardly lead away from the initialization.

    Detects
        The sum of the update/weight ratios over the run is below `travel` for every weight, though each step is of an
        ordinary size, and the loss fell by less than a tenth of its start.

    Why it matters
        Steps of 1e-3 of the weights need a thousand of them to make a new network. A run of a few dozen says nothing
        about the model: neither that it learns nor that it does not.

    Decided by
        travel: 0.2; weights that moved by a fifth of their size at most are still mostly the initialization. ratio:
        1e-5 per step at some time, below which learning-rate-too-low looks. steps: 20, the least that is judged.
        decades: 3, beyond which the signal that is lost over depth is what holds the run up.

    Stays silent when
        The loss fell, gradients are exactly zero or vanish over depth, or the run goes on or was stopped from outside.

    Remedies
        raise-learning-rate, find-learning-rate

    References
        Karpathy 2022, makemore part 3 (update/weight ratio); Stack Overflow 50306988.
    """

    stage: ClassVar[Stage] = "optimizer"
    needs: ClassVar[tuple[str, ...]] = ("loss", "update_ratio")
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite", "grad_max", "grad_norm", "signal_norm")
    explains: ClassVar[tuple[str, ...]] = ("loss-plateau",)
    remedies: ClassVar[tuple[str, ...]] = ("raise-learning-rate", "find-learning-rate")

    travel: float = 0.2
    ratio: float = 1e-5
    steps: int = 20
    decades: float = 3.0

    def check(self, history: History) -> Iterator[Finding]:
        curve, columns = loss_curve(history), weight_parameters(history)
        if history.meta.get("state", "finished") != "finished" or curve is None or curve.lost or not columns:
            return
        if curve.count < self.steps or not -0.5 <= curve.share < 0.1 or not self._has_gradient(history):
            return
        paths, peak = self._paths(history, columns)
        longest = float(paths.max(initial=0.0))
        if not 0 < longest < self.travel or peak < self.ratio or self._loses_signal(history):
            return
        steps = history["update_ratio"].steps
        yield self.finding(
            history,
            level="warning",
            message=f"{history.num_steps} steps moved no weight by more than {100 * longest:.2g} % of its size (limit "
            f"{100 * self.travel:.0f} %), and the loss went from {curve.start:.4g} to {curve.end:.4g}: the run is "
            "too short for its learning rate.",
            first_step=history.num_steps - 1,  # while it went on there was nothing to say
            layers=tuple(history.parameters[index].name for index in columns),
            evidence=(
                Evidence(statistic="travel", observed=longest, limit=self.travel, step=int(steps[-1]), below=True),
            ),
            confidence=0.6,
        )

    def _paths(
        self, history: History, columns: list[int]
    ) -> tuple[np.ndarray[tuple[int], np.dtype[np.float64]], float]:
        """(per weight the sum of its ratios over all steps, the largest ratio of any)."""
        series = history["update_ratio"]
        ratios = np.where(np.isfinite(series.values[:, columns]), series.values[:, columns], 0.0)
        # Between deep readings the last one is carried on.
        spans = np.diff(np.append(series.steps, history.num_steps))
        return ratios.T @ spans.astype(np.float64), float(ratios.max(initial=0.0))

    def _loses_signal(self, history: History) -> bool:
        """Whether the gradient does not reach the layers near the input: more steps would not help those."""
        lost = [profile.lost for profile in profiles(history)]
        return median(lost) >= self.decades

    def _has_gradient(self, history: History) -> bool:
        largest = history.series.get("grad_max")
        return largest is None or bool(np.nanmax(np.nan_to_num(largest.values), initial=0.0) > 0)
