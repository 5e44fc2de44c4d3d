"""recurrent-vanishing."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._recurrence import recurrences
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class RecurrentVanishing(Rule):
    """The gradient dies out on its way back through time: what happened early in a sequence cannot be learned.

    Detects
        The gradient signal of a recurrent cell loses `decades` or more from the last call back to the first, in most
        deep readings, in a run whose loss is stuck.

    Why it matters
        Each step back multiplies by the recurrent Jacobian. At 0.58 per step, a tanh cell with PyTorch's default
        initialization, 1e-9 is left after 40 steps. Gradients of the weights do not show it: the last steps keep them
        large.

    Decided by
        decades: 3 over all calls, as for vanishing-gradients over depth. calls: 8 or more, so that a layer shared by
        a few places is no recurrence.

    Stays silent when
        The run learns: a task that only needs the recent past has no use for the rest of the gradient. Cells with
        gates forget by design.

    Remedies
        reinitialize-layers, insert-shortcuts, replace-activations

    References
        Hochreiter 1991, Untersuchungen zu dynamischen neuronalen Netzen; Bengio, Simard & Frasconi 1994; Pascanu,
        Mikolov & Bengio 2013, arXiv:1211.5063; Le, Jaitly & Hinton 2015, arXiv:1504.00941 (identity recurrence).
    """

    stage: ClassVar[Stage] = "architecture"
    needs: ClassVar[tuple[str, ...]] = ("loss",)
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite", "call_signal_norm", "micro_batches")
    explains: ClassVar[tuple[str, ...]] = ("vanishing-gradients", "loss-plateau")
    remedies: ClassVar[tuple[str, ...]] = ("reinitialize-layers", "insert-shortcuts", "replace-activations")

    decades: float = 3.0
    calls: int = 8

    def check(self, history: History) -> Iterator[Finding]:
        curve = loss_curve(history)
        if curve is None or not curve.stuck:
            return
        for recurrence in recurrences(history, least=self.calls):
            lost = recurrence.lost_most_of_the_time(self.decades)
            if lost is None:
                continue
            worst, step = lost
            yield self.finding(
                history,
                level="error" if curve.share < 0.1 else "warning",
                message=f"Back through the {recurrence.calls} calls of {recurrence.layer} the gradient signal loses "
                f"{worst:.1f} decades (limit {self.decades:g}), and the loss stays at {curve.end:.4g}: the start of "
                "a sequence is out of reach.",
                first_step=step,
                layers=(recurrence.layer,),
                evidence=(
                    Evidence(
                        statistic="decades_lost_through_time",
                        observed=worst,
                        limit=self.decades,
                        step=step,
                        layer=recurrence.layer,
                    ),
                ),
                confidence=0.85,
            )
            return
