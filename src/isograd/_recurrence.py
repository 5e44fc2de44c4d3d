"""The gradient signal through time: over the calls of a layer that a step calls again and again."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from isograd._depth import ACTIVATIONS
from isograd._history import Floats, History, Integers, Layer
from isograd._robust import log10_positive, median, theil_sen

_WITHOUT_WEIGHTS = ACTIVATIONS | {"dropout", "pool", "flatten", "identity", "softmax", "log-softmax"}


@dataclass(frozen=True, kw_only=True)
class Recurrence:
    """A layer called `calls` times in a step. `lost`: per deep reading the decades that its gradient signal loses from
    the last call back to the first, negative where it grows, NaN where nothing was read.
    """

    layer: str
    calls: int
    steps: Integers
    lost: Floats

    def lost_most_of_the_time(self, decades: float) -> tuple[float, int] | None:
        """(typical loss, first step) where the signal loses `decades` over half of the time or more."""
        hit = self.lost >= decades
        # Deep readings are dense at first: each stands for the steps up to the next one.
        spans = np.diff(np.append(self.steps, self.steps[-1:] + 1)) * np.isfinite(self.lost)
        if not hit.any() or 2 * np.sum(spans[hit]) < np.sum(spans):
            return None
        return median(self.lost[hit]), int(self.steps[hit][0])


def recurrences(history: History, *, least: int) -> list[Recurrence]:
    """Every layer that was called `least` times or more in a step, in order of name.

    One activation module that stands behind many layers is called often too, but nothing recurs there; nor where each
    call belongs to a micro-batch of its own.
    """
    found = []
    passes = history.series.get("micro_batches")
    least = max(least, 1 + int(np.nanmax(passes.values, initial=1)) if passes is not None else least)
    known = {layer.name for layer in history.layers if may_recur(layer)}
    for layer, series in sorted(history.profiles.get("call_signal_norm", {}).items()):
        if layer in known and series.values.ndim == 2 and series.values.shape[1] >= least:
            lost = np.array([_lost(row) for row in series.values])
            found.append(Recurrence(layer=layer, calls=series.values.shape[1], steps=series.steps, lost=lost))
    return found


def may_recur(layer: Layer) -> bool:
    """Whether several calls of a layer in a step can be steps in time: a module without weights stands anywhere."""
    return layer.role != "module" or layer.kind not in _WITHOUT_WEIGHTS


def _lost(signal: Floats) -> float:
    """Slope x length; exact zeros, where the signal has underflown, count as the smallest float32.

    Zeros behind the last call with a signal have not underflown: the loss does not ask those calls.
    """
    asked = np.arange(len(signal)) < np.max(np.flatnonzero(signal > 0), initial=-1)
    logs = log10_positive(np.where((signal == 0) & asked, 1e-45, signal))
    if np.sum(np.isfinite(logs)) < 3:
        return float("nan")
    return theil_sen(np.arange(len(logs)), logs) * (len(logs) - 1)
