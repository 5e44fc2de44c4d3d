"""What isograd and the baselines say of one recorded run, at its end and at every moment before. It counts nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from baselines import BASELINES
from catalog import Job, Variant
from record import printed_verdict, run_folder

from isograd._diagnose import diagnose
from isograd._history import History, Series
from isograd._runs import read_run
from isograd.rules import RULES

MOMENTS = (1, 2, 3, 5, 10, 20, 30, 50, 100, 200, 300, 500, 1000, 2000, 3000, 5000)
"""Numbers of steps after which a run is looked at as if it ended there."""

ABOUT_THE_END = ("undertrained",)
"""What can be said of a run that is over only: at any moment before, every run is too short."""


@dataclass(frozen=True, kw_only=True)
class Named:
    """One entry of a diagnosis. `stage`: of its rule; "symptom" for what no cause explains."""

    cause: str
    stage: str
    level: str
    confidence: float

    @property
    def is_alarm(self) -> bool:
        """Whether it is at level warning or above."""
        return self.level != "info"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was said of one run.

    `alarm_after`: the number of steps after which the first alarm was given, None for a run without one: the diagnosis
    of the run truncated to so many steps has a cause at level warning, other than that it is too short. `flagged`:
    baseline -> steps seen at its first alarm, or None. `held`: what the program said of itself (repaired, healthy).
    """

    case: str
    variant: Variant
    seed: int
    steps: int
    causes: tuple[Named, ...]
    alarm_after: int | None
    flagged: Mapping[str, int | None] = field(default_factory=dict)
    held: bool | None = None

    @property
    def alarms(self) -> tuple[Named, ...]:
        """The entries at level warning or above, in the order of the diagnosis."""
        return tuple(named for named in self.causes if named.is_alarm)


def judge(job: Job, root: Path) -> Outcome | None:
    """The outcome of one job recorded below `root`; None when it left no run."""
    folder = job.folder(root)
    path = run_folder(folder)
    if path is None:
        return None
    histories = read_run(path).histories
    causes = named(histories)
    return Outcome(
        case=job.case.name,
        variant=job.variant,
        seed=job.seed,
        steps=max((history.num_steps for history in histories), default=0),
        causes=causes,
        alarm_after=first_alarm(histories),
        flagged={name: baseline(histories) for name, baseline in BASELINES.items()},
        held=printed_verdict(folder),
    )


def named(histories: Sequence[History]) -> tuple[Named, ...]:
    """The diagnosis of `histories`, in its order."""
    return tuple(
        Named(
            cause=cause.finding.name,
            stage=RULES[cause.finding.name].stage,
            level=cause.finding.level,
            confidence=cause.finding.confidence,
        )
        for cause in diagnose(histories).causes
    )


def first_alarm(histories: Sequence[History]) -> int | None:
    """The number of steps after which the first alarm is given.

    Looks at `MOMENTS` and the end, and halves the gap before the first that has an alarm. Facts that carry no step
    (which parameters are optimized, hyperparameters as last seen) are those of the whole run.
    """
    steps = max((history.num_steps for history in histories), default=0)
    silent = 0
    for moment in (moment for moment in MOMENTS if moment < steps):
        if _has_alarm(histories, moment):
            return _earliest(histories, silent, moment)
        silent = moment
    if any(entry.is_alarm for entry in named(histories)):
        return _earliest(histories, silent, steps)
    return None


def truncated(history: History, steps: int) -> History:
    """`history` as it stood after `steps` optimizer steps: later readings and events left out."""
    return replace(
        history,
        series=_cut(history.series, steps),
        profiles={name: _cut(layers, steps) for name, layers in history.profiles.items()},
        events=tuple(event for event in history.events if event.step < steps),
    )


def _has_alarm(histories: Sequence[History], steps: int) -> bool:
    causes = named([truncated(history, steps) for history in histories])
    return any(entry.is_alarm and entry.cause not in ABOUT_THE_END for entry in causes)


def _earliest(histories: Sequence[History], silent: int, loud: int) -> int:
    """The first number of steps with an alarm between one without and one with it, taken to be the only change."""
    while loud - silent > 1:
        middle = (silent + loud) // 2
        if _has_alarm(histories, middle):
            loud = middle
        else:
            silent = middle
    return loud


def _cut(series: Mapping[str, Series], steps: int) -> dict[str, Series]:
    ends = {name: int(np.searchsorted(entry.steps, steps)) for name, entry in series.items()}
    return {
        name: Series(entry.steps[: ends[name]], entry.values[: ends[name]])
        for name, entry in series.items()
        if ends[name]
    }
