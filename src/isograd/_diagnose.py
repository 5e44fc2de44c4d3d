"""Run every rule on every subject, group what is seen under what caused it, and say what could not be looked at."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from isograd._errors import UnhealthyRun
from isograd._forecast import Preflight
from isograd._history import History
from isograd._rule import LEVELS, STAGES, Evidence, Finding, Level, Options, Rule, Unmeasured
from isograd._statistics import STATISTICS
from isograd.rules import RULES

SCHEMA = 1


@dataclass(frozen=True, kw_only=True)
class Cause:
    """A finding that explains others, or one that nothing explains. `symptoms` are in order of time."""

    finding: Finding
    symptoms: tuple[Finding, ...] = ()
    remedies: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values only; a number that is not finite is null, since JSON has none."""
        finding = self.finding
        return {
            "cause": finding.name,
            "subject": finding.subject,
            "level": finding.level,
            "layers": list(finding.layers),
            "first_step": finding.first_step,
            "confidence": finding.confidence,
            "message": finding.message,
            "symptoms": [symptom.name for symptom in self.symptoms],
            "evidence": [_evidence_dict(evidence) for evidence in finding.evidence],
            "remedies": list(self.remedies),
        }


@dataclass(frozen=True, kw_only=True)
class Diagnosis:
    """What is wrong with a run, the most upstream and most certain first, and what could not be looked at."""

    run: str
    subjects: tuple[str, ...]
    steps: int
    causes: tuple[Cause, ...] = ()
    unmeasured: tuple[Unmeasured, ...] = ()
    overhead: float | None = None
    histories: tuple[History, ...] = field(default=(), repr=False, compare=False)
    """What it was drawn from: a treatment depends on it."""
    preflight: Preflight | None = None
    """What `isograd.preflight` found; None for a run."""

    @property
    def healthy(self) -> bool:
        """Whether no cause is at level warning or above."""
        return not self.at_least("warning")

    def at_least(self, level: Level) -> tuple[Cause, ...]:
        """The causes at `level` or above, in order. Raises ValueError for a level that there is not."""
        if level not in LEVELS:
            raise ValueError(f"{level!r} is no level; levels are {', '.join(LEVELS)}")
        return tuple(cause for cause in self.causes if LEVELS.index(cause.finding.level) >= LEVELS.index(level))

    def to_dict(self) -> dict[str, Any]:
        """The diagnosis as JSON values, schema 1; that of a preflight has its facts under "preflight"."""
        facts = {} if self.preflight is None else {"preflight": self.preflight.to_dict()}
        return {
            "schema": SCHEMA,
            "run": self.run,
            "subjects": list(self.subjects),
            "steps": self.steps,
            "healthy": self.healthy,
            "overhead": self.overhead,
            "causes": [cause.to_dict() for cause in self.causes],
            "unmeasured": [{"rule": u.rule, "missing": u.missing, "why": u.why} for u in self.unmeasured],
            **facts,
        }

    def raise_for_findings(self, level: Level = "warning") -> None:
        """Raise UnhealthyRun, with this diagnosis as its text, if a cause is at `level` or above."""
        if self.at_least(level):
            raise UnhealthyRun(str(self))

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _repr_html_(self) -> str:
        from isograd._notebook import diagnosis_card  # how it shows itself is known above

        return diagnosis_card(self)

    def _lines(self) -> Iterator[str]:
        seen = f"{self.steps} steps of {', '.join(self.subjects) or 'no model'}"
        seen = seen if self.preflight is None else "a model before its first step"
        yield f"healthy: no fault found in {seen}" if self.healthy else f"not healthy: {seen}"
        yield from () if self.preflight is None else self.preflight.sentences()
        for cause in self.causes:
            finding = cause.finding
            where = f"   {finding.layers[0]}" if finding.layers else ""
            yield f"{finding.name}   {finding.level}   steps {finding.first_step}-{finding.last_step}{where}"
            yield f"  {finding.message}"
            if cause.symptoms:
                yield f"  Explains: {', '.join(f'{s.name} (step {s.first_step})' for s in cause.symptoms)}."
        if self.unmeasured:
            yield f"Could not look: {', '.join(dict.fromkeys(u.rule for u in self.unmeasured))}."


def diagnose(
    histories: Iterable[History], *, run: str = "", overhead: float | None = None, options: Options | None = None
) -> Diagnosis:
    """Apply all rules to the subjects of a run.

    `options` maps a rule's name to its options, as `[tool.isograd.rules.<name>]` does. Raises ValueError for a rule
    or an option that does not exist, with the nearest name; never raises on what was measured.
    """
    rules = configured(options or {})
    subjects = _acquainted(histories)
    causes: list[Cause] = []
    unmeasured: list[Unmeasured] = []
    for history in subjects:
        findings: list[Finding] = []
        for rule in rules:
            missing = missing_statistics(rule, history)
            unmeasured.extend(missing)
            if _can_look(rule, history):
                # Readings of a broken run reach the ends of float64, where overflow is expected and means nothing.
                with np.errstate(all="ignore"):
                    findings.extend(rule.check(history))
        causes.extend(group(findings))
    return Diagnosis(
        run=run,
        subjects=tuple(history.subject for history in subjects),
        steps=max((history.num_steps for history in subjects), default=0),
        causes=tuple(sorted(causes, key=_rank)),
        unmeasured=tuple(dict.fromkeys(unmeasured)),
        overhead=overhead,
        histories=subjects,
    )


def _acquainted(histories: Iterable[History]) -> tuple[History, ...]:
    """The subjects of a run, each knowing the others."""
    subjects = tuple(histories)
    return tuple(
        replace(history, companions={other.subject: other for other in subjects if other is not history})
        for history in subjects
    )


def configured(options: Options) -> list[Rule]:
    """Every rule of the catalogue with the given options. Raises ValueError as `diagnose` does."""
    for name in options:
        if name not in RULES:
            raise ValueError(f"there is no rule {name!r}{_nearest(name, RULES)}")
    return [_construct(name, rule, options.get(name, {})) for name, rule in RULES.items()]


def _construct(name: str, rule: type[Rule], given: Mapping[str, object]) -> Rule:
    defaults = {field.name: getattr(rule, field.name) for field in fields(rule)}  # type: ignore[arg-type]
    for option, value in given.items():
        if option not in defaults:
            raise ValueError(f"{name} has no option {option!r}{_nearest(option, defaults)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{name}: option {option!r} must be a finite number, not {value!r}")
        if isinstance(defaults[option], int) and value != int(value):
            raise ValueError(f"{name}: option {option!r} must be a whole number, not {value!r}")
    typed = {option: type(defaults[option])(value) for option, value in given.items()}
    return rule(**typed)


def _nearest(name: str, names: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(names), n=3)
    return f"; nearest: {', '.join(close)}" if close else f"; there are {', '.join(sorted(names))}"


def _can_look(rule: Rule, history: History) -> bool:
    return all(len(history.series.get(name, ())) for name in rule.needs) and bool(history.series)


def missing_statistics(rule: Rule, history: History) -> list[Unmeasured]:
    """The statistics that a rule needed and did not get, with the observer's reason where it gave one.

    A per-layer statistic without a reading and without a reason, in a run that read others, had nothing to be read
    from.
    """
    return [
        Unmeasured(
            rule=rule.rule_name(), missing=name, why=history.unmeasured.get(name, "no reading of it in this run")
        )
        for name in rule.needs
        if name in history.unmeasured or (not len(history.series.get(name, ())) and not _has_no_place(name, history))
    ]


def _has_no_place(statistic: str, history: History) -> bool:
    axis = STATISTICS[statistic].axis
    return axis == "layer" and any(STATISTICS[name].axis == "layer" for name in history.series)


def group(findings: Iterable[Finding]) -> list[Cause]:
    """The findings of one subject as causes: what one brings about goes to the most upstream cause that explains it.

    A cause explains the symptoms and the further causes that its rule lists, if it is itself at level warning or
    above, or the other is no alarm either. It must have been there before the symptom ended, and before the further
    cause began. It takes over a higher level: what caused the loss of a run is an error. What nothing explains stands
    for itself. No chain of rules explains itself, so every finding has a root.
    """
    ordered = sorted(findings, key=lambda finding: (_stage(finding) == "symptom", *_upstream(finding)))
    roots = [finding for finding in ordered if not any(_explains(other, finding) for other in ordered)]
    explained: dict[int, list[Finding]] = {index: [] for index in range(len(roots))}
    for finding in ordered:
        if not any(finding is root for root in roots):
            index = next(i for i, root in enumerate(roots) if _leads_to(root, finding, ordered))
            explained[index].append(finding)
    return [_cause(root, explained[index]) for index, root in enumerate(roots)]


def _explains(cause: Finding, other: Finding) -> bool:
    latest = other.last_step if _stage(other) == "symptom" else other.first_step
    if other.name not in RULES[cause.name].explains or cause.first_step > latest:
        return False
    return cause.level != "info" or other.level == "info"


def _leads_to(root: Finding, finding: Finding, findings: list[Finding]) -> bool:
    """Whether `root` explains `finding`, directly or through other findings."""
    reached, waiting = [root], [root]
    while waiting:
        cause = waiting.pop()
        following = [f for f in findings if _explains(cause, f) and not any(f is known for known in reached)]
        reached += following
        waiting += following
    return any(finding is known for known in reached)


def _cause(finding: Finding, symptoms: list[Finding]) -> Cause:
    level = max((finding.level, *(symptom.level for symptom in symptoms)), key=LEVELS.index)
    return Cause(
        finding=replace(finding, level=level),
        symptoms=tuple(sorted(symptoms, key=lambda symptom: symptom.first_step)),
        remedies=RULES[finding.name].remedies,
    )


def _stage(finding: Finding) -> str:
    return RULES[finding.name].stage


def _upstream(finding: Finding) -> tuple[int, int, float]:
    """First in time, then upstream, then certain."""
    return finding.first_step, STAGES.index(RULES[finding.name].stage), -finding.confidence


def _rank(cause: Cause) -> tuple[bool, bool, int, int, float]:
    """Alarms before what is worth knowing, causes before symptoms that nothing explains, then as `_upstream`."""
    finding = cause.finding
    return finding.level == "info", _stage(finding) == "symptom", *_upstream(finding)


def _evidence_dict(evidence: Evidence) -> dict[str, Any]:
    return {
        "statistic": evidence.statistic,
        "observed": evidence.observed if math.isfinite(evidence.observed) else None,
        "limit": evidence.limit,
        "step": evidence.step,
        "layer": evidence.layer,
    }
