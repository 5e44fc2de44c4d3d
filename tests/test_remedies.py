"""The catalogue of remedies: every file keeps the contract, on every history, in words that compile."""

import ast
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from isograd._changes import Change
from isograd._diagnose import Cause, Diagnosis, diagnose
from isograd._errors import UnknownName
from isograd._history import Event, History
from isograd._remedy import Inapplicable, Remedy
from isograd._rule import Finding
from isograd._statistics import STATISTICS
from isograd._treat import combine, every_treatment, parse, treat, treatment_of
from isograd.remedies import REMEDIES
from isograd.rules import RULES
from isograd.testing import plain_network, random_history

every_remedy = pytest.mark.parametrize("remedy", REMEDIES.values(), ids=list(REMEDIES))
SECTIONS = ("What it does", "When it helps", "Risks", "Prediction", "Sources")
PROMISED = {
    "clip-gradient-value", "clip-gradient-norm", "clip-gradient-adaptively", "clip-gradient-by-history", "clip-weights",
    "penalize-weights", "decay-weights", "lower-learning-rate", "raise-learning-rate", "find-learning-rate",
    "warm-up-learning-rate", "schedule-learning-rate", "change-optimizer", "stabilize-optimizer", "reinitialize-layers",
    "replace-activations", "insert-normalization", "insert-shortcuts", "standardize-inputs", "standardize-targets",
    "raise-precision", "scale-loss", "zero-gradients", "average-accumulation", "remove-output-activation",
    "skip-bad-steps", "rewind",
}  # fmt: skip


def test_every_promised_remedy_is_there():
    """The field's remedies are all in the catalogue."""
    assert set(REMEDIES) >= PROMISED


@pytest.mark.parametrize("rule", RULES.values(), ids=list(RULES))
def test_what_a_rule_recommends_exists(rule):
    """A rule names no remedy that cannot be applied or read about."""
    assert set(rule.remedies) <= set(REMEDIES)


@every_remedy
def test_a_page_has_its_sections(remedy):
    """Each page says what the remedy does, when it helps, its risks, what must move, and its sources."""
    page = remedy.__doc__ or ""

    assert [s for s in SECTIONS if re.search(rf"^    {s}$", page, re.MULTILINE)] == list(SECTIONS)


@every_remedy
def test_what_it_treats_and_predicts_exists(remedy):
    """A remedy treats causes of the catalogue and predicts a statistic that is measured."""
    assert set(remedy.treats) <= {name for name, rule in RULES.items() if rule.stage != "symptom"}
    assert remedy.predicts[0] in STATISTICS


def changes_of(remedy, history):
    """(changes, "") or (None, why not)."""
    try:
        return remedy.changes(history), ""
    except Inapplicable as reason:
        return None, str(reason)


@every_remedy
@given(seed=st.integers(0, 2**32 - 1))
def test_a_remedy_takes_any_program(remedy, seed):
    """On any history, each candidate gives changes or says in a sentence why not, and code that Python can read."""
    history = random_history(seed)

    for candidate in remedy.candidates(history):
        changes, reason = changes_of(candidate, history)
        if changes is None:
            assert reason.endswith(".")
            continue
        assert all(isinstance(change, Change) for change in changes)
        assert bool(changes) == (remedy.applicability != "advice")
        ast.parse(candidate.code(history))


@every_remedy
def test_code_fits_a_terminal(remedy):
    """A line that a terminal of 80 columns breaks in two is no Python any more; names of twenty layers are in it."""
    for history in (plain_network(), plain_network(depth=20, activation="sigmoid"), History(subject="model")):
        for candidate in (*remedy.candidates(history), remedy()):
            assert [] == [line for line in candidate.code(history).splitlines() if len(line) > 78]


def test_registering_is_told_with_the_programs_own_names():
    """The lists and dicts that hold what nobody trains, and the program's optimizer with its rate."""
    names = ["Net.blocks[0].weight", "Net.blocks[1].bias", "Net.heads['a'].weight", "Net.scales[0]", "Net.last.weight"]
    event = Event(step=0, kind="loss-graph", data={"operations": [], "unoptimized": names})
    network = plain_network()
    seen = replace(network, subject="net", events=(event,), groups=({"optimizer": "Adam", "lr": 1e-3},), series={})

    assert REMEDIES["register-parameters"]().code(seen).splitlines() == [
        "self.blocks = torch.nn.ModuleList(self.blocks)  # in __init__",
        "self.heads = torch.nn.ModuleDict(self.heads)  # in __init__",
        "self.scales = torch.nn.ParameterList(self.scales)  # in __init__",
        "# after the model is complete:",
        "optimizer = torch.optim.Adam(",
        "    net.parameters(), lr=0.001",
        ")",
    ]


@every_remedy
def test_the_text_of_a_remedy_is_what_apply_takes(remedy):
    """What a remedy is printed as is parsed to the same remedy again, with all options that it proposes."""
    for candidate in remedy.candidates(plain_network()):
        assert candidate == parse(str(candidate))


@every_remedy
def test_what_is_proposed_can_be_given_to_a_program_that_was_not_watched(remedy):
    """`isograd fix` names a treatment, and `run --apply` takes it in a folder without a run: the same changes."""
    unseen = History(subject="model")
    for candidate in remedy.candidates(plain_network()):
        changes, _ = changes_of(candidate, plain_network())
        if changes and not isinstance(candidate, REMEDIES["remove-output-activation"]):
            assert len(changes) == len(candidate.changes(unseen))
    (change,) = parse("remove-output-activation:kind=relu,target=softmax").changes(unseen)
    assert ("relu", "softmax") == (change.kind, change.target)


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ("clip-gradient", UnknownName, "clip-gradient-norm"),
        ("", UnknownName, "There is no remedy"),
        ("clip-gradient-norm:norm=1", ValueError, "its options are max_norm"),
        ("clip-gradient-norm:max_norm", ValueError, "write option=value"),
        ("clip-gradient-norm:max_norm=big", ValueError, "takes a number, not 'big'"),
        ("warm-up-learning-rate:steps=1.5", ValueError, "takes a whole number"),
        ("reinitialize-layers:method=best", ValueError, "xavier, kaiming"),
        ("change-optimizer:optimizer=Magic", ValueError, "one of SGD"),
    ],
)
def test_a_wrong_text_gets_one_sentence(text, error, words):
    """A name, an option or a value that there is not is refused with what there is."""
    with pytest.raises(error, match=re.escape(words)):
        parse(text)


@given(st.floats(max_value=0) | st.just(float("inf")) | st.just(float("nan")))
def test_a_limit_must_be_a_positive_number(limit):
    """A clip at zero, below it, at infinity or at NaN is refused."""
    with pytest.raises(ValueError, match="above 0"):
        parse(f"clip-gradient-norm:max_norm={limit!r}").changes(History())


# ---- proposals ------------------------------------------------------------------------------------------------------


def sick():
    """A diagnosis of saturating activations in a 20-layer sigmoid network."""
    network = plain_network(depth=20, activation="sigmoid")
    found = Finding(
        name="saturating-activations", subject="model", level="error", message="1", first_step=0, last_step=9
    )
    cause = Cause(finding=found, remedies=RULES[found.name].remedies)
    return Diagnosis(run="", subjects=("model",), steps=10, causes=(cause,), histories=(network,))


def test_proposals_begin_with_the_rule_s_own_first_choice():
    """For saturating activations the first proposal is the first remedy that the rule names."""
    first = treat(sick())[0]

    assert "saturating-activations" == first.cause
    assert RULES["saturating-activations"].remedies[0] == first.remedies[0].remedy_name()
    assert first.changes
    assert first.code


def test_what_a_remedy_goes_with_is_proposed_with_it_and_it_alone_after_that():
    """New activations come with weights drawn for them; both forms stand in the list, the combination first."""
    found = [t.texts for t in treat(sick())]

    assert found.index(("replace-activations", "reinitialize-layers")) < found.index(("replace-activations",))


@every_remedy
def test_what_a_remedy_goes_with_exists(remedy):
    """The texts can be applied, and name another remedy."""
    for candidate in remedy.candidates(plain_network()):
        for text in candidate.goes_with():
            assert parse(text).remedy_name() != remedy.remedy_name()


def test_proposals_fall_in_score_and_are_told_once():
    """The order is by score, and no treatment stands there twice."""
    found = treat(sick())

    assert [t.score for t in found] == sorted((t.score for t in found), reverse=True)
    assert len(found) == len(set(map(str, found)))


def test_a_larger_rate_is_no_cure_for_vanishing_gradients():
    """No rule for a vanishing signal recommends a larger learning rate."""
    for name in ("saturating-activations", "initialization-too-small", "vanishing-gradients", "recurrent-vanishing"):
        assert "raise-learning-rate" not in RULES[name].remedies


def test_a_lower_rate_is_no_cure_for_missing_zero_grad():
    """A missing zero_grad is cured by clearing gradients and by nothing else."""
    assert ("zero-gradients",) == RULES["missing-zero-grad"].remedies


def test_a_healthy_run_gets_no_proposal():
    """Nothing is proposed where nothing is wrong."""
    assert () == treat(diagnose([plain_network()]))


def test_every_treatment_leaves_out_advice_and_what_has_no_place():
    """Of the whole catalogue, a plain float32 network gets neither advice nor higher precision."""
    names = {str(treatment.remedies[0].remedy_name()) for treatment in every_treatment(plain_network())}

    assert {"rewind", "raise-precision", "average-accumulation"} & names == set()
    assert {"clip-gradient-norm", "insert-normalization", "reinitialize-layers"} <= names


def test_a_combination_has_the_changes_of_both():
    """Two treatments together are both, in order, and what they share once."""
    clip, rate = (treatment_of([text], plain_network()) for text in ("clip-gradient-norm", "lower-learning-rate"))

    both = combine(clip, rate, clip)

    assert ("clip-gradient-norm", "lower-learning-rate") == both.texts
    assert (*clip.changes, *rate.changes) == both.changes
    assert both.to_dict()["treatment"] == list(both.texts)


def test_the_contract_names_itself():
    """A remedy's name is its class's in kebab-case."""
    assert all(name == remedy.remedy_name() and issubclass(remedy, Remedy) for name, remedy in REMEDIES.items())
