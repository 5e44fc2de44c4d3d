"""nonfinite-inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._depth import boundary
from isograd._history import History
from isograd._nonfinite import bad_steps, damaged, entries, rows, source, told
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class NonfiniteInputs(Rule):
    """A batch holds NaN or Inf before the model touches it.

    Detects
        A count of non-finite entries above 0 in an input of the model, at the step at which the loss or a gradient
        first became non-finite. An event of the observer that found the data or the targets to blame counts as well,
        and names the row of the batch.

    Why it matters
        One such entry makes the loss and all weights NaN in one step, and no change of model or optimizer helps.

    Decided by
        A count above 0, at the same step: no threshold.

    Stays silent when
        Inputs held such values at steps that went well: masks of -inf are meant, and models that replace NaN cope.

    Remedies
        skip-bad-steps, standardize-inputs

    References
        Lineax, issue 81 (blame the input first); scikit-learn, check_array (force_all_finite).
    """

    stage: ClassVar[Stage] = "data"
    needs: ClassVar[tuple[str, ...]] = ("output_nonfinite",)
    uses: ClassVar[tuple[str, ...]] = ("loss_nonfinite", "grad_nonfinite", "weight_nonfinite", "skipped")
    explains: ClassVar[tuple[str, ...]] = (
        "nonfinite-values",
        "loss-divergence",
        "exploding-gradients",
        "invalid-operation",
        "singular-derivative",
    )
    remedies: ClassVar[tuple[str, ...]] = ("skip-bad-steps", "standardize-inputs")

    def check(self, history: History) -> Iterator[Finding]:
        broken = bad_steps(history)
        if not len(broken):
            return
        first = int(broken[0])
        for evidence in (*self._counted(history, first), *self._told(history, first)):
            yield self.finding(
                history,
                level="error" if damaged(history) else "warning",
                message=f"The {self._name(history, evidence)} was not finite at step {first}, the step at which the "
                f"run first became non-finite: {entries(evidence.observed)}{self._rows(history, first)}.",
                first_step=first,
                layers=(evidence.layer,) if evidence.layer else (),
                evidence=(evidence,),
                confidence=0.95,
            )
            return

    def _name(self, history: History, evidence: Evidence) -> str:
        event = told(history, evidence.step, "input")
        if event is not None and event.data.get("name") == "target":
            return "target"
        return f"input {evidence.layer or 'of the model'}"

    def _rows(self, history: History, step: int) -> str:
        """Which row of the batch it was, and where the batch was used."""
        event = told(history, step, "input")
        if event is None or "row_index" not in event.data:
            return ""
        return f", first in row {event.data['row_index']} of the batch ({rows(event)}), used{source(event)}"

    def _counted(self, history: History, first: int) -> Iterator[Evidence]:
        series = history["output_nonfinite"]
        row = series.at(first)
        for index in boundary(history, "input") if row is not None else ():
            before = series.values[series.steps < first, index]
            if row is not None and row[index] > 0 and not np.any(before > 0):
                yield Evidence(
                    statistic="output_nonfinite",
                    observed=float(row[index]),
                    limit=1.0,
                    step=first,
                    layer=history.layers[index].name,
                )

    def _told(self, history: History, first: int) -> Iterator[Evidence]:
        names = {layer.name for layer in history.layers}
        for event in history.events_of("nonfinite"):
            if event.data.get("place") == "input" and event.step <= first:
                count = event.data.get("count", 1)
                yield Evidence(
                    statistic="output_nonfinite",
                    observed=max(1.0, float(count)) if isinstance(count, (int, float)) else 1.0,
                    limit=1.0,
                    step=event.step,
                    layer=event.layer if event.layer in names else None,
                )
