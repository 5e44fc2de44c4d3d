"""oversmoothing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._loss_graph import loss_graphs
from isograd._rule import Evidence, Finding, Rule, Stage
from isograd._similarity import Merging, merging


@dataclass(frozen=True, kw_only=True)
class Oversmoothing(Rule):
    """Nodes or tokens are averaged with their neighbors at every layer until all are the same.

    Detects
        In a network that mixes rows (attention, a product with an adjacency or attention matrix from the left,
        messages scattered to nodes): 1 - c, with c the mean cosine between two rows of a layer's output, falls by
        `decades` or more from the first to the last third of the layers with weights, to at most `left` there, in half
        of the deep readings or more, and the loss is stuck.

    Why it matters
        A product with a normalized adjacency or attention matrix is an average: repeated, it converges to its leading
        eigenvector, and what told nodes apart is multiplied by the second eigenvalue at every layer. The output is
        the same for all, and so is the gradient.

    Decided by
        left: 0.02. Attention without shortcuts reaches 0.07 after two layers and 0.0003 after three.
        decades: 1, so that rows which are alike from the input on (constant features, padding) are not blamed on
        depth.

    Stays silent when
        The loss falls: representations that look alike to the cosine can differ enough for the readout, and a class
        token or a pooled readout needs one row only. Nothing mixes rows: then it is deep-without-shortcuts.

    Remedies
        insert-shortcuts, insert-normalization, remove-layers

    References
        Li, Han & Wu 2018, Deeper insights into graph convolutional networks, arXiv:1801.07606; Oono & Suzuki 2020,
        arXiv:1905.10947; Dong, Cordonnier & Loukas 2021, Attention is not all you need, arXiv:2103.03404; Noci et al.
        2022, arXiv:2206.03126; Chen et al. 2020, GCNII, arXiv:2007.02133 (the cure).
    """

    stage: ClassVar[Stage] = "architecture"
    needs: ClassVar[tuple[str, ...]] = ("row_similarity",)
    uses: ClassVar[tuple[str, ...]] = ("loss", "loss_nonfinite")
    explains: ClassVar[tuple[str, ...]] = (
        "vanishing-gradients",
        "loss-plateau",
        "no-gradient",
        "deep-without-shortcuts",
    )
    remedies: ClassVar[tuple[str, ...]] = ("insert-shortcuts", "insert-normalization", "remove-layers")

    left: float = 0.02
    decades: float = 1.0

    def check(self, history: History) -> Iterator[Finding]:
        curve, seen = loss_curve(history), merging(history)
        if curve is None or not curve.stuck or not self._mixes_rows(history):
            return
        merged = [reading for reading in seen if reading.deep <= self.left and reading.decades >= self.decades]
        if not merged or 2 * len(merged) < len(seen):
            return
        worst = min(merged, key=lambda reading: reading.deep)
        names = tuple(history.layers[index].name for index in worst.columns)
        yield self.finding(
            history,
            level="error" if curve.share < 0.1 else "warning",
            message=f"Over {len(names)} layers, what tells two rows (nodes, tokens) apart falls from "
            f"{worst.shallow:.2g} to {worst.deep:.1g} of their size at step {worst.step} (limit {self.left:g}), and "
            f"the loss stays at {curve.end:.4g}.",
            first_step=merged[0].step,
            last_step=merged[-1].step,
            layers=self._ordered(history, worst),
            evidence=(
                Evidence(statistic="row_difference", observed=worst.deep, limit=self.left, step=worst.step, below=True),
                Evidence(
                    statistic="row_difference_decades", observed=worst.decades, limit=self.decades, step=worst.step
                ),
            ),
            confidence=0.8,
        )

    def _mixes_rows(self, history: History) -> bool:
        has_attention = any(layer.kind == "attention" and np.isfinite(layer.position) for layer in history.layers)
        return has_attention or any(graph.mixings > 0 for graph in loss_graphs(history))

    def _ordered(self, history: History, reading: Merging) -> tuple[str, ...]:
        """The layers, those whose rows are most alike first."""
        alike = np.argsort(np.nan_to_num(reading.difference, nan=np.inf), kind="stable")
        return tuple(history.layers[reading.columns[index]].name for index in alike)
