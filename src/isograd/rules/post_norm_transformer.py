"""post-norm-transformer."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._loss_graph import loss_graphs
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class PostNormTransformer(Rule):
    """Transformer blocks that normalize behind the residual join, trained without warm-up.

    Detects
        A network with attention in which `joins` or more residual joins are read by a normalization and by nothing
        else, a learning rate that reaches half of its largest value within `start` of the run, and a run that failed.

    Why it matters
        A normalization behind the join divides the identity path as well: over L blocks the gradient that reaches the
        first ones shrinks by 2^(-L/2), while that of the last ones is large at the start, O(d sqrt(ln d)) however deep
        the network is. The first full steps throw the last blocks to where their outputs drown what comes in, and
        training stays there. Warm-up makes those steps small; normalizing inside the branch (pre-norm) removes the
        cause.

    Decided by
        joins: 6, three blocks of attention and feed-forward; one or two blocks train without warm-up.
        start: 0.02 of the run. Vaswani et al. (2017) warm up over 4 % of theirs (4000 of 100,000 steps).

    Stays silent when
        The run learns (shallow, small rates, scaled initialization), the rate warms up, or the shortcut goes on past
        the normalization (pre-norm, also with a normalization at the very end).

    Remedies
        warm-up-learning-rate, move-normalization, lower-learning-rate

    References
        Xiong et al. 2020, On layer normalization in the transformer architecture, arXiv:2002.04745; Liu et al. 2020,
        Understanding the difficulty of training transformers, arXiv:2004.08249; Wang et al. 2022, DeepNet,
        arXiv:2203.00555; Vaswani et al. 2017, arXiv:1706.03762.
    """

    stage: ClassVar[Stage] = "architecture"
    needs: ClassVar[tuple[str, ...]] = ("loss", "learning_rate")
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite",)
    explains: ClassVar[tuple[str, ...]] = (
        "vanishing-gradients",
        "exploding-gradients",
        "loss-plateau",
        "loss-oscillation",
        "loss-spike",
        "loss-divergence",
        "oversmoothing",
    )
    remedies: ClassVar[tuple[str, ...]] = ("warm-up-learning-rate", "move-normalization", "lower-learning-rate")

    joins: int = 6
    start: float = 0.02

    def check(self, history: History) -> Iterator[Finding]:
        curve = loss_curve(history)
        graph = max(loss_graphs(history), key=lambda graph: graph.post_norms, default=None)
        if curve is None or not curve.failed or graph is None or graph.post_norms < self.joins:
            return
        attention = tuple(
            layer.name for layer in history.layers if layer.kind == "attention" and np.isfinite(layer.position)
        )
        rise = self._rise(history)
        if not attention or rise is None or rise > self.start * history.num_steps:
            return
        rate = float(np.nanmax(history["learning_rate"].values[rise]))
        first = int(history["loss"].steps[0])
        yield self.finding(
            history,
            level="error" if curve.lost or curve.share < 0.1 else "warning",
            message=f"{graph.post_norms} of {graph.shortcuts} residual joins are normalized behind the join (limit "
            f"{self.joins}), and the learning rate stands at {rate:.2g} from step {rise} on, without warm-up; the loss "
            f"went from {curve.start:.4g} to {curve.end:.4g}.",
            first_step=first,
            layers=attention,
            evidence=(
                Evidence(statistic="post_norms", observed=float(graph.post_norms), limit=float(self.joins), step=first),
            ),
            confidence=0.75,
        )

    def _rise(self, history: History) -> int | None:
        """The reading at which the learning rate first has half of its largest value."""
        values = history["learning_rate"].values
        rates = np.nanmax(np.where(np.isfinite(values), values, 0.0), axis=1, initial=0.0) if values.ndim == 2 else None
        if rates is None or not len(rates) or not rates.max() > 0:
            return None
        return int(np.flatnonzero(rates >= rates.max() / 2)[0])
