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


@dataclass(frozen=True, kw_only=True)
class Section:
    """Paragraphs under a heading, which is "" where there is none."""

    heading: str = ""
    paragraphs: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Page:
    """What there is to say of a name. `kind`: "symptom", "cause, data", "remedy, tried by isograd", "statistic, …"."""

    name: str
    kind: str
    sections: tuple[Section, ...]

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[RenderableType]:
        plain = is_plain(console, options)
        yield Text.assemble((self.name, "bold"), f"   {self.kind}")
        for section in self.sections:
            yield Text(f"\n{section.heading}" if section.heading else "", style="bold")
            indent = (0, 0, 0, 2 if section.heading else 0)
            yield from (Padding(said(paragraph, plain=plain), indent) for paragraph in section.paragraphs)


def explain(name: str) -> Page:
    """The page of a symptom, cause, remedy or statistic. Raises UnknownName, with the nearest names, for others."""
    key = name.strip().lower()
    if key.replace("_", "-") in RULES:
        return _rule_page(RULES[key.replace("_", "-")])
    if key.replace("_", "-") in REMEDIES:
        return _remedy_page(REMEDIES[key.replace("_", "-")])
    if key.replace("-", "_") in STATISTICS:
        return _statistic_page(STATISTICS[key.replace("-", "_")])
    known, everything = [*RULES, *REMEDIES, *STATISTICS], f"; symptoms and causes are {', '.join(RULES)}"
    raise UnknownName(f"{name!r} is no symptom, cause, remedy or statistic{nearest(key, known, otherwise=everything)}")


def _rule_page(rule: type[Rule]) -> Page:
    """A rule's docstring under its name and stage, and its options with their defaults."""
    name = rule.rule_name()
    kind = "symptom" if rule.stage == "symptom" else f"cause, {rule.stage}"
    options = _options(rule, f"in [tool.isograd.rules.{name}] of pyproject.toml")
    return Page(name=name, kind=kind, sections=(*_sections(rule), *options))


def _remedy_page(remedy: type[Remedy]) -> Page:
    """A remedy's docstring under its name, the causes that it treats, and its options with their defaults."""
    name = remedy.remedy_name()
    treats = Section(paragraphs=(f"Treats: {', '.join(remedy.treats)}.",))
    options = _options(remedy, f"as in --apply {name}:option=value") if remedy.applicability != "advice" else ()
    kind = f"remedy, {_APPLICABILITY[remedy.applicability]}"
    return Page(name=name, kind=kind, sections=(*_sections(remedy), treats, *options))


_APPLICABILITY = {
    "automatic": "tried by isograd",
    "opt-in": "tried where it is asked for",
    "advice": "for a human to do",
}


def _statistic_page(statistic: Statistic) -> Page:
    """What a statistic means, when it is read, how exact it is and which rules need it."""
    unit = f", in {statistic.unit}" if statistic.unit != "1" else ""
    read = f"Read: {'every step' if statistic.tier == 'cheap' else 'at deep steps'}. Error: {statistic.error}."
    users = sorted(name for name, rule in RULES.items() if statistic.name in rule.needs)
    needed = (f"Needed by: {', '.join(users)}.",) if users else ()
    return Page(
        name=statistic.name,
        kind=f"statistic, one reading per {statistic.axis}{unit}",
        sections=(Section(paragraphs=(statistic.meaning,)), Section(paragraphs=(read, *needed))),
    )


def _options(entry: type[Rule | Remedy], where: str) -> tuple[Section, ...]:
    defaults = [f"{f.name} = {f.default!r}" for f in fields(entry) if f.default is not MISSING]  # type: ignore[arg-type]
    return (Section(heading=f"Options, {where}", paragraphs=tuple(defaults)),) if defaults else ()


def _sections(entry: type[Rule | Remedy]) -> Iterator[Section]:
    """The blocks of a docstring; a heading is a line above indented ones.

    Lines are joined, so that the page fits every width; `option: …` begins a paragraph of its own.
    """
    for block in (inspect.getdoc(entry) or "").split("\n\n"):
        heading, *body = block.splitlines()
        if body and all(line.startswith(" ") for line in body):
            yield Section(heading=heading, paragraphs=_joined(body))
        else:
            yield Section(paragraphs=_joined([heading, *body]))


def _joined(lines: Sequence[str]) -> tuple[str, ...]:
    paragraphs: list[str] = []
    for line in map(str.strip, lines):
        if not paragraphs or re.match(r"[a-z][a-z_]*: ", line):
            paragraphs.append(line)
        else:
            paragraphs[-1] += f" {line}"
    return tuple(paragraphs)
