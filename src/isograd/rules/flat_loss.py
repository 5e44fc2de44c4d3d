"""flat-loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._loss_curve import LARGE_SHARE, loss_curve
from isograd._loss_graph import MOVES, LossGraph, loss_graphs
from isograd._rule import Evidence, Finding, Rule, Stage

CUTTING = {
    "Clamp": "clamp",
    "ClampMin": "clamp",
    "ClampMax": "clamp",
    "Hardtanh": "hardtanh",
    "Hardsigmoid": "hardsigmoid",
    "Threshold": "threshold",
    "Sign": "sign",
    "Round": "round",
    "Floor": "floor",
    "Ceil": "ceil",
    "Heaviside": "step",
    "Minimum": "minimum",
    "Maximum": "maximum",
}
"""Operations whose derivative is zero over a part of their range, or everywhere."""


@dataclass(frozen=True, kw_only=True)
class FlatLoss(Rule):
    """The loss has a derivative of exactly zero where the predictions are.

    Detects
        An operation with a flat part (clamp, sign, round, threshold, minimum) stands in the loss's graph behind the
        last layer with weights, and no parameter receives a gradient other than exactly 0, from the first step on, for
        `patience` steps or more. Or a clamp of an error, a difference of prediction and target, cuts off `most` of
        its entries at the start, and the loss is stuck.

    Why it matters
        Clamping an error to [-1, 1] before squaring it, meant to bound the gradient, makes the gradient zero for
        every error beyond 1: the larger the mistake, the less is learned. What is meant is the Huber loss.

    Decided by
        patience: 3 steps. A gradient of exactly 0.0 has no threshold. most: 0.9 of the entries; what is left of the
        gradient of a mean is then a tenth, and the run would need ten times its steps.

    Stays silent when
        The loss falls by four fifths all the same. Or any gradient arrives: clamps that guard a logarithm or a ratio
        (clipped policy objectives, hinge losses) are flat for some examples only.

    Remedies
        standardize-targets

    References
        Mnih et al. 2015, Human-level control through deep reinforcement learning (error clipping, often misread as
        clamping the error); Huber 1964, Robust estimation of a location parameter.
    """

    stage: ClassVar[Stage] = "output"
    needs: ClassVar[tuple[str, ...]] = ("loss", "grad_max")
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite", "grad_nonfinite")
    explains: ClassVar[tuple[str, ...]] = ("no-gradient", "loss-plateau", "vanishing-gradients")
    remedies: ClassVar[tuple[str, ...]] = ("standardize-targets",)

    patience: int = 3
    most: float = 0.9

    def check(self, history: History) -> Iterator[Finding]:
        graph, curve = next(iter(loss_graphs(history)), None), loss_curve(history)
        if graph is None or curve is None or graph.step >= history.num_steps:
            return
        cut = next((name for name in graph.above_product if name in CUTTING), None)
        if cut is None or curve.share >= LARGE_SHARE:
            return
        silent, step = self._silent_steps(history), int(history["grad_max"].steps[0])
        if silent >= self.patience:
            evidence = Evidence(statistic="grad_max", observed=0.0, limit=0.0, step=step, below=True)
            what = f"every gradient is exactly 0 for the first {silent} steps"
        elif curve.stuck and graph.flat_share >= self.most and self._cuts_an_error(graph):
            evidence = Evidence(statistic="flat_share", observed=graph.flat_share, limit=self.most, step=graph.step)
            what = f"{100 * graph.flat_share:.0f} % of the errors get no gradient at step {graph.step}"
        else:
            return
        yield self.finding(
            history,
            level="error",
            message=f"The loss goes through a {CUTTING[cut]} that is flat where the predictions are: {what}, and the "
            f"loss ends at {curve.end:.4g}.",
            first_step=step,
            evidence=(evidence,),
            confidence=0.9,
        )

    def _cuts_an_error(self, graph: LossGraph) -> bool:
        """Whether what is cut is a difference; a clamp of a probability or of a variance is a guard."""
        names = [name for name in graph.above_product if name not in MOVES]
        return any(a in CUTTING and b in ("Sub", "Rsub") for a, b in pairwise(names))

    def _silent_steps(self, history: History) -> int:
        """How many steps from the first on gave every parameter that was read a gradient of exactly 0."""
        largest, bad = history["grad_max"].values, history.series.get("grad_nonfinite")
        moving = np.nan_to_num(largest, nan=0.0) > 0
        if bad is not None and bad.values.shape == moving.shape:
            moving |= bad.values > 0
        if not np.isfinite(largest).any():
            return 0
        alive = np.flatnonzero(moving.any(axis=1))
        return int(alive[0]) if len(alive) else len(largest)
