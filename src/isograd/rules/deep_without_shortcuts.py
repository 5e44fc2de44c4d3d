"""deep-without-shortcuts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import Profile, profiles
from isograd._gain import initial_gain
from isograd._history import History
from isograd._loss_curve import LossCurve, loss_curve
from isograd._loss_graph import LossGraph, loss_graphs
from isograd._rule import Evidence, Finding, Level, Rule, Stage
from isograd._similarity import Merging, merging


@dataclass(frozen=True, kw_only=True)
class DeepWithoutShortcuts(Rule):
    """Depth itself loses the signal: a long chain of products with nothing that carries the signal past them.

    Detects
        A chain of `depth` products with weights or more between loss and input, with fewer than one residual join and
        fewer than one normalization per `branch` of them. And the signal does not get through: the gradient loses or
        gains `decades` on its way back, or, in a run that failed, what tells two samples apart, 1 - c with c the mean
        cosine between rows, falls to `left` or less in the last third of the layers, by a decade or more.

    Why it matters
        Each layer multiplies the signal by a factor near 1 or not so near, and depth is the exponent: 0.7 per layer,
        harmless in four layers, is 1e-5 in 32. Where the norm survives, directions do not: all inputs end as the same
        output. An identity path adds where a plain chain multiplies.

    Decided by
        depth: 10. Srivastava et al. (2015) train plain networks of 10 layers as well as any, and of 20 not.
        branch: 6, twice the longest branch of usual residual networks (three products in a bottleneck).
        decades: 3, as for vanishing-gradients. hopeless: 7 decades, the resolution of float32, is a warning even where
        the loss falls. left: 0.001, the resolution of float16 (2^-10).

    Stays silent when
        The signal arrives: with critical or orthogonal weights it does through hundreds of plain layers, and
        self-normalizing ones keep it. Residual, dense, highway and pre-norm networks have joins. Info while the run
        learns all the same.

    Remedies
        insert-shortcuts, insert-normalization, reinitialize-layers

    References
        He et al. 2016, Deep residual learning, arXiv:1512.03385; Srivastava, Greff & Schmidhuber 2015, Highway
        networks, arXiv:1505.00387; Schoenholz et al. 2017, arXiv:1611.01232 (depth to which inputs can be told
        apart); Balduzzi et al. 2017, The shattered gradients problem, arXiv:1702.08591.
    """

    stage: ClassVar[Stage] = "architecture"
    needs: ClassVar[tuple[str, ...]] = ("signal_norm",)
    uses: ClassVar[tuple[str, ...]] = (
        "grad_norm",
        "row_similarity",
        "weight_norm",
        "output_rms",
        "loss",
        "loss_nonfinite",
    )
    explains: ClassVar[tuple[str, ...]] = ("vanishing-gradients", "exploding-gradients", "loss-plateau", "no-gradient")
    remedies: ClassVar[tuple[str, ...]] = ("insert-shortcuts", "insert-normalization", "reinitialize-layers")

    depth: int = 10
    branch: int = 6
    decades: float = 3.0
    hopeless: float = 7.0
    left: float = 0.001

    def check(self, history: History) -> Iterator[Finding]:
        graph = next((graph for graph in loss_graphs(history) if self._is_plain(graph)), None)
        if graph is None:
            return
        curve = loss_curve(history)
        lost = self._most(profiles(history)[:4])
        merged = next((reading for reading in merging(history)[:4] if self._is_merged(reading)), None)
        if curve is None or not curve.failed:
            merged = None
        seen: list[Profile | Merging] = [reading for reading in (lost, merged) if reading is not None]
        if not seen:
            return
        yield self.finding(
            history,
            level=self._level(curve, 0.0 if lost is None else abs(lost.lost)),
            message=f"{graph.products} layers in a row with {graph.shortcuts} shortcuts and {graph.norms} "
            f"normalizations: {self._words(lost, merged)}.",
            first_step=seen[0].step,
            layers=tuple(history.layers[index].name for index in seen[0].columns),
            evidence=tuple(self._evidence(lost, merged)),
            confidence=self._confidence(history),
        )

    def _level(self, curve: LossCurve | None, lost: float) -> Level:
        if curve is None or not curve.failed:
            return "warning" if lost >= self.hopeless else "info"
        return "error" if curve.lost or curve.share < 0.1 else "warning"

    def _is_plain(self, graph: LossGraph) -> bool:
        return graph.products >= self.depth and self.branch * max(graph.shortcuts, graph.norms) < graph.products

    def _most(self, seen: list[Profile]) -> Profile | None:
        """Of the first readings the one that loses or gains most, if that is in half of them beyond `decades`."""
        over = [profile for profile in seen if abs(profile.lost) >= self.decades]
        return max(over, key=lambda profile: abs(profile.lost)) if over and 2 * len(over) >= len(seen) else None

    def _is_merged(self, reading: Merging) -> bool:
        return reading.deep <= self.left and reading.decades >= 1

    def _words(self, lost: Profile | None, merged: Merging | None) -> str:
        parts = []
        if lost is not None:
            verb = "loses" if lost.lost > 0 else "gains"
            parts.append(f"the gradient {verb} {abs(lost.lost):.1f} decades (limit {self.decades:g})")
        if merged is not None:
            parts.append(f"samples differ by {merged.deep:.1g} of their size in the last layers (limit {self.left:g})")
        return " and ".join(parts)

    def _evidence(self, lost: Profile | None, merged: Merging | None) -> Iterator[Evidence]:
        if lost is not None:
            yield Evidence(
                statistic="decades_lost" if lost.lost > 0 else "decades_gained",
                observed=abs(lost.lost),
                limit=self.decades,
                step=lost.step,
            )
        if merged is not None:
            yield Evidence(
                statistic="row_difference", observed=merged.deep, limit=self.left, step=merged.step, below=True
            )

    def _confidence(self, history: History) -> float:
        """Lower where the scale of the weights alone accounts for half of what is lost: depth is then survivable."""
        gain = initial_gain(history)
        if gain is None or not np.isfinite(gain.predicted * gain.backward):
            return 0.6
        return 0.5 if gain.predicted * gain.backward > 0 and abs(gain.predicted) >= abs(gain.backward) / 2 else 0.75
