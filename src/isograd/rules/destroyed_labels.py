"""destroyed-labels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import boundary
from isograd._history import History
from isograd._loss_graph import MOVES, POOLINGS, loss_graphs
from isograd._robust import finite, median
from isograd._rule import Evidence, Finding, Rule, Stage

LOSSES = frozenset(
    {
        "NllLoss",
        "NllLoss2D",
        "NllLossNd",
        "MseLoss",
        "SmoothL1Loss",
        "HuberLoss",
        "BinaryCrossEntropy",
        "BinaryCrossEntropyWithLogits",
    }
)

ANSWERS = frozenset({"LogSoftmax", "Softmax", "Sigmoid", "Tanh", "Log", "Clamp", "ClampMin", "Relu", "Add"}) | (
    MOVES | POOLINGS
)
"""Operations between a layer with weights and the loss that leave the layer's bias able to answer by itself."""


@dataclass(frozen=True, kw_only=True)
class DestroyedLabels(Rule):
    """The labels are all the same: they say nothing about the inputs.

    Detects
        A target of which every example that was read, `rows` or more in several batches, is the same, while the
        answers come straight out of a layer with weights; and no step at which the loss jumps by `jump` times its
        last values, as it does when a rare other label comes by.

    Why it matters
        The bias of the last layer answers a constant within a few steps. The loss falls to zero, the accuracy is
        100 %, and the network has learned nothing: a cast, a join or a division has destroyed the labels.

    Decided by
        rows: 500 examples. If all of n are equal, other labels make up less than 3 / n of the data with 95 %
        confidence (the rule of three): 0.6 %. jump: 10; one rare example among 64 raises a loss near zero by more.

    Stays silent when
        Single batches hold one class (sorted or rare ones), batches differ, the answer is a comparison with the
        constant by design (contrastive pairs, residuals of an equation, differences of scores), several losses have
        constants of their own (a discriminator), or a second model trains beside it.

    Remedies
        check-labels

    References
        Hanley & Lippman-Hand 1983, If nothing goes wrong, is everything all right? (rule of three); Humbatova et al.
        2020, arXiv:1910.11015 (wrong labels among the faults of training data).
    """

    stage: ClassVar[Stage] = "data"
    needs: ClassVar[tuple[str, ...]] = ("distinct_values", "output_min", "output_max", "loss")
    uses: ClassVar[tuple[str, ...]] = ("output_mean", "output_rms")
    explains: ClassVar[tuple[str, ...]] = ("no-gradient", "vanishing-gradients", "loss-plateau")
    remedies: ClassVar[tuple[str, ...]] = ("check-labels",)

    rows: int = 500
    jump: float = 10.0

    def check(self, history: History) -> Iterator[Finding]:
        targets = [int(i) for i in boundary(history, "target")]
        if history.companions or len(targets) != 1 or not self._answered_directly(history):
            return
        seen = self._constant_rows(history, targets[0])
        if seen < self.rows or self._jumps(history):
            return
        layer, step = history.layers[targets[0]], int(history["distinct_values"].steps[0])
        low, high = (median(history[name].values[:, targets[0]]) for name in ("output_min", "output_max"))
        same = f"{low:.4g}" if low == high else "one and the same row"
        yield self.finding(
            history,
            level="error",
            message=f"All {seen} examples of {layer.name} that were read are {same}: the labels say nothing about the "
            "inputs.",
            first_step=step,
            layers=(layer.name,),
            evidence=(
                Evidence(
                    statistic="constant_rows", observed=float(seen), limit=float(self.rows), step=step, layer=layer.name
                ),
            ),
            confidence=0.9,
        )

    def _answered_directly(self, history: History) -> bool:
        """Whether nothing but an activation stands between the last product with weights and the loss."""
        graph = next(iter(loss_graphs(history)), None)
        if graph is None or graph.step >= history.num_steps:
            return False
        names = graph.above_product
        places = [index for index, name in enumerate(names) if name in LOSSES]
        return bool(places) and all(name in ANSWERS for name in names[places[0] + 1 :])

    def _constant_rows(self, history: History, column: int) -> int:
        """How many examples were read if they were all the same, otherwise 0."""
        counts = history["distinct_values"].values[:, column]
        read = np.isfinite(counts)
        batch = history.layers[column].shape[:1]
        if read.sum() < 2 or not batch or np.any(counts[read] > 1):
            return 0
        moments = ("output_min", "output_max", "output_mean", "output_rms")
        if not all(_is_constant(history, statistic, column) for statistic in moments):
            return 0
        # A batch of one row is always of one kind: then its entries must be equal too.
        low, high = (median(history[name].values[:, column]) for name in ("output_min", "output_max"))
        alone = batch[0] == 1 and low != high
        return 0 if alone else int(read.sum()) * int(batch[0])

    def _jumps(self, history: History) -> bool:
        """Whether some later loss stands out of the five before it, and of rounding."""
        values = finite(history["loss"].values)
        if len(values) < 20:
            return False
        before = np.median(np.lib.stride_tricks.sliding_window_view(np.abs(values), 5)[:-1], axis=1)
        least = 1e-3 * float(np.max(np.abs(values[:5])))
        later = np.abs(values[5:])
        return bool(np.any((later >= self.jump * before) & (later >= least) & (np.arange(len(later)) >= 5)))


def _is_constant(history: History, statistic: str, column: int) -> bool:
    """Whether a statistic of a layer is the same at every reading, to rounding."""
    series = history.series.get(statistic)
    if series is None:
        return True
    known = finite(series.values[:, column])
    return bool(len(known)) and bool(np.ptp(known) <= 1e-6 * np.max(np.abs(known)))
