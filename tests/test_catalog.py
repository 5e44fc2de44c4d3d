"""The catalogue as a whole: the contract that every rule keeps, and what the walk refuses."""

import importlib
import inspect
import re
import sys
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isograd import rules
from isograd._catalog import walk
from isograd._rule import Evidence, Rule
from isograd.rules import RULES
from isograd.testing import (
    SECTIONS,
    altered,
    check_description,
    check_finding,
    check_findings,
    check_rule,
    check_severity,
    plain_network,
    random_history,
)

SYMPTOMS = {
    "vanishing-gradients", "exploding-gradients", "nonfinite-values", "no-gradient", "loss-divergence", "loss-spike",
    "loss-oscillation", "loss-plateau", "replica-drift",
}  # fmt: skip

HEALTHY = {
    "shallow": plain_network(depth=1),
    "deep": plain_network(depth=30, steps=40),
    "tanh": plain_network(depth=8, activation="tanh"),
    "gelu": plain_network(depth=8, activation="gelu"),
    "short": plain_network(steps=5),
    "long": plain_network(steps=600),
}

every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


@every_rule
def test_rule_describes_itself(rule):
    """Every rule has its page, with all sections and options, and names statistics that there are."""
    check_description(rule)


@every_rule
def test_rule_is_silent_on_healthy_networks(rule):
    """No rule raises an alarm, or says a word, on networks that learn, whatever their depth, activation and length."""
    check_rule(rule, silent=HEALTHY.values(), seeds=())

    assert [] == [finding for history in HEALTHY.values() for finding in check_findings(rule, history)]


@every_rule
@given(seed=st.integers(0, 2**32 - 1))
def test_rule_judges_anything(rule, seed):
    """No rule raises on any history; what it finds exists, is beyond its limit, and does not hang on names."""
    check_findings(rule, random_history(seed))


@every_rule
def test_rule_explains_symptoms(rule):
    """What a cause explains is in the catalogue, a symptom among it, and symptoms explain nothing."""
    assert set(rule.explains) <= set(RULES)
    assert (rule.stage == "symptom") == (not set(rule.explains) & SYMPTOMS)


@every_rule
def test_no_chain_of_rules_explains_itself(rule):
    """From what a cause explains, no way leads back to it: every chain of findings has a root."""
    reached, waiting = set(), [rule.rule_name()]
    while waiting:
        following = set(RULES[waiting.pop()].explains) - reached
        reached |= following
        waiting += following

    assert rule.rule_name() not in reached


@every_rule
def test_remedies_are_verb_phrases(rule):
    """Remedies are kebab-case, and those that a rule declares stand on its page."""
    page = (rule.__doc__ or "").split("Remedies")[1].split("References")[0]

    assert all(re.fullmatch(r"[a-z]+(-[a-z]+)*", remedy) for remedy in rule.remedies)
    assert [remedy for remedy in rule.remedies if remedy not in page] == []


def test_every_file_is_a_rule():
    """The catalogue holds one rule for each file of its folder, under the file's name."""
    files = {path.stem for path in Path(rules.__file__).parent.glob("*.py")} - {"__init__"}

    assert {name.replace("-", "_") for name in RULES} == files
    assert list(RULES) == sorted(RULES)
    assert all(rule.rule_name() == name for name, rule in RULES.items())


def test_all_symptoms_are_there():
    """Each symptom of the vocabulary has a rule, and only those stand at the end of the stages."""
    assert {name for name, rule in RULES.items() if rule.stage == "symptom"} == SYMPTOMS


# ---- the walk -------------------------------------------------------------------------------------------------------

RULE = """
from dataclasses import dataclass
from isograd._rule import Rule

@dataclass(frozen=True, kw_only=True)
class OddThing(Rule):
    stage = "symptom"
    needs = ()
    def check(self, history):
        return iter(())
"""


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A function that makes a package of one file `odd_thing.py` with a given text, imported afresh."""

    def make(text):
        folder = tmp_path / "found"
        folder.mkdir()
        (folder / "__init__.py").write_text("")
        (folder / "odd_thing.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        return importlib.import_module("found")

    yield make
    for name in [name for name in sys.modules if name.partition(".")[0] == "found"]:
        del sys.modules[name]


def test_walk_finds_a_new_file(package):
    """A file with a class named after it is all that a new rule takes."""
    assert ["odd-thing"] == list(walk(package(RULE), Rule))


REFUSED = {
    "another name": (RULE.replace("OddThing", "Other"), "must hold a class OddThing derived from Rule"),
    "not a rule": ("class OddThing: pass", "must hold a class OddThing derived from Rule"),
    "no check": (RULE.replace("def check", "def look"), "does not provide check"),
    "not a dataclass": (RULE.replace("@dataclass(frozen=True, kw_only=True)", ""), "must be a dataclass"),
    "not frozen": (RULE.replace("frozen=True, ", ""), "must be a dataclass"),
    "no default": (RULE.replace("    needs = ()", "    needs = ()\n    limit: float"), "an option without a default"),
}


@pytest.mark.parametrize("text, sentence", REFUSED.values(), ids=REFUSED)
def test_walk_refuses(package, text, sentence):
    """A file that does not keep to the contract fails at import, with its name and the reason."""
    with pytest.raises(ImportError, match=f"found.odd_thing.*{sentence}"):
        walk(package(text), Rule)


# ---- the contract suite itself --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class WeightsOfOne(Rule):
    """Weight norms above a limit.

    Detects
        weight_norm above `limit`.
    Why it matters
        It does not.
    Decided by
        limit: 1.
    Stays silent when
        Weights are small.
    Remedies
        decay-weights
    References
        None.
    """

    stage: ClassVar = "symptom"
    needs: ClassVar = ("weight_norm",)

    limit: float = 1.0

    def check(self, history):
        largest = float(history["weight_norm"].values.max(initial=0))
        if largest >= self.limit:
            yield self.found(history, largest)

    def found(self, history, largest):
        evidence = Evidence(statistic="weight_norm", observed=largest, limit=self.limit, step=0)
        return self.finding(
            history, level="warning", message=f"{largest:g}", first_step=0, last_step=0, evidence=(evidence,)
        )


SMALL = altered(plain_network(), weight_norm=0.5)
LARGE = altered(plain_network(), weight_norm=2.0)


def test_the_suite_accepts_a_rule_that_keeps_the_contract():
    """A rule of a stranger that keeps the contract passes."""
    check_rule(WeightsOfOne, fires=[LARGE], silent=[SMALL], seeds=())


def broken(**members):
    """The same rule with something broken, as a class of the same name."""
    members = {"__doc__": WeightsOfOne.__doc__, **members}
    return dataclass(frozen=True, kw_only=True)(type("WeightsOfOne", (WeightsOfOne,), members))


def remembering():
    """A rule that answers differently the second time."""
    calls = []

    def check(self, history):
        calls.append(1)
        return iter([self.found(history, 2.0)] if len(calls) % 2 else [])

    return broken(check=check)


BROKEN = {
    "no sections": (broken(__doc__="Nothing about the limit."), "must have the sections"),
    "option not on the page": (broken(__doc__=(WeightsOfOne.__doc__ or "").replace("limit", "")), "does not mention"),
    "unknown statistic": (broken(needs=("weight",)), "no statistic"),
    "reads more": (
        broken(check=lambda self, history: iter([self.found(history, 2.0)] * bool(history["loss"].values.any()))),
        "reads loss without declaring it",
    ),
    "evidence within the limit": (
        broken(check=lambda self, history: iter([self.found(history, 0.1)])),
        "evidence within its limit",
    ),
    "a layer that is not there": (
        broken(
            check=lambda self, history: iter(
                [self.finding(history, level="info", message="1", first_step=0, layers=("nowhere",))]
            )
        ),
        "layers that there are not",
    ),
    "a step that was not seen": (
        broken(check=lambda self, history: iter([self.finding(history, level="info", message="1", first_step=10**6)])),
        "steps that were not seen",
    ),
    "another answer": (remembering(), "same answer twice"),
    "depends on names": (
        broken(
            check=lambda self, history: iter(
                [self.found(history, 2.0)] if any(layer.name == "linear0" for layer in history.layers) else []
            )
        ),
        "depends on the names",
    ),
    "always": (broken(check=lambda self, history: iter([self.found(history, 2.0)])), "fires on a healthy history"),
    "never": (broken(check=lambda self, history: iter([])), "is silent where it should fire"),
    "raises": (broken(check=lambda self, history: iter([1 / 0])), "division by zero"),
}


@pytest.mark.parametrize("rule, sentence", BROKEN.values(), ids=BROKEN)
def test_the_suite_refuses(rule, sentence):
    """A rule that breaks the contract in one point fails with a sentence about that point."""
    with pytest.raises((AssertionError, ZeroDivisionError), match=sentence):
        check_rule(rule, fires=[LARGE], silent=[SMALL], seeds=())


def test_the_suite_refuses_a_level_that_falls():
    """A rule that takes a worse fault less seriously fails."""
    with pytest.raises(AssertionError, match="takes a worse fault less seriously"):
        check_severity(WeightsOfOne, [LARGE, SMALL])


def test_the_suite_refuses_a_finding_signed_by_another():
    """A finding under the name of another rule fails."""
    (finding,) = WeightsOfOne().check(LARGE)

    with pytest.raises(AssertionError, match="signs a finding"):
        check_finding(RULES["dead-units"], LARGE, finding)


def test_random_histories_are_of_every_kind():
    """Among random histories there are empty and long ones, none and many layers, NaN, infinities and zeros."""
    made = [random_history(seed) for seed in range(300)]
    values = [v for history in made for series in history.series.values() for v in series.values.ravel()[:50]]
    sizes = {len(history.layers) for history in made}

    assert {0, 1, 2} < sizes
    assert any(history.num_steps == 0 for history in made)
    assert any(history.num_steps > 100 for history in made)
    assert any(v != v for v in values)
    assert {float("inf"), float("-inf"), 0.0, 1e300} < set(values)


def test_the_plain_network_has_every_statistic_that_a_rule_reads():
    """What the rules need is in the history that their tests start from; what is not there must be optional."""
    history = plain_network()
    needed = {statistic for rule in RULES.values() for statistic in rule.needs}

    assert needed <= set(history.series)


def test_sections_are_those_of_the_page():
    """The sections that are checked are those that a rule's page has."""
    lines = [line.strip() for line in inspect.getdoc(RULES["dead-units"]).splitlines()]

    assert list(SECTIONS) == [line for line in lines if line in SECTIONS]
    assert {field.name for field in fields(RULES["dead-units"])} == {"most", "cut", "readings"}
