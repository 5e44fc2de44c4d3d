"""saturated-output."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History, Layer
from isograd._loss_curve import LossCurve, loss_curve
from isograd._loss_graph import LossGraph, column_of, loss_graphs, output_layer
from isograd._robust import Floats, median
from isograd._rule import Evidence, Finding, Rule, Stage

LOGARITHMS = frozenset({"Log", "Log2", "Log10", "Log1P", "BinaryCrossEntropy"})
"""Operations that take the logarithm of a probability made elsewhere; a log-softmax has its derivative to itself."""

SQUASHING = {"Sigmoid": "sigmoid", "Softmax": "softmax"}


@dataclass(frozen=True, kw_only=True)
class SaturatedOutput(Rule):
    """Probabilities pinned at 0 or 1, many of them wrong, under a logarithm that is clipped: the loss cannot move.

    Detects
        In the loss's graph, a logarithm behind a sigmoid or a softmax, and `pinned` or more of the probabilities at
        an end of their range (for a sigmoid its saturation; for a softmax mean p^2 over mean p, which is 1 where every
        p is 0 or 1, counted from the 1/K of equal probabilities; or the share that a clamp cuts off at the first step),
        in a run whose loss is stuck above what an answer that knows nothing would have: ln K for K classes, ln 2 for
        one probability.

    Why it matters
        The derivative of a sigmoid or softmax is p (1 - p), zero where p is 0 or 1 in floating point. The logarithm
        would make up for it, if it were not cut off (at 1e-7, or at -100) to keep it finite: wrong and certain
        answers get no gradient. A loss that takes the scores themselves has the gradient p - y there.

    Decided by
        pinned: 0.5, most of them. The loss: ln K is the cross-entropy of equal probabilities, so pinned answers with
        a larger one are wrong ones.

    Stays silent when
        The answers are certain and right: the loss is small. Labels are noise: the probabilities stay in the middle.
        Or the loss takes scores (cross-entropy or binary cross-entropy of logits).

    Remedies
        remove-output-activation, standardize-inputs, reinitialize-layers

    References
        PyTorch documentation of BCELoss (logarithms are clamped at -100) and BCEWithLogitsLoss; Goodfellow, Bengio &
        Courville 2016, Deep learning, section 6.2.2.2 (the logarithm undoes the exponential of the sigmoid).
    """

    stage: ClassVar[Stage] = "output"
    needs: ClassVar[tuple[str, ...]] = ("loss",)
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite", "saturation", "output_rms", "output_mean")
    explains: ClassVar[tuple[str, ...]] = ("loss-plateau", "no-gradient", "vanishing-gradients")
    remedies: ClassVar[tuple[str, ...]] = ("remove-output-activation", "standardize-inputs", "reinitialize-layers")

    pinned: float = 0.5

    def check(self, history: History) -> Iterator[Finding]:
        graph, curve = next(iter(loss_graphs(history)), None), loss_curve(history)
        if graph is None or curve is None or not curve.stuck or graph.step >= history.num_steps:
            return
        kind = self._squashed(graph)
        if kind is None:
            return
        layer = output_layer(history, SQUASHING[kind])
        chance = math.log(max(2, layer.units if layer is not None and kind == "Softmax" else 2))
        evidence = self._pinned(history, graph, layer)
        if evidence is None or not curve.end >= chance:
            return
        yield self._saturated(history, kind, chance, evidence, curve)

    def _saturated(self, history: History, kind: str, chance: float, evidence: Evidence, curve: LossCurve) -> Finding:
        return self.finding(
            history,
            level="error",
            message=f"{100 * evidence.observed:.0f} % of the output's {SQUASHING[kind]} is pinned at an end of its "
            f"range, where the logarithm is cut off and no gradient is left, at a loss of {curve.end:.4g}; equal "
            f"probabilities have {chance:.3g}.",
            first_step=evidence.step,
            layers=(evidence.layer,) if evidence.layer else (),
            evidence=(evidence,),
            confidence=0.8,
        )

    def _squashed(self, graph: LossGraph) -> str | None:
        """The activation whose result a logarithm takes, with only clamps, sums and choices between."""
        names = graph.above_product
        logs = [index for index, name in enumerate(names) if name in LOGARITHMS]
        return next((name for name in names[logs[0] + 1 :] if name in SQUASHING), None) if logs else None

    def _pinned(self, history: History, graph: LossGraph, layer: Layer | None) -> Evidence | None:
        series = history.series.get("saturation" if layer is not None and layer.kind == "sigmoid" else "output_rms")
        shares = self._shares(history, layer) if layer is not None else np.empty(0)
        if series is not None and median(shares[-5:]) >= self.pinned and layer is not None:
            # Since when: behind the last reading at which the output was free.
            free = np.flatnonzero(~(shares >= self.pinned))
            since = int(free[-1]) + 1 if len(free) and free[-1] + 1 < len(shares) else 0
            share, step = median(shares[-5:]), int(series.steps[since])
            return Evidence(statistic="pinned_fraction", observed=share, limit=self.pinned, step=step, layer=layer.name)
        if graph.flat_share >= self.pinned:
            return Evidence(
                statistic="flat_share", observed=graph.flat_share, limit=self.pinned, step=graph.step, layer=None
            )
        return None

    def _shares(self, history: History, layer: Layer) -> Floats:
        """[S]: which share of the layer's output is pinned."""
        column = column_of(history, layer)
        saturation = history.series.get("saturation")
        if layer.kind == "sigmoid":
            return np.empty(0) if saturation is None else saturation.values[:, column]
        rms, mean = history.series.get("output_rms"), history.series.get("output_mean")
        if rms is None or mean is None or rms.values.shape != mean.values.shape:
            return np.empty(0)
        # 1 where every p is 0 or 1, and 1/K where all are equal, which is as far from pinned as can be.
        ratio = rms.values[:, column] ** 2 / np.where(mean.values[:, column] > 0, mean.values[:, column], 1)
        uniform = 1 / max(2, layer.units)
        return np.asarray((ratio - uniform) / (1 - uniform))
