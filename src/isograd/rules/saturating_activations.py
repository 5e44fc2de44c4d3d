"""saturating-activations."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from isograd._depth import WEIGHTED, Profile, columns_of, profiles
from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._robust import median
from isograd._rule import Evidence, Finding, Level, Rule, Stage
from isograd._theory import BOUNDED, largest_slope


@dataclass(frozen=True, kw_only=True)
class SaturatingActivations(Rule):
    """Bounded activations (sigmoid, tanh and kin) pass too little gradient: by their number, or by where they work.

    Detects
        A tower: three or more bounded activations in series that together take -sum log10 sqrt(E[phi'^2]) decades, at
        least half of the `decades` or more that the gradient signal loses over depth. A sigmoid's slope is at most
        1/4, so each layer loses 0.6 decades even where nothing is saturated. Saturation: more than `saturated` of a
        hidden layer's outputs where the slope is below 5 % of the largest.

    Why it matters
        The gradient is multiplied by the slope once per layer. Layers behind the activation stop learning.

    Decided by
        decades: 2, a hundredfold loss. saturated: 0.5, in the median of the deep readings.

    Stays silent when
        The activation is the output (a classifier that is sure saturates by right), or a gate of a recurrent cell.
        Info as long as the loss falls.

    Remedies
        replace-activations, insert-normalization, standardize-inputs, reinitialize-layers

    References
        Glorot & Bengio 2010, Understanding the difficulty of training deep feedforward neural networks; Hochreiter
        1991; Schoenholz et al. 2017, Deep information propagation, arXiv:1611.01232.
    """

    stage: ClassVar[Stage] = "architecture"
    needs: ClassVar[tuple[str, ...]] = ("activation_slope",)
    uses: ClassVar[tuple[str, ...]] = ("saturation", "signal_norm", "grad_norm", "loss", "loss_nonfinite")
    explains: ClassVar[tuple[str, ...]] = ("vanishing-gradients", "loss-plateau", "no-gradient")
    remedies: ClassVar[tuple[str, ...]] = (
        "replace-activations",
        "insert-normalization",
        "standardize-inputs",
        "reinitialize-layers",
    )

    decades: float = 2.0
    saturated: float = 0.5

    def check(self, history: History) -> Iterator[Finding]:
        hidden = self._hidden(history)
        if not len(hidden):
            return
        found = next(self._tower(history, hidden), None) or next(self._pinned(history, hidden), None)
        if found is not None:
            yield found

    def _hidden(self, history: History) -> NDArray[np.int64]:
        """Columns of the bounded activations that a layer with weights follows."""
        weighted = columns_of(history, WEIGHTED)
        last = max((history.layers[index].position for index in weighted), default=-np.inf)
        columns = columns_of(history, BOUNDED)
        return np.array([index for index in columns if history.layers[index].position < last], dtype=np.int64)

    def _tower(self, history: History, hidden: NDArray[np.int64]) -> Iterator[Finding]:
        seen = [profile for profile in profiles(history) if profile.lost >= self.decades]
        if len(hidden) < 3 or not seen:
            return
        lost = median([profile.lost for profile in seen])
        taken = self._taken(history, hidden, seen[0])
        if not taken >= max(self.decades, lost / 2):
            return
        kinds = sorted({history.layers[index].kind for index in hidden})
        yield self.finding(
            history,
            level=self._level(history),
            message=f"{len(hidden)} {' and '.join(kinds)} activations in series take {taken:.1f} of the "
            f"{lost:.1f} decades that "
            f"the gradient signal loses over depth ({taken / len(hidden):.2f} per layer; limit "
            f"{self.decades:g} in all).",
            first_step=seen[0].step,
            layers=tuple(history.layers[index].name for index in hidden),
            evidence=(
                Evidence(statistic="decades_taken", observed=taken, limit=self.decades, step=seen[0].step),
                Evidence(statistic="decades_lost", observed=seen[0].lost, limit=self.decades, step=seen[0].step),
            ),
            confidence=0.9,
        )

    def _taken(self, history: History, hidden: NDArray[np.int64], profile: Profile) -> float:
        """-sum log10 of the activations' root mean square slopes; the theoretical best where one was not read."""
        measured = history["activation_slope"].at(profile.step)
        slopes = np.array([largest_slope(history.layers[index].kind) for index in hidden])
        if measured is not None:
            slopes = np.where(np.isfinite(measured[hidden]), measured[hidden], slopes)
        return float(-np.sum(np.log10(np.clip(slopes, 1e-30, None))))

    def _pinned(self, history: History, hidden: NDArray[np.int64]) -> Iterator[Finding]:
        series = history.series.get("saturation")
        if series is None or not len(series):
            return
        typical = np.array([median(series.values[:, index]) for index in hidden])
        pinned = np.flatnonzero(typical >= self.saturated)
        if not len(pinned):
            return
        worst = int(pinned[np.argmax(typical[pinned])])
        name, observed = history.layers[hidden[worst]].name, float(typical[worst])
        over = np.flatnonzero((series.values[:, hidden[pinned]] >= self.saturated).any(axis=1))
        begun = int(series.steps[over[0]])
        yield self.finding(
            history,
            level=self._level(history),
            message=f"{100 * observed:.0f} % of the outputs of {name} are saturated (limit "
            f"{100 * self.saturated:.0f} %), first "
            f"at step {begun}: hardly any gradient passes.",
            first_step=begun,
            layers=tuple(history.layers[hidden[index]].name for index in pinned),
            evidence=(
                Evidence(statistic="saturation", observed=observed, limit=self.saturated, step=begun, layer=name),
            ),
            confidence=0.7,
        )

    def _level(self, history: History) -> Level:
        curve = loss_curve(history)
        if curve is None or not curve.failed:
            return "info"
        return "error" if curve.share < 0.1 else "warning"
