"""Where settings come from, which source wins, and what is said of a mistake."""

import math
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isograd._settings import Settings, load_settings
from isograd.rules import RULES


@pytest.fixture
def project(tmp_path):
    """A folder with a pyproject.toml that the test writes: `project(text)` gives the folder."""

    def write(text):
        (tmp_path / "pyproject.toml").write_text(text, encoding="utf-8")
        return tmp_path

    return write


def test_defaults(tmp_path):
    """Where nothing is said, the defaults hold."""
    assert Settings() == load_settings(folder=tmp_path, environment={})


def test_each_source_overrules_the_one_before(project):
    """Arguments win over the environment, the environment over pyproject.toml, pyproject.toml over the defaults."""
    folder = project("[tool.isograd]\nevery = 10\nsteps = 10\nseed = 10\nbudget = 0.1\n")
    environment = {"ISOGRAD_STEPS": "20", "ISOGRAD_SEED": "20", "ISOGRAD_BUDGET": "0.2"}

    settings = load_settings(folder=folder, environment=environment, seed=30, budget=None)

    assert (10, 20, 30, 0.2) == (settings.every, settings.steps, settings.seed, settings.budget)


def test_the_nearest_pyproject_counts(project):
    """A command typed in a subfolder finds the pyproject.toml above it, and its folder means the same as there."""
    folder = project("[tool.isograd]\nout = 'runs'\n")
    (folder / "a" / "b").mkdir(parents=True)

    assert folder / "runs" == load_settings(folder=folder / "a" / "b", environment={}).out


def test_a_pyproject_of_others_is_left_alone(project):
    """A pyproject.toml without `[tool.isograd]` says nothing."""
    assert Settings() == load_settings(folder=project("[tool.ruff]\nevery = 3\n"), environment={})


def test_arguments_and_environment_are_relative_to_the_current_folder(tmp_path):
    """A folder from the command line or the environment is meant where the command is typed."""
    assert Path("here") == load_settings(folder=tmp_path, environment={"ISOGRAD_OUT": "here"}).out
    assert Path("here") == load_settings(folder=tmp_path, environment={}, out="here").out


@pytest.mark.parametrize("switch", ["off", "OFF", " off "])
def test_off_switches_everything_off(project, switch):
    """With ISOGRAD=off nothing is read, not even a file with mistakes."""
    settings = load_settings(folder=project("[tool.isograd]\nevry = 1\n"), environment={"ISOGRAD": switch})

    assert not settings.enabled


@pytest.mark.parametrize("switch", ["", "on"])
def test_on_is_the_default(tmp_path, switch):
    """ISOGRAD=on and an empty ISOGRAD leave isograd on."""
    assert load_settings(folder=tmp_path, environment={"ISOGRAD": switch}).enabled


MISTAKES = {
    "misspelled key": ("[tool.isograd]\nevry = 5", {}, r"pyproject\.toml is not a setting; did you mean every\?"),
    "unknown key": (
        "[tool.isograd]\nzzz = 5",
        {},
        r"zzz in .*pyproject\.toml is not a setting; settings are out, every",
    ),
    "switch in the file": ("[tool.isograd]\nenabled = false", {}, r"enabled in .*pyproject\.toml is not a setting"),
    "no table": ("[tool]\nisograd = 5", {}, r"pyproject\.toml: tool\.isograd must be a table, not 5\."),
    "not TOML": ("[tool.isograd\n", {}, r"pyproject\.toml cannot be read: "),
    "float steps": (
        "[tool.isograd]\nevery = 2.5",
        {},
        r"every in .*pyproject\.toml is 2\.5, but must be a whole number",
    ),
    "boolean": ("[tool.isograd]\nevery = true", {}, r"every in .*pyproject\.toml is True, but must be a whole number"),
    "zero": ("[tool.isograd]\nsteps = 0", {}, r"steps in .*pyproject\.toml is 0, but must be .* 1 or more\."),
    "negative budget": ("[tool.isograd]\nbudget = -1", {}, r"budget in .*pyproject\.toml is -1, but must be a share"),
    "nan budget": ("[tool.isograd]\nbudget = nan", {}, r"budget in .*pyproject\.toml is nan, but must be a share"),
    "empty folder": ("[tool.isograd]\nout = 3", {}, r"out in .*pyproject\.toml is 3, but must be a folder\."),
    "seed too large": (
        "[tool.isograd]\nseed = 4294967296",
        {},
        r"seed in .*pyproject\.toml is 4294967296, but must be",
    ),
    "environment key": (
        "",
        {"ISOGRAD_EVRY": "5"},
        r"ISOGRAD_EVRY in the environment is not a setting; did you mean every\?",
    ),
    "environment value": ("", {"ISOGRAD_EVERY": "x"}, r"ISOGRAD_EVERY in the environment is 'x', but must be a whole"),
    "environment rules": ("", {"ISOGRAD_RULES": "x"}, r"ISOGRAD_RULES in the environment is not a setting"),
    "switch": ("", {"ISOGRAD": "of"}, r"ISOGRAD in the environment is 'of', but must be on or off\."),
    "rules no table": (
        "[tool.isograd]\nrules = 1",
        {},
        r"rules in .*pyproject\.toml is 1, but must be a table of rules\.",
    ),
    "rule name": (
        "[tool.isograd.rules.vanishing-gradient]\ndecades = 1",
        {},
        r"rules\.vanishing-gradient in .* names no rule; did you mean vanishing-gradients",
    ),
    "rule no table": ("[tool.isograd.rules]\nloss-spike = 1", {}, r"rules\.loss-spike in .* is 1, but must be a table"),
    "rule option": (
        "[tool.isograd.rules.vanishing-gradients]\ndecade = 1",
        {},
        r"rules\.vanishing-gradients\.decade in .*pyproject\.toml is not an option of vanishing-gradients; did you",
    ),
    "rule value": (
        "[tool.isograd.rules.vanishing-gradients]\ndecades = 'x'",
        {},
        r"rules\.vanishing-gradients\.decades in .*pyproject\.toml is 'x', but must be a float like 3\.0\.",
    ),
}


@pytest.mark.parametrize(("text", "environment", "sentence"), MISTAKES.values(), ids=list(MISTAKES))
def test_a_mistake_is_one_sentence(project, text, environment, sentence):
    """A mistake is told in one sentence that names the file or the environment, and the key."""
    folder = project(text)

    with pytest.raises(ValueError, match=sentence) as raised:
        load_settings(folder=folder, environment=environment)

    assert "\n" not in str(raised.value).replace(str(folder), "").split(" cannot be read: ")[0]


def test_options_of_rules_are_read(project):
    """`[tool.isograd.rules.<name>]` gives the options of that rule, whole numbers for floats included."""
    folder = project("[tool.isograd.rules.vanishing-gradients]\ndecades = 4\n")

    assert {"vanishing-gradients": {"decades": 4}} == load_settings(folder=folder, environment={}).rules


@pytest.mark.parametrize("name", sorted(RULES))
def test_every_option_of_every_rule_can_be_set(project, name):
    """Each option of each rule, set to its own default in TOML, is accepted."""
    lines = [f"{field.name} = {_toml(field.default)}" for field in fields(RULES[name])]
    folder = project(f"[tool.isograd.rules.{name}]\n" + "\n".join(lines))

    options = load_settings(folder=folder, environment={}).rules[name]

    assert {field.name for field in fields(RULES[name])} == set(options)
    RULES[name](**options)


def _toml(value):
    return repr(list(value)).replace("'", '"') if isinstance(value, tuple) else str(value).lower()


@given(st.integers(), st.floats(), st.text())
def test_any_value_is_taken_or_refused_with_a_sentence(whole, real, text):
    """Any number is either in force afterwards or refused by name; nothing else happens."""
    for key, value in [("every", whole), ("steps", whole), ("seed", whole), ("budget", real), ("out", text)]:
        told = load_or_refuse(key, value)

        assert (
            told == (Path(value) if key == "out" else value)
            or f"{key} in the arguments is {value!r}, but must be" in told
        )


def load_or_refuse(key, value):
    try:
        return getattr(load_settings(folder=Path("/"), environment={}, **{key: value}), key)
    except ValueError as error:
        return str(error)


def test_infinite_budget_means_no_limit(tmp_path):
    """A budget of infinity is accepted."""
    assert math.inf == load_settings(folder=tmp_path, environment={"ISOGRAD_BUDGET": "inf"}).budget
