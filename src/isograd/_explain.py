"""The page of a name: a symptom, cause, remedy or statistic. A rule's or remedy's page is its docstring."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from dataclasses import MISSING, dataclass, fields

from rich.console import Console, ConsoleOptions, RenderableType
from rich.padding import Padding
from rich.text import Text

from isograd._errors import UnknownName
from isograd._remedy import Remedy
from isograd._rule import Rule
from isograd._settings import nearest
from isograd._statistics import STATISTICS, Statistic
from isograd._terminal import is_plain, said
from isograd.remedies import REMEDIES
from isograd.rules import RULES


def explain(name: str) -> RenderableType:
    """The page of a symptom, cause, remedy or statistic. Raises UnknownName, with the nearest names, for others."""
    key = name.strip().lower()
    if key.replace("_", "-") in RULES:
        return RulePage(rule=RULES[key.replace("_", "-")])
    if key.replace("_", "-") in REMEDIES:
        return RemedyPage(remedy=REMEDIES[key.replace("_", "-")])
    if key.replace("-", "_") in STATISTICS:
        return StatisticPage(statistic=STATISTICS[key.replace("-", "_")])
    known, everything = [*RULES, *REMEDIES, *STATISTICS], f"; symptoms and causes are {', '.join(RULES)}"
    raise UnknownName(f"{name!r} is no symptom, cause, remedy or statistic{nearest(key, known, otherwise=everything)}")


@dataclass(frozen=True, kw_only=True)
class RulePage:
    """A rule's docstring under its name and stage, and its options with their defaults."""

    rule: type[Rule]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = is_plain(console, options)
        name, stage = self.rule.rule_name(), self.rule.stage
        yield Text.assemble((name, "bold"), f"   {'symptom' if stage == 'symptom' else f'cause, {stage}'}")
        yield from _page(self.rule, plain)
        yield from _options(self.rule, f"in [tool.isograd.rules.{name}] of pyproject.toml")


@dataclass(frozen=True, kw_only=True)
class RemedyPage:
    """A remedy's docstring under its name, the causes that it treats, and its options with their defaults."""

    remedy: type[Remedy]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain, name = is_plain(console, options), self.remedy.remedy_name()
        yield Text.assemble((name, "bold"), f"   remedy, {_APPLICABILITY[self.remedy.applicability]}")
        yield from _page(self.remedy, plain)
        yield Text()
        yield said(f"Treats: {', '.join(self.remedy.treats)}.", plain=plain)
        if self.remedy.applicability != "advice":
            yield from _options(self.remedy, f"as in --apply {name}:option=value")


_APPLICABILITY = {
    "automatic": "tried by isograd",
    "opt-in": "tried where it is asked for",
    "advice": "for a human to do",
}


@dataclass(frozen=True, kw_only=True)
class StatisticPage:
    """What a statistic means, when it is read, how exact it is and which rules need it."""

    statistic: Statistic

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        statistic, plain = self.statistic, is_plain(console, options)
        unit = f", in {statistic.unit}" if statistic.unit != "1" else ""
        yield Text.assemble((statistic.name, "bold"), f"   statistic, one reading per {statistic.axis}{unit}\n")
        yield said(statistic.meaning, plain=plain)
        yield Text()
        yield Text(f"Read: {'every step' if statistic.tier == 'cheap' else 'at deep steps'}. Error: {statistic.error}.")
        users = sorted(name for name, rule in RULES.items() if statistic.name in rule.needs)
        if users:
            yield Text(f"Needed by: {', '.join(users)}.")


def _page(entry: type[Rule | Remedy], plain: bool) -> Iterator[RenderableType]:
    for heading, paragraphs in _sections(inspect.getdoc(entry) or ""):
        yield Text(f"\n{heading}" if heading else "", style="bold")
        yield from (Padding(said(p, plain=plain), (0, 0, 0, 2 if heading else 0)) for p in paragraphs)


def _options(entry: type[Rule | Remedy], where: str) -> Iterator[RenderableType]:
    defaults = [f"{f.name} = {f.default!r}" for f in fields(entry) if f.default is not MISSING]  # type: ignore[arg-type]
    if defaults:
        yield Text()
        yield Text(f"Options, {where}", style="bold")
        yield from (Padding(Text(default), (0, 0, 0, 2)) for default in defaults)


def _sections(docstring: str) -> Iterator[tuple[str, list[str]]]:
    """Heading and paragraphs of each block; a heading is a line above indented ones, "" where there is none.

    Lines are joined, so that the page fits every width; `option: …` begins a paragraph of its own.
    """
    for block in docstring.split("\n\n"):
        heading, *body = block.splitlines()
        if body and all(line.startswith(" ") for line in body):
            yield heading, _joined(body)
        else:
            yield "", _joined([heading, *body])


def _joined(lines: Sequence[str]) -> list[str]:
    paragraphs: list[str] = []
    for line in map(str.strip, lines):
        if not paragraphs or re.match(r"[a-z][a-z_]*: ", line):
            paragraphs.append(line)
        else:
            paragraphs[-1] += f" {line}"
    return paragraphs
