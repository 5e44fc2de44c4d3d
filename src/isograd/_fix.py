"""Find a treatment that helps: run, diagnose, try, verify, rank. `isograd fix` in one function.

1. The program as it is, once, gives the diagnosis and the yardstick.
2. *Screening*: candidates run once with the same seed, on the shortest part of the run that shows the fault, beside the
   untreated program once more, which tells what chance alone does. They come in waves, the likeliest first, until one
   has resolved its cause.
3. *Verification*: the best of them run on other seeds, paired with untreated runs, for half of the run; where that does
   not decide, on as many seeds more for the whole of it. Only this counts, so that luck in the screening does not. If
   the best leaves causes, or brings others, it is tried together with the best for one of them.

Screening and verification are successive halving (Jamieson & Talwalkar 2016, arXiv:1502.07943) with two rungs.
"""

from __future__ import annotations

import math
import shutil
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from isograd._bins import Readings, even_in_steps, fold_line
from isograd._changes import ReplaceOptimizer, ScheduleLearningRate, SetHyperparameter
from isograd._diagnose import Diagnosis
from isograd._history import History
from isograd._remedy import Treatment
from isograd._rule import Options
from isograd._treat import combine, every_treatment, treat
from isograd._trial import Program, Trial, end_trials, run_trial
from isograd._verify import MATTERS, Arm, Verdict, compare

CANDIDATES = 9
"""Screened at most by default."""

WAVE = 3
"""Candidates of one wave: with the untreated run beside the first one, two rounds of two jobs. Where the first wave has
what helps, the whole search takes three times the time of the program: 1 + 4/4/2 + 6/2/2."""

MINUTE = 60.0
"""s for which a program runs untreated where that shows a fault: the steps until then count as the whole of it."""

SLOWER, HANGS = 5.0, 30.0
"""A treated run that takes so many times the time of the untreated one, and so many s, is given up."""

FINALISTS = 2
"""Verified at most, the second where the first does not resolve its cause; where everything is tried, three are."""

TIMES = 6
"""What the search may take in times of the untreated run: behind the first wave and the first verification no stage
begins that would take it beyond that."""

SHARE = 4
"""Screening runs for a quarter of the steps, unless the fault shows later."""


POINTS = 200
"""Points of a loss curve that is kept."""


@dataclass(frozen=True, kw_only=True)
class Curves:
    """Losses of paired runs, rolled up to at most `POINTS` points: medians of the steps up to each of `steps`.

    `baseline`, `treated`: one curve per seed, NaN where no loss was finite.
    """

    steps: tuple[int, ...]
    baseline: tuple[tuple[float, ...], ...]
    treated: tuple[tuple[float, ...], ...]

    @classmethod
    def of(cls, before: Sequence[Arm], after: Sequence[Arm]) -> Curves:
        """Of untreated and treated runs of one step or more."""
        length = max(arm.steps for arm in (*before, *after))
        steps = np.arange(length)
        bins = even_in_steps(steps, steps, POINTS)

        def rolled_up(arm: Arm) -> tuple[float, ...]:
            losses = np.full(length, np.nan)
            losses[: arm.steps] = arm.losses
            nothing = np.zeros(length, np.bool_)
            whole = Readings(first=steps, last=steps, values=losses, low=None, high=None, broken=nothing)
            return tuple(fold_line(whole, bins).middle.tolist())

        return cls(
            steps=tuple(bins.last.tolist()),
            baseline=tuple(map(rolled_up, before)),
            treated=tuple(map(rolled_up, after)),
        )

    def to_dict(self) -> dict[str, Any]:
        """JSON values; a point without a finite loss is null."""

        def curve(values: Sequence[float]) -> list[float | None]:
            return [value if math.isfinite(value) else None for value in values]

        return {
            "steps": list(self.steps),
            "baseline": [curve(values) for values in self.baseline],
            "treated": [curve(values) for values in self.treated],
        }


@dataclass(frozen=True, kw_only=True)
class Tried:
    """A treatment with its verdict: on one pair from the screening, or on `verified` pairs of other seeds.

    `seconds`: of its runs together. `steps`: of the longest of them. `curves`: the losses of verified pairs.
    """

    treatment: Treatment
    verdict: Verdict
    seconds: float
    verified: int = 0
    steps: int = 0
    curves: Curves | None = field(default=None, repr=False, compare=False)

    @property
    def left(self) -> set[str]:
        """Causes that treated runs have."""
        return {*self.verdict.remaining, *self.verdict.introduced}

    @property
    def recommended(self) -> bool:
        """Better than doing nothing on pairs that did not choose it."""
        return self.verified > 1 and self.verdict.helps

    def to_dict(self) -> dict[str, Any]:
        """One of `trials` of `fix --json`."""
        return {
            **self.treatment.to_dict(),
            **self.verdict.to_dict(),
            "pairs": self.verified or 1,
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
        }


@dataclass(frozen=True, kw_only=True)
class Fix:
    """What was found and what was tried, best first. `best` indexes `trials`.

    `diagnosis`: of the untreated program; `confirmed`: its causes that a treatment for them resolved. `noise`: the
    effect of running the same program again, 0 where it is reproducible. `steps`: of the first verification.
    `folder`: where the untreated run is kept; `unkept`: why it is not although it was asked for.
    """

    diagnosis: Diagnosis
    trials: tuple[Tried, ...] = ()
    noise: float = 0.0
    steps: int = 0
    seconds: float = 0.0
    baseline_seconds: float = 0.0
    interrupted: bool = False
    error: str = ""
    folder: Path | None = None
    unkept: str = ""

    @property
    def best(self) -> int | None:
        """The index of the recommended treatment; None where nothing was better than doing nothing."""
        return next((index for index, tried in enumerate(self.trials) if tried.recommended), None)

    @property
    def confirmed(self) -> tuple[str, ...]:
        """Causes that a treatment for them resolved."""
        cured = [t for t in self.trials if t.recommended and t.verdict.outcome == "resolved"]
        return tuple(dict.fromkeys(cause for t in cured for cause in t.verdict.resolved if _is_for(t.treatment, cause)))

    def to_dict(self) -> dict[str, Any]:
        """`fix --json`, schema 1."""
        return {
            "schema": 1,
            "run": self.diagnosis.run,
            "baseline": {**self.diagnosis.to_dict(), "confirmed": list(self.confirmed), "error": self.error},
            "trials": [tried.to_dict() for tried in self.trials],
            "best": self.best,
            "noise": self.noise,
            "steps": self.steps,
            "seconds": round(self.seconds, 3),
            "baseline_seconds": round(self.baseline_seconds, 3),
            "interrupted": self.interrupted,
        }

    def to_keep(self) -> dict[str, Any]:
        """The same with the loss curves of what was verified: what lies beside the untreated run."""
        told = self.to_dict()
        for trial, tried in zip(told["trials"], self.trials, strict=True):
            trial["curves"] = None if tried.curves is None else tried.curves.to_dict()
        return told


Report = Callable[[str, int, int], None]
"""Told of the stage, and how many of its runs are done out of how many."""


@dataclass(kw_only=True)
class Search:
    """The search for one program. `executor` runs trials: any of `concurrent.futures`, so also a cluster's.

    `every`: try the whole catalogue in its default form. `seeds`: pairs that verify. `limit`: s that a run may take.
    `keep`: the folder of runs in which the untreated run stays.
    """

    program: Program
    steps: int | None = None
    seeds: int = 3
    every: bool = False
    limit: float = 60.0
    threads: int = 1
    memory: int | None = None
    keep: Path | None = None
    executor: Executor
    options: Options = field(default_factory=dict)
    report: Report = lambda stage, done, total: None
    _runs: dict[str, list[Arm]] = field(default_factory=dict, init=False)
    _patience: float = field(init=False)
    _yardstick: Arm = field(init=False)
    _began: float = field(default=0.0, init=False)
    _whole: float = field(default=0.0, init=False)
    _pace: float = field(default=0.0, init=False)
    _short: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self._patience = self.limit

    def run(self) -> Fix:
        """Search until something is verified or nothing is left. Ctrl-C ends it with what is known."""
        self._began = time.perf_counter()
        first = self._first_run()
        self._patience = min(self.limit, max(HANGS, SLOWER * first.seconds))
        self._whole = first.seconds
        fix = Fix(
            diagnosis=first.diagnosis,
            steps=first.steps,
            baseline_seconds=first.seconds,
            error=first.error,
            folder=first.folder,
            unkept=first.unkept,
        )
        if first.steps and (not first.diagnosis.healthy or self.every):
            *_, fix = self._stages(first, fix)
        return replace(fix, seconds=time.perf_counter() - self._began)

    def _first_run(self) -> Arm:
        """The program as it is: to its end, or for a minute, or until `limit` where a minute shows no fault."""
        least = self.limit if self.steps else min(self.limit, MINUTE)
        (arm,) = self._arms("the program as it is", [self._trial(seconds=least, keep=self.keep)])
        if least < self.limit and arm.seconds >= least and arm.diagnosis.healthy:
            if arm.folder is not None:
                shutil.rmtree(arm.folder, ignore_errors=True)  # the longer one takes its place
            (arm,) = self._arms("the program as it is", [self._trial(seconds=self.limit, keep=self.keep)])
        return arm

    def _stages(self, first: Arm, fix: Fix) -> Iterator[Fix]:
        """The state of the search after each stage."""
        try:
            history = _subject_of(first.diagnosis)
            candidates = self._candidates(first.diagnosis)
            if self.every:
                candidates = list({str(t): t for t in (*candidates, *every_treatment(history))}.values())
            screened, noise = self._screen(first, candidates, history.subject)
            fix = replace(fix, trials=tuple(screened), noise=noise)
            yield fix
            yield from self._verify(first, fix, history.subject)
        except KeyboardInterrupt:
            yield replace(fix, interrupted=True)

    def _candidates(self, diagnosis: Diagnosis) -> list[Treatment]:
        """What is proposed, every remedy once before the other forms of one."""
        found = [t for t in treat(diagnosis) if t.changes and t.applicability == "automatic"]
        forms = Counter[str]()
        turns = {}
        for treatment in found:
            turns[str(treatment)] = forms[_family(treatment)]
            forms[_family(treatment)] += 1
        return sorted(found, key=lambda treatment: turns[str(treatment)])[:CANDIDATES]

    def _screen(self, first: Arm, candidates: Sequence[Treatment], subject: str) -> tuple[list[Tried], float]:
        self._short = steps = _screening_steps(first)
        size = len(candidates) if self.every else WAVE
        waves = [candidates[i : i + size] for i in range(0, len(candidates), size)] or [()]
        self._yardstick, *arms = self._arms(
            "trying treatments",
            [self._trial(steps=steps, subject=subject), *self._screening(waves[0], steps, subject)],
        )
        runs = _with_place(waves[0], arms)
        for wave in waves[1:]:
            if any(all(_promise(one)) for one in _compared(self._yardstick, runs)) or not self._affords(
                len(wave), steps
            ):
                break
            arms = self._arms("trying treatments", self._screening(wave, steps, subject))
            runs += _with_place(wave, arms)
        others = [arm for _, arm in runs]
        noise = abs(compare([_cut(first, steps)], [self._yardstick], others=others).effect.value)
        return _ranked(_compared(self._yardstick, runs)), noise

    def _screening(self, wave: Sequence[Treatment], steps: int, subject: str) -> list[Trial]:
        return [self._trial(changes=t.changes, steps=steps, subject=subject) for t in wave]

    def _verify(self, first: Arm, fix: Fix, subject: str) -> Iterator[Fix]:
        steps = self._verification_steps(first)
        fix = replace(fix, steps=steps)
        chance = max(MATTERS, 2 * fix.noise)
        promising = [tried for tried in fix.trials if _is_promising(tried, chance)]
        families = {_family(tried.treatment): tried for tried in reversed(promising)}
        # Different remedies first, then other forms of them.
        finalists = sorted(promising, key=lambda tried: tried is not families[_family(tried.treatment)])
        if not finalists:
            return
        fix = yield from self._compete(fix, finalists[: FINALISTS + self.every], subject, steps)
        undecided = [t for t in fix.trials if t.verified and t.verdict.outcome == "inconclusive" and not t.verdict.why]
        longer = first.steps if self._affords(2 * self.seeds, first.steps) else steps
        if undecided and fix.best is None and self._affords(2 * self.seeds, longer):
            # Twice as many pairs, of whole runs where that can be. A null treatment is called an improvement in 4.5 %
            # of such double looks, one of two null treatments in 8 % (simulated; Student's level is 2.5 % a look).
            likeliest = max(undecided, key=lambda t: t.verdict.effect.value).treatment
            seeds = range(self.seeds + 1, 2 * self.seeds + 1)
            yield self._with(fix, self._tried(likeliest, [None, likeliest], seeds, longer, subject))

    def _compete(self, fix: Fix, finalists: Sequence[Tried], subject: str, steps: int) -> Generator[Fix, None, Fix]:
        waiting = [tried.treatment for tried in finalists]
        seeds = range(1, self.seeds + 1)
        arms: list[Treatment | None] = [None, waiting[0]]
        fix = self._with(fix, self._tried(waiting.pop(0), arms, seeds, steps, subject))
        yield fix
        extended = self._extended(fix, subject)
        if extended is not None:
            waiting = [extended, *(treatment for treatment in waiting if str(treatment) != str(extended))]
        while waiting and (self.every or (not _is_cure(fix.trials[0]) and self._affords(self.seeds, steps))):
            treatment = waiting.pop(0)
            fix = self._with(fix, self._tried(treatment, [treatment], seeds, steps, subject))
            yield fix
        return fix

    def _extended(self, fix: Fix, subject: str) -> Treatment | None:
        """The first treatment with another, where it helps and is no cure: of the best that were tried for causes that
        stay, those that the treated program's own diagnosis proposes, and the second best, what does most in screening.
        """
        first, *rest = fix.trials
        if not first.recommended or _is_cure(first):
            return None
        others = [t.treatment for t in rest if _adds(first.treatment, t.treatment) and t.verdict.outcome != "worse"]
        suited = [t for t in others if t.cause in first.verdict.remaining]
        treated = self._runs[str(first.treatment)][0].diagnosis
        new = [t for t in self._candidates(treated) if _adds(first.treatment, t)]
        partners = list({str(t): t for t in (*suited, *new)}.values())[:WAVE] or others[:1]
        wave = [combine(first.treatment, partner) for partner in partners]
        steps = self._short
        if len(wave) < 2 or not self._affords(len(wave), steps):
            return next(iter(wave), None)
        runs = _with_place(wave, self._arms("trying treatments", self._screening(wave, steps, subject)))
        return next((tried.treatment for tried in _ranked(_compared(self._yardstick, runs))), None)

    def _affords(self, runs: int, steps: int) -> bool:
        """Whether so many runs more, at the pace of the last ones, stay within what the search may take.

        Where everything is to be tried, they do.
        """
        elapsed = time.perf_counter() - self._began
        return self.every or elapsed + runs * steps * self._pace <= TIMES * self._whole

    def _tried(
        self, treatment: Treatment, arms: Sequence[Treatment | None], seeds: Sequence[int], steps: int, subject: str
    ) -> Tried:
        """Run `arms` on `seeds`, and compare all runs that there are by now of the treatment and of none."""
        trials = [
            self._trial(changes=() if arm is None else arm.changes, seed=seed, steps=steps, subject=subject)
            for arm in arms
            for seed in seeds
        ]
        done = self._arms("verifying", trials)
        for place, arm in enumerate(arms):
            self._runs.setdefault(str(arm), []).extend(done[place * len(seeds) : (place + 1) * len(seeds)])
        before, after = self._runs[str(None)], self._runs[str(treatment)]
        verdict = compare(before, after, cause=treatment.cause)
        return Tried(
            treatment=treatment,
            verdict=verdict,
            seconds=sum(arm.seconds for arm in after),
            verified=len(after),
            steps=max(arm.steps for arm in after),
            curves=Curves.of(before, after),
        )

    def _with(self, fix: Fix, tried: Tried) -> Fix:
        """The state with one more verified treatment: recommended ones first, by the low end of their effect in one
        measure; last combinations that do nothing which a part of them does not do alone.
        """
        rest = [t for t in fix.trials if str(t.treatment) != str(tried.treatment)]
        verified = [t for t in rest if t.verified] + [tried]
        arms = {str(t.treatment): self._runs[str(t.treatment)] for t in verified}
        others = [arm for runs in arms.values() for arm in runs]

        def adds(one: Tried) -> bool:
            whole = set(one.treatment.remedies)
            return all(
                compare(arms[str(part.treatment)], arms[str(one.treatment)]).helps or part.left - one.left
                for part in verified
                if set(part.treatment.remedies) < whole
            )

        def order(one: Tried) -> tuple[float, ...]:
            effect = compare(self._runs[str(None)], arms[str(one.treatment)], others=others).effect
            resolved = one.verdict.outcome == "resolved"
            return bool(adds(one)), _is_cure(one), resolved, one.recommended, effect.low

        verified.sort(key=order, reverse=True)
        return replace(fix, trials=(*verified, *(t for t in rest if not t.verified)))

    def _verification_steps(self, first: Arm) -> int:
        """Half of the run, unless the fault shows later; the whole of it where `steps` were asked for."""
        return first.steps if self.steps else max(_screening_steps(first), first.steps // 2)

    def _trial(self, **what: Any) -> Trial:
        limits = {"seconds": self._patience, "memory": self.memory, "threads": self.threads}
        return Trial(program=self.program, **{"steps": self.steps, **limits, **what})

    def _arms(self, stage: str, trials: Sequence[Trial]) -> list[Arm]:
        """The runs of trials, in their order; the same trial is run once."""
        began = time.perf_counter()
        self.report(stage, 0, len(trials))
        futures = [self.executor.submit(run_trial, trial, self.options) for trial in trials]
        try:
            for done, _ in enumerate(as_completed(futures), 1):
                self.report(stage, done, len(trials))
        except KeyboardInterrupt:
            for future in futures:
                future.cancel()
            raise
        arms = [future.result() for future in futures]
        steps = sum(arm.steps for arm in arms)
        self._pace = (time.perf_counter() - began) / steps if steps else self._pace
        return arms


def fix(
    program: Program,
    *,
    steps: int | None = None,
    seeds: int = 3,
    jobs: int = 2,
    every: bool = False,
    limit: float = 60.0,
    threads: int = 1,
    memory: int | None = None,
    keep: Path | None = None,
    options: Options | None = None,
    report: Report | None = None,
) -> Fix:
    """Search on this machine with `jobs` processes at once; see `Search`. Ctrl-C ends those under way; before the first
    of them has ended nothing is known, and KeyboardInterrupt is raised.
    """
    with ThreadPoolExecutor(max_workers=jobs) as executor:
        search = Search(
            program=program,
            steps=steps,
            seeds=seeds,
            every=every,
            limit=limit,
            threads=threads,
            memory=memory,
            keep=keep,
            executor=executor,
            options=options or {},
            **({"report": report} if report is not None else {}),
        )
        try:
            found = search.run()
        except KeyboardInterrupt:
            end_trials()
            raise
        if found.interrupted:
            end_trials()
        return found


def _is_for(treatment: Treatment, cause: str) -> bool:
    return cause == treatment.cause or any(cause in remedy.treats for remedy in treatment.remedies)


def _subject_of(diagnosis: Diagnosis) -> History:
    """Where the first cause is."""
    causes = diagnosis.at_least("warning")
    name = causes[0].finding.subject if causes else diagnosis.subjects[0]
    return next(history for history in diagnosis.histories if history.subject == name)


def _screening_steps(first: Arm) -> int:
    """A quarter of the run, at least 20 steps, and twice as long as the fault and what it causes take to show."""
    told = [f for cause in first.diagnosis.at_least("warning")[:1] for f in (cause.finding, *cause.symptoms)]
    shows = max((finding.first_step for finding in told if finding.level != "info"), default=0)
    return min(first.steps, max(first.steps // SHARE, 20, 2 * (shows + 1)))


def _with_place(wave: Sequence[Treatment], arms: Sequence[Arm]) -> list[tuple[Treatment, Arm]]:
    """Treatments with their runs; those left out of which the program, asked when it ran, had no place for."""
    return [(treatment, arm) for treatment, arm in zip(wave, arms, strict=True) if not arm.refused]


def _compared(untreated: Arm, runs: Sequence[tuple[Treatment, Arm]]) -> list[Tried]:
    """One pair for each treatment, in the measure of all: only forms of one remedy measure themselves by what merely
    hastens.
    """

    def beside(treatment: Treatment) -> list[Arm]:
        return [arm for other, arm in runs if not _hastens(other) or _family(other) == _family(treatment)]

    return [
        Tried(
            treatment=treatment,
            verdict=compare([untreated], [arm], cause=treatment.cause, others=beside(treatment)),
            seconds=arm.seconds,
            steps=arm.steps,
        )
        for treatment, arm in runs
    ]


def _cut(arm: Arm, steps: int) -> Arm:
    return replace(arm, losses=arm.losses[:steps], error="")


def _ranked(tried: Sequence[Tried]) -> list[Tried]:
    """What leaves nothing to treat comes first, then what resolves its cause without harm, then what lowers the loss.

    Effects within an order of magnitude of the largest (that of a larger learning rate apart, which makes any run
    faster at first) count as equal, and the remedy that suits the cause best goes first. Of the forms of one remedy
    those go first that have half of their largest effect.
    """
    families: dict[str, list[Tried]] = {}
    for one in tried:
        families.setdefault(_family(one.treatment), []).append(one)
    largest = _largest_effect([one for one in tried if not _hastens(one.treatment)])

    def order(one: Tried) -> tuple[float, ...]:
        effect, family = one.verdict.effect.value, families[_family(one.treatment)]
        cured, matters = _promise(one)
        large = matters and effect >= largest / 10
        suits = max(other.treatment.score for other in family)
        form = effect >= _largest_effect(family) / 2
        return (
            cured and large and not one.verdict.remaining,
            cured,
            matters,
            large,
            suits,
            form,
            one.treatment.score,
            effect,
        )

    return sorted(tried, key=order, reverse=True)


def _hastens(treatment: Treatment) -> bool:
    return any(remedy.hastens for remedy in treatment.remedies)


def _family(treatment: Treatment) -> str:
    """The name of its first remedy."""
    return treatment.remedies[0].remedy_name()


def _adds(treatment: Treatment, other: Treatment) -> bool:
    """Whether the other one changes other things: no remedy and no hyperparameter that this one has."""

    def changed(treatment: Treatment) -> set[str]:
        found = {remedy.remedy_name() for remedy in treatment.remedies}
        for change in treatment.changes:
            if isinstance(change, SetHyperparameter):
                found.add(change.name)
            elif isinstance(change, ScheduleLearningRate):
                found.add("lr")
            elif isinstance(change, ReplaceOptimizer):
                found.update(name for name, _ in change.hyperparameters)
        return found

    return changed(treatment).isdisjoint(changed(other))


def _largest_effect(tried: Sequence[Tried]) -> float:
    return max((one.verdict.effect.value for one in tried if math.isfinite(one.verdict.effect.value)), default=0.0)


def _promise(tried: Tried) -> tuple[bool, bool]:
    """Whether its cause is gone without harm, and whether the loss is lower by what matters."""
    effect = tried.verdict.effect.value
    cured = tried.treatment.cause in tried.verdict.resolved
    harmless = tried.verdict.outcome != "worse" and effect > -MATTERS
    return cured and harmless, effect >= MATTERS


def _is_promising(tried: Tried, chance: float) -> bool:
    """Worth more runs: better than chance, or free of its cause while the harm has not shown in the loss yet."""
    cured, matters = _promise(tried)
    return cured or (matters and tried.verdict.effect.value >= chance)


def _is_cure(tried: Tried) -> bool:
    """Whether nothing is left to treat."""
    return tried.verdict.outcome == "resolved" and not tried.verdict.remaining
