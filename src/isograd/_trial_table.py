"""What to say of a search for a treatment: the table of what was tried, then the winner's code."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from isograd._chart import number
from isograd._fix import Fix, Tried
from isograd._terminal import is_plain, said
from isograd._verify import Effect

_STYLES = {"resolved": "bold green", "improved": "green", "worse": "red", "no-effect": "dim", "inconclusive": ""}


@dataclass(frozen=True, kw_only=True)
class FixTable:
    """The outcome in a sentence, every treatment with its loss before and after, and the code to paste."""

    fix: Fix

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = is_plain(console, options)
        if self.fix.trials:
            yield self._table(plain)
            yield Text()
        yield said(self._outcome(), plain=plain)
        if self.fix.best is not None:
            yield Text()
            yield Padding(Text(self.fix.trials[self.fix.best].treatment.code), (0, 0, 0, 2))

    def _table(self, plain: bool) -> Table:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("treatment", overflow="fold")
        for name in ("untreated", "treated", "effect", "pairs", "s"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("outcome", no_wrap=True)
        for tried in self.fix.trials:
            outcome = tried.verdict.outcome if tried.verified or tried.verdict.outcome == "worse" else "tried once"
            table.add_row(
                str(tried.treatment),
                *(number(end) if math.isfinite(end) else "-" for end in _ends(tried)),
                said(effect_text(tried.verdict.effect), plain=plain),
                str(tried.verified or 1),
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
            return f"Found {causes}; {why}. `isograd treat` proposes what only a human can change."
        best = fix.trials[fix.best]
        confirmed = f" This confirms {', '.join(fix.confirmed)}." if fix.confirmed else ""
        return (
            f"{best.treatment} {_DID[best.verdict.outcome]} on {best.verified} pairs of runs of {fix.steps} steps: "
            f"effect {effect_text(best.verdict.effect)} of the progress made.{confirmed} The code:"
        )


_DID = {"resolved": "resolved it", "improved": "improved it without resolving all of it"}


def effect_text(effect: Effect) -> str:
    """`+0.93 [+0.88, +0.97]`; the value alone where one pair gives no interval."""
    if not math.isfinite(effect.value):
        return "-"
    value = f"{effect.value:+.2f}"
    return f"{value} [{effect.low:+.2f}, {effect.high:+.2f}]" if math.isfinite(effect.low) else value


def _ends(tried: Tried) -> tuple[float, float]:
    """Mean end of the untreated and of the treated runs."""
    ends = tried.verdict.ends
    if not ends:
        return math.nan, math.nan
    return sum(a for a, _ in ends) / len(ends), sum(b for _, b in ends) / len(ends)
