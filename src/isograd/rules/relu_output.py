"""relu-output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import boundary
from isograd._history import History, Layer
from isograd._loss_curve import LossCurve, loss_curve
from isograd._loss_graph import LossGraph, column_of, loss_graphs, output_layer
from isograd._robust import median
from isograd._rule import Evidence, Finding, Level, Rule, Stage

DEAD = 0.9
"""The share of a layer's units from which dead-units calls it dead."""


@dataclass(frozen=True, kw_only=True)
class ReluOutput(Rule):
    """A ReLU on the model's answer: class scores or values cannot be negative, and a zero answer learns nothing.

    Detects
        In the loss's graph, a ReLU as the first operation behind the last product with weights, together with harm:
        a run whose loss is stuck or lost, and an output of K scores of which more is exactly zero at the end than one
        positive score per example would leave (`zeros` or more in any case), or targets of which a good part lies
        below zero.

    Why it matters
        Where the score is negative the output is 0 and so is its derivative: that example gives no gradient. Once
        all are, the model is dead, at a loss that no step changes.

    Decided by
        A share of 1 - (1 - 2^-K) / K: of K centered scores none is positive in 2^-K of the examples; had all others
        exactly one, this many entries would be zero (0.90 for 10 classes). Beyond it, examples without any positive
        score, and so without a gradient, must have come up. zeros: 0.75 at the least, for few scores: halfway from the
        half that is zero in any ReLU to all. Targets: their mean minus their standard deviation below 0, so that about
        a sixth of them or more cannot be reached.

    Stays silent when
        The run learns in spite of it: counts, prices and images are never negative, and some networks pool class
        maps behind a ReLU. Or units inside the network are dead, and the zeros come from there.

    Remedies
        remove-output-activation

    References
        Stack Overflow 47352366; Lu et al. 2019, Dying ReLU and initialization, arXiv:1903.06733; Iandola et al. 2016,
        SqueezeNet, arXiv:1602.07360 (a ReLU before the average pooling of class maps, which works).
    """

    stage: ClassVar[Stage] = "output"
    needs: ClassVar[tuple[str, ...]] = ("loss",)
    uses: ClassVar[tuple[str, ...]] = (
        "loss_nonfinite",
        "output_zero_fraction",
        "output_mean",
        "output_std",
        "dead_fraction",
    )
    explains: ClassVar[tuple[str, ...]] = ("no-gradient", "loss-plateau", "vanishing-gradients")
    remedies: ClassVar[tuple[str, ...]] = ("remove-output-activation",)

    zeros: float = 0.75

    def check(self, history: History) -> Iterator[Finding]:
        graph, curve = next(iter(loss_graphs(history)), None), loss_curve(history)
        layer = output_layer(history, "relu")
        if graph is None or curve is None or layer is None or graph.output_operation != "Relu":
            return
        evidence = self._negative_targets(history) or self._zero_outputs(history, layer)
        if evidence is None or not curve.failed or graph.step >= history.num_steps or self._died_before(history, layer):
            return
        yield self._harmful(history, graph, layer, evidence, curve)

    def _harmful(
        self, history: History, graph: LossGraph, layer: Layer, evidence: Evidence, curve: LossCurve
    ) -> Finding:
        what = (
            f"{100 * evidence.observed:.0f} % of it is exactly 0"
            if evidence.statistic == "output_zero_fraction"
            else f"targets reach below 0 ({evidence.observed:.3g} at one standard deviation under their mean)"
        )
        level: Level = "error" if curve.share < 0.5 else "warning"
        return self.finding(
            history,
            level=level,
            message=f"The output goes through a ReLU and {what}: what is cut off gets no gradient, and the loss stays "
            f"at {curve.end:.4g}.",
            first_step=graph.step if evidence.below else evidence.step,
            layers=(layer.name,),
            evidence=(evidence,),
            confidence=0.8,
        )

    def _died_before(self, history: History, layer: Layer) -> bool:
        """Whether a rectifier inside the network is dead: then the zeros come from there."""
        series = history.series.get("dead_fraction")
        inside = [i for i, other in enumerate(history.layers) if other.position < layer.position]
        return series is not None and any(median(series.values[-5:, i]) >= DEAD for i in inside)

    def _zero_outputs(self, history: History, layer: Layer) -> Evidence | None:
        series = history.series.get("output_zero_fraction")
        if series is None or not len(series):
            return None
        column = column_of(history, layer)
        limit = self._most_zeros(layer)
        share, low = median(series.values[-5:, column]), np.flatnonzero(series.values[:, column] < limit)
        begun = int(low[-1]) + 1 if len(low) else 0
        if not share >= limit or begun >= len(series):
            return None
        return Evidence(
            statistic="output_zero_fraction",
            observed=share,
            limit=limit,
            step=int(series.steps[begun]),
            layer=layer.name,
        )

    def _most_zeros(self, layer: Layer) -> float:
        """The largest share of zeros that one positive score for each example leaves."""
        scores = max(1, layer.units)
        return max(self.zeros, 1 - (1 - 2.0**-scores) / scores)

    def _negative_targets(self, history: History) -> Evidence | None:
        means, spreads = history.series.get("output_mean"), history.series.get("output_std")
        if means is None or spreads is None or means.values.shape != spreads.values.shape or not len(means):
            return None
        for index in boundary(history, "target"):
            low = median(means.values[:, index] - spreads.values[:, index])
            if "float" in history.layers[index].type and np.isfinite(low) and low < 0:
                name = history.layers[index].name
                return Evidence(
                    statistic="output_mean", observed=low, limit=0.0, step=int(means.steps[0]), layer=name, below=True
                )
        return None
