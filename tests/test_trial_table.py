"""What `isograd fix` prints: everything that was tried, at any width."""

import io
import math

import pytest
from rich.console import Console

from isograd._diagnose import Cause, Diagnosis
from isograd._fix import Fix, Tried
from isograd._remedy import Treatment
from isograd._rule import Finding
from isograd._treat import parse
from isograd._trial_table import FixTable
from isograd._verify import Effect, Verdict

FAULT = Finding(
    name="saturating-activations", subject="model", level="error", message="", first_step=0, last_step=9, confidence=0.9
)
SICK = Diagnosis(run="", subjects=("model",), steps=600, causes=(Cause(finding=FAULT),))


def tried(*texts, outcome="inconclusive", value=0.0, half=math.inf, ends=((2.3, 2.3),), pairs=0):
    treatment = Treatment(remedies=tuple(map(parse, texts)), changes=(), cause=FAULT.name, code="the code")
    verdict = Verdict(
        outcome=outcome,
        effect=Effect(value=value, low=value - half, high=value + half),
        ends=tuple(ends),
        resolved=(FAULT.name,) if outcome == "resolved" else (),
    )
    return Tried(treatment=treatment, verdict=verdict, seconds=12.3, verified=pairs, steps=300)


CURED = tried("insert-normalization", outcome="resolved", value=0.96, half=0.02, ends=[(2.3, 0.1)] * 3, pairs=3)
BOTH = tried(
    "replace-activations:target=gelu", "reinitialize-layers:method=critical",
    outcome="improved", value=0.8, half=0.5, ends=[(2.3, 0.3)] * 3, pairs=3,
)  # fmt: skip
HARM = tried("clip-gradient-norm:max_norm=0.123", outcome="worse", value=-0.3, ends=[(2.3, math.nan)])
ONCE = tried("lower-learning-rate:factor=0.01")


def printed(fix, width):
    file = io.StringIO()
    Console(file=file, width=width, color_system=None).print(FixTable(fix=fix))
    return file.getvalue()


@pytest.mark.parametrize("width", [80, 99, 100, 120, 200])
def test_every_treatment_is_told_at_any_width(width):
    """No line is longer than the terminal, and each name, effect, interval and outcome is in one piece."""
    text = printed(Fix(diagnosis=SICK, trials=(CURED, BOTH, HARM, ONCE), steps=300), width)

    assert max(map(len, text.splitlines())) <= width
    for piece in (
        "insert-normalization", "replace-activations", "reinitialize-layers", "method=critical", "clip-gradient-norm",
        "max_norm=0.123", "+0.96", "[+0.94, +0.98]", "[+0.30, +1.30]", "-0.30", "resolved", "improved", "worse",
        "tried once", "12.3",
    ):  # fmt: skip
        assert piece in text


def test_the_table_says_what_its_words_mean():
    """A lower loss with no effect, and one pair of runs, are explained under every table, and nowhere without one."""
    legend = "tried once: on one pair of runs, which decides nothing."

    assert legend in " ".join(printed(Fix(diagnosis=SICK, trials=(CURED, ONCE), steps=300), 80).split())
    assert legend not in printed(Fix(diagnosis=SICK), 80)


def test_the_winner_comes_with_its_code():
    """Under the table stands what was recommended, on how many pairs, what that confirms, and what to paste."""
    text = " ".join(printed(Fix(diagnosis=SICK, trials=(CURED, ONCE), steps=300), 120).split())

    assert "insert-normalization resolved it on 3 pairs of runs of 300 steps: effect +0.96 [+0.94, +0.98]" in text
    assert "This confirms saturating-activations." in text
    assert text.endswith("the code")


@pytest.mark.parametrize(
    "fix, words",
    [
        (Fix(diagnosis=SICK, trials=(ONCE,)), "Found saturating-activations; nothing that was tried helped."),
        (Fix(diagnosis=SICK, trials=(ONCE,), interrupted=True), "interrupted before anything was verified."),
        (
            Fix(diagnosis=Diagnosis(run="", subjects=("model",), steps=70)),
            "There is nothing to fix: no fault was found",
        ),
        (
            Fix(diagnosis=Diagnosis(run="", subjects=(), steps=0), error="KeyError: 3"),
            "could not be tried: KeyError: 3.",
        ),
    ],
)
def test_what_was_not_found_is_told(fix, words):
    """Without a recommendation one sentence says why there is none."""
    assert words in " ".join(printed(fix, 120).split())
