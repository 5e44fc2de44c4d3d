"""targets-outside-range."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import boundary
from isograd._history import History, Layer
from isograd._loss_curve import loss_curve
from isograd._rule import Evidence, Finding, Level, Rule, Stage

RANGES = {
    "BinaryCrossEntropy": (0.0, 1.0),
    "BinaryCrossEntropyWithLogits": (0.0, 1.0),
    "SoftMarginLoss": (-1.0, 1.0),
}
"""What the targets of a loss may be: probabilities, or a sign."""


@dataclass(frozen=True, kw_only=True)
class TargetsOutsideRange(Rule):
    """Targets that the loss does not allow, and that it does not refuse either.

    Detects
        The targets of a binary cross-entropy below 0 or above 1, by `slack` or more; or of a soft-margin loss, which
        takes -1 and 1, that are 0 at the least.

    Why it matters
        The binary cross-entropy of a target of 2 or of -1 has no minimum: the loss falls below 0 and on, the scores
        grow without end, and nothing is learned about the others. A soft-margin target of 0 gives no gradient at all.

    Decided by
        slack: 0.01, room for rounding and for images resampled from [0, 1]. An error where the loss falls below 0,
        which no cross-entropy of probabilities can, or where it is stuck or lost.

    Stays silent when
        Targets are smoothed, soft, or weighted inside [0, 1]; or the loss is one that takes any number.

    Remedies
        check-labels, standardize-targets

    References
        PyTorch documentation of BCEWithLogitsLoss (targets are numbers between 0 and 1) and of SoftMarginLoss
        (targets of 1 or -1).
    """

    stage: ClassVar[Stage] = "data"
    needs: ClassVar[tuple[str, ...]] = ("output_min", "output_max")
    uses: ClassVar[tuple[str, ...]] = ("loss", "loss_nonfinite")
    explains: ClassVar[tuple[str, ...]] = (
        "loss-plateau",
        "loss-divergence",
        "loss-oscillation",
        "loss-spike",
        "exploding-gradients",
        "nonfinite-values",
    )
    remedies: ClassVar[tuple[str, ...]] = ("check-labels", "standardize-targets")

    slack: float = 0.01

    def check(self, history: History) -> Iterator[Finding]:
        for prediction in boundary(history, "prediction"):
            operation = history.layers[prediction].type
            target = _partner(history, history.layers[prediction])
            evidence = self._outside(history, operation, target) if target is not None else None
            if evidence is not None:
                yield self._refused(history, operation, evidence)
                return

    def _refused(self, history: History, operation: str, evidence: Evidence) -> Finding:
        curve, (low, high) = loss_curve(history), RANGES[operation]
        ends = f" The loss goes from {curve.start:.4g} to {curve.end:.4g}." if curve is not None else ""
        lost = curve is not None and (curve.failed or curve.lowest < 0)
        level: Level = "error" if lost else "warning"
        allowed = f"{low:g} to {high:g}" if low == 0 else f"{low:g} or {high:g}"
        return self.finding(
            history,
            level=level,
            message=f"A target of {evidence.observed:.4g} enters {operation}, which takes {allowed}.{ends}",
            first_step=evidence.step,
            layers=(evidence.layer,) if evidence.layer else (),
            evidence=(evidence,),
            confidence=0.95,
        )

    def _outside(self, history: History, operation: str, target: int) -> Evidence | None:
        if operation not in RANGES:
            return None
        low, high = RANGES[operation]
        margin, name = self.slack * (high - low), history.layers[target].name
        above = _first(history, "output_max", target, high + margin, name)
        under = _first(history, "output_min", target, low - margin, name, below=True)
        if operation == "SoftMarginLoss":
            # Signs stand at the two ends: a least target between them is no sign.
            under = under or _between(history, target, low + margin, high - margin, name)
        return min((e for e in (above, under) if e is not None), key=lambda e: e.step, default=None)


def _partner(history: History, prediction: Layer) -> int | None:
    """The column of the target that entered the loss together with a prediction."""
    name = prediction.name.removesuffix("prediction") + "target"
    return next((int(i) for i in boundary(history, "target") if history.layers[i].name == name), None)


def _first(
    history: History, statistic: str, column: int, limit: float, name: str, *, below: bool = False
) -> Evidence | None:
    """The first reading at or beyond `limit`."""
    series = history[statistic]
    values = series.values[:, column]
    rows = np.flatnonzero(values <= limit if below else values >= limit)
    if not len(rows):
        return None
    observed, step = float(values[rows[0]]), int(series.steps[rows[0]])
    return Evidence(statistic=statistic, observed=observed, limit=limit, step=step, layer=name, below=below)


def _between(history: History, column: int, low: float, high: float, name: str) -> Evidence | None:
    found = _first(history, "output_min", column, low, name)
    return found if found is not None and found.observed < high else None
