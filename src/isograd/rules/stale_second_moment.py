"""stale-second-moment."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import Floats, History
from isograd._loss_curve import LossCurve, loss_curve
from isograd._parameter_groups import decay_rates, hyperparameter, members
from isograd._robust import median
from isograd._rule import Evidence, Finding, Level, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class StaleSecondMoment(Rule):
    """Adam's second moment still remembers small gradients when large ones arrive: steps of many learning rates.

    Detects
        In a group of Adam or its kin, from the norm G of the group's gradient at every step:
        U = m / (sqrt(v) + eps sqrt(n)), with m and v the bias-corrected running means of G and G^2 at the group's beta1
        and beta2. U is the root mean square of the update in learning rates where the gradient keeps its direction. It
        is at or above `rms` in `readings` steps, and no measured update says much less (a third).

    Why it matters
        A gradient that tracks its own second moment moves each weight by at most about one learning rate. After a
        jump of the gradient at a time when v is small, the update of step j behind it is (1 - beta1^j) /
        sqrt(1 - beta2^j) rates: up to 6.6 with betas (0.9, 0.999), and still above 3 after 60 steps. The loss spikes
        within a few steps.

    Decided by
        rms: 2.3, above which the spikes of Wortsman et al. (2023) began 1 to 8 steps later. With beta2 = 0.99 the
        formula peaks at 2.1, with 0.95 at 1.1: such groups do not reach it.
        readings: 2.
        lost: 0.5. A warning where the loss behind the jump rose by half of what had been learned until then, and to
        twice the height that it had at the jump itself, before any update; info otherwise.

    Stays silent when
        The first step is as long as the learning rate (both moments are corrected for their start), gradients are
        large for one step only, their direction changes from step to step, or weight decay makes the update.

    Remedies
        stabilize-optimizer, clip-gradient-norm, clip-gradient-by-history, warm-up-learning-rate

    References
        Wortsman et al. 2023, Stable and low-precision training for large-scale vision-language models,
        arXiv:2304.13013 (RMS of g^2 / v, update clipping); Molybog et al. 2023, arXiv:2304.09871; Kingma & Ba 2015,
        arXiv:1412.6980, section 2.1 (bound of a step).
    """

    stage: ClassVar[Stage] = "optimizer"
    needs: ClassVar[tuple[str, ...]] = ("grad_norm", "learning_rate")
    uses: ClassVar[tuple[str, ...]] = ("loss", "loss_nonfinite", "update_norm")
    explains: ClassVar[tuple[str, ...]] = (
        "loss-spike",
        "loss-divergence",
        "loss-oscillation",
        "loss-plateau",
        "exploding-gradients",
        "nonfinite-values",
        "dead-units",
        "saturating-activations",
    )
    remedies: ClassVar[tuple[str, ...]] = (
        "stabilize-optimizer",
        "clip-gradient-norm",
        "clip-gradient-by-history",
        "warm-up-learning-rate",
    )

    rms: float = 2.3
    readings: int = 2
    lost: float = 0.5

    def check(self, history: History) -> Iterator[Finding]:
        for group in range(len(history.groups)):
            betas = decay_rates(history, group)
            columns = members(history, group)
            if betas is not None and columns:
                yield from self._in_group(history, group, columns, betas)

    def _in_group(
        self, history: History, group: int, columns: list[int], betas: tuple[float, float]
    ) -> Iterator[Finding]:
        steps = history["grad_norm"].steps
        norms = np.sqrt(np.nansum(history["grad_norm"].values[:, columns] ** 2, axis=1))
        sizes = self._update_sizes(norms, betas, self._floor(history, group, columns))
        found = [
            stretch for stretch in self._stretches(sizes) if self._is_made(history, group, columns, sizes, stretch)
        ]
        if not found:
            return
        curve = loss_curve(history)
        begun = [self._jump(norms, first, betas[0]) for first, _ in found]
        costly = [
            i for i, start in enumerate(begun) if curve is not None and self._relapsed(history, curve, steps[start])
        ]
        told = costly[0] if costly else 0
        first, last = found[told]
        worst = first + int(np.argmax(sizes[first : last + 1]))
        yield self.finding(
            history,
            level=self._level(curve, bool(costly)),
            message=f"The gradient grew from {norms[max(0, begun[told] - 1)]:.2g} to {norms[worst]:.2g}, and updates "
            f"reached {sizes[worst]:.2g} learning rates at step {steps[worst]} (limit {self.rms:g}; about 1 is usual): "
            f"with beta2 = {betas[1]:g}, v still remembers the small gradients before step {steps[begun[told]]}.",
            first_step=int(steps[begun[told]]),
            last_step=int(steps[last]),
            layers=self._largest(history, columns, worst),
            evidence=(
                Evidence(statistic="update_rms", observed=float(sizes[worst]), limit=self.rms, step=int(steps[worst])),
            ),
            confidence=0.8 if costly else 0.6,
        )

    def _floor(self, history: History, group: int, columns: list[int]) -> float:
        """Epsilon for the norm of all entries: eps sqrt(n)."""
        epsilon = hyperparameter(history, group, "eps")
        count = sum(history.parameters[index].size for index in columns)
        return epsilon * float(np.sqrt(count)) if np.isfinite(epsilon) else 0.0

    def _update_sizes(self, norms: Floats, betas: tuple[float, float], floor: float) -> Floats:
        """U of every step, by Adam's own recursion."""
        sizes, first, second = np.zeros(len(norms)), 0.0, 0.0
        for index, norm in enumerate(norms):
            first = betas[0] * first + (1 - betas[0]) * float(norm)
            second = betas[1] * second + (1 - betas[1]) * float(norm) ** 2
            moment = first / (1 - betas[0] ** (index + 1))
            scale = np.sqrt(second / (1 - betas[1] ** (index + 1))) + floor
            sizes[index] = moment / scale if scale > 0 else 0.0
        return np.nan_to_num(sizes, nan=0.0, posinf=0.0)

    def _stretches(self, sizes: Floats) -> list[tuple[int, int]]:
        """First and last index of each stretch of `readings` steps or more beyond the limit."""
        edges = np.diff(np.concatenate([[0], (sizes >= self.rms).astype(np.int8), [0]]))
        ends = zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True)
        return [(int(first), int(end) - 1) for first, end in ends if end - first >= self.readings]

    def _is_made(
        self, history: History, group: int, columns: list[int], sizes: Floats, stretch: tuple[int, int]
    ) -> bool:
        """Whether the updates that were measured in the stretch, if any, are not far below what the norms allow."""
        updates, rates = history.series.get("update_norm"), history["learning_rate"]
        steps = history["grad_norm"].steps
        count = sum(history.parameters[index].size for index in columns)
        for index in range(stretch[0], stretch[1] + 1) if updates is not None else ():
            update, rate = (series.at(int(steps[index])) for series in (updates, rates) if series is not None)
            if update is None or rate is None or rate.ndim != 1 or group >= len(rate) or not rate[group] > 0:
                continue
            measured = float(np.sqrt(np.nansum(update[columns] ** 2) / max(1, count)) / rate[group])
            if np.isfinite(update[columns]).any() and measured < sizes[index] / 3:
                return False
        return True

    def _jump(self, norms: Floats, index: int, beta1: float) -> int:
        """Where the gradient left its past, if it did within the first moment's memory before `index`."""
        memory = int(2 / (1 - beta1)) + 1
        usual = median(norms[max(0, index - 10 * memory) : max(1, index - memory)])
        near = max(0, index - memory)
        over = np.flatnonzero(norms[near : index + 1] >= self.rms * usual)
        return near + int(over[0]) if len(over) else index

    def _largest(self, history: History, columns: list[int], index: int) -> tuple[str, ...]:
        """The group's tensors at one step, the one with the largest gradient first, eight at most."""
        row = np.nan_to_num(history["grad_norm"].values[index, columns], posinf=0.0)
        return tuple(history.parameters[columns[i]].name for i in np.argsort(-row, kind="stable")[:8])

    def _level(self, curve: LossCurve | None, is_costly: bool) -> Level:
        if curve is None or not (is_costly or curve.lost):
            return "info"
        return "error" if curve.lost else "warning"

    def _relapsed(self, history: History, curve: LossCurve, step: int) -> bool:
        """Whether behind `step` `lost` of what had been learned went again, and not because the data are others."""
        series = history["loss"]
        before = median(series.values[(series.steps < step) & (series.steps >= step - 20)])
        behind = series.values[(series.steps > step) & (series.steps <= step + 20)]
        at = median(series.values[series.steps == step])
        rose = bool(median(behind) - before >= self.lost * max(curve.start - before, 0.1 * curve.scale))
        return rose and not np.nanmax(behind, initial=-np.inf) - before < 2 * (at - before)
