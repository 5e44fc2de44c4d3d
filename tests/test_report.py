"""What people read: the verdict, the charts and the pages, at every width, on terminals and off."""

import io
import itertools
import math
import re
from dataclasses import fields

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isograd._chart import DepthProfile, Sparkline, depth_profile
from isograd._diagnose import Cause, Diagnosis
from isograd._errors import UnknownName
from isograd._explain import explain
from isograd._history import Event, History, Layer, Parameter, Series
from isograd._remedy import Treatment
from isograd._report import proposals, verdict
from isograd._rule import Evidence, Finding, Unmeasured
from isograd._statistics import STATISTICS
from isograd._terminal import render, show
from isograd._treat import parse
from isograd.rules import RULES

ESCAPE = "\x1b"


def finding(name, *, level="error", message="It is so.", first=0, last=199, layers=(), evidence=(), confidence=0.9):
    return Finding(
        name=name,
        subject="model",
        level=level,
        message=message,
        first_step=first,
        last_step=last,
        layers=layers,
        evidence=evidence,
        confidence=confidence,
    )


def diagnosis(*causes, unmeasured=(), overhead=0.0061, run="20300101-train"):
    return Diagnosis(run=run, subjects=("model",), steps=200, causes=causes, unmeasured=unmeasured, overhead=overhead)


SATURATED = Cause(
    finding=finding(
        "saturating-activations",
        message="19 sigmoid layers pass on 0.21 of the signal each – 1e-13 × together.",
        layers=("net.1", "net.3"),
        evidence=(Evidence(statistic="activation_slope", observed=0.2134, limit=0.5, step=0, layer="net.1"),),
    ),
    symptoms=(finding("vanishing-gradients"), finding("loss-plateau", first=12)),
    remedies=("replace-activations", "reinitialize-layers"),
)
BLIND = Unmeasured(rule="dead-units", missing="dead_fraction", why="compiled modules hide it.")
NOTE = Cause(finding=finding("loss-spike", level="info"))


def depth_history(signal, *, steps=(0, 9), kinds="linear", **more):
    """`signal`: [steps, layers]."""
    signal = np.asarray(signal, dtype=float)
    layers = tuple(Layer(name=f"net.{i}", kind=kinds, position=i) for i in range(signal.shape[1]))
    return History(layers=layers, series={"signal_norm": Series(steps, signal)}, **more)


# ---- the verdict ----------------------------------------------------------------------------------------------------


def test_a_verdict_word_for_word():
    """Off a terminal: what, where, since when, the number against its limit, what it explains, what to do next."""
    text = render(verdict(diagnosis(SATURATED, NOTE, unmeasured=(BLIND,))), width=80)

    assert (
        """\
isograd: not healthy, 1 finding in 200 steps of model. First cause:
saturating-activations. Watch overhead 0.6 %.

  saturating-activations   error   steps 0-199   in net.1 and 1 more
    19 sigmoid layers pass on 0.21 of the signal each - 1e-13 x together.
    activation_slope 0.213 at step 0 in net.1, limit 0.5.
    Explains: vanishing-gradients (step 0), loss-plateau (step 12).
    Remedies: replace-activations, reinitialize-layers.
    Next: isograd explain saturating-activations

Worth knowing, no alarm: loss-spike.
Could not look: dead-units.
All of it: isograd diagnose 20300101-train -v
To look at: isograd report 20300101-train
"""
        == text
    )


def test_a_healthy_verdict_word_for_word():
    """A healthy run is told in one sentence, with how many rules looked, and which could not."""
    text = render(verdict(diagnosis(unmeasured=(BLIND,), overhead=0.0002)), width=120)

    assert (
        f"isograd: healthy. {len(RULES) - 1} rules looked at 200 steps of model and found no fault. "
        "Watch overhead below 0.1 %.\n\n"
        "Could not look: dead-units.\nAll of it: isograd diagnose 20300101-train -v\n"
    ) == render_unwrapped(text)


def render_unwrapped(text):
    """One line for the first paragraph, whatever the width made of it."""
    first, _, rest = text.partition("\n\n")
    return first.replace("\n", " ") + "\n\n" + rest


def test_silence_where_all_is_well():
    """A healthy run with nothing unmeasured and nothing worth knowing is told in its first paragraph alone."""
    assert 1 == len(render(verdict(diagnosis()), width=200).splitlines())


def test_a_symptom_without_a_cause_says_so():
    """A symptom that nothing explains is called what was seen first, not a cause."""
    text = render(verdict(diagnosis(Cause(finding=finding("loss-plateau", level="warning")))), width=200)

    assert "Seen first: loss-plateau." in text
    assert "No rule names a cause for this symptom." in text
    assert "First cause" not in text


def test_verbose_tells_everything():
    """With `verbose` notes, all evidence, all layers, the confidence and the reasons for not looking are told."""
    text = render(verdict(diagnosis(SATURATED, NOTE, unmeasured=(BLIND,)), verbose=True), width=200)

    for told in (
        "loss-spike   info",
        "Layers: net.1, net.3.",
        "Confidence: 90 %.",
        "Not measured: dead_fraction, compiled modules hide it. Could not look: dead-units.",
    ):
        assert told in text
    assert "All of it" not in text


def test_more_than_three_causes_are_named_not_told():
    """Ten seconds allow three causes; the fourth and fifth are named with level and time, and `verbose` tells them."""
    names = ["dead-units", "unscaled-inputs", "invalid-operation", "learning-rate-too-high", "nonfinite-inputs"]
    many = diagnosis(*(Cause(finding=finding(name, first=7, last=7)) for name in names))

    short, long = (render(verdict(many, verbose=verbose), width=200) for verbose in (False, True))

    assert "Then: learning-rate-too-high (error, step 7), nonfinite-inputs (error, step 7)." in short
    assert [3, 5] == [text.count("Next: isograd explain") for text in (short, long)]


def test_evidence_is_not_said_twice():
    """A message that has the number against its limit is not followed by the same again, unless everything is asked."""
    evidence = (Evidence(statistic="decades_lost", observed=8.0, limit=3.0, step=0),)
    cause = Cause(finding=finding("vanishing-gradients", message="8.0 decades lost (limit 3).", evidence=evidence))

    assert "decades_lost" not in render(verdict(diagnosis(cause)))
    assert "decades_lost 8 at step 0, limit 3." in render(verdict(diagnosis(cause), verbose=True))


def test_what_ended_the_run_is_told():
    """Exceptions, interruptions and a watcher that detached are told with their step."""
    events = (
        Event(step=3, kind="exception", data={"type": "RuntimeError", "message": "boom"}),
        Event(step=4, kind="interrupted"),
        Event(step=5, kind="watch-detached", data={"message": "TypeError: x"}),
    )
    text = render(verdict(diagnosis(), [History(events=events)]), width=200)

    for told in (
        "The script raised RuntimeError at step 3.",
        "The run was interrupted at step 4.",
        "Watching stopped at step 5: TypeError: x",
    ):
        assert told in text


def test_what_was_changed_is_told_in_one_block():
    """A sentence that does not fit goes on under its beginning, not at the edge."""
    change = {"change": "ReinitializeLayers", "method": "xavier", "layers": ["a-layer-with-a-long-name"]}
    event = Event(step=0, kind="treatment-applied", data={"change": change, "detail": "13 layers"})
    text = render(verdict(diagnosis(), [History(events=(event,))]))
    told = text[text.index("  Applied") :].splitlines()

    assert 2 <= len(told)
    assert all(line.startswith("  ") and not line.startswith("   ") for line in told)


def test_the_code_of_a_proposal_is_not_broken():
    """The widest line of code there is stands in one piece, on a terminal of 80 columns."""
    code = "x = " + "1" * 74
    remedy = parse("reinitialize-layers")
    treatment = Treatment(remedies=(remedy,), changes=(), cause="c", code=code)

    assert f"  {code}" in render(proposals(diagnosis(Cause(finding=finding("c"))), [treatment])).splitlines()


def test_the_loss_is_one_line():
    """The loss is told by its first and last finite value, its shape, and how often it was not finite."""
    history = History(series={"loss": Series(range(4), [2.5, math.nan, 1.5, 0.5])})

    assert "  loss  2.5 #x=_ 0.5  (1 not finite)\n" in render(verdict(diagnosis(), [history]), width=200)


def test_a_loss_that_was_never_finite():
    """A loss of nothing but NaN or Inf is told without a number that does not exist."""
    history = History(series={"loss": Series(range(2), [math.inf, math.inf])})

    assert "loss  xx  (2 not finite)" in render(verdict(diagnosis(), [history]), width=200)


def test_several_subjects_are_told_apart():
    """Where a program trains two models, losses and layers say whose they are."""
    two = Diagnosis(run="r", subjects=("generator", "model"), steps=5, causes=(SATURATED,))
    histories = [History(subject=s, series={"loss": Series([0, 1], [2.0, 1.0])}) for s in two.subjects]

    text = render(verdict(two, histories), width=200)

    assert "loss of generator  2 #_ 1" in text
    assert "steps 0-199   model   in net.1 and 1 more" in text


@pytest.mark.parametrize("name", ["vanishing-gradients", "exploding-gradients"])
def test_the_depth_profile_comes_with_depth_faults(name):
    """A run whose signal vanishes or explodes shows its depth profile; another one does only with `verbose`."""
    history = depth_history([[1e-6, 1e-3], [1e-6, 1e-3]])
    with_it = diagnosis(Cause(finding=finding("saturating-activations"), symptoms=(finding(name),)))
    without = diagnosis(Cause(finding=finding("loss-plateau")))

    shown = ["Gradient signal" in render(verdict(d, [history], verbose=v)) for d, v in
             ((with_it, False), (without, False), (without, True))]  # fmt: skip

    assert [True, False, True] == shown


NAMES = st.sampled_from([*RULES, "a" * 50])
WORDS = st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=60)


@given(
    st.lists(
        st.tuples(NAMES, st.sampled_from(["info", "warning", "error"]), WORDS, st.lists(WORDS, max_size=3)), max_size=5
    ),
    st.sampled_from([40, 80, 120]),
    st.booleans(),
    st.booleans(),
)
def test_any_verdict_fits(found, width, terminal, verbose):
    """Whatever was found, however named, the verdict keeps to the width, with no escapes off a terminal."""
    causes = [
        Cause(finding=finding(name, level=level, message=words, layers=tuple(layers)))
        for name, level, words, layers in found
        if name in RULES
    ]
    history = depth_history([[1e-300, 0.0, math.inf, 1.0]] * 2)

    text = render(verdict(diagnosis(*causes), [history], verbose=verbose), terminal=terminal, width=width)

    if not terminal:
        assert ESCAPE not in text
        assert all(len(line) <= width for line in text.split("\n") if line.isascii())


# ---- terminals, pipes and encodings ---------------------------------------------------------------------------------


class Stream(io.TextIOWrapper):
    def __init__(self, *, terminal, encoding="utf-8"):
        super().__init__(io.BytesIO(), encoding=encoding, newline="")
        self.terminal = terminal

    def isatty(self):
        return self.terminal

    def text(self):
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)


def shown(*, terminal, encoding="utf-8"):
    stream = Stream(terminal=terminal, encoding=encoding)
    show(verdict(diagnosis(SATURATED), [depth_history([[1e-3, 1e-2]] * 2)]), stream)
    return stream.text()


def test_a_terminal_gets_colors(monkeypatch):
    """On a terminal levels are colored and bars are blocks."""
    monkeypatch.setenv("TERM", "xterm")

    text = shown(terminal=True)

    assert f"{ESCAPE}[1;31merror{ESCAPE}[0m" in text
    assert "█" in text


@pytest.mark.parametrize(
    ("terminal", "variable", "value"),
    [(False, "TERM", "xterm"), (True, "NO_COLOR", "1"), (True, "TERM", "dumb")],
    ids=["pipe", "NO_COLOR", "dumb"],
)
def test_plain_is_ascii_without_escapes(monkeypatch, terminal, variable, value):
    """In a pipe, with NO_COLOR and on a dumb terminal the text is ASCII and has no escape sequence."""
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(variable, value)

    text = shown(terminal=terminal)

    assert text.isascii()
    assert ESCAPE not in text
    assert "####" in text


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
@pytest.mark.parametrize("terminal", [True, False])
def test_any_encoding_will_do(monkeypatch, encoding, terminal):
    """A terminal or file that cannot encode a character gets an escape in its place, not an error."""
    monkeypatch.setenv("TERM", "xterm")
    stream = Stream(terminal=terminal, encoding=encoding)

    show(verdict(diagnosis(Cause(finding=finding("dead-units", layers=("слой",))))), stream)

    assert "\\u0441\\u043b\\u043e\\u0439" in stream.text()


# ---- charts ---------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=300), st.integers(1, 60), st.booleans())
def test_a_sparkline_keeps_order(values, width, plain):
    """A sparkline is no longer than its width, and where it shows every value, higher values stand no lower."""
    line = Sparkline(values=np.array(values), width=width).draw(plain=plain)
    levels = ["▁▂▃▄▅▆▇█", "_.-:=+*#"][plain]

    assert min(width, len(values)) == len(line)
    if len(line) == len(values):
        heights = [levels.index(character) for character in line]
        assert all(h <= k for (v, h), (w, k) in itertools.permutations(zip(values, heights, strict=True), 2) if v < w)


def test_a_sparkline_of_growth_over_decades_is_logarithmic():
    """Where values span more than a factor of 1000, equal ratios are equal steps."""
    assert "_:*#" == Sparkline(values=np.array([1.0, 1e3, 1e6, 1e7])).draw(plain=True)


def test_a_sparkline_of_nothing_is_empty():
    """No values, no characters."""
    assert Sparkline(values=np.array([])).draw(plain=True) == ""


def test_bars_are_proportional_to_decades():
    """A bar's length is the value's share of the decades between the scale's ends, which are whole powers of ten."""
    profile = depth_profile(depth_history([[1e-4, 1e-3, 1e-2, 1e-1, 1.0]], steps=(0,)))

    bars = [line.count("#") for line in render(profile, width=60).splitlines()[2:7]]

    # 60 columns less the label (5) and its gap (2), the reading (9) and its gap (2): 42, of which 40 are used.
    assert [0, 10, 20, 30, 40] == bars


def test_first_and_last_readable_step():
    """The profile compares the first and the last deep step that have a reading, not those without."""
    signal = [[math.nan] * 2, [1.0, 10.0], [3.0, 3.0], [1e-3, 10.0], [math.nan] * 2]

    profile = depth_profile(depth_history(signal, steps=(0, 1, 2, 3, 4)))

    assert (1, 3) == profile.steps
    assert (
        "From layer net.1 back to net.0 it falls by 1.0 decades at step 1 and falls by 4.0 decades at step 3."
        == profile.summary()
    )


def test_zero_and_nonfinite_readings_have_words():
    """A reading of exactly 0, of Inf and none at all are told apart."""
    profile = depth_profile(depth_history([[0.0, math.inf, 1.0, 1.0], [1.0, 1.0, math.nan, 1.0]]))
    first, last = (
        [
            (reading, bar.count("#"))
            for bar, reading in (_cells(line)[i] for line in render(profile, width=80).splitlines()[2:6])
        ]
        for i in (0, 1)
    )

    # (80 columns less label and gap, 7) in two parts of 36, less reading and gap, 11 each.
    assert [("0", 0), ("inf", 25), ("1.0e+00", 0), ("1.0e+00", 0)] == first
    assert [("1.0e+00", 0), ("1.0e+00", 0), ("-", 0), ("1.0e+00", 0)] == last
    assert (
        "From layer net.3 back to net.0 it falls to exactly 0 at step 0 and falls by 0.0 decades at step 9."
        == profile.summary()
    )


def _cells(line):
    """The two (bar, reading) pairs of a row of two bars, label excluded."""
    return re.findall(r"(#*) +(\S+)", line[len("net.0  ") :])


@given(st.integers(2, 400), st.integers(2, 40))
def test_long_networks_are_condensed(depth, rows):
    """However deep the network, at most `rows` layers are shown, in order, first and last among them."""
    profile = depth_profile(depth_history(np.ones((2, depth))), rows=rows)
    shown = [int(name.removeprefix("net.")) for name in profile.names]

    assert shown == sorted(set(shown))
    assert (0, depth - 1) == (shown[0], shown[-1])
    assert min(depth, rows) == len(shown)
    assert depth == profile.total


def test_layers_with_weights_come_first():
    """Where there is no room for every layer, activations give way to layers with weights."""
    layers = tuple(Layer(name=f"{k}{i}", kind=k, position=i) for i in range(15) for k in ("linear", "relu"))
    history = History(layers=layers, series={"signal_norm": Series([0], np.ones((1, 30)))})

    assert {f"linear{i}" for i in range(15)} == set(depth_profile(history, rows=20).names)
    assert 30 == len(depth_profile(history, rows=30).names)


def test_inputs_and_predictions_are_no_layers():
    """What enters the model or the loss has no place in the profile."""
    layers = (Layer(name="x", role="input"), Layer(name="a"), Layer(name="b"), Layer(name="y", role="prediction"))
    history = History(layers=layers, series={"signal_norm": Series([0], np.ones((1, 4)))})

    assert ("a", "b") == depth_profile(history).names


def test_weight_gradients_stand_in():
    """Where no signal was read, the gradients of the weight matrices are drawn, and the title says so."""
    parameters = tuple(
        Parameter(name=n, shape=s) for n, s in [("a.weight", (4, 4)), ("a.bias", (4,)), ("b.weight", (4, 4))]
    )
    history = History(parameters=parameters, series={"grad_norm": Series([0], [[1e-3, 7.0, 1.0]])})

    profile = depth_profile(history)

    assert ("a.weight", "b.weight") == profile.names
    assert "Gradient norm" in render(profile)


@pytest.mark.parametrize(
    "history",
    [
        History(),
        depth_history(np.ones((2, 1))),
        depth_history(np.full((2, 3), math.nan)),
        depth_history(np.zeros((0, 3)), steps=()),
    ],
    ids=["empty", "one layer", "unread", "no step"],
)
def test_no_profile_without_two_readings(history):
    """Without two layers that were read there is no profile."""
    assert depth_profile(history) is None


def test_long_names_keep_their_end():
    """A name too long for its column loses its beginning: the end tells the layer."""
    profile = DepthProfile(
        quantity="Gradient signal", names=("encoder." * 9 + "last", "b"), steps=(0,), values=np.ones((1, 2)), total=2
    )
    line = render(profile, width=60).splitlines()[2]

    assert line.startswith("~")
    assert "encoder.last" in line


# ---- pages ----------------------------------------------------------------------------------------------------------


def words(text):
    return text.split()


@pytest.mark.parametrize("name", sorted(RULES))
def test_a_rules_page_is_its_docstring(name):
    """`explain` prints every word of the rule's docstring in order, its stage, and each option with its default."""
    text = render(explain(name), terminal=True, width=100)
    plain = "".join(part.split("m", 1)[-1] if i else part for i, part in enumerate(text.split(ESCAPE + "[")))
    page, _, options = plain.partition("\nOptions, in")

    said = words(page)
    assert name == said[0]
    assert words(RULES[name].__doc__) == said[-len(words(RULES[name].__doc__)) :]
    for field in fields(RULES[name]):
        assert f"{field.name} = {field.default!r}" in options


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_a_statistics_page_has_its_meaning(name):
    """`explain` tells what a statistic means, its unit, when it is read and how exact it is."""
    text = " ".join(words(render(explain(name), terminal=True, width=100)))

    for told in (STATISTICS[name].meaning, STATISTICS[name].error, STATISTICS[name].unit):
        assert " ".join(words(told)) in text


@pytest.mark.parametrize("name", ["Vanishing-Gradients", "vanishing_gradients", " vanishing-gradients "])
def test_a_name_may_be_typed_loosely(name):
    """Case, underscores and blanks around a name do not matter."""
    assert render(explain("vanishing-gradients")) == render(explain(name))


def test_an_unknown_name_gets_the_nearest():
    """A misspelled name is refused with the names that look like it; a strange one with all there are."""
    with pytest.raises(UnknownName, match=r"'vanishing-gradient' is no .*; did you mean vanishing-gradients or .*\?$"):
        explain("vanishing-gradient")
    with pytest.raises(UnknownName, match=rf"; symptoms and causes are {', '.join(RULES)}\.$"):
        explain("zzzzzz")


@pytest.mark.parametrize("name", sorted(RULES))
def test_pages_are_plain_off_a_terminal(name):
    """In a pipe a rule's page is ASCII within 80 columns, authors' names aside."""
    text = render(explain(name))

    assert ESCAPE not in text
    assert all(len(line) <= 80 for line in text.splitlines())
