"""What mkdocs builds from the program itself: pages of rules, remedies, statistics, commands and public names.

A hook of mkdocs (`hooks:` in mkdocs.yml). A page of a name is what `isograd explain` prints, with links; formulas in
pages that are written by hand become MathML, which browsers draw without a script.
"""

from __future__ import annotations

import html
import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields
from typing import Any

import click
from latex2mathml.converter import convert
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

import isograd
from isograd import _cli
from isograd._explain import Page, explain
from isograd._rule import STAGES
from isograd._settings import Settings
from isograd._statistics import STATISTICS
from isograd.remedies import REMEDIES
from isograd.rules import RULES

STAGE_TITLES = {
    "data": "Data and targets",
    "loop": "Training loop",
    "initialization": "Initialization",
    "architecture": "Architecture",
    "output": "Output and loss",
    "optimizer": "Learning rate and optimizer",
    "numerics": "Numerics",
    "symptom": "Symptoms",
}
AXIS_TITLES = {
    "step": "One reading per step",
    "group": "One reading per parameter group",
    "parameter": "One reading per parameter",
    "layer": "One reading per layer",
    "call": "One reading per call of a layer",
}

HOMES = (
    dict.fromkeys(RULES, "rules")
    | dict.fromkeys(REMEDIES, "remedies")
    | dict.fromkeys(STATISTICS, "statistics")
)  # fmt: skip
"""Name -> folder of its page."""


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Hang the generated pages into the navigation, below the page that lists them."""
    rules = {STAGE_TITLES[stage]: [f"rules/{name}.md" for name in _of_stage(stage)] for stage in _told()}
    below: dict[str, list[Any]] = {
        "rules/index.md": [{title: names} for title, names in rules.items()],
        "remedies/index.md": [f"remedies/{name}.md" for name in REMEDIES],
        "statistics/index.md": [f"statistics/{name}.md" for name in STATISTICS],
    }
    for entry in config.nav or ():
        for pages_of in entry.values():
            if isinstance(pages_of, list):
                pages_of.extend(below[pages_of[0]])
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_content(text: str, **_: Any) -> str:
    """Formulas as MathML: arithmatex has marked them, and no script is to be loaded for them."""
    text = _FORMULA.sub(lambda found: f'<div class="formula" tabindex="0">{_mathml(found[1], "block")}</div>', text)
    return _INLINE_FORMULA.sub(lambda found: _mathml(found[1], "inline"), text)


_FORMULA = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)
_INLINE_FORMULA = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)


def _mathml(formula: str, display: str) -> str:
    return convert(html.unescape(formula).strip(), display=display)


def pages() -> dict[str, str]:
    """Path -> Markdown of every generated page."""
    return {
        **{f"{HOMES[name]}/{name}.md": _page_of(name) for name in HOMES},
        "symptoms.md": _symptoms(),
        "rules/index.md": _rules(),
        "remedies/index.md": _remedies(),
        "statistics/index.md": _statistics(),
        "command-line.md": _command_line(),
        "api.md": _api(),
    }


# ---- text ----------------------------------------------------------------------------------------------------------

_PLAIN = [re.escape(name) for name in HOMES if "-" in name or "_" in name]
# Names that are words of every day (`loss`, `rewind`) are names only where a list of names stands.
_WORDS = [re.escape(name) for name in HOMES if "-" not in name and "_" not in name]


def _pattern(names: Iterable[str]) -> re.Pattern[str]:
    known = "|".join(sorted(names, key=len, reverse=True))
    return re.compile(rf"`(?P<code>[^`]+)`|(?<![\w-])(?P<name>{known})(?![\w-])|arXiv:(?P<arxiv>\d{{4}}\.\d{{4,5}})")


_PROSE, _LIST = _pattern(_PLAIN), _pattern([*_PLAIN, *_WORDS])


def prose(text: str, home: str, *, names: bool = False) -> str:
    """A paragraph of a docstring as Markdown that shows it as it is: code, names and papers are links or code.

    `home`: the folder of the page. `names`: the paragraph lists names.
    """
    parts, end = [], 0
    for found in (_LIST if names else _PROSE).finditer(text):
        parts += [_escaped(text[end : found.start()]), _marked(found, home)]
        end = found.end()
    return "".join((*parts, _escaped(text[end:])))


def _marked(found: re.Match[str], home: str) -> str:
    if found["arxiv"]:
        return f"[{found[0]}](https://arxiv.org/abs/{found['arxiv']})"
    if found["name"]:
        return link(found["name"], home)
    return link(found["code"], home, code=True) if found["code"] in HOMES else _code(found["code"])


def link(name: str, home: str, *, code: bool = False) -> str:
    """A link to the page of `name` from a page in the folder `home`."""
    up = "../" if home else ""
    return f"[{_code(name) if code else _escaped(name)}]({up}{HOMES[name]}/{name}.md)"


def _code(text: str) -> str:
    return f"<code>{_escaped(text)}</code>"


def _escaped(text: str) -> str:
    """What Markdown would take for its own, as entities."""
    return re.sub(r"[\\`*_{}\[\]<>()#+!|~^$&-]", lambda found: f"&#{ord(found[0])};", text)


def _links(names: Iterable[str], home: str) -> str:
    return ", ".join(link(name, home) for name in names)


def _summary(name: str) -> str:
    """The first sentence of a page."""
    return re.split(r"(?<=[.])\s(?=[A-Z`])", explain(name).sections[0].paragraphs[0])[0]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = (f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))
    return "\n".join(lines)


def _document(*blocks: str) -> str:
    return "\n\n".join(block for block in blocks if block) + "\n"


# ---- pages of names --------------------------------------------------------------------------------------------------


def _page_of(name: str) -> str:
    page, home = explain(name), HOMES[name]
    return _document(
        f"# {_escaped(name)}",
        f"{_escaped(page.kind)}\n{{: .kind }}",
        *_sections(page, home),
        *_relations(name, home),
        f"The same in the terminal: `isograd explain {name}`\n{{: .relations }}",
    )


def _sections(page: Page, home: str) -> Iterator[str]:
    for section in page.sections:
        if section.heading:
            yield f"## {_escaped(section.heading)}"
        if section.heading.startswith("Options,"):
            yield "\n".join(("```text", *section.paragraphs, "```"))
            continue
        for paragraph in section.paragraphs:
            names = section.heading == "Remedies" or paragraph.startswith(("Treats: ", "Needed by: "))
            yield prose(paragraph, home, names=names)


def _relations(name: str, home: str) -> Iterator[str]:
    """What the catalogue says of a name, which its docstring need not repeat."""
    if name in RULES:
        rule = RULES[name]
        causes = [other for other in RULES if name in RULES[other].explains]
        told = {"Explains": rule.explains, "Explained by": causes, "Needs": rule.needs, "Sharpened by": rule.uses}
    elif name in REMEDIES:
        told = {"Proposed for": [rule for rule in RULES if name in RULES[rule].remedies]}
    else:
        told = {"Used by": [rule for rule in RULES if name in RULES[rule].uses]}
    for title, names in told.items():
        if names:
            yield f"**{title}:** {_links(names, home)}\n{{: .relations }}"


# ---- lists -----------------------------------------------------------------------------------------------------------


def _told() -> tuple[str, ...]:
    """Stages in the order of a reader: what is seen, then what is wrong."""
    return ("symptom", *(stage for stage in STAGES if stage != "symptom"))


def _of_stage(stage: str) -> list[str]:
    return [name for name in RULES if RULES[name].stage == stage]


def _rules() -> str:
    blocks = ["# Symptoms and causes", f"{len(RULES)} rules look at every run, from what is seen to what is wrong."]
    for stage in _told():
        rows = [(link(name, "rules"), prose(_summary(name), "rules")) for name in _of_stage(stage)]
        blocks += [f"## {STAGE_TITLES[stage]}", _table(("name", "what it is"), rows)]
    return _document(*blocks)


def _symptoms() -> str:
    def chain(names: Iterable[str]) -> str:
        def treated(name: str) -> str:
            return f" Remedies: {_links(RULES[name].remedies, '')}." if RULES[name].remedies else ""

        return "\n".join(f"- **{link(name, '')}** {prose(_summary(name), '')}{treated(name)}" for name in names)

    opening = (
        "What you see, what can cause it, and what treats that, as the rules themselves have it. Which of the causes "
        "it is in your run, `isograd run` measures; which of the remedies helps, `isograd fix`."
    )
    blocks = ["# From symptom to remedy", opening]
    for symptom in _of_stage("symptom"):
        causes = [name for name in RULES if symptom in RULES[name].explains and RULES[name].stage != "symptom"]
        own = f"Treated by itself: {_links(RULES[symptom].remedies, '')}." if RULES[symptom].remedies else ""
        measured = f"{link(symptom, '')} tells how it is measured."
        blocks += [f"## {symptom}", f"{prose(_summary(symptom), '')} {measured}", own]
        blocks.append(chain(causes) if causes else "")
    seen = set(_of_stage("symptom"))
    silent = [n for n in RULES if RULES[n].stage != "symptom" and not seen & set(RULES[n].explains)]
    if silent:
        blocks += ["## Causes that show themselves", "They are found without any of the symptoms above.", chain(silent)]
    return _document(*blocks)


def _remedies() -> str:
    rows = [
        (
            link(name, "remedies"),
            prose(_summary(name), "remedies"),
            explain(name).kind.removeprefix("remedy, "),
            _links(remedy.treats, "remedies"),
        )
        for name, remedy in REMEDIES.items()
    ]
    return _document(
        "# Remedies",
        f"{len(REMEDIES)} ways to treat what is wrong. `isograd treat` proposes them with the code for your program, "
        "`isograd run --apply NAME` trains with one, `isograd fix` measures which of them helps.",
        _table(("name", "what it does", "who does it", "treats, best first"), rows),
    )


def _statistics() -> str:
    opening = (
        f"{len(STATISTICS)} quantities are measured: some at every step, the others at deep steps, which are spaced so "
        "that watching stays within its budget. Each states its unit and its error."
    )
    blocks = ["# Statistics", opening]
    for axis, title in AXIS_TITLES.items():
        rows = [
            (
                link(s.name, "statistics"),
                prose(_summary(s.name), "statistics"),
                s.unit,
                "every step" if s.tier == "cheap" else "deep",
            )
            for s in STATISTICS.values()
            if s.axis == axis
        ]
        blocks += [f"## {title}", _table(("name", "what it is", "unit", "read"), rows)]
    return _document(*blocks)


# ---- command line and Python -----------------------------------------------------------------------------------------


def _command_line() -> str:
    statuses = next(p for p in inspect.cleandoc(_cli.__doc__ or "").split("\n\n") if p.startswith("Statuses: "))
    whole = click.Context(_cli.cli, info_name="isograd")
    blocks = ["# Command line", _escaped(_cli.cli.help or ""), prose(" ".join(statuses.split()), "")]
    for name, command in sorted(_cli.cli.commands.items()):
        blocks += _command(name, click.Context(command, info_name=name, parent=whole))
    blocks += ["## Settings", *_settings()]
    return _document(*blocks)


def _command(name: str, context: click.Context) -> Iterator[str]:
    command = context.command
    yield f"## isograd {name}"
    yield f"```console\n$ {context.command_path} {' '.join(command.collect_usage_pieces(context))}\n```"
    paragraphs = inspect.cleandoc(command.help or "").split("\n\n")
    yield from (prose(" ".join(paragraph.split()), "") for paragraph in paragraphs)
    options = [option for option in command.get_params(context) if isinstance(option, click.Option)]
    records = [option.get_help_record(context) for option in options]
    yield _table(("option", "what it does"), [(_code(flag), prose(text, "")) for flag, text in filter(None, records)])


def _settings() -> Iterator[str]:
    _, *told = inspect.cleandoc(Settings.__doc__ or "").split("\n\n")
    meanings = dict(re.findall(r"`(\w+)`: (.*?)(?=\s+`\w+`: |$)", " ".join(" ".join(told).split())))
    defaults = {field.name: getattr(Settings(), field.name) for field in fields(Settings)}
    yield (
        "From weakest to strongest: `[tool.isograd]` in the nearest pyproject.toml, `ISOGRAD_*` in the environment, "
        "arguments. `ISOGRAD=off` switches everything off."
    )
    yield _table(
        ("setting", "in the environment", "default", "what it is"),
        [
            (_code(name), _code(_variable(name)), _code(str(default)), prose(meanings[name].rstrip("."), ""))
            for name, default in defaults.items()
        ],
    )


def _variable(setting: str) -> str:
    return {"enabled": "ISOGRAD", "rules": "–"}.get(setting, f"ISOGRAD_{setting.upper()}")


def _api() -> str:
    public = {name: getattr(isograd, name) for name in isograd.__all__ if name != "__version__"}

    def of(kind: Callable[[Any], bool]) -> Iterator[str]:
        return (f"::: isograd.{name}" for name, value in public.items() if kind(value))

    def is_exception(value: Any) -> bool:
        return inspect.isclass(value) and issubclass(value, Exception)

    def is_value(value: Any) -> bool:
        return inspect.isclass(value) and not is_exception(value)

    return _document(
        "# Python",
        "What `import isograd` gives. Everything else is private and may change. `isograd.__version__` is the version.",
        "## Functions",
        *of(inspect.isfunction),
        "## What they take and return",
        *of(is_value),
        "## Exceptions",
        *of(is_exception),
    )
