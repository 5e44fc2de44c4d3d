"""exploding-gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import profiles
from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._robust import block_medians, log10_positive
from isograd._rule import Evidence, Finding, Level, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class ExplodingGradients(Rule):
    """The gradient grows on its way back through the layers, from step to step, or beyond what its norm can hold.

    Detects
        Over depth: the gradient signal gains `decades` or more from the loss to the input (the mirror of
        vanishing-gradients). In time: the global gradient norm before clipping ends `growth` decades or more above
        its early median. Overflow: a gradient whose entries are finite and whose float32 norm is not, so that
        clipping by norm zeroes it.

    Why it matters
        One step along such a gradient leaves the region in which it meant anything: the loss jumps or becomes NaN. A
        norm that overflows turns clip_grad_norm_ into a multiplication by zero.

    Decided by
        decades: 3 over depth, as for vanishing-gradients.
        growth: 1.5 decades in time. Gradients of healthy runs grow too, up to tenfold, as a loss becomes sharper.
        Overflow: sqrt of the largest float32, 1.8e19 per entry.

    Stays silent when
        The norm spikes and comes back (loss-spike looks at consequences), the user clips it, or it falls. Growth over
        depth or in time is info as long as the loss falls: only together with a loss that does not is it a warning.

    Remedies
        clip-gradient-norm, clip-gradient-by-history, lower-learning-rate, reinitialize-layers, warm-up-learning-rate

    References
        Bengio, Simard & Frasconi 1994, Learning long-term dependencies with gradient descent is difficult; Pascanu,
        Mikolov & Bengio 2013, On the difficulty of training recurrent neural networks, arXiv:1211.5063; Yang et al.
        2019, A mean field theory of batch normalization, arXiv:1902.08129.
    """

    stage: ClassVar[Stage] = "symptom"
    needs: ClassVar[tuple[str, ...]] = ("grad_norm",)
    uses: ClassVar[tuple[str, ...]] = (
        "signal_norm",
        "grad_max",
        "global_grad_norm",
        "global_grad_norm_unclipped",
        "loss",
        "loss_nonfinite",
    )
    remedies: ClassVar[tuple[str, ...]] = (
        "clip-gradient-norm",
        "clip-gradient-by-history",
        "lower-learning-rate",
        "reinitialize-layers",
        "warm-up-learning-rate",
    )

    decades: float = 3.0
    growth: float = 1.5

    def check(self, history: History) -> Iterator[Finding]:
        for look in (self._overflow, self._over_depth, self._in_time):
            found = next(look(history), None)
            if found is not None:
                yield found
                return

    def _overflow(self, history: History) -> Iterator[Finding]:
        norms, entries = history["grad_norm"], history.series.get("grad_max")
        if entries is None or entries.values.shape != norms.values.shape:
            return
        overflown = np.isposinf(norms.values) & np.isfinite(entries.values)
        if not overflown.any():
            return
        row, column = (int(i) for i in np.argwhere(overflown)[0])
        largest, step, name = float(entries.values[row, column]), int(norms.steps[row]), history.parameters[column].name
        yield self.finding(
            history,
            level="error",
            message=f"The gradient of {name} has finite entries up to {largest:.2g}, but their L2 norm "
            f"overflows at step "
            f"{step}: clipping by norm would set it to zero.",
            first_step=step,
            layers=tuple(history.parameters[i].name for i in np.flatnonzero(overflown[row])),
            # The norm is at least its largest entry, and it left the range of float32.
            evidence=(Evidence(statistic="grad_norm", observed=float("inf"), limit=3.4e38, step=step, layer=name),),
            confidence=0.95,
        )

    def _over_depth(self, history: History) -> Iterator[Finding]:
        seen = profiles(history)
        gained = -np.array([profile.lost for profile in seen])
        hit = np.flatnonzero(gained >= self.decades)
        if not len(hit) or 2 * len(hit) < np.sum(np.isfinite(gained)):
            return
        worst = max((seen[i] for i in hit), key=lambda profile: -profile.lost)
        names = tuple(history.layers[index].name for index in worst.columns)
        yield self.finding(
            history,
            level=self._level(history),
            message=f"The gradient signal gains {-worst.lost:.1f} decades from {names[-1]} back to {names[0]}, "
            f"{-worst.slope:.2f} per layer (limit {self.decades:g} in all).",
            first_step=seen[hit[0]].step,
            last_step=seen[hit[-1]].step,
            layers=names,
            evidence=(Evidence(statistic="decades_gained", observed=-worst.lost, limit=self.decades, step=worst.step),),
            confidence=0.8,
        )

    def _in_time(self, history: History) -> Iterator[Finding]:
        series = history.series.get("global_grad_norm_unclipped") or history.series.get("global_grad_norm")
        if series is None or series.values.ndim != 1:
            return
        logs = log10_positive(series.values)
        steps, logs = series.steps[np.isfinite(logs)], logs[np.isfinite(logs)]
        early = float(np.median(logs[: max(3, len(logs) // 10)])) if len(logs) >= 6 else float("nan")
        grown = float(block_medians(logs, 10)[-1]) - early if len(logs) >= 6 else float("nan")
        if not grown >= self.growth:
            return
        over = np.flatnonzero(logs >= early + self.growth)
        begun, size = int(steps[over[0]]), 10 ** (early + grown)
        yield self.finding(
            history,
            level=self._level(history),
            message=f"The gradient norm grew {10**grown:.3g}-fold, from {10**early:.3g} to {size:.3g} "
            f"(limit {10**self.growth:.3g}-fold), beyond the limit first at step {begun}.",
            first_step=begun,
            evidence=(Evidence(statistic="growth_decades", observed=grown, limit=self.growth, step=int(steps[-1])),),
            confidence=0.7,
        )

    def _level(self, history: History) -> Level:
        curve = loss_curve(history)
        if curve is None:
            return "warning" if "loss_nonfinite" in history else "info"
        return "error" if curve.lost else "warning" if curve.failed else "info"
