"""unscaled-inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import ACTIVATIONS, WEIGHTED, boundary, columns_of, weight_parameters
from isograd._history import History
from isograd._loss_curve import LossCurve, loss_curve
from isograd._nonfinite import READS, first_place
from isograd._robust import median
from isograd._rule import Evidence, Finding, Level, Rule, Stage

HUGE = 1e6
"""Inputs that overflow by themselves after a few layers: nothing else need be invalid."""

OVERFLOW = 1.8e19
"""The square root of the largest float32: what the square of a loss or of a gradient does not survive."""


@dataclass(frozen=True, kw_only=True)
class UnscaledInputs(Rule):
    """Inputs far from unit scale, or columns of very different scale, that make the run hard or break it.

    Detects
        An input of floating-point numbers whose root mean square is at or above `scale`, or whose columns differ in
        scale by `columns` or more, together with harm: a loss that is lost or stuck; outputs that start as large,
        where targets are not; a first activation that is saturated or dead; or a first layer that takes nearly all of
        the gradient.

    Why it matters
        The curvature with respect to the first layer's weights grows with the square of the inputs, so the largest
        stable learning rate shrinks with it: inputs of 0 to 255 allow a rate 65,000 times smaller than inputs of 0 to
        1. Bounded activations saturate at once.

    Decided by
        scale: 10 root mean square; what a step changes in the first layer's output grows with the square of the input,
        so a step of the usual 1e-3 of the weights does what one of 0.1, a large one, does at unit scale; ordinary
        features (0 to 1, standardized, one-hot, 0 to 10) stay below. columns: 100, a ratio of 10,000 in curvature, and
        about as many steps of gradient descent until the small column is learned; zeros are left out, so that a column
        that is rarely set (a word, a pixel at the border) counts with the scale of its values. harm: the first
        weight's share of the squared gradient norm, 0.99.

    Stays silent when
        Inputs are integers (token and category numbers, an embedding's input) or only moderately off. Without any harm
        it is info; where the loss falls well in spite of it, a warning at most. It is info, too, where the forward
        pass overflows before the first update, from inputs below 1e6: products and squares of fresh layers do not (1e6
        squared is 1e12, the largest float32 3.4e38), so an exponential or a division does, and is the cause.

    Remedies
        standardize-inputs, insert-normalization, lower-learning-rate

    References
        LeCun et al. 1998, Efficient BackProp, section 4.3; Ioffe & Szegedy 2015, Batch normalization,
        arXiv:1502.03167.
    """

    stage: ClassVar[Stage] = "data"
    needs: ClassVar[tuple[str, ...]] = ("output_rms",)
    uses: ClassVar[tuple[str, ...]] = (
        "column_scale_ratio",
        "saturation",
        "dead_fraction",
        "grad_norm",
        "loss",
        *READS,
    )
    explains: ClassVar[tuple[str, ...]] = (
        "loss-divergence",
        "loss-spike",
        "loss-oscillation",
        "loss-plateau",
        "exploding-gradients",
        "vanishing-gradients",
        "nonfinite-values",
        "no-gradient",
        "learning-rate-too-high",
        "saturating-activations",
        "dead-units",
        "saturated-output",
        "undertrained",
    )
    remedies: ClassVar[tuple[str, ...]] = ("standardize-inputs", "insert-normalization", "lower-learning-rate")

    scale: float = 10.0
    columns: float = 100.0
    harm: float = 0.99

    def check(self, history: History) -> Iterator[Finding]:
        off = [evidence for index in boundary(history, "input") for evidence in self._off_scale(history, int(index))]
        if not off:
            return
        worst = max(off, key=lambda evidence: evidence.observed / evidence.limit)
        curve = loss_curve(history)
        overflown = worst.observed < HUGE and _breaks_at_once(history)
        harm = [] if overflown else list(self._harm(history, curve))
        what = (
            "a root mean square of" if worst.statistic == "output_rms" else "columns whose scales differ by a factor of"
        )
        consequence = f" {harm[0]}" if harm else " It does no harm that shows."
        if overflown:
            consequence = " What it does cannot be told from what an operation that overflows at the first step does."
        yield self.finding(
            history,
            level=self._level(curve, bool(harm)),
            message=f"The input {worst.layer} has {what} {worst.observed:.3g} (limit {worst.limit:g}).{consequence}",
            first_step=worst.step,
            layers=tuple(dict.fromkeys(evidence.layer for evidence in off if evidence.layer)),
            evidence=tuple(sorted(off, key=lambda evidence: -evidence.observed / evidence.limit)),
            confidence=0.9 if len(harm) >= 2 else 0.7 if harm else 0.5,
        )

    def _off_scale(self, history: History, index: int) -> Iterator[Evidence]:
        layer = history.layers[index]
        if "int" in layer.type or "bool" in layer.type or self._is_embedded(history, layer.position):
            return
        for statistic, limit in (("output_rms", self.scale), ("column_scale_ratio", self.columns)):
            series = history.series.get(statistic)
            observed = median(series.values[:, index]) if series is not None else float("nan")
            if series is not None and observed >= limit:
                yield Evidence(
                    statistic=statistic, observed=observed, limit=limit, step=int(series.steps[0]), layer=layer.name
                )

    def _is_embedded(self, history: History, position: float) -> bool:
        """Whether the next layer after an input looks its entries up instead of multiplying them."""
        behind = [layer for layer in history.layers if layer.role == "module" and layer.position >= position]
        first = min(behind, key=lambda layer: layer.position, default=None)
        return first is not None and first.kind == "embedding"

    def _harm(self, history: History, curve: LossCurve | None) -> Iterator[str]:
        if curve is not None and curve.failed:
            end = "is not finite at the end" if curve.lost else f"goes from {curve.start:.4g} to {curve.end:.4g}"
            yield f"The loss {end}."
        activations = columns_of(history, ACTIVATIONS)
        for statistic, word in (("saturation", "saturated"), ("dead_fraction", "dead")):
            series = history.series.get(statistic)
            share = median(series.values[:, activations[0]]) if series is not None and len(activations) else 0.0
            if share >= 0.5:
                yield f"{100 * share:.0f} % of {history.layers[activations[0]].name} is {word}."
        taken = self._first_share(history)
        if taken >= self.harm:
            yield f"The first layer takes {100 * taken:.2f} % of the squared gradient norm."
        inflated = self._first_output(history)
        if inflated >= self.scale:
            yield f"Outputs start at a root mean square of {inflated:.3g}."

    def _first_share(self, history: History) -> float:
        """The first weight's share of the squared gradient norm at the first reading."""
        series, weights = history.series.get("grad_norm"), weight_parameters(history)
        if series is None or len(weights) < 3 or not len(series):
            return 0.0
        power = np.nan_to_num(series.values[0, weights], posinf=0.0) ** 2
        return float(power[0] / np.sum(power)) if np.sum(power) > 0 else 0.0

    def _first_output(self, history: History) -> float:
        """Root mean square of the last layer's first output, 0 where the targets are as large."""
        weighted, row = columns_of(history, WEIGHTED), history["output_rms"].values[0]
        targets = row[boundary(history, "target")]
        size = float(row[weighted[-1]]) if len(weighted) else 0.0
        return size if np.isfinite(size) and not np.any(targets >= size / 2) else 0.0

    def _level(self, curve: LossCurve | None, harmed: bool) -> Level:
        if not harmed:
            return "info"
        return "error" if curve is not None and curve.failed else "warning"


def _breaks_at_once(history: History) -> bool:
    """Whether the forward pass left the numbers' range at the first step, before any update could have done it."""
    place, loss = first_place(history), history.series.get("loss")
    if place is not None and place.kind in ("output", "loss") and place.step == 0:
        return True
    return loss is not None and bool(np.any(np.abs(loss.values[:1]) >= OVERFLOW))
