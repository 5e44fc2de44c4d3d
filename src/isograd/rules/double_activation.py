"""double-activation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._loss_graph import MOVES, LossGraph, loss_graphs, output_layer
from isograd._rule import Evidence, Finding, Level, Rule, Stage

APPLYING = {
    "LogSoftmax": "a log-softmax",
    "BinaryCrossEntropyWithLogits": "a sigmoid inside the binary cross-entropy",
    "LogSigmoid": "a log-sigmoid",
    "Softmax": "a softmax",
    "Sigmoid": "a sigmoid",
}
"""Operations that expect scores of any size and make probabilities of them."""

SQUASHING = {"Softmax": "softmax", "Sigmoid": "sigmoid"}
"""Operations whose result is a probability already."""


@dataclass(frozen=True, kw_only=True)
class DoubleActivation(Rule):
    """Probabilities enter a loss that makes probabilities of what it gets: a softmax or sigmoid is applied twice.

    Detects
        In the loss's graph, from the loss towards the layers: a (log-)softmax or (log-)sigmoid, and right behind it,
        with nothing but reshaping between, a softmax or a sigmoid: `activations` (2) in series.

    Why it matters
        The second one gets numbers between 0 and 1 and can hardly tell them apart: with K classes the loss of a
        perfect softmax stops at ln(e + K - 1) - 1 (0.74 for 4 classes) instead of 0, and the gradient is multiplied
        by p (1 - p) once more. The accuracy may look well.

    Decided by
        activations: 2, read from the graph: no threshold. An error where the loss is stuck as well.

    Stays silent when
        The values are scaled in between (a temperature, a learned gain), or a log-softmax is repeated, which changes
        nothing: log-softmax of a log-softmax is itself.

    Remedies
        remove-output-activation

    References
        PyTorch documentation of CrossEntropyLoss and BCEWithLogitsLoss (expects unnormalized scores); Humbatova et
        al. 2020, Taxonomy of real faults in deep learning systems, arXiv:1910.11015 (wrong output activation).
    """

    stage: ClassVar[Stage] = "output"
    needs: ClassVar[tuple[str, ...]] = ("loss",)
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite",)
    explains: ClassVar[tuple[str, ...]] = ("loss-plateau", "vanishing-gradients", "no-gradient", "undertrained")
    remedies: ClassVar[tuple[str, ...]] = ("remove-output-activation",)

    activations: int = 2

    def check(self, history: History) -> Iterator[Finding]:
        for graph in loss_graphs(history):
            series = self._in_series(graph)
            if len(series) >= self.activations and graph.step < history.num_steps:
                yield self._doubled(history, graph, series)
                return

    def _in_series(self, graph: LossGraph) -> list[str]:
        """The longest chain of activations that follow each other, from the loss down."""
        chain: list[str] = []
        for operation in graph.operations:
            if operation in (SQUASHING if chain else APPLYING):
                chain.append(operation)
            elif operation not in MOVES:
                if len(chain) >= self.activations:
                    break
                chain = []
        return chain

    def _doubled(self, history: History, graph: LossGraph, series: list[str]) -> Finding:
        inner = SQUASHING[series[-1]]
        layer = output_layer(history, inner)
        names = (layer.name,) if layer else ()
        return self.finding(
            history,
            level=self._level(history),
            message=f"What enters the loss has gone through a {inner} already, and the loss applies "
            f"{APPLYING[series[0]]} to it: {len(series)} in series.",
            first_step=graph.step,
            layers=names,
            evidence=(
                Evidence(
                    statistic="activations_in_series",
                    observed=float(len(series)),
                    limit=float(self.activations),
                    step=graph.step,
                    layer=layer.name if layer else None,
                ),
            ),
            confidence=0.95,
        )

    def _level(self, history: History) -> Level:
        curve = loss_curve(history)
        return "error" if curve is not None and curve.failed else "warning"
