"""broadcast-loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import ClassVar

from isograd._history import History
from isograd._loss_graph import LossGraph, loss_graphs
from isograd._rule import Evidence, Finding, Rule, Stage

PAIRING = frozenset({"Sub", "Rsub", "Add", "Mul"})
"""Operations that combine prediction and target entry by entry."""


@dataclass(frozen=True, kw_only=True)
class BroadcastLoss(Rule):
    """Prediction and target have shapes that stretch against each other: every prediction meets every target.

    Detects
        A loss of the framework that received a stretched side, of `growth` times the entries or more; or an
        elementwise difference in the loss's graph that makes a [B, B] table of a prediction with B entries.

    Why it matters
        [B, 1] against [B] becomes [B, B]. The mean over all pairs is least where every prediction is the mean of the
        targets: the loss falls to their variance and stays there, without any error.

    Decided by
        growth: 2, read from the shapes.

    Stays silent when
        Shapes agree, or the prediction was given its extra axis on purpose (unsqueeze, indexing with None), as
        pairwise distances and quantile losses do. One prediction for the whole batch, a single number, is meant.

    Remedies
        match-shapes

    References
        PyTorch's own warning in mse_loss ("Using a target size that is different to the input size"); deepset
        FARM, issue 229.
    """

    stage: ClassVar[Stage] = "output"
    needs: ClassVar[tuple[str, ...]] = ("loss",)
    explains: ClassVar[tuple[str, ...]] = ("loss-plateau", "undertrained")
    remedies: ClassVar[tuple[str, ...]] = ("match-shapes",)

    growth: float = 2.0

    def check(self, history: History) -> Iterator[Finding]:
        for graph in loss_graphs(history):
            shapes = self._told(graph) or self._seen(graph)
            if shapes is None or graph.step >= history.num_steps:
                continue
            before, after = shapes
            factor = prod(after) / max(1, prod(before))
            yield self.finding(
                history,
                level="error",
                message=f"The prediction of shape {list(before)} and the target were stretched to {list(after)} in "
                f"the loss: {factor:.0f} times as many entries, every prediction against every target.",
                first_step=graph.step,
                evidence=(Evidence(statistic="stretched", observed=factor, limit=self.growth, step=graph.step),),
                confidence=0.95,
            )
            return

    def _told(self, graph: LossGraph) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """(shape of the prediction, shape in the loss) where a loss of the framework was given two shapes."""
        for loss in graph.losses:
            before, after = loss.prediction_shape, _broadcast(loss.prediction_shape, loss.target_shape)
            if loss.broadcast and after is not None and prod(before) > 1 and self._grew(before, after):
                return before, after
        return None

    def _seen(self, graph: LossGraph) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
        """The same for a loss written out, where a table of pairs comes out of a list of predictions."""
        rows = list(zip(graph.operations, graph.shapes, strict=False))[: len(graph.above_product) + 1]
        for (operation, after), (below, before) in pairwise(rows):
            is_table = len(after) == 2 and after[0] == after[1] == prod(before) > 1
            if operation in PAIRING and is_table and self._grew(before, after) and not below.startswith("Unsqueeze"):
                return before, after
        return None

    def _grew(self, before: tuple[int, ...], after: tuple[int, ...]) -> bool:
        return prod(after) >= self.growth * prod(before)


def _broadcast(one: tuple[int, ...], other: tuple[int, ...]) -> tuple[int, ...] | None:
    """The shape that two shapes stretch to, None when they do not fit."""
    size = max(len(one), len(other))
    pairs = list(zip((1,) * (size - len(one)) + one, (1,) * (size - len(other)) + other, strict=True))
    if any(a != b and 1 not in (a, b) for a, b in pairs):
        return None
    return tuple(max(a, b) for a, b in pairs)
