"""bounded-output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import boundary
from isograd._history import History
from isograd._loss_curve import LossCurve, loss_curve
from isograd._loss_graph import MOVES, POOLINGS, LossGraph, column_of, loss_graphs, output_layer
from isograd._robust import median
from isograd._rule import Evidence, Finding, Rule, Stage

RANGES = {"Sigmoid": (0.0, 1.0), "Tanh": (-1.0, 1.0), "Softmax": (0.0, 1.0)}
"""What an output activation can return."""

DISTANCES = frozenset({"MseLoss", "SmoothL1Loss", "HuberLoss", "L1Loss"})
WRITTEN_OUT = frozenset({"Abs", "Pow", "Sub"})
"""Losses that measure a distance, and what such a loss is made of where it is written out; cross-entropies are meant
for probabilities."""

KEEPING = MOVES | POOLINGS | {"Index", "IndexSelect", "Gather", "MaskedSelect", "Expand", "Repeat", "Clamp", "Flip"}
"""What returns nothing that lies outside the range of what it is given."""


@dataclass(frozen=True, kw_only=True)
class BoundedOutput(Rule):
    """The output's activation has a range that does not hold the targets.

    Detects
        In the loss's graph, a sigmoid, tanh or softmax right behind the last product with weights, a distance as the
        loss, and nothing in between that leaves the activation's range; together with targets of which a good part
        lies outside that range; or, where targets could not be read, an output that sits at the end of its range
        (saturation at or above `pinned`) in a run whose loss is stuck.

    Why it matters
        A sigmoid cannot answer 31. The best it can do is to saturate, where its own slope stops all learning.

    Decided by
        outside: the mean of the targets plus or minus one standard deviation, no further than the largest and the
        smallest target themselves, at least `outside` (0.05) of the range beyond its end: a sixth of the targets or
        more is out of reach. The extremes matter where targets are skewed: most pixels of a drawing are 0, and one
        standard deviation below their mean there is none. pinned: 0.9 of the output's entries.

    Stays silent when
        Targets fit (images in [0, 1] behind a sigmoid, actions in [-1, 1] behind a tanh), a few outliers do not,
        what the activation returns is scaled, shifted or weighs other outputs (a gate, an attention), or the loss is
        a cross-entropy.

    Remedies
        remove-output-activation, standardize-targets

    References
        Stack Overflow 48221692; Bishop 1995, Neural networks for pattern recognition, section 6.1 (linear outputs for
        regression).
    """

    stage: ClassVar[Stage] = "output"
    needs: ClassVar[tuple[str, ...]] = ("loss",)
    uses: ClassVar[tuple[str, ...]] = (
        "loss_nonfinite",
        "output_mean",
        "output_std",
        "output_min",
        "output_max",
        "saturation",
    )
    explains: ClassVar[tuple[str, ...]] = ("loss-plateau", "no-gradient", "vanishing-gradients")
    remedies: ClassVar[tuple[str, ...]] = ("remove-output-activation", "standardize-targets")

    outside: float = 0.05
    pinned: float = 0.9

    def check(self, history: History) -> Iterator[Finding]:
        curve = loss_curve(history)
        graph = next((graph for graph in loss_graphs(history) if _bounding(graph)), None)
        if graph is None or curve is None or graph.step >= history.num_steps:
            return
        kind = _bounding(graph)
        evidence = self._unreachable(history, kind) or self._pinned(history, kind, curve)
        if evidence is None:
            return
        low, high = RANGES[kind]
        layer = output_layer(history, kind.lower())
        what = (
            f"{100 * evidence.observed:.0f} % of it sits at an end of that range"
            if evidence.statistic == "saturation"
            else f"within one standard deviation of their mean the targets reach {evidence.observed:.4g}"
        )
        yield self.finding(
            history,
            level="error" if curve.failed else "warning",
            message=f"The output goes through a {kind.lower()}, which returns {low:g} to {high:g}, and {what}. The "
            f"loss went from {curve.start:.4g} to {curve.end:.4g}.",
            first_step=graph.step,
            layers=(layer.name,) if layer else (),
            evidence=(evidence,),
            confidence=0.9 if evidence.statistic != "saturation" else 0.7,
        )

    def _unreachable(self, history: History, kind: str) -> Evidence | None:
        means, spreads = history.series.get("output_mean"), history.series.get("output_std")
        if means is None or spreads is None or means.values.shape != spreads.values.shape or not len(means):
            return None
        low, high = RANGES[kind]
        margin = self.outside * (high - low)
        for index in boundary(history, "target"):
            center, spread = median(means.values[:, index]), median(spreads.values[:, index])
            above = min(center + spread, _typical(history, "output_max", index, missing=np.inf))
            below = max(center - spread, _typical(history, "output_min", index, missing=-np.inf))
            if above >= high + margin:
                return _at(history, int(index), above, high + margin)
            if below <= low - margin:
                return _at(history, int(index), below, low - margin, below=True)
        return None

    def _pinned(self, history: History, kind: str, curve: LossCurve) -> Evidence | None:
        series, layer = history.series.get("saturation"), output_layer(history, kind.lower())
        if series is None or layer is None or not len(series) or not curve.stuck or boundary(history, "target").size:
            return None
        share = median(series.values[-5:, column_of(history, layer)])
        if not share >= self.pinned:
            return None
        step = int(series.steps[-1])
        return Evidence(statistic="saturation", observed=share, limit=self.pinned, step=step, layer=layer.name)


def _bounding(graph: LossGraph) -> str:
    """The activation whose range bounds what enters the distance; empty where there is none."""
    names = graph.above_product
    written_out = max((index for index, name in enumerate(names) if name in WRITTEN_OUT), default=len(names))
    loss = max((index for index, name in enumerate(names) if name in DISTANCES), default=written_out)
    between = [name for name in names[loss + 1 :] if name not in KEEPING]
    return between[0] if len(between) == 1 and between[0] in RANGES else ""


def _typical(history: History, statistic: str, index: int, *, missing: float) -> float:
    """A layer's median reading of `statistic`, `missing` where it was not read."""
    series = history.series.get(statistic)
    value = float("nan") if series is None else median(series.values[:, index])
    return missing if np.isnan(value) else value


def _at(history: History, index: int, observed: float, limit: float, *, below: bool = False) -> Evidence:
    return Evidence(
        statistic="output_mean",
        observed=observed,
        limit=limit,
        step=int(history.series["output_mean"].steps[0]),
        layer=history.layers[index].name,
        below=below,
    )
