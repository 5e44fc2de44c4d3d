"""Counts what was said against what is true: rates, times, confusion, calibration. It reads no run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

from catalog import Case
from judge import Named, Outcome

from isograd.rules import RULES

EDGES = (0.0, 0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.01)
"""Bounds of the confidences that one row of the calibration table covers."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How often a detector was right, over some outcomes.

    `detected`: faulty runs with an alarm. `top1`, `top3`: faulty runs of which an accepted cause is the first alarm, or
    among the first three; of a harmless fault only where no alarm is an error. `silent`: fixed runs without an alarm;
    `pairs`: pairs with both. `controls_silent`: healthy runs without one. `calm`: fixed and healthy runs without an
    alarm at any moment. `median_steps`: steps seen until the first alarm, over detected runs.
    """

    faulty: int
    detected: int
    top1: int
    top3: int
    fixed: int
    silent: int
    pairs: int
    controls: int
    controls_silent: int
    calm: int
    median_steps: float | None

    @property
    def rates(self) -> dict[str, float]:
        """The shares that a later version must not fall below."""
        return {
            "detected": _share(self.detected, self.faulty),
            "top1": _share(self.top1, self.faulty),
            "top3": _share(self.top3, self.faulty),
            "silent": _share(self.silent, self.fixed),
            "controls_silent": _share(self.controls_silent, self.controls),
        }


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Causes that were given with a confidence in [low, high): how many, their mean confidence, how many were right.

    `right` are accepted causes of faulty programs. `on_healthy` of `count` were given in fixed or healthy programs.
    """

    low: float
    high: float
    count: int
    on_healthy: int
    right: int
    mean_confidence: float


@dataclass(frozen=True, kw_only=True)
class Given:
    """One cause that was given at level warning or above. `place`: 1 for the first."""

    case: str
    variant: str
    seed: int
    cause: str
    place: int
    level: str
    confidence: float
    right: bool


def score(outcomes: Sequence[Outcome], cases: Mapping[str, Case]) -> Score:
    """The score of the diagnosis over `outcomes`; every case of them must be in `cases`."""
    faulty = _of(outcomes, "faulty")
    after = [outcome.alarm_after for outcome in faulty if outcome.alarms and outcome.alarm_after is not None]
    return _score(
        outcomes,
        has_alarm=lambda outcome: bool(outcome.alarms),
        ever=lambda outcome: outcome.alarm_after is not None or bool(outcome.alarms),
        after=after,
        top1=sum(is_right(outcome, cases[outcome.case], 1) for outcome in faulty),
        top3=sum(is_right(outcome, cases[outcome.case], 3) for outcome in faulty),
    )


def baseline_score(outcomes: Sequence[Outcome], baseline: str) -> Score:
    """The score of a baseline, which names no cause and whose alarms stay."""
    after = [outcome.flagged[baseline] for outcome in _of(outcomes, "faulty")]
    return _score(
        outcomes,
        has_alarm=lambda outcome: outcome.flagged[baseline] is not None,
        ever=lambda outcome: outcome.flagged[baseline] is not None,
        after=[steps for steps in after if steps is not None],
        top1=0,
        top3=0,
    )


def _score(
    outcomes: Sequence[Outcome],
    *,
    has_alarm: Callable[[Outcome], bool],
    ever: Callable[[Outcome], bool],
    after: Sequence[int],
    top1: int,
    top3: int,
) -> Score:
    faulty, fixed, controls = (_of(outcomes, variant) for variant in ("faulty", "fixed", "healthy"))
    silent = {(outcome.case, outcome.seed) for outcome in fixed if not has_alarm(outcome)}
    return Score(
        faulty=len(faulty),
        detected=sum(map(has_alarm, faulty)),
        top1=top1,
        top3=top3,
        fixed=len(fixed),
        silent=len(silent),
        pairs=sum(has_alarm(outcome) and (outcome.case, outcome.seed) in silent for outcome in faulty),
        controls=len(controls),
        controls_silent=sum(not has_alarm(outcome) for outcome in controls),
        calm=sum(not ever(outcome) for outcome in [*fixed, *controls]),
        median_steps=median(after) if after else None,
    )


def is_right(outcome: Outcome, case: Case, places: int) -> bool:
    """Whether an accepted cause is among the first `places` alarms, and no error was given about a harmless fault."""
    if case.harmless and any(named.level == "error" for named in outcome.alarms):
        return False
    return any(named.cause in case.accepted for named in outcome.alarms[:places])


def confusion(outcomes: Sequence[Outcome], cases: Mapping[str, Case]) -> dict[str, Counter[str]]:
    """Family of the most exact accepted cause -> families of what was named first ("silent" where nothing was).

    A family is the stage of the rule: from data, loop and initialization down to numerics, or "symptom".
    """
    table: dict[str, Counter[str]] = {}
    for outcome in _of(outcomes, "faulty"):
        expected = cases[outcome.case].accepted[0]
        family = RULES[expected].stage if expected in RULES else "no such rule"
        table.setdefault(family, Counter())[outcome.alarms[0].stage if outcome.alarms else "silent"] += 1
    return table


def given(outcomes: Iterable[Outcome], cases: Mapping[str, Case]) -> list[Given]:
    """Every cause at level warning or above.

    Symptoms that no cause explains claim no cause and are left out, but for those that are a cause of some fault.
    """
    causes = {cause for case in cases.values() for cause in case.accepted}
    return [
        Given(
            case=outcome.case,
            variant=outcome.variant,
            seed=outcome.seed,
            cause=named.cause,
            place=place,
            level=named.level,
            confidence=named.confidence,
            right=_holds(named, outcome, cases),
        )
        for outcome in outcomes
        for place, named in enumerate(outcome.alarms, 1)
        if named.stage != "symptom" or named.cause in causes
    ]


def calibration(entries: Sequence[Given], edges: Sequence[float] = EDGES) -> list[Bin]:
    """How often causes given with some confidence were right; bins without any are left out."""
    bins = []
    for low, high in pairwise(edges):
        inside = [entry for entry in entries if low <= entry.confidence < high]
        if inside:
            bins.append(_bin(inside, low, min(high, 1.0)))
    return bins


def calibration_by_cause(entries: Sequence[Given]) -> dict[str, Bin]:
    """The same per cause, whatever its confidence."""
    return {
        cause: _bin([entry for entry in entries if entry.cause == cause], 0.0, 1.0)
        for cause in sorted({entry.cause for entry in entries})
    }


def _bin(entries: Sequence[Given], low: float, high: float) -> Bin:
    return Bin(
        low=low,
        high=high,
        count=len(entries),
        on_healthy=sum(entry.variant != "faulty" for entry in entries),
        right=sum(entry.right for entry in entries),
        mean_confidence=sum(entry.confidence for entry in entries) / len(entries),
    )


def _holds(named: Named, outcome: Outcome, cases: Mapping[str, Case]) -> bool:
    return outcome.variant == "faulty" and named.cause in cases[outcome.case].accepted


def _of(outcomes: Iterable[Outcome], variant: str) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.variant == variant]


def _share(part: int, whole: int) -> float:
    return part / whole if whole else 1.0
