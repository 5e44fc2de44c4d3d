"""From a diagnosis to proposals: which remedies, with which options, in which order.

A proposal's score is how well the cause is established, times how well the remedy treats that cause, times how safe
it is. It decides what is tried first; what is recommended is decided by trying it (`_verify.py`).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from isograd._diagnose import Cause, Diagnosis
from isograd._errors import UnknownName
from isograd._history import History
from isograd._remedy import Applicability, Inapplicable, Remedy, Treatment
from isograd.remedies import REMEDIES

SAFETY: Mapping[Applicability, float] = {"automatic": 1.0, "opt-in": 0.5, "advice": 0.25}
"""A remedy that needs consent comes after those that do not, and advice last, whatever it promises."""


def treat(diagnosis: Diagnosis) -> tuple[Treatment, ...]:
    """Proposals for the causes at level warning or above, best first; empty for a healthy run.

    Each remedy is proposed once with the same options, for the cause that scores highest.
    """
    found: dict[str, Treatment] = {}
    subjects = {history.subject: history for history in diagnosis.histories}
    for cause in diagnosis.at_least("warning"):
        history = subjects.get(cause.finding.subject)
        for treatment in _proposals(cause, history) if history is not None else ():
            known = found.get(str(treatment))
            if known is None or known.score < treatment.score:
                found[str(treatment)] = treatment
    return tuple(sorted(found.values(), key=lambda treatment: -treatment.score))


def every_treatment(history: History) -> tuple[Treatment, ...]:
    """The default form of every remedy of the catalogue that this program has a place for, advice left out."""
    found = (_resolved(remedy(), history, None) for remedy in REMEDIES.values())
    return tuple(treatment for treatment in found if treatment is not None and treatment.changes)


def combine(*treatments: Treatment) -> Treatment:
    """One treatment of several: their remedies and changes in order, without doubles."""
    remedies = tuple(dict.fromkeys(remedy for treatment in treatments for remedy in treatment.remedies))
    changes = tuple(dict.fromkeys(change for treatment in treatments for change in treatment.changes))
    code = "\n\n".join(dict.fromkeys(treatment.code for treatment in treatments))
    return replace(treatments[0], remedies=remedies, changes=changes, code=code)


def treatment_of(texts: Sequence[str], history: History) -> Treatment:
    """The treatment that `--apply TEXT` (once for each text) stands for in a program.

    Raises UnknownName or ValueError as `parse` does, and Inapplicable where the program has no place for one.
    """
    remedies = tuple(map(parse, texts))
    changes = tuple(change for remedy in remedies for change in remedy.changes(history))
    code = "\n\n".join(remedy.code_for(history) for remedy in remedies)
    return Treatment(remedies=remedies, changes=changes, code=code)


def parse(text: str) -> Remedy:
    """The remedy that `NAME[:option=value,…]` names.

    Raises UnknownName for a name that there is not, ValueError for an option that it does not have or a value that
    it does not take; both name the nearest that exist.
    """
    name, _, options = text.strip().partition(":")
    if name not in REMEDIES:
        near = difflib.get_close_matches(name, list(REMEDIES), n=3)
        hint = f"; nearest: {', '.join(near)}" if near else f"; there are {', '.join(REMEDIES)}"
        raise UnknownName(f"There is no remedy {name!r}{hint}.")
    remedy = REMEDIES[name]
    defaults = {field.name: field.default for field in fields(remedy)}  # type: ignore[arg-type]
    given = dict(_option(name, part, defaults) for part in options.split(",") if part.strip())
    return remedy(**given)


def _option(name: str, part: str, defaults: Mapping[str, Any]) -> tuple[str, Any]:
    key, equals, value = (piece.strip() for piece in part.partition("="))
    if key in defaults and not equals:
        raise ValueError(f"{name}: write option=value, as in {key}={defaults[key]}")
    if key not in defaults:
        known = ", ".join(defaults) or "none"
        raise ValueError(f"{name} has no option {key!r}: write option=value; its options are {known}")
    kind = type(defaults[key])
    try:
        return key, kind(value)
    except ValueError:
        raise ValueError(f"{name}: {key} takes {_WORD.get(kind, kind.__name__)}, not {value!r}") from None


_WORD = {int: "a whole number", float: "a number"}


def _proposals(cause: Cause, history: History) -> Iterator[Treatment]:
    """For one cause: its rule's remedies in their order, each with the options that suit what was measured."""
    for rank, name in enumerate(cause.remedies):
        if name not in REMEDIES:
            continue
        candidates = list(REMEDIES[name].candidates(history, cause.finding))
        forms = [form for remedy in candidates for form in _forms(remedy, history, cause.finding.name)]
        for place, treatment in enumerate(forms):
            fit = 1 / (1 + rank) / (1 + place)
            yield replace(treatment, score=cause.finding.confidence * fit * SAFETY[treatment.applicability])


def _forms(remedy: Remedy, history: History, cause: str) -> Iterator[Treatment]:
    """The remedy together with what it goes with, then alone; nothing where the program has no place for it."""
    alone = _resolved(remedy, history, cause)
    if alone is None:
        return
    others = [_resolved(parse(text), history, cause) for text in remedy.goes_with()]
    together = [other for other in others if other is not None]
    if together:
        yield combine(alone, *together)
    yield alone


def _resolved(remedy: Remedy, history: History, cause: str | None) -> Treatment | None:
    try:
        return Treatment(
            remedies=(remedy,),
            changes=remedy.changes(history),
            cause=cause,
            code=remedy.code_for(history),
        )
    except Inapplicable:
        return None
