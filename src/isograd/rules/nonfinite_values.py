"""nonfinite-values."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._nonfinite import Place, damaged, first_place, last_bad_step, operation, skipped_steps, told
from isograd._rule import Evidence, Finding, Level, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class NonfiniteValues(Rule):
    """A NaN or Inf stands in an input, an output, the loss, a gradient, a weight or the optimizer's state.

    Detects
        The first place in time, and within a step in the order in which values arise: an input; the first layer with
        non-finite outputs from finite inputs; the loss; the gradient of the layer nearest the loss; a weight; the
        state.

    Why it matters
        NaN spreads: one in a gradient makes every weight of that tensor NaN in one step, and nothing brings it back.

    Decided by
        A count above 0: no threshold. skip_share: 0.5 of the steps after the first `settling` steps (20) skipped by a
        gradient scaler is a loss scale that finds no resting place; a healthy one halves from 2^16 a few times and
        then skips one step in 2000.

    Stays silent when
        A gradient scaler skipped the step: that is how it finds its scale. A non-finite loss that left gradients and
        weights finite (a mean over nothing) is a warning, never an error.

    Remedies
        skip-bad-steps, rewind

    References
        Micikevicius et al. 2018, Mixed precision training, arXiv:1710.03740; PyTorch issues 70348 and 41508.
    """

    stage: ClassVar[Stage] = "symptom"
    needs: ClassVar[tuple[str, ...]] = ("grad_nonfinite",)
    uses: ClassVar[tuple[str, ...]] = (
        "loss_nonfinite",
        "output_nonfinite",
        "input_nonfinite",
        "signal_nonfinite",
        "weight_nonfinite",
        "state_nonfinite",
        "skipped",
    )
    remedies: ClassVar[tuple[str, ...]] = ("skip-bad-steps", "rewind")

    skip_share: float = 0.5
    settling: int = 20

    def check(self, history: History) -> Iterator[Finding]:
        place = first_place(history)
        if place is not None:
            yield self._first(history, place)
            return
        yield from self._restless_scale(history)

    def _first(self, history: History, place: Place) -> Finding:
        event = told(history, place.step, "operation", "gradient")
        came = "" if event is None else f", from {operation(event)}"
        return self.finding(
            history,
            level=self._level(history),
            message=f"The first non-finite value stood in the {place} at step {place.step}"
            f" ({place.entries}){came}.{self._aftermath(history, place)}",
            first_step=place.step,
            last_step=max(place.step, last_bad_step(history)),
            layers=place.layers(history),
            evidence=(Evidence(**place.reading(history)),),
            confidence=0.99,
        )

    def _level(self, history: History) -> Level:
        return "error" if damaged(history) else "warning"

    def _aftermath(self, history: History, place: Place) -> str:
        last = last_bad_step(history)
        if damaged(history):
            return " It stayed to the end of the run." if last > place.step else ""
        return f" It was gone after step {last}, and weights stayed finite." if last >= place.step else ""

    def _restless_scale(self, history: History) -> Iterator[Finding]:
        late = np.array([step for step in skipped_steps(history) if step >= self.settling])
        after = history.num_steps - self.settling
        if after <= 0 or len(late) < 10 or len(late) < self.skip_share * after:
            return
        share = len(late) / after
        yield self.finding(
            history,
            level="warning",
            message=f"The gradient scaler skipped {100 * share:.0f} % of the steps after step {self.settling} "
            f"(limit {100 * self.skip_share:.0f} %): gradients overflow at every loss scale.",
            first_step=int(late[0]),
            evidence=(Evidence(statistic="skipped_share", observed=share, limit=self.skip_share, step=int(late[-1])),),
            confidence=0.8,
        )
