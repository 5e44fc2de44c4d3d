"""What is written about isograd is complete and true: names, commands, options, settings and exceptions."""

import inspect
import re
import shlex
import subprocess
import sys
from dataclasses import fields

import click
import pytest

import isograd
from isograd import _errors
from isograd._cli import cli
from isograd._explain import explain
from isograd._settings import Settings, load_settings
from isograd._statistics import STATISTICS
from isograd._terminal import render
from isograd.rules import RULES


@pytest.fixture(scope="session")
def readme(repository):
    return (repository / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*RULES, *STATISTICS])
def test_every_name_can_be_explained(name):
    """Each rule and each statistic has a page that begins with its name and tells more than it."""
    page = render(explain(name))

    assert page.startswith(name)
    assert len(page.split()) > 10


@pytest.mark.parametrize("name", RULES)
def test_pages_name_only_what_exists(name):
    """A rule needs and uses statistics that exist, and explains what has a page."""
    rule = RULES[name]

    assert [] == [s for s in (*rule.needs, *rule.uses) if s not in STATISTICS]
    assert [] == [s for s in rule.explains if s not in RULES]


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_is_in_the_readme(readme, command):
    """README names each command as one types it."""
    assert re.search(rf"\bisograd {command}\b", readme)


def typed(readme):
    """The commands in README's snippets, up to the end of the line."""
    return re.findall(r"^    isograd (\S.*)$", readme, re.MULTILINE)


def test_commands_in_the_readme_can_be_typed(readme):
    """Each command line in README's snippets is accepted by the parser, with the commands and options that exist."""
    lines = typed(readme)
    whole = cli.make_context("isograd", [])
    for line in lines:
        name, *arguments = shlex.split(line, comments=True)

        # A command keeps the help option of the first context it saw: without its parent's, `-h` would be gone.
        cli.commands[name].make_context(name, arguments, parent=whole)
    assert len(lines) >= 5


def test_what_the_readme_says_of_a_deep_network_is_what_preflight_says(readme, tmp_path):
    """README's program, given to the command that stands below it, prints the lines that stand below that."""
    code = re.search(r"^```python\n(# deep\.py\n.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    shown = re.search(r"`isograd preflight deep\.py:build` says.*?^```\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert code
    assert shown
    (tmp_path / "deep.py").write_text(code[1])
    done = subprocess.run(
        [sys.executable, "-m", "isograd", "preflight", "deep.py:build"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip

    number, printed = r"(\d+(?:\.\d+)?)", " ".join(done.stdout.split())
    for line in map(str.strip, shown[1].splitlines()):
        found = re.search(number.join(map(re.escape, re.split(r"\d+(?:\.\d+)?", line))), printed)

        # Other machines round otherwise.
        assert found, line
        assert list(map(float, found.groups())) == pytest.approx(list(map(float, re.findall(number, line))), rel=0.05)


def test_what_the_readme_says_of_a_bad_step_is_what_replay_says(readme, tmp_path):
    """README's program keeps its loss finite under a guard, and its bad step is told as README tells it."""
    code = re.search(r"^```python\n(# train\.py\n.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    shown = re.search(r"^\$ isograd replay \S+/(step-\d+) train\.py\n(.*?)^```$", readme, re.MULTILINE | re.DOTALL)
    assert code
    assert shown
    (tmp_path / "train.py").write_text(code[1])

    def isograd_(*arguments):
        command = [sys.executable, "-m", "isograd", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)

    guarded = isograd_("run", "--guard", "skip,clip,rewind", "train.py")
    assert float(guarded.stdout) < 0.5
    command = re.search(r"^  isograd (replay \S+ train\.py)$", guarded.stderr, re.MULTILINE)
    assert command
    assert f"/{shown[1]} " in command[1]
    replayed = isograd_(*command[1].split())
    assert replayed.returncode == 0
    assert shown[2].split() == replayed.stdout.split()


def test_names_in_the_readme_exist(readme):
    """Every public name that README's snippets use exists."""
    used = set(re.findall(r"\bisograd\.([a-z_A-Z]+)\(", readme))

    assert used
    assert used <= set(isograd.__all__)


def test_words_to_explain_in_the_readme_exist(readme):
    """Every name that README explains has a page."""
    for name in re.findall(r"\bisograd explain ([a-z_-]+)", readme):
        explain(name)


@pytest.mark.parametrize("command", sorted(cli.commands))
def test_every_command_and_option_says_what_it_does(command):
    """Each command and option has a help text, ending with a full stop."""
    parameters = [p for p in cli.commands[command].params if isinstance(p, click.Option)]

    assert (cli.commands[command].help or "").rstrip().endswith((".", "default."))
    assert [] == [p.name for p in parameters if not (p.help or "").endswith((".", ")"))]


def test_every_option_of_run_is_a_setting():
    """An option of `isograd run` that is a setting has its name, so that file, environment and argument agree."""
    options = {p.name for p in cli.commands["run"].params if isinstance(p, click.Option)}
    settings = {field.name for field in fields(Settings)}

    assert {"fail_on", "guard", "module", "treatments"} == options - settings
    assert {"rules", "enabled"} == settings - options


def test_defaults_in_help_are_the_defaults():
    """Where `isograd run -h` says a default, it is the one in force."""
    texts = {p.name: p.help or "" for p in cli.commands["run"].params if isinstance(p, click.Option)}
    said = {name: match.group(1) for name, text in texts.items() if (match := re.search(r"\(default: (.*)\)", text))}

    assert {"out", "budget"} <= set(said)
    for name, default in said.items():
        assert default == str(getattr(Settings(), name))


def test_arguments_of_watch_are_settings():
    """The options of `watch` are settings, so that what is said of one holds for the other."""
    names = {name for name, p in inspect.signature(isograd.watch).parameters.items() if p.kind is p.KEYWORD_ONLY}

    assert names - {"guard"} <= {field.name for field in fields(Settings)}


def test_every_setting_is_documented():
    """The docstring of `Settings` tells each of its fields."""
    assert [] == [field.name for field in fields(Settings) if f"`{field.name}`" not in Settings.__doc__]
    assert load_settings.__doc__


def test_every_exception_is_in_the_tree_and_public():
    """The tree in the module's docstring names every exception, and all of them are public."""
    exceptions = [
        name for name, value in vars(_errors).items() if inspect.isclass(value) and issubclass(value, Exception)
    ]

    assert [] == [name for name in exceptions if not re.search(rf"\b{name}\b", _errors.__doc__)]
    assert set(exceptions) <= set(isograd.__all__)
