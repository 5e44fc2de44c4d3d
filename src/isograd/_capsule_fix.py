"""Treatments tried on one captured step: what the step gives with each, in seconds instead of runs."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

from isograd._capsule import Capsule
from isograd._errors import CannotReplay, IsogradError
from isograd._recorded import diagnose_run
from isograd._remedy import Treatment
from isograd._replay import Replay
from isograd._rerun import replay_script
from isograd._rule import Options
from isograd._runs import Run, read_run
from isograd._treat import every_treatment, treat
from isograd._trial import Program

StepOutcome = Literal["resolved", "contained", "no-effect", "refused"]
"""resolved: loss and gradients are as they should be; contained: they are not, and the weights come to no harm."""

_ORDER: tuple[StepOutcome, ...] = ("resolved", "contained", "no-effect", "refused")


@dataclass(frozen=True, kw_only=True)
class StepTrial:
    """A treatment, and the captured step with it. `replay`: None where it was refused, and `why` says so."""

    treatment: Treatment
    outcome: StepOutcome
    replay: Replay | None = None
    why: str = ""
    seconds: float = 0.0

    def to_dict(self) -> dict[str, Any]:
        """As JSON of schema 1 has it."""
        return {
            "treatment": str(self.treatment),
            "outcome": self.outcome,
            "why": self.why,
            "replay": None if self.replay is None else self.replay.to_dict(),
            "code": self.treatment.code,
            "seconds": self.seconds,
        }


@dataclass(frozen=True, kw_only=True)
class CapsuleFix:
    """A captured step as it is and with every proposal for the run it comes from, best first."""

    baseline: Replay
    trials: tuple[StepTrial, ...] = ()

    @property
    def best(self) -> StepTrial | None:
        """The first that has resolved or contained it."""
        return next((trial for trial in self.trials if trial.outcome in ("resolved", "contained")), None)

    def to_dict(self) -> dict[str, Any]:
        """As JSON of schema 1 has it."""
        trials = [trial.to_dict() for trial in self.trials]
        best = None if self.best is None else self.trials.index(self.best)
        return {"schema": 1, "baseline": self.baseline.to_dict(), "trials": trials, "best": best}


def fix_capsule(
    capsule: Capsule,
    program: Program,
    *,
    jobs: int | None = None,
    every: bool = False,
    seconds: float = 600.0,
    options: Options | None = None,
    report: Callable[[int, int], None] = lambda done, all_: None,
) -> CapsuleFix:
    """Try the proposals for the capsule's run on its step; with `every`, the default form of every remedy.

    `report(done, all)` hears of progress. Raises CannotReplay where the program does not come to the step or makes
    another one of it, RunNotFound or RunUnreadable where the run that the capsule lies in is gone.
    """
    jobs = jobs or os.cpu_count() or 1
    run = read_run(capsule.path.absolute().parent.parent)
    baseline = replay_script(capsule, program, jobs=jobs, seconds=seconds)
    if not baseline.reproduced:
        raise CannotReplay(f"The step cannot serve to compare treatments: it was not reproduced, {baseline.why}")
    wanted = _wanted(run, capsule, every=every, options=options or {})
    report(0, len(wanted))
    trials: list[StepTrial] = []
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        for trial in pool.map(lambda one: _tried(capsule, program, one, baseline, seconds), wanted):
            trials.append(trial)
            report(len(trials), len(wanted))
    return CapsuleFix(baseline=baseline, trials=tuple(sorted(trials, key=lambda one: _ORDER.index(one.outcome))))


def _wanted(run: Run, capsule: Capsule, *, every: bool, options: Options) -> Sequence[Treatment]:
    if every:
        history = next((h for h in run.histories if h.subject == capsule.subject), run.histories[0])
        return every_treatment(history)
    return [treatment for treatment in treat(diagnose_run(run, options)) if treatment.changes]


def _tried(capsule: Capsule, program: Program, treatment: Treatment, baseline: Replay, seconds: float) -> StepTrial:
    began = time.perf_counter()
    try:
        replay = replay_script(capsule, program, changes=treatment.changes, jobs=1, seconds=seconds)
    except IsogradError as error:
        return StepTrial(treatment=treatment, outcome="refused", why=str(error), seconds=time.perf_counter() - began)
    outcome = outcome_of(capsule, baseline, replay)
    return StepTrial(treatment=treatment, outcome=outcome, replay=replay, seconds=time.perf_counter() - began)


def outcome_of(capsule: Capsule, baseline: Replay, replay: Replay) -> StepOutcome:
    """What a treatment has made of the step: of what was captured for, nothing may be left."""
    is_sound = replay.finite and replay.finite_after
    if baseline.finite and is_sound and all(_is_within(reason, replay) for reason in capsule.why):
        return "resolved"
    if not baseline.finite and is_sound:
        return "resolved"
    is_harmless = replay.finite_after and not replay.update_norm > 0
    return "contained" if is_harmless and (baseline.update_norm > 0 or not baseline.finite_after) else "no-effect"


def _is_within(reason: Any, replay: Replay) -> bool:
    """Whether what had left its range is back in it; a channel that a replay does not measure is left out."""
    layer = reason["layer"]
    of_layer = [norm for name, norm in replay.grad_norms.items() if layer in (name, name.rpartition(".")[0])]
    found = {
        "loss": replay.loss,
        "global_grad_norm": replay.grad_norm,
        "update": replay.update_norm,
        "grad_norm": math.sqrt(sum(norm * norm for norm in of_layer)),
    }.get(reason["channel"])
    return found is None or reason["limit"] is None or found <= reason["limit"]
