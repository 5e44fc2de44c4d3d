"""hidden-state-not-detached."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import Event, Floats, History, Integers
from isograd._loss_curve import loss_curve
from isograd._rule import Evidence, Finding, Rule, Stage

AGAIN = {"backward through the graph a second time": 1, "has been modified by an inplace operation": 2}
"""What torch says when a step's backward pass runs into the graph, or the weights, of an earlier step, and how many
steps must have gone well before for these words to mean that."""


@dataclass(frozen=True, kw_only=True)
class HiddenStateNotDetached(Rule):
    """The loss depends on the graphs of earlier steps through a state that is carried over without being detached.

    Detects
        graph_nodes, the size of the autograd graph below the loss, grows from reading to reading by at least `part` of
        its first size per step, in `share` of the readings and to the last of them, `readings` at least.

    Why it matters
        Every step computes gradients through all steps before it: time and memory grow without bound, the gradient
        passes through the hidden state of the whole past and vanishes or explodes, and weights that were updated in
        the meantime make it wrong, or make torch refuse the second step.

    Decided by
        part: 0.1 of one step's graph, for a state that only a small part of the network makes. share: 0.9.
        readings: 4, so that two long sequences in a row do not count. An error, whatever the sizes, where the run ended
        with torch's refusal to go back through an earlier step.

    Stays silent when
        The graph grows and shrinks with the length of the sequences, or is cut every few steps (truncated
        backpropagation through time).

    Remedies
        detach-hidden-state

    References
        Williams & Peng 1990, An efficient gradient-based algorithm for on-line training of recurrent network
        trajectories (truncation); PyTorch, Word-level language modeling example (`repackage_hidden`).
    """

    stage: ClassVar[Stage] = "loop"
    needs: ClassVar[tuple[str, ...]] = ("graph_nodes",)
    uses: ClassVar[tuple[str, ...]] = ("loss", "loss_nonfinite")
    explains: ClassVar[tuple[str, ...]] = (
        "exploding-gradients",
        "vanishing-gradients",
        "loss-divergence",
        "loss-plateau",
        "recurrent-explosion",
        "recurrent-vanishing",
    )
    remedies: ClassVar[tuple[str, ...]] = ("detach-hidden-state",)

    part: float = 0.1
    share: float = 0.9
    readings: int = 4

    def check(self, history: History) -> Iterator[Finding]:
        series, refusal = history["graph_nodes"], self._refusal(history)
        known = np.isfinite(series.values) & (series.values > 0) if series.values.ndim == 1 else np.zeros(0, dtype=bool)
        steps, sizes = series.steps[: len(known)][known], series.values[: len(known)][known]
        growth = self._growth(steps, sizes) if len(sizes) >= self.readings else None
        if growth is not None:
            yield self._grown(history, steps, sizes, growth, refusal)
        elif refusal is not None and len(sizes):
            yield self._refused(history, int(steps[0]), float(sizes[0]), refusal)

    def _grown(self, history: History, steps: Integers, sizes: Floats, growth: float, refusal: Event | None) -> Finding:
        last, curve = int(np.argmax(sizes)), loss_curve(history)
        return self.finding(
            history,
            level="error" if refusal is not None or (curve is not None and curve.lost) else "warning",
            message=f"The graph below the loss grew from {sizes[0]:.0f} nodes at step {steps[0]} to {sizes[last]:.0f} "
            f"at step {steps[last]}, by {100 * growth:.0f} % of its first size with every step (limit "
            f"{100 * self.part:.0f} %): each step carries the graphs of the steps before it.",
            first_step=int(steps[0]),
            evidence=(Evidence(statistic="graph_growth", observed=growth, limit=self.part, step=int(steps[last])),),
            confidence=0.9,
        )

    def _refused(self, history: History, step: int, size: float, refusal: Event) -> Finding:
        return self.finding(
            history,
            level="error",
            message=f"After {history.num_steps} {'step' if history.num_steps == 1 else 'steps'}, the backward pass ran "
            f"into the graph of an earlier step and torch ended the run ({refusal.data.get('type', 'error')}).",
            first_step=history.num_steps - 1,
            evidence=(Evidence(statistic="graph_nodes", observed=size, limit=1.0, step=step),),
            confidence=0.75,
        )

    def _refusal(self, history: History) -> Event | None:
        """The exception with which torch ended the run, if it was about a graph of an earlier step.

        In the first step the same words mean two backward passes over one loss; in-place changes show there too.
        """
        for event in history.events_of("exception"):
            message = str(event.data.get("message", ""))
            if any(words in message and history.num_steps >= least for words, least in AGAIN.items()):
                return event
        return None

    def _growth(self, steps: Integers, sizes: Floats) -> float | None:
        """Median growth per step in first sizes, or None where the graph does not go on growing to its last reading."""
        # The observer stops counting somewhere: from its largest reading on a graph that stays there says nothing.
        counted = int(np.argmax(sizes)) + 1
        rates = np.diff(sizes[:counted]) / np.diff(steps[:counted]) / sizes[0]
        growing = rates >= self.part
        is_lasting = len(rates) and np.mean(growing) >= self.share and sizes[-1] >= sizes.max() * 0.9
        return float(np.median(rates[growing])) if is_lasting and counted >= min(len(sizes), self.readings) else None
