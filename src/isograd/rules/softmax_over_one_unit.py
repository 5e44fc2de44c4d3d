"""softmax-over-one-unit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from isograd._history import History
from isograd._loss_graph import LossGraph, loss_graphs, output_layer
from isograd._rule import Evidence, Finding, Rule, Stage

SOFTMAXES = ("Softmax", "LogSoftmax")


@dataclass(frozen=True, kw_only=True)
class SoftmaxOverOneUnit(Rule):
    """A softmax over a dimension of one entry: it is 1 whatever enters, and its derivative is 0.

    Detects
        In the loss's graph, a softmax or log-softmax right behind the last product with weights, over fewer than
        `entries` entries.

    Why it matters
        exp(x) / exp(x) = 1. The model's answer is a constant and every gradient behind it is exactly zero: no
        optimizer, rate or initialization moves anything. The remedy is a sigmoid, or as many units as classes.

    Decided by
        entries: 2, below which there is nothing to choose from.

    Stays silent when
        The softmax is not the output's: attention over a sequence that happens to have one element is a constant on
        that batch only.

    Remedies
        remove-output-activation

    References
        Wardat, Le & Rajan 2021, DeepLocalize (Stack Overflow 31880720); Bridle 1990, Probabilistic interpretation of
        feedforward classification network outputs.
    """

    stage: ClassVar[Stage] = "output"
    needs: ClassVar[tuple[str, ...]] = ("loss",)
    explains: ClassVar[tuple[str, ...]] = (
        "no-gradient",
        "loss-plateau",
        "vanishing-gradients",
        "flat-loss",
        "undertrained",
    )
    remedies: ClassVar[tuple[str, ...]] = ("remove-output-activation",)

    entries: int = 2

    def check(self, history: History) -> Iterator[Finding]:
        graph = next((graph for graph in loss_graphs(history) if self._is_constant(graph)), None)
        if graph is None or graph.step >= history.num_steps:
            return
        layer = output_layer(history, "softmax") or output_layer(history, "log-softmax")
        size = float(graph.softmax_sizes[-1])
        yield self.finding(
            history,
            level="error",
            message=f"The output goes through a softmax over {size:.0f} entry (fewer than {self.entries}): it is 1 "
            "whatever enters, and the gradient behind it is exactly 0.",
            first_step=graph.step,
            layers=(layer.name,) if layer else (),
            evidence=(
                Evidence(
                    statistic="softmax_size",
                    observed=size,
                    limit=float(self.entries - 1),
                    step=graph.step,
                    layer=layer.name if layer else None,
                    below=True,
                ),
            ),
            confidence=0.99,
        )

    def _is_constant(self, graph: LossGraph) -> bool:
        if graph.output_operation not in SOFTMAXES or not graph.softmax_sizes:
            return False
        return graph.softmax_sizes[-1] < self.entries
