"""What to say of a search for a treatment: the table of what was tried, then the winner's code."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from isograd._chart import number
from isograd._fix import Fix
from isograd._terminal import is_plain, said

WIDE = 100
"""Columns from which a line has room for everything."""

_LEGEND = (
    "effect: what it adds of the progress made, with its 95 % interval (to begin lower is none); "
    "tried once: on one pair of runs, which decides nothing."
)

_STYLES = {"resolved": "bold green", "improved": "green", "worse": "red", "no-effect": "dim", "inconclusive": ""}


@dataclass(frozen=True, kw_only=True)
class FixTable:
    """The outcome in a sentence, every treatment with its loss before and after, and the code to paste."""

    fix: Fix

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = is_plain(console, options)
        if self.fix.trials:
            yield self._table(plain, narrow=options.max_width < WIDE)
            yield Text()
            yield Text(_LEGEND, style="dim")
            yield Text()
        yield said(self._outcome(), plain=plain)
        if self.fix.best is not None:
            yield Text()
            yield Padding(Text(self.fix.trials[self.fix.best].treatment.code), (0, 0, 0, 2))

    def _table(self, plain: bool, *, narrow: bool) -> Table:
        """`narrow`: options and intervals have lines of their own, and pairs no column."""
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("treatment", overflow="fold")
        for name in ("before", "after", "effect", *(() if narrow else ("pairs",)), "s"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("outcome", no_wrap=True)
        for tried in self.fix.trials:
            outcome = tried.verdict.outcome if tried.verified or tried.verdict.outcome == "worse" else "tried once"
            name, effect = str(tried.treatment), str(tried.verdict.effect)
            if narrow:
                name, effect = _broken(tried.treatment.texts), effect.replace(" [", "\n[")
            table.add_row(
                name,
                *(number(end) if math.isfinite(end) else "-" for end in tried.verdict.means),
                said(effect, plain=plain),
                *(() if narrow else (str(tried.verified or 1),)),
                f"{tried.seconds:.1f}",
                Text(outcome, style=_STYLES.get(outcome, "dim")),
            )
        return table

    def _outcome(self) -> str:
        fix = self.fix
        if fix.error and not fix.diagnosis.steps:
            return f"The program could not be tried: {fix.error}."
        if fix.diagnosis.healthy:
            return f"There is nothing to fix: no fault was found in {fix.diagnosis.steps} steps."
        causes = ", ".join(cause.finding.name for cause in fix.diagnosis.at_least("warning"))
        if fix.best is None:
            why = "interrupted before anything was verified" if fix.interrupted else "nothing that was tried helped"
            reason = next((t.verdict.why for t in fix.trials if t.verified and t.verdict.why), "")
            why += f" ({reason})" * bool(reason)
            return f"Found {causes}; {why}. After `isograd run`, `isograd treat` proposes what only a human can change."
        best = fix.trials[fix.best]
        steps = f"{best.steps}" if best.steps == fix.steps else f"{fix.steps} to {best.steps}"
        left = "".join(
            f" {words} {', '.join(names)}."
            for words, names in (("It leaves", best.verdict.remaining), ("It brings", best.verdict.introduced))
            if names
        )
        confirmed = f" This confirms {', '.join(fix.confirmed)}." if fix.confirmed else ""
        return (
            f"{best.treatment} {_DID[best.verdict.outcome]} on {best.verified} pairs of runs of {steps} steps: "
            f"effect {best.verdict.effect} of the progress made.{confirmed}{left} The code:"
        )


def _broken(texts: Sequence[str]) -> str:
    """Each remedy on a line, and each of its options."""
    return "\n+ ".join(text.replace(":", "\n  ").replace(",", "\n  ") for text in texts)


_DID = {"resolved": "resolved it", "improved": "improved it without resolving all of it"}
