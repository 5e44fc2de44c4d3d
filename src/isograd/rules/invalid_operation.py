"""invalid-operation."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._loss_curve import loss_curve
from isograd._nonfinite import Place, damaged, first_place, operation, ran_away, told
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class InvalidOperation(Rule):
    """The forward pass computes NaN or Inf from finite inputs and finite weights.

    Detects
        The first non-finite value of the run stands in a layer's output or in the loss, not in a weight, an input or
        a gradient, and nothing had run away before: the last loss and gradient norm lie within `runaway` times their
        median, and the weights have not grown tenfold since the start. Or, in the first two steps, values whose
        square exceeds the range of float32 come out of inputs of ordinary size. Where the operation was traced, it is
        named with the line of the program that called it and the rows that were hit.

    Why it matters
        log 0, 0/0, an exponential that overflows, a softmax over a row that is masked completely, a mean or a
        standard deviation over too little: one such value makes every weight NaN at the next update.

    Decided by
        runaway: 1000. A loss that diverges passes through every decade on its way to infinity; an operation that
        is invalid does not announce itself.
        overflow: 1.8e19, the square root of the largest float32, for a loss; for the entries of a gradient whose norm
        has overflowed, that over the root of their number.

    Stays silent when
        Weights were non-finite before, the gradient broke first (the forward pass is finite and its derivative is
        not), data came in non-finite, or a gradient scaler skipped the step. A warning where weights stayed finite.

    Remedies
        skip-bad-steps, raise-precision, standardize-inputs, insert-normalization, scale-loss

    References
        PyTorch issues 41508 (masked softmax), 70348 (mean over nothing), 1620 (log of softmax); Blanchard, Higham &
        Higham 2021, Accurately computing the log-sum-exp and softmax functions.
    """

    stage: ClassVar[Stage] = "numerics"
    needs: ClassVar[tuple[str, ...]] = ("loss_nonfinite",)
    uses: ClassVar[tuple[str, ...]] = (
        "loss",
        "global_grad_norm",
        "grad_norm",
        "grad_max",
        "weight_norm",
        "grad_nonfinite",
        "output_nonfinite",
        "input_nonfinite",
        "signal_nonfinite",
        "weight_nonfinite",
        "state_nonfinite",
        "skipped",
        "output_rms",
    )
    explains: ClassVar[tuple[str, ...]] = (
        "nonfinite-values",
        "loss-divergence",
        "exploding-gradients",
        "loss-spike",
        "no-gradient",
        "loss-plateau",
        "undertrained",
    )
    remedies: ClassVar[tuple[str, ...]] = (
        "skip-bad-steps",
        "raise-precision",
        "standardize-inputs",
        "insert-normalization",
        "scale-loss",
    )

    runaway: float = 1000.0
    overflow: float = 1.8e19

    def check(self, history: History) -> Iterator[Finding]:
        place = first_place(history)
        if place is not None and place.kind in ("output", "loss"):
            if not ran_away(history, place.step, self.runaway):
                yield self._invalid(history, place)
        elif place is None or place.kind in ("gradient", "state"):
            yield from self._overflown(history)

    def _invalid(self, history: History, place: Place) -> Finding:
        event, hurt = told(history, place.step, "operation"), damaged(history)
        seen = f" ({place.entries})" if event is None else f": {operation(event)}"
        after = "" if hurt else " Weights stayed finite: it did no lasting damage."
        return self.finding(
            history,
            level="error" if hurt else "warning",
            message=f"The {place} was not finite at step {place.step}, from finite inputs and finite weights{seen}."
            f"{after}",
            first_step=place.step,
            layers=place.layers(history),
            evidence=(Evidence(**place.reading(history)),),
            confidence=0.8 if event is None else 0.9,
        )

    def _overflown(self, history: History) -> Iterator[Finding]:
        """Finite values of a size that only an exponential or a division can make of ordinary inputs."""
        curve, fed = loss_curve(history), self._largest_input(history)
        evidence = self._early_loss(history) or self._early_gradient(history)
        if curve is None or evidence is None or fed >= 1e6:
            return
        what = "The loss" if evidence.statistic == "loss" else f"The largest gradient entry of {evidence.layer}"
        yield self.finding(
            history,
            level="error" if curve.failed else "warning",
            message=f"{what} is {evidence.observed:.2g} at step {evidence.step}, from inputs of at most {fed:.3g}: "
            f"squares leave float32 (limit {evidence.limit:.2g}), so an exponential or a division has run away.",
            first_step=evidence.step,
            layers=(evidence.layer,) if evidence.layer else (),
            evidence=(evidence,),
            confidence=0.8,
        )

    def _early_loss(self, history: History) -> Evidence | None:
        values = history.series["loss"].values[:2] if "loss" in history.series else np.empty(0)
        size = float(np.max(np.abs(values[np.isfinite(values)]), initial=0.0))
        if size < self.overflow:
            return None
        step = int(history.series["loss"].steps[0])
        return Evidence(statistic="loss", observed=size, limit=self.overflow, step=step)

    def _early_gradient(self, history: History) -> Evidence | None:
        """A gradient of finite entries in the first two steps whose norm overflows."""
        norms, entries = history.series.get("grad_norm"), history.series.get("grad_max")
        if norms is None or entries is None or norms.values.shape != entries.values.shape or not norms.values.size:
            return None
        over = np.isposinf(norms.values[:2]) & np.isfinite(entries.values[:2])
        largest = np.where(over, entries.values[:2], -1.0)
        row, column = (int(i) for i in np.unravel_index(np.argmax(largest), over.shape))
        size, parameter = float(entries.values[row, column]), history.parameters[column]
        # The norm is at most the largest entry times the root of their number.
        limit = self.overflow / max(1, parameter.size) ** 0.5
        if not over.any() or size < limit:
            return None
        return Evidence(
            statistic="grad_max", observed=size, limit=limit, step=int(norms.steps[row]), layer=parameter.name
        )

    def _largest_input(self, history: History) -> float:
        series = history.series.get("output_rms")
        columns = [index for index, layer in enumerate(history.layers) if layer.role == "input"]
        if series is None or not len(series) or not columns:
            return 0.0
        values = series.values[:, columns]
        return float(np.max(np.where(np.isfinite(values), values, 0.0)))
