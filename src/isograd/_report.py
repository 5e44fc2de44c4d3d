"""What to say of a run and in which order: the verdict in the terminal and the list of runs.

It decides nothing: every number here stands in a `Diagnosis`, a `History` or a run's summary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from isograd._chart import Sparkline, depth_profile, number
from isograd._diagnose import Cause, Diagnosis
from isograd._history import Event, History
from isograd._remedy import Treatment
from isograd._rule import LEVELS, Evidence, Finding
from isograd._runs import RunSummary
from isograd._schedule import ALLOWANCE
from isograd._terminal import is_plain, said
from isograd.rules import RULES

_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan"}
_IN_FULL = 3  # causes told in full before the rest is a line each: what ten seconds allow
_DEPTH = frozenset({"vanishing-gradients", "exploding-gradients"})


def verdict(diagnosis: Diagnosis, histories: Sequence[History] = (), *, verbose: bool = False) -> RenderableType:
    """What is wrong, where, since when, the number against its limit, the first cause and the next command.

    `verbose` adds every cause in full, all evidence, findings at level info, and why a rule could not look.
    """
    return Verdict(diagnosis=diagnosis, histories=tuple(histories), verbose=verbose)


def proposals(diagnosis: Diagnosis, treatments: Sequence[Treatment]) -> RenderableType:
    """Treatments in their order: what each is for, what `--apply` takes, and the code to paste."""
    if diagnosis.healthy:
        return Text(f"Nothing to treat: no fault was found in {diagnosis.steps} steps.")
    if not treatments:
        names = ", ".join(cause.finding.name for cause in diagnosis.at_least("warning"))
        return Text(f"isograd knows no treatment for {names}; `isograd explain` tells what to look at.")
    rows: list[RenderableType] = []
    for number_, treatment in enumerate(treatments, 1):
        rows.append(
            Text.assemble(f"{number_}. ", (str(treatment), "bold"), f"   for {treatment.cause}", _consent(treatment))
        )
        rows.append(Padding(Text(treatment.code), (0, 0, 1, 2)))  # its 78 columns fit into 80
    return Group(*rows)


def _consent(treatment: Treatment) -> str:
    return {"automatic": "", "opt-in": "   (opt-in)", "advice": "   (advice)"}[treatment.applicability]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The parts of a verdict in their order; see `verdict`."""

    diagnosis: Diagnosis
    histories: tuple[History, ...]
    verbose: bool

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = is_plain(console, options)
        yield self._headline()
        yield from self._facts(plain)
        for history in self.histories if self.diagnosis.preflight is None else ():
            yield from self._loss(history, plain)
            yield from (Padding(said(line.strip(), plain=plain), (0, 0, 0, 2)) for line in _happenings(history))
        # The picture stands above the words: on a small terminal the causes and the next commands stay in sight.
        yield from self._profiles()
        told = [cause for cause in self.diagnosis.causes if self.verbose or cause.finding.level != "info"]
        in_full = len(told) if self.verbose else _IN_FULL
        for cause in told[:in_full]:
            yield Text()
            yield from self._cause(cause, plain)
        notes = [*self._unmeasured()] if self.verbose else [*self._left_out(told[in_full:])]
        if notes:
            yield Text()
        yield from (said(note, plain=plain) for note in notes)

    def _headline(self) -> Text:
        seen = f"{self.diagnosis.steps} steps of {_listed(self.diagnosis.subjects, 4)}"
        if self.diagnosis.preflight is not None:
            seen = "a model before its first step"
        overhead = self._overhead()
        if self.diagnosis.healthy:
            looked = len(RULES) - len({u.rule for u in self.diagnosis.unmeasured})
            found = f"{looked} rules looked at {seen} and found no fault."
            return Text.assemble("isograd: ", ("healthy", "bold green"), f". {found}{overhead}")
        causes = [cause.finding for cause in self.diagnosis.causes if cause.finding.level != "info"]
        kind = "First cause" if _stage(causes[0].name) != "symptom" else "Seen first"
        counted = f"{len(causes)} {'finding' if len(causes) == 1 else 'findings'} in {seen}. {kind}: "
        style = _STYLES[max((finding.level for finding in causes), key=LEVELS.index)]
        return Text.assemble(
            "isograd: ", ("not healthy", style), f", {counted}", (causes[0].name, style), f".{overhead}"
        )

    def _facts(self, plain: bool) -> Iterator[RenderableType]:
        if self.diagnosis.preflight is not None:
            for sentence in self.diagnosis.preflight.sentences():
                yield Padding(said(sentence, plain=plain), (0, 0, 0, 2))

    def _overhead(self) -> str:
        share = self.diagnosis.overhead
        if share is None:
            return ""
        spent = [np.nansum(h["watch_seconds"].values) for h in self.histories if "watch_seconds" in h]
        seconds = float(sum(spent))
        # Of a short run the share says little: what it may cost once is an allowance in seconds.
        if spent and share > 0.01 and seconds <= ALLOWANCE:
            free = f"the first {ALLOWANCE:.0f} s are free"
            return f" Watch overhead {max(seconds, 0.1):.1f} s ({_percent(share)}; {free})."
        return f" Watch overhead {_percent(share)}."

    def _loss(self, history: History, plain: bool) -> Iterator[Text]:
        if "loss" not in history:
            return
        values = history["loss"].values
        finite = values[np.isfinite(values)]
        line = Sparkline(values=values).draw(plain=plain)
        whose = f" of {history.subject}" if len(self.histories) > 1 else ""
        broken = f"({len(values) - len(finite)} not finite)" if len(finite) < len(values) else ""
        curve = f"{finite[0]:.4g} {line} {finite[-1]:.4g}" if len(finite) else line
        yield Text(f"  loss{whose}  {curve}  {broken}".rstrip())

    def _cause(self, cause: Cause, plain: bool) -> Iterator[RenderableType]:
        finding = cause.finding
        # Two subjects can have layers of the same name.
        subject = f"   {finding.subject}" if len(self.diagnosis.subjects) > 1 else ""
        where = subject + (f"   in {_listed(finding.layers, 1)}" if finding.layers else "")
        yield Text.assemble(
            "  ",
            (finding.name, "bold"),
            "   ",
            (finding.level, _STYLES[finding.level]),
            f"   {_steps(finding)}{where}",
        )
        yield Padding(Group(*(said(line, plain=plain) for line in self._lines(cause))), (0, 0, 0, 4))

    def _lines(self, cause: Cause) -> Iterator[str]:
        finding = cause.finding
        yield finding.message
        if self.verbose or "limit" not in finding.message:
            yield from (_measured(evidence) for evidence in finding.evidence[: None if self.verbose else 1])
        if cause.symptoms:
            yield f"Explains: {', '.join(f'{s.name} (step {s.first_step})' for s in cause.symptoms)}."
        elif _stage(finding.name) == "symptom":
            yield "No rule names a cause for this symptom."
        if self.verbose:
            yield from [f"Layers: {', '.join(finding.layers)}."] if len(finding.layers) > 1 else []
            yield f"Confidence: {_percent(finding.confidence)}."
        if cause.remedies:
            yield f"Remedies: {', '.join(cause.remedies)}."
        yield f"Next: isograd explain {finding.name}"

    def _profiles(self) -> Iterator[RenderableType]:
        seen = {f.subject for c in self.diagnosis.causes for f in (c.finding, *c.symptoms) if f.name in _DEPTH}
        for history in self.histories:
            profile = depth_profile(history) if self.verbose or history.subject in seen else None
            if profile is not None and (self.verbose or not self.diagnosis.healthy):
                yield Text()
                yield Padding(profile, (0, 0, 0, 2))

    def _left_out(self, causes: Sequence[Cause]) -> Iterator[str]:
        """What the short verdict does not tell, in a sentence each, and the command that tells it."""
        notes = tuple(dict.fromkeys(c.finding.name for c in self.diagnosis.causes if c.finding.level == "info"))
        blind = tuple(dict.fromkeys(unmeasured.rule for unmeasured in self.diagnosis.unmeasured))
        if causes:
            yield f"Then: {', '.join(f'{c.finding.name} ({c.finding.level}, {_steps(c.finding)})' for c in causes)}."
        if notes:
            yield f"Worth knowing, no alarm: {_listed(notes, 5)}."
        if blind:
            yield f"Could not look: {_listed(blind, 3)}."
        if self.diagnosis.run and (causes or notes or blind):
            yield f"All of it: isograd diagnose {self.diagnosis.run} -v"

    def _unmeasured(self) -> Iterator[str]:
        missed = self.diagnosis.unmeasured
        for missing, why in dict.fromkeys((u.missing, u.why) for u in missed):
            rules = dict.fromkeys(u.rule for u in missed if (u.missing, u.why) == (missing, why))
            yield f"Not measured: {missing}, {why.rstrip('.')}. Could not look: {', '.join(rules)}."


def _happenings(history: History) -> Iterator[str]:
    """What was changed while the program ran, and what ended the run or the watching early, in words."""
    yield from _interventions(history)
    for event in history.events_of("exception"):
        yield f"  The script raised {event.data.get('type', 'an exception')} at step {event.step}."
    for event in history.events_of("interrupted"):
        yield f"  The run was interrupted at step {event.step}."
    for event in history.events_of("watch-detached"):
        yield f"  Watching stopped at step {event.step}: {event.data.get('message', 'isograd failed')}"


def _interventions(history: History) -> Iterator[str]:
    """Changes applied, refused and undone, each once; a change of several optimizers is one, from the first on."""
    told: set[str] = set()
    for event in history.events:
        line = _intervention(event)
        if line is not None and line[1] not in told:
            told.add(line[1])
            yield "  " + " ".join(line)
        if event.kind == "treatment-undone":
            told.clear()  # it may be applied once more
    for kind, done in _AT_BAD_STEPS.items():
        events = history.events_of(kind)
        if events:
            steps = f"step {events[0].step}" if len(events) == 1 else f"{len(events)} steps, the first {events[0].step}"
            why = events[0].data.get("why", "gradients hold NaN or Inf")
            yield f"  {done}: {steps}: {why}."
    for event in history.events_of("rewound"):
        yield f"  Rewound at step {event.step}, by {event.data.get('steps', 'some')} steps."
    for event in history.events_of("guard-refused"):
        yield f"  Not guarded: {event.data.get('why', '')}."


_AT_BAD_STEPS = {
    "bad-step-skipped": "Skipped",
    "bad-step-clipped": "Clipped",
    "bad-step": "Bad and taken",
    "bad-step-stopped": "Stopped",
    "guard-gave-up": "The guard let pass",
    "guard-relearned": "The guard learned its ranges anew",
}
"""What was done at bad steps, by kind of event."""


def _intervention(event: Event) -> tuple[str, str] | None:
    """(when, what) of a change applied, refused or undone; None for any other event."""
    match event.kind:
        case "treatment-applied":
            detail = f", {event.data['detail']}" if event.data.get("detail") else ""
            return f"Applied from step {event.step} on:", f"{_change(event.data.get('change', {}))}{detail}."
        case "treatment-refused":
            return f"Not applied (step {event.step}):", str(event.data.get("why", ""))
        case "treatment-undone":
            left = " ".join(map(str, event.data.get("left", ()))) or "Nothing of it stays."
            return f"Undone at step {event.step}.", left
    return None


def _change(change: Mapping[str, Any]) -> str:
    """`ClipGradients` with its fields is `clip gradients (method norm, limit 1)`."""
    words = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", str(change.get("change", "a change"))).lower()
    given = [f"{k} {_field(v)}" for k, v in change.items() if k != "change" and v not in (None, "", (), [])]
    return f"{words} ({', '.join(given)})" if given else words


def _field(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, (list, tuple)):
        return _listed([" ".join(map(_field, v)) if isinstance(v, (list, tuple)) else _field(v) for v in value], 3)
    return str(value)


def _measured(evidence: Evidence) -> str:
    where = f" in {evidence.layer}" if evidence.layer else ""
    observed, limit = number(evidence.observed), number(evidence.limit)
    return f"{evidence.statistic} {observed} at step {evidence.step}{where}, limit {limit}."


def _steps(finding: Finding) -> str:
    first, last = finding.first_step, finding.last_step
    return f"step {first}" if first == last else f"steps {first}-{last}"


def _listed(names: Sequence[str], most: int) -> str:
    """`a, b and 3 more`."""
    shown, more = ", ".join(names[:most]), len(names) - most
    return f"{shown} and {more} more" if more > 0 else shown


def _percent(share: float) -> str:
    """`0.6 %`; what is below a tenth of a percent is said to be so."""
    percent = 100 * share
    return "below 0.1 %" if 0 < percent < 0.05 else f"{percent:.1f} %" if percent < 10 else f"{percent:.0f} %"


def _stage(name: str) -> str:
    rule = RULES.get(name)
    return rule.stage if rule else ""


# ---- the list of runs -------------------------------------------------------------------------------------------


def run_table(runs: Sequence[RunSummary]) -> RenderableType:
    """One line per run: id, which begins with the time of its start (UTC), how it stands, steps and script."""
    if not runs:
        return Text("No run has been recorded here yet: isograd run SCRIPT records one.")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("run", no_wrap=True)
    table.add_column("state", no_wrap=True)
    table.add_column("steps", justify="right", no_wrap=True)
    table.add_column("script", overflow="fold")
    for run in runs:
        table.add_row(*(Text(cell) for cell in (run.id, run.state, str(run.steps), run.script)))
    return table
