"""Did it help? The verdict on a treatment from paired runs of the same program, with and without it.

Each seed gives a pair: the untreated run and the treated one, at equal steps, judged by the program's own loss. A
pair's *start* is the lowest of what its two runs, and those with other treatments beside them, begin with (see
`_start`): what a treatment of the data or the initialization removes before anything is learned (losses of thousands
from unscaled inputs) is no progress, and does not dwarf what is. A run's *end* is the mean loss of its last quarter,
where the worst twentieth of the steps counts as the worst of the others, and at most the start: what is above it is
lost progress, however high. The *effect* of a pair is

    (end untreated - end treated) / (start - lowest end of any run in the comparison)

the share of the progress that was made anywhere which the treatment adds: 1 where the program stands still without
it, 0 where it changes nothing, below 0 where it harms. It does not depend on the loss's unit or offset. A run that has
NaN or Inf in its last quarter, or raises, has made no progress: its end is its start.

The interval is Student's t over the pairs (two-sided 95 %): a treatment that does nothing is called an improvement in
at most 2.5 % of comparisons, as far as pairs are normal. Which treatment is compared has to be chosen on other seeds.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from isograd._diagnose import Diagnosis
from isograd._history import History
from isograd._robust import median
from isograd.rules import RULES

Outcome = Literal["resolved", "improved", "no-effect", "worse", "inconclusive"]

MATTERS = 0.02
"""The smallest effect that is called one: a fiftieth of the progress made."""

_T975 = (math.nan, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Student's t at 97.5 % for 1 to 9 degrees of freedom (tables; scipy.stats.t.ppf in the tests)."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One run of the program. `losses`: the program's own loss of each step, NaN where it was not finite.

    `error`: what ended it, if not its own end. `refused`: it was ended at its first step because the program has no
    place for the treatment. `seconds`: wall time; `step_seconds`: median time of a step. `diagnosis`: what isograd
    found in it. `folder`: where its run is kept; `unkept`: why it is not although it was asked for.
    """

    seed: int
    losses: NDArray[np.float64]
    diagnosis: Diagnosis
    error: str = ""
    refused: bool = False
    seconds: float = math.nan
    step_seconds: float = math.nan
    folder: Path | None = None
    unkept: str = ""

    @classmethod
    def of(cls, history: History, diagnosis: Diagnosis, *, seed: int, error: str = "") -> Arm:
        """A recorded run: the losses of one subject from step 0 on, and what was found in all of them."""
        losses = np.full(history.num_steps, np.nan)
        if "loss" in history:
            losses[history["loss"].steps] = history["loss"].values
        if "loss_nonfinite" in history:
            # A step without a loss of its own is none that broke: it stands where the last one stood.
            absent = np.isnan(losses)
            absent[history["loss_nonfinite"].steps[history["loss_nonfinite"].values > 0]] = False
            losses[absent] = _carried(losses)[absent]
        seconds = median(history["step_seconds"].values) if "step_seconds" in history else math.nan
        return cls(seed=seed, losses=losses, diagnosis=diagnosis, error=error, step_seconds=seconds)

    @property
    def steps(self) -> int:
        """Optimizer steps seen."""
        return len(self.losses)


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A number and its 95 % interval; infinite where one pair gives none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """`+0.93 [+0.88, +0.97]`; the value alone where one pair gives no interval."""
        if not math.isfinite(self.value):
            return "-"
        return f"{self.value:+.2f}" + (f" [{self.low:+.2f}, {self.high:+.2f}]" if math.isfinite(self.low) else "")

    def to_dict(self) -> dict[str, float | None]:
        """JSON values: an end that is not finite is null."""
        return {
            name: getattr(self, name) if math.isfinite(getattr(self, name)) else None
            for name in ("value", "low", "high")
        }


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """What the pairs say. `ends`: (untreated, treated) per seed: mean loss of the last quarter of the steps
    compared, in the loss's own unit; NaN for a run that broke.

    `resolved`: causes at warning or above of every untreated run that no treated run has; `remaining`: those that every
    untreated and some treated run has; `introduced`: causes that a treated run has and no untreated one. `time_ratio`:
    time of a step with the treatment over without.
    """

    outcome: Outcome
    effect: Effect
    ends: tuple[tuple[float, float], ...] = ()
    resolved: tuple[str, ...] = ()
    remaining: tuple[str, ...] = ()
    introduced: tuple[str, ...] = ()
    time_ratio: float = math.nan
    why: str = field(default="", compare=False)

    @property
    def helps(self) -> bool:
        """Whether it may be recommended: better than doing nothing, by more than chance."""
        return self.outcome in ("resolved", "improved")

    @property
    def means(self) -> tuple[float, float]:
        """Mean end of the untreated and of the treated runs; NaN without pairs, and where one of them broke."""
        before, after = zip(*self.ends, strict=True) if self.ends else ((math.nan,), (math.nan,))
        return sum(before) / len(before), sum(after) / len(after)

    def __str__(self) -> str:
        before, after = self.means
        told = {"resolved": self.resolved, "remaining": self.remaining, "introduced": self.introduced}
        pairs = f"{len(self.ends)} pair{'s' * (len(self.ends) != 1)} of runs"
        losses = f"loss {before:.4g} untreated, {after:.4g} treated"
        parts = [
            f"{self.outcome} on {pairs}: {losses}, effect {self.effect} of the progress made.",
            *(f"{word.capitalize()}: {', '.join(names)}." for word, names in told.items() if names),
            *([f"{self.why[0].upper()}{self.why[1:]}."] if self.why else []),
        ]
        return " ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        """The verdict's part of `fix --json`."""
        baseline, treated = zip(*self.ends, strict=True) if self.ends else ((), ())
        return {
            "outcome": self.outcome,
            "loss": {"baseline": [_or_none(x) for x in baseline], "treated": [_or_none(x) for x in treated]},
            "effect": self.effect.to_dict(),
            "resolved": list(self.resolved),
            "remaining": list(self.remaining),
            "introduced": list(self.introduced),
            "why": self.why,
        }


def compare(
    untreated: Sequence[Arm], treated: Sequence[Arm], *, cause: str | None = None, others: Sequence[Arm] = ()
) -> Verdict:
    """The verdict on runs of equal seeds with and without a treatment; seeds that only one side has are left out.

    `others`: runs with other treatments, whose beginning and progress count: what is chosen from shares one measure.
    `cause`: what the treatment is for; with it gone from every treated run and the loss improved, it is resolved.
    Without a pair the outcome is inconclusive.
    """
    pairs = [(a, b) for a in untreated for b in treated if a.seed == b.seed]
    pairs = [(a, b) for a, b in pairs if a.steps or b.steps]
    if not pairs:
        nothing = Effect(value=math.nan, low=-math.inf, high=math.inf)
        return Verdict(outcome="inconclusive", effect=nothing, why="no run of the program reached an optimizer step")
    steps = [_common_steps(a, b) for a, b in pairs]
    effect = _effect(pairs, steps, others)
    before = [_alarms(a.diagnosis) for a, _ in pairs]
    after = [_alarms(b.diagnosis) for _, b in pairs]
    resolved = set[str].intersection(*before) - set[str]().union(*after)
    remaining = set[str].intersection(*before) - resolved
    introduced = set[str]().union(*after) - set[str]().union(*before)
    failed = [b for _, b in pairs if b.error and not any(a.error == b.error for a, _ in pairs)]
    outcome = "worse" if failed else _outcome(effect)
    why = f"the treated program fails: {failed[0].error}" if failed else ""
    moves = any(RULES[name].moves_objective for name in set[str]().union(*before, *after) & RULES.keys())
    if moves and outcome in ("improved", "worse") and not failed:
        outcome, why = "inconclusive", "what the loss is compared with learns as well: a lower loss is no better one"
    if outcome == "improved" and (cause in resolved if cause else resolved) and not introduced:
        outcome = "resolved"
    times = [b.step_seconds / a.step_seconds for a, b in pairs if a.step_seconds > 0]
    return Verdict(
        outcome=outcome,
        effect=effect,
        ends=tuple((_end(a, n), _end(b, n)) for (a, b), n in zip(pairs, steps, strict=True)),
        resolved=tuple(sorted(resolved)),
        remaining=tuple(sorted(remaining)),
        introduced=tuple(sorted(introduced)),
        time_ratio=float(np.median(times)) if times else math.nan,
        why=why,
    )


def _effect(pairs: Sequence[tuple[Arm, Arm]], steps: Sequence[int], others: Sequence[Arm]) -> Effect:
    beside = [[arm for arm in others if arm.seed == a.seed] for a, _ in pairs]
    starts = [_start((a, b), more) for (a, b), more in zip(pairs, beside, strict=True)]
    ends = [
        (_counted_end(a, n, start), _counted_end(b, n, start))
        for (a, b), n, start in zip(pairs, steps, starts, strict=True)
    ]
    elsewhere = [
        _counted_end(arm, n, start) for more, n, start in zip(beside, steps, starts, strict=True) for arm in more
    ]
    lowest = min([*map(min, ends), *elsewhere])
    scale = max(start - lowest for start in starts)
    spread = max(abs(a - b) for a, b in ends)
    # Where no run got below its start, there is no progress to share: the start itself is the yardstick.
    unit = scale if scale > 0 else max(spread, abs(float(np.median(starts))), 1e-30)
    return interval([(a - b) / unit for a, b in ends])


def interval(effects: Sequence[float]) -> Effect:
    """Mean and two-sided 95 % Student interval of at most ten paired effects; a single one has an infinite interval."""
    values = np.asarray(effects, dtype=np.float64)
    mean, n = float(values.mean()), len(values)
    if n < 2:
        return Effect(value=mean, low=-math.inf, high=math.inf)
    half = _T975[min(n - 1, len(_T975) - 1)] * float(values.std(ddof=1)) / math.sqrt(n)
    return Effect(value=mean, low=mean - half, high=mean + half)


def _outcome(effect: Effect) -> Outcome:
    if effect.low > 0 and effect.value >= MATTERS:
        return "improved"
    if effect.high < 0 and effect.value <= -MATTERS:
        return "worse"
    if math.isfinite(effect.low) and abs(effect.value) < MATTERS and effect.high - effect.low < 4 * MATTERS:
        return "no-effect"
    return "inconclusive"


def _common_steps(a: Arm, b: Arm) -> int:
    """The steps at which a pair is compared: the shorter run's, but a run that an error cut short sets no limit."""
    whole = [arm.steps for arm in (a, b) if not arm.error]
    return min(whole) if whole else min(a.steps, b.steps)


def _start(pair: tuple[Arm, Arm], others: Sequence[Arm]) -> float:
    """The lowest of what the runs begin with; 0 where no loss is finite: such a pair shows no progress.

    Of `others` no run begins below its first loss: what it learns in its first steps is no part of where it began.
    """
    levels = [*map(_level, pair), *(max(_level(arm), float(arm.losses[0])) for arm in others if arm.steps)]
    return min((level for level in levels if math.isfinite(level)), default=0.0)


def _level(arm: Arm) -> float:
    """What a run begins with: the median of a twentieth of the steps, for the loss of one small batch may be anything;
    that of the first five where it is higher, for a fast run has learned by then. NaN where no loss is finite.
    """
    early = arm.losses[: max(1, arm.steps // 20)]
    medians = [np.median(losses[np.isfinite(losses)]) for losses in (early, early[:5]) if np.isfinite(losses).any()]
    return float(max(medians, default=math.nan))


def _end(arm: Arm, steps: int) -> float:
    """Mean of the last quarter of the losses up to `steps`; NaN for a run that broke."""
    last = _last_quarter(arm, steps)
    return math.nan if last is None else float(np.mean(last))


def _counted_end(arm: Arm, steps: int, start: float) -> float:
    """The end as the effect counts it: the worst twentieth cut, and at most `start`, which is that of a broken run."""
    last = _last_quarter(arm, steps)
    if last is None:
        return start
    return min(start, float(np.mean(np.minimum(last, last[len(last) - 1 - len(last) // 20]))))


def _last_quarter(arm: Arm, steps: int) -> NDArray[np.float64] | None:
    """The last quarter of the losses up to `steps`, in ascending order; None for a run that broke."""
    last = np.sort(arm.losses[:steps][-max(1, steps // 4) :])
    if not len(last) or not np.isfinite(last).all() or (arm.error and arm.steps < steps):
        return None
    return last


def _alarms(diagnosis: Diagnosis) -> set[str]:
    return {cause.finding.name for cause in diagnosis.at_least("warning")}


def _carried(losses: NDArray[np.float64]) -> NDArray[np.float64]:
    """At each step the last finite loss, NaN before the first."""
    last = np.maximum.accumulate(np.where(np.isfinite(losses), np.arange(len(losses)), -1))
    return np.where(last >= 0, losses[np.maximum(last, 0)], np.nan)


def _or_none(value: float) -> float | None:
    return value if math.isfinite(value) else None
