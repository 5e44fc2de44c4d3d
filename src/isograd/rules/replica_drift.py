"""replica-drift."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from isograd._history import History
from isograd._rule import Evidence, Finding, Rule, Stage


@dataclass(frozen=True, kw_only=True)
class ReplicaDrift(Rule):
    """Tensors that data parallelism keeps equal on all ranks are not equal.

    Detects
        replica_difference, the largest difference of a parameter between two ranks relative to its size, above
        `limit`. An event "replica-drift" from the observer with `name` and `difference` counts as well.

    Why it matters
        Each rank trains a model of its own on its share of the data; the one that is saved has seen a fraction of it.

    Decided by
        limit: 1e-6. Replicas that apply the same averaged gradient are equal to the last bit; reductions in another
        order differ by 1e-7 of float32 at most.

    Stays silent when
        One process trains, or replicas are compared at different steps (the observer compares at the same step).

    Remedies
        No automatic one: call the wrapper that synchronizes instead of the module in it, or synchronize by hand.

    References
        Li et al. 2020, PyTorch distributed: experiences on accelerating data parallel training, arXiv:2006.15704.
    """

    stage: ClassVar[Stage] = "symptom"
    needs: ClassVar[tuple[str, ...]] = ()
    uses: ClassVar[tuple[str, ...]] = ("replica_difference",)

    limit: float = 1e-6

    def check(self, history: History) -> Iterator[Finding]:
        drifted = [*self._measured(history), *self._told(history)]
        if not drifted:
            return
        begun = min(evidence.step for evidence in drifted)
        worst = max(drifted, key=lambda evidence: evidence.observed)
        names = tuple(dict.fromkeys(e.layer for e in sorted(drifted, key=lambda e: -e.observed) if e.layer))
        yield self.finding(
            history,
            level="error",
            message=f"{max(1, len(names))} parameters differ between ranks, by up to {worst.observed:.2g} "
            f"of their size "
            f"(limit {self.limit:g}) at step {worst.step}; first seen at step {begun}.",
            first_step=begun,
            layers=names,
            evidence=(worst,),
            confidence=0.98,
        )

    def _measured(self, history: History) -> Iterator[Evidence]:
        series = history.series.get("replica_difference")
        if series is None or not len(series):
            return
        largest = np.max(np.where(np.isfinite(series.values), series.values, 0.0), axis=0)
        for column in np.flatnonzero(largest > self.limit):
            first = int(np.argmax(series.values[:, column] > self.limit))
            yield Evidence(
                statistic="replica_difference",
                observed=float(largest[column]),
                limit=self.limit,
                step=int(series.steps[first]),
                layer=history.parameters[column].name,
            )

    def _told(self, history: History) -> Iterator[Evidence]:
        names = {parameter.name for parameter in history.parameters}
        for event in history.events_of("replica-drift"):
            difference, name = event.data.get("difference"), event.data.get("name")
            if isinstance(difference, (int, float)) and difference > self.limit:
                known = str(name) if name in names else None
                yield Evidence(
                    statistic="replica_difference",
                    observed=float(difference),
                    limit=self.limit,
                    step=event.step,
                    layer=known,
                )
