"""bootstrapped-target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import boundary
from isograd._history import History
from isograd._loss_curve import LossCurve, loss_curve
from isograd._robust import Floats, block_medians, log10_positive
from isograd._rule import Evidence, Finding, Rule, Stage

FIRST = 20
"""Steps of a run that are all read: what moves from one step to the next shows in them."""


@dataclass(frozen=True, kw_only=True)
class BootstrappedTarget(Rule):
    """Targets are made from the model's own predictions, and both run away together.

    Detects
        Floating-point targets whose size has grown to `growth` times that of the first ones or more, while the
        predictions kept step with them (their sizes agree within a factor of `together` at most readings since), in a
        run whose loss stood at `worse` times its start or more. From `early` times on where targets and
        predictions moved together from step to step, in the first steps and further than the targets are wide.

    Why it matters
        A target r + gamma max Q(s') rises with Q: each step that lifts Q lifts what it is compared with, the
        maximum picks the errors that are too high, and nothing but the slow factor gamma holds it back. Targets that
        come from data keep their distribution.

    Decided by
        growth: 100, which is 1 / (1 - gamma) for gamma = 0.99: no discounted sum of rewards of the size first seen
        is larger. early: 10. together: 3. worse: 10 times the starting loss.

    Stays silent when
        Targets come from data, whatever the predictions do; values grow towards what rewards allow and the loss
        stays of its order, as with a target network; or predictions run away alone, which is another fault.

    Remedies
        clip-gradient-norm, lower-learning-rate

    References
        Mnih et al. 2015, Human-level control through deep reinforcement learning (target network); van Hasselt, Guez &
        Silver 2016, arXiv:1509.06461 (overestimation by the maximum); van Hasselt et al. 2018, Deep reinforcement
        learning and the deadly triad, arXiv:1812.02648 (values beyond 1 / (1 - gamma)).
    """

    stage: ClassVar[Stage] = "output"
    needs: ClassVar[tuple[str, ...]] = ("loss", "output_rms")
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite", "output_max", "output_min", "output_mean", "output_std")
    explains: ClassVar[tuple[str, ...]] = (
        "loss-divergence",
        "loss-spike",
        "loss-oscillation",
        "loss-plateau",
        "exploding-gradients",
        "nonfinite-values",
        "unscaled-targets",
    )
    remedies: ClassVar[tuple[str, ...]] = ("clip-gradient-norm", "lower-learning-rate")
    moves_objective: ClassVar[bool] = True

    growth: float = 100.0
    early: float = 10.0
    together: float = 3.0
    worse: float = 10.0

    def check(self, history: History) -> Iterator[Finding]:
        curve = loss_curve(history)
        if curve is None or not self._is_worse(history, curve):
            return
        for target in boundary(history, "target"):
            prediction = _partner(history, int(target))
            if prediction is None or "float" not in history.layers[target].type:
                continue
            followed = _moves_together(history, int(target), prediction)
            evidence = self._grown(history, int(target), prediction, self.early if followed else self.growth)
            if evidence is not None:
                first = int(history["output_rms"].steps[0]) if followed else evidence.step
                yield self._ran_away(history, evidence, curve, first)
                return

    def _ran_away(self, history: History, evidence: Evidence, curve: LossCurve, first: int) -> Finding:
        return self.finding(
            history,
            level="error",
            message=f"The targets have grown to {evidence.observed:.3g} times the size of the first ones (limit "
            f"{evidence.limit:g}, reached at step {evidence.step}) and the predictions with them: targets follow "
            f"predictions. The loss went from {curve.start:.4g} to {curve.end:.4g}.",
            first_step=first,
            layers=(evidence.layer,) if evidence.layer else (),
            evidence=(evidence,),
            confidence=0.85,
        )

    def _is_worse(self, history: History, curve: LossCurve) -> bool:
        """Whether the loss stood far above its start for a twentieth of the run or more, or was lost."""
        high = block_medians(history["loss"].values, 20).max()
        return curve.lost or bool(high >= curve.start + self.worse * curve.scale)

    def _grown(self, history: History, target: int, prediction: int, limit: float) -> Evidence | None:
        """How far the targets' size left that of the first ones, if the predictions were there too."""
        steps, size = history["output_rms"].steps, _largest(history, target)
        answer = history["output_rms"].values[:, prediction]
        known = np.flatnonzero(np.isfinite(size) & (size > 0))
        if len(known) < 3:
            return None
        first = float(np.max(size[known[:3]]))
        far = known[size[known] >= limit * first]
        apart = np.abs(log10_positive(answer[far]) - log10_positive(history["output_rms"].values[far, target]))
        if len(far) < 2 or not np.mean(apart <= np.log10(self.together)) >= 0.5:
            return None
        observed, step = float(np.max(size[far]) / first), int(steps[far[0]])
        return Evidence(
            statistic="target_growth", observed=observed, limit=limit, step=step, layer=history.layers[target].name
        )


def _partner(history: History, target: int) -> int | None:
    """The column of the prediction that entered the loss together with a target."""
    name = history.layers[target].name.removesuffix("target") + "prediction"
    return next((int(i) for i in boundary(history, "prediction") if history.layers[i].name == name), None)


def _largest(history: History, column: int) -> Floats:
    """[S]: the largest absolute entry, or the root mean square where that alone was read."""
    rms, low, high = (history.series.get(name) for name in ("output_rms", "output_min", "output_max"))
    assert rms is not None
    if low is None or high is None or low.values.shape != rms.values.shape or high.values.shape != rms.values.shape:
        return rms.values[:, column]
    return np.maximum(np.abs(low.values[:, column]), np.abs(high.values[:, column]))


def _moves_together(history: History, target: int, prediction: int) -> bool:
    """Whether, over the consecutive steps at the start, both means moved as one by more than the targets' spread."""
    means, spreads = history.series.get("output_mean"), history.series.get("output_std")
    if means is None or spreads is None or not len(spreads):
        return False
    gaps = np.flatnonzero(np.diff(means.steps) != 1)
    run = min(FIRST, int(gaps[0]) + 1 if len(gaps) else len(means))
    own, other = means.values[:run, target], means.values[:run, prediction]
    if run < 8 or not np.isfinite(own).all() or not np.isfinite(other).all() or not np.ptp(other) > 0:
        return False
    moved = abs(float(np.median(own[-3:]) - np.median(own[:3])))
    return moved > spreads.values[0, target] and float(np.corrcoef(own, other)[0, 1]) >= 0.9
