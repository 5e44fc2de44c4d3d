"""What to say of a capsule, of a replay, and of treatments that were tried on one step."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from isograd._capsule import Capsule
from isograd._capsule_fix import CapsuleFix, StepTrial
from isograd._chart import number
from isograd._replay import Replay
from isograd._terminal import is_plain, said

_STYLES = {"resolved": "bold green", "contained": "green", "no-effect": "dim", "refused": "dim"}


@dataclass(frozen=True, kw_only=True)
class ReplayReport:
    """A replay in sentences."""

    replay: Replay

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = is_plain(console, options)
        first, *others = self.replay.sentences()
        yield said(printable(first), plain=plain)
        for sentence in others:
            yield Padding(said(printable(sentence), plain=plain), (0, 0, 0, 2))


@dataclass(frozen=True, kw_only=True)
class CapsuleReport:
    """What a capsule holds, and how it is replayed."""

    capsule: Capsule

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = is_plain(console, options)
        yield said("\n".join(map(printable, _held(self.capsule))), plain=plain)


def _held(capsule: Capsule) -> Iterator[str]:
    facts = capsule.facts
    roots = ", ".join(str(kind) for kind in facts["roots"].values()) or "no module"
    yield f"Step {capsule.step} of {capsule.subject} ({roots}), {capsule.action}, {capsule.bytes / 2**20:.1f} MiB."
    for reason in capsule.why:
        where = f" of {reason['layer']}" if reason["layer"] else ""
        limit = "" if reason["limit"] is None else f", its limit {number(reason['limit'])}"
        yield f"  {reason['channel']}{where} was {number(reason['observed'])}{limit}."
    counts = {
        "batches of a data loader": "batches",
        "calls of the model": "calls",
        "variables of the program": "locals",
    }
    held = [f"{len(facts[key])} {words}" for words, key in counts.items() if facts[key]]
    yield f"  It holds {len(facts['parameters'])} parameters, {', '.join(held) or 'no data'}."
    command = " ".join(str(part) for part in facts["command"])
    yield f"  It was written by: {command}" if command else "  It does not say by which program it was written."
    yield f"Name the program to replay it with: isograd replay {capsule.path} {command or 'SCRIPT'}"


@dataclass(frozen=True, kw_only=True)
class CapsuleFixTable:
    """Every treatment with what the step gives under it, and the code of the best."""

    fix: CapsuleFix

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = is_plain(console, options)
        yield self._table(plain)
        yield Text()
        yield said(printable(self._outcome()), plain=plain)
        if self.fix.best is not None:
            yield Text()
            yield Padding(Text(self.fix.best.treatment.code), (0, 0, 0, 2))

    def _table(self, plain: bool) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("treatment", overflow="fold")
        for name in ("loss", "gradient", "update", "s"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("first bad operation", overflow="fold")
        table.add_column("outcome", no_wrap=True)
        base = self.fix.baseline
        table.add_row("none", *_figures(base), f"{base.seconds:.1f}", said(_bad(base), plain=plain), "")
        for trial in self.fix.trials:
            table.add_row(*self._row(trial, plain))
        return table

    def _row(self, trial: StepTrial, plain: bool) -> list[RenderableType]:
        replay = trial.replay
        figures = ("-", "-", "-") if replay is None else _figures(replay)
        bad = said(printable(trial.why) if replay is None else _bad(replay), plain=plain)
        outcome = Text(trial.outcome, style=_STYLES[trial.outcome])
        return [str(trial.treatment), *figures, f"{trial.seconds:.1f}", bad, outcome]

    def _outcome(self) -> str:
        best = self.fix.best
        if best is None:
            return (
                "Nothing that was tried helps this step." if self.fix.trials else "There is no proposal for this run."
            )
        did = "leaves nothing wrong with it" if best.outcome == "resolved" else "keeps the weights as they were"
        return f"On this one step {best.treatment} {did}. `isograd fix` tells what it does to a run. The code:"


def _figures(replay: Replay) -> tuple[str, str, str]:
    return (_number(replay.loss), _number(replay.grad_norm), _number(replay.update_norm))


def _number(value: float) -> str:
    return number(value) if math.isfinite(value) else str(value)


def _bad(replay: Replay) -> str:
    return "none" if replay.first_bad is None else printable(replay.first_bad.what)


def printable(text: str) -> str:
    """`text` without what steers a terminal: a capsule may come from anywhere."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode("ascii") for c in text)
