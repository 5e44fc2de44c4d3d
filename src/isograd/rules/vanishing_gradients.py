"""vanishing-gradients."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import Profile, profiles
from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._recurrence import may_recur
from isograd._robust import log10_positive, median, theil_sen
from isograd._rule import Evidence, Finding, Level, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class VanishingGradients(Rule):
    """The gradient signal shrinks on its way back through the layers, or through time.

    Detects
        s = decades per layer, the Theil-Sen slope of log10 ||dL/d output|| over the layers with weights, ordered from
        the input to the loss. D = s x (layers - 1) is what is lost between the loss and the input. Seen when D
        exceeds `decades` in at least half of the deep readings. Where gradients with respect to outputs were not
        read, the gradients of the weights stand in. Through time: the same over the calls of a layer that is called
        several times.

    Why it matters
        Layers near the input receive noise or nothing and stay as they were initialized. Under mean-field theory the
        norm changes by sqrt(sigma_w^2 E[phi'^2]) per layer: 0.41 for ReLU with PyTorch's default initialization, 0.14
        for sigmoid, so that 20 layers lose 8 and 17 decades.

    Decided by
        decades: 3, the largest loss of signal that is not worth a word. Healthy plain networks with critical
        initialization stay within 1 decade over 60 layers.
        hopeless: 7 decades, the resolution of float32 (2^-23 = 1.2e-7): what arrives is below the rounding of what
        left.

    Stays silent when
        The signal is small everywhere, as at convergence: only its slope over depth counts. Exact zeros are the
        business of no-gradient. A profile beyond `decades` is info while the loss falls well, since adaptive
        optimizers rescale it.

    Remedies
        reinitialize-layers, replace-activations, insert-normalization, insert-shortcuts

    References
        Hochreiter 1991, Untersuchungen zu dynamischen neuronalen Netzen; Glorot & Bengio 2010, Understanding the
        difficulty of training deep feedforward neural networks; Schoenholz et al. 2017, Deep information propagation,
        arXiv:1611.01232; Sen 1968, Estimates of the regression coefficient based on Kendall's tau.
    """

    stage: ClassVar[Stage] = "symptom"
    needs: ClassVar[tuple[str, ...]] = ("grad_norm",)
    uses: ClassVar[tuple[str, ...]] = ("signal_norm", "call_signal_norm", "loss", "loss_nonfinite")
    remedies: ClassVar[tuple[str, ...]] = (
        "reinitialize-layers",
        "replace-activations",
        "insert-normalization",
        "insert-shortcuts",
    )

    decades: float = 3.0
    hopeless: float = 7.0

    def check(self, history: History) -> Iterator[Finding]:
        seen = profiles(history)
        lost = np.array([profile.lost for profile in seen])
        hit = lost >= self.decades
        if hit.any() and 2 * np.sum(hit) >= np.sum(np.isfinite(lost)):
            yield self._over_depth(history, [profile for profile, bad in zip(seen, hit, strict=True) if bad])
        yield from self._through_time(history)

    def _over_depth(self, history: History, bad: list[Profile]) -> Finding:
        worst = max(bad, key=lambda profile: profile.lost)
        names = [history.layers[index].name for index in worst.columns]
        what = "weight gradient" if worst.by_parameter else "gradient signal"
        return self.finding(
            history,
            level=self._level(history, worst.lost),
            message=f"The {what} loses {worst.lost:.1f} decades between {names[-1]} and {names[0]}, "
            f"{worst.slope:.2f} per layer over {len(names)} layers (limit {self.decades:g} in all).",
            first_step=bad[0].step,
            last_step=bad[-1].step,
            layers=tuple(names),
            evidence=(Evidence(statistic="decades_lost", observed=worst.lost, limit=self.decades, step=worst.step),),
            confidence=0.9 if median([profile.lost for profile in bad]) >= self.hopeless else 0.7,
        )

    def _through_time(self, history: History) -> Iterator[Finding]:
        recurring = {layer.name for layer in history.layers if may_recur(layer)}
        for layer, series in history.profiles.get("call_signal_norm", {}).items():
            calls = log10_positive(series.values)
            if layer not in recurring or calls.ndim != 2 or calls.shape[1] < 3:
                continue
            lost = np.array([theil_sen(np.arange(calls.shape[1]), row) * (calls.shape[1] - 1) for row in calls[:8]])
            bad = np.flatnonzero(lost >= self.decades)
            if 2 * len(bad) <= np.sum(np.isfinite(lost)):
                continue
            worst = int(bad[np.argmax(lost[bad])])
            step, observed = int(series.steps[worst]), float(lost[worst])
            yield self.finding(
                history,
                level=self._through_time_level(history, observed),
                message=f"The gradient signal of {layer} loses {observed:.1f} decades over {calls.shape[1]} "
                f"calls, from the "
                f"last back to the first (limit {self.decades:g}).",
                first_step=int(series.steps[bad[0]]),
                layers=(layer,),
                evidence=(
                    Evidence(statistic="decades_lost", observed=observed, limit=self.decades, step=step, layer=layer),
                ),
                confidence=0.7,
            )

    def _through_time_level(self, history: History, lost: float) -> Level:
        """Losing the distant past hurts only where the task needs it: a run that learns does not."""
        curve = loss_curve(history)
        if curve is None or not curve.failed:
            return "info"
        return self._level(history, lost)

    def _level(self, history: History, lost: float) -> Level:
        curve = loss_curve(history)
        stuck = curve is not None and curve.failed
        if lost >= self.hopeless:
            return "error" if stuck else "warning"
        return "warning" if stuck else "info"
