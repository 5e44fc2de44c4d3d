"""What to say of a run and in which order: the verdict in the terminal and the list of runs.

It decides nothing: every number here stands in a `Diagnosis`, a `History` or a run's summary.
"""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from isograd._capsule import Capsule
from isograd._chart import Sparkline, depth_profile
from isograd._diagnose import Cause, Diagnosis
from isograd._history import History
from isograd._remedy import Treatment
from isograd._runs import RunSummary
from isograd._terminal import is_plain, said
from isograd._wording import happenings, headline, listed, measured, percent, stage_of, steps_of

_STYLES = {"error": "bold red", "warning": "bold yellow", "info": "bold cyan", "healthy": "bold green"}
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


def captured(capsules: Sequence[Capsule], command: Sequence[str]) -> str:
    """How many bad steps can be looked at again, and the command for the first. `command`: the script's own line.

    Plain text: a command that is broken over lines cannot be copied.
    """
    path = capsules[0].path
    with contextlib.suppress(ValueError):
        path = path.relative_to(Path.cwd())
    said = "1 bad step was captured" if len(capsules) == 1 else f"{len(capsules)} bad steps were captured"
    return f"{said}. To see the first again:\n  isograd replay {shlex.join([str(path), *map(str, command)])}\n"


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
            yield from (Padding(said(line.strip(), plain=plain), (0, 0, 0, 2)) for line in happenings(history))
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
        parts = [(words, _STYLES.get(stands_for, "")) for words, stands_for in headline(self.diagnosis, self.histories)]
        return Text.assemble("isograd: ", *parts)

    def _facts(self, plain: bool) -> Iterator[RenderableType]:
        if self.diagnosis.preflight is not None:
            for sentence in self.diagnosis.preflight.sentences():
                yield Padding(said(sentence, plain=plain), (0, 0, 0, 2))

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
        where = subject + (f"   in {listed(finding.layers, 1)}" if finding.layers else "")
        yield Text.assemble(
            "  ",
            (finding.name, "bold"),
            "   ",
            (finding.level, _STYLES[finding.level]),
            f"   {steps_of(finding)}{where}",
        )
        yield Padding(Group(*(said(line, plain=plain) for line in self._lines(cause))), (0, 0, 0, 4))

    def _lines(self, cause: Cause) -> Iterator[str]:
        finding = cause.finding
        yield finding.message
        if self.verbose or "limit" not in finding.message:
            yield from (measured(evidence) for evidence in finding.evidence[: None if self.verbose else 1])
        if cause.symptoms:
            yield f"Explains: {', '.join(f'{s.name} (step {s.first_step})' for s in cause.symptoms)}."
        elif stage_of(finding.name) == "symptom":
            yield "No rule names a cause for this symptom."
        if self.verbose:
            yield from [f"Layers: {', '.join(finding.layers)}."] if len(finding.layers) > 1 else []
            yield f"Confidence: {percent(finding.confidence)}."
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
            yield f"Then: {', '.join(f'{c.finding.name} ({c.finding.level}, {steps_of(c.finding)})' for c in causes)}."
        if notes:
            yield f"Worth knowing, no alarm: {listed(notes, 5)}."
        if blind:
            yield f"Could not look: {listed(blind, 3)}."
        if self.diagnosis.run and (causes or notes or blind):
            yield f"All of it: isograd diagnose {self.diagnosis.run} -v"
        if self.diagnosis.run and not self.diagnosis.healthy:
            yield f"To look at: isograd report {self.diagnosis.run}"

    def _unmeasured(self) -> Iterator[str]:
        missed = self.diagnosis.unmeasured
        for missing, why in dict.fromkeys((u.missing, u.why) for u in missed):
            rules = dict.fromkeys(u.rule for u in missed if (u.missing, u.why) == (missing, why))
            yield f"Not measured: {missing}, {why.rstrip('.')}. Could not look: {', '.join(rules)}."


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
