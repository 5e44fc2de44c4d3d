"""The engine: which findings belong together, in which order they are told, and what could not be looked at."""

import json
from dataclasses import replace
from time import perf_counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from isograd._diagnose import Cause, Diagnosis, configured, diagnose, group, missing_statistics
from isograd._errors import IsogradError, UnhealthyRun
from isograd._history import History, Series
from isograd._rule import LEVELS, Evidence, Finding
from isograd.rules import RULES
from isograd.testing import altered, plain_network, random_history

STEPS = np.arange(100)
STUCK = 2.3026 + 0.01 * np.sin(STEPS * 1.7)


def sigmoid_tower():
    """Eight sigmoids that take the signal, and a loss that stands at ln 10."""
    history = plain_network(depth=8, activation="sigmoid")
    behind = np.array([8 - (layer.position - 1) / 2 for layer in history.layers])
    return altered(
        history,
        activation_slope=lambda v: np.where(np.isfinite(v), 0.22, v),
        signal_norm=lambda v: v * 0.15**behind,
        loss=STUCK,
    )


def poisoned():
    """A batch with NaN at step 50, and everything after it."""
    after = STEPS >= 50
    return altered(
        plain_network(),
        output_nonfinite=lambda v: v + (STEPS == 50)[:, None] * (np.arange(v.shape[1]) == 0),
        loss=lambda v: np.where(after, np.nan, v),
        loss_nonfinite=after,
        grad_nonfinite=lambda v: v + after[:, None],
    )


def finding(name, *, level="error", first=0, last=99, confidence=0.9):
    return Finding(
        name=name, subject="model", level=level, message="1", first_step=first, last_step=last, confidence=confidence
    )


def told(findings):
    """Cause -> its symptoms."""
    return {cause.finding.name: [symptom.name for symptom in cause.symptoms] for cause in group(findings)}


# ---- whole runs -----------------------------------------------------------------------------------------------------


def test_a_healthy_run_is_healthy():
    """A network that learns has no cause at all, and every rule could look."""
    diagnosis = diagnose([plain_network()])

    assert (True, (), ()) == (diagnosis.healthy, diagnosis.causes, diagnosis.unmeasured)


def test_a_sigmoid_tower_is_named_with_its_symptoms():
    """Of a sigmoid tower that does not learn, the activations are the cause; what is seen stands under it."""
    causes = diagnose([sigmoid_tower()]).causes

    assert ["saturating-activations"] == [cause.finding.name for cause in causes]
    assert ["loss-plateau", "vanishing-gradients"] == sorted(symptom.name for symptom in causes[0].symptoms)
    assert "replace-activations" in causes[0].remedies


def test_the_first_cause_is_the_poisoned_input():
    """Of a run that a batch poisoned, the input is named, and the NaN everywhere else stands under it."""
    (cause,) = diagnose([poisoned()]).causes

    assert "nonfinite-inputs" == cause.finding.name
    assert {"nonfinite-values", "loss-divergence"} == {symptom.name for symptom in cause.symptoms}


def test_subjects_are_judged_apart():
    """In a run of two models, what is wrong with one is said of that one alone."""
    generator, critic = replace(plain_network(), subject="generator"), replace(poisoned(), subject="critic")

    diagnosis = diagnose([generator, critic], run="r1")

    assert ("generator", "critic") == diagnosis.subjects
    assert {"critic"} == {cause.finding.subject for cause in diagnosis.causes}


def test_an_empty_run_is_healthy_and_unmeasured():
    """A run without a reading has no findings, and says of each rule that needs something that it could not look."""
    diagnosis = diagnose([History()])

    assert (True, 0, ()) == (diagnosis.healthy, diagnosis.steps, diagnosis.causes)
    assert {name for name, rule in RULES.items() if rule.needs} == {u.rule for u in diagnosis.unmeasured}


def test_no_subject_is_no_fault():
    """A run in which no model was seen can be told."""
    assert "healthy: no fault found in 0 steps of no model" == str(diagnose([]))


@given(st.integers(0, 2**32 - 1))
def test_any_run_can_be_diagnosed_and_written(seed):
    """Whatever was measured, the diagnosis is made, is strict JSON, and its levels are in order of alarm."""
    diagnosis = diagnose([random_history(seed), random_history(seed + 1)])
    alarms = [cause.finding.level != "info" for cause in diagnosis.causes]

    json.dumps(diagnosis.to_dict(), allow_nan=False)
    assert alarms == sorted(alarms, reverse=True)
    assert diagnosis.healthy == (not any(alarms))
    assert str(diagnosis)


def test_ten_thousand_steps_of_three_hundred_layers():
    """A run of 10,000 steps and 300 layers is diagnosed in less than two seconds."""
    network = plain_network(depth=149, steps=400)
    rows = {"cheap": np.resize(np.arange(400), 10_000), "deep": np.arange(400)}
    cheap = {"loss", "loss_nonfinite", "global_grad_norm", "global_grad_norm_unclipped", "skipped"}
    cheap |= {"grad_norm", "grad_max", "grad_nonfinite", "learning_rate"}
    series = {
        name: Series(np.arange(10_000), s.values[rows["cheap"]])
        if name in cheap
        else Series(np.arange(400) * 25, s.values)
        for name, s in network.series.items()
    }
    began = perf_counter()
    diagnosis = diagnose([replace(network, series=series)])

    assert perf_counter() - began < 2.0
    assert 10_000 == diagnosis.steps


# ---- what belongs together ------------------------------------------------------------------------------------------


def test_a_symptom_goes_to_the_most_upstream_cause():
    """Of two causes from the same step that explain a symptom, the one further upstream gets it."""
    inputs, rate = finding("unscaled-targets"), finding("weight-decay-too-strong", confidence=0.99)

    assert {"unscaled-targets": ["loss-plateau"], "weight-decay-too-strong": []} == told(
        [finding("loss-plateau"), rate, inputs]
    )


def test_a_symptom_goes_to_the_earlier_cause():
    """A cause that was there first comes before one further upstream that came later."""
    late, early = finding("unscaled-inputs", first=50), finding("learning-rate-too-high", first=1)

    assert {"learning-rate-too-high": ["loss-divergence"], "unscaled-inputs": []} == told(
        [finding("loss-divergence", first=60), late, early]
    )


def test_a_cause_does_not_explain_what_was_over_before_it():
    """A symptom that ended before a cause began stands for itself."""
    early = finding("loss-spike", level="info", first=3, last=5)

    assert {"learning-rate-too-high": [], "loss-spike": []} == told(
        [early, finding("learning-rate-too-high", first=40)]
    )


def test_a_cause_takes_the_further_causes_that_it_brings_about():
    """Units that died after the rate was too high, and what their death did, are told under the rate."""
    rate, dead = finding("learning-rate-too-high", first=3), finding("dead-units", first=9)

    assert {"learning-rate-too-high": ["dead-units", "no-gradient"]} == told(
        [dead, finding("no-gradient", first=12), rate]
    )


def test_a_cause_does_not_bring_about_what_was_there_before_it():
    """Units that were dead before the rate was too high are a cause of their own."""
    rate, dead = finding("learning-rate-too-high", first=3), finding("dead-units", first=1)

    assert {"dead-units": [], "learning-rate-too-high": []} == told([dead, rate])


def test_a_cause_explains_only_what_its_rule_lists():
    """Replicas that drift are not explained by dead units."""
    assert {"dead-units": [], "replica-drift": []} == told([finding("dead-units"), finding("replica-drift")])


def test_what_is_no_alarm_does_not_hide_one():
    """A cause at level info does not take a warning under it; it does take what is info."""
    cause = finding("unscaled-inputs", level="info")
    alarm, word = finding("vanishing-gradients", level="warning"), finding("loss-plateau", level="info")

    assert {"unscaled-inputs": ["loss-plateau"], "vanishing-gradients": []} == told([cause, alarm, word])


def test_a_cause_is_as_serious_as_what_it_caused():
    """A cause at level warning with a symptom at level error is an error."""
    (cause,) = group([finding("dead-units", level="warning"), finding("no-gradient", level="error")])

    assert "error" == cause.finding.level


@given(st.lists(st.tuples(st.sampled_from(sorted(RULES)), st.sampled_from(LEVELS), st.integers(0, 50)), max_size=12))
def test_nothing_is_lost_or_told_twice(rows):
    """Every finding is told exactly once, as a cause or as a symptom of one, and never more mildly."""
    findings = [finding(name, level=level, first=first) for name, level, first in rows]

    causes = group(findings)

    names = [name for cause in causes for name in (cause.finding.name, *(symptom.name for symptom in cause.symptoms))]
    worst = max((LEVELS.index(f.level) for f in findings), default=-1)
    assert sorted(names) == sorted(f.name for f in findings)
    assert worst == max((LEVELS.index(cause.finding.level) for cause in causes), default=-1)


# ---- what was not seen ----------------------------------------------------------------------------------------------


def without(history, *statistics):
    return replace(history, series={name: s for name, s in history.series.items() if name not in statistics})


def test_a_missing_statistic_is_told_with_its_reason():
    """A rule whose statistic could not be read is unmeasured, with the reason of whoever measured."""
    history = replace(
        without(plain_network(), "update_ratio"), unmeasured={"update_ratio": "the optimizer is compiled"}
    )

    missed = {(u.rule, u.missing, u.why) for u in diagnose([history]).unmeasured}

    why = "the optimizer is compiled"
    rules = ("learning-rate-too-high", "learning-rate-too-low", "symmetric-initialization", "undertrained")
    assert {(rule, "update_ratio", why) for rule in rules} == missed


def test_a_statistic_of_layers_that_there_are_not_is_not_missed():
    """A network without an activation has no dead units, which is no gap in the measurement."""
    assert [] == missing_statistics(RULES["dead-units"](), without(plain_network(), "dead_fraction"))


def test_a_partly_read_statistic_is_used_and_told():
    """Where some layers could not be read, the rule looks at the others, and the gap is told."""
    history = replace(sigmoid_tower(), unmeasured={"activation_slope": "compiled modules"})

    diagnosis = diagnose([history])

    assert "saturating-activations" == diagnosis.causes[0].finding.name
    assert ["saturating-activations"] == [u.rule for u in diagnosis.unmeasured]


def test_a_rule_does_not_look_without_what_it_needs():
    """Without activation slopes no activation is blamed; the symptom stands for itself."""
    names = [cause.finding.name for cause in diagnose([without(sigmoid_tower(), "activation_slope")]).causes]

    assert "vanishing-gradients" in names
    assert "saturating-activations" not in names


# ---- options --------------------------------------------------------------------------------------------------------


def test_options_reach_their_rule():
    """An option changes the rule that it is for: with a limit of 20 decades, ten are no word worth."""
    silent = diagnose([sigmoid_tower()], options={"saturating-activations": {"decades": 20}})

    assert "saturating-activations" not in [cause.finding.name for cause in silent.causes]


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"dead-unit": {}}, "there is no rule 'dead-unit'; nearest: dead-units"),
        ({"dead-units": {"moist": 1}}, "dead-units has no option 'moist'; nearest: most"),
        ({"dead-units": {"most": "all"}}, "option 'most' must be a finite number, not 'all'"),
        ({"dead-units": {"most": True}}, "option 'most' must be a finite number, not True"),
        ({"dead-units": {"most": float("nan")}}, "option 'most' must be a finite number, not nan"),
        ({"dead-units": {"readings": 2.5}}, "option 'readings' must be a whole number, not 2.5"),
    ],
)
def test_options_that_there_are_not(options, sentence):
    """A misspelled rule or option, or a value of the wrong kind, is refused with a sentence."""
    with pytest.raises(ValueError, match=sentence):
        configured(options)


def test_options_keep_their_type():
    """A whole number given for a fraction is a fraction; every other option stays as it is by default."""
    rules = {rule.rule_name(): rule for rule in configured({"dead-units": {"most": 1, "readings": 5.0}})}

    assert repr(rules["dead-units"]) == "DeadUnits(most=1.0, cut=0.99, readings=5)"
    assert rules["loss-spike"] == RULES["loss-spike"]()


# ---- what a diagnosis says ------------------------------------------------------------------------------------------


def test_json_of_a_diagnosis():
    """The JSON has the agreed keys, and numbers that JSON lacks are null."""
    evidence = Evidence(statistic="grad_norm", observed=float("inf"), limit=3.4e38, step=4, layer="fc")
    cause = Cause(
        finding=Finding(
            name="dead-units", subject="model", level="error", message="All 1.", first_step=3, last_step=9,
            layers=("fc",), evidence=(evidence,), confidence=0.9,
        ),
        symptoms=(finding("loss-plateau", level="info"),),
        remedies=("reinitialize-layers",),
    )  # fmt: skip

    written = Diagnosis(run="r1", subjects=("model",), steps=10, causes=(cause,), overhead=0.006).to_dict()

    assert written == {
        "schema": 1, "run": "r1", "subjects": ["model"], "steps": 10, "healthy": False, "overhead": 0.006,
        "causes": [{
            "cause": "dead-units", "subject": "model", "level": "error", "layers": ["fc"], "first_step": 3,
            "confidence": 0.9, "message": "All 1.", "symptoms": ["loss-plateau"],
            "evidence": [{"statistic": "grad_norm", "observed": None, "limit": 3.4e38, "step": 4, "layer": "fc"}],
            "remedies": ["reinitialize-layers"],
        }],
        "unmeasured": [],
    }  # fmt: skip


def test_text_of_a_diagnosis():
    """The text names the cause, its level, its place, its number and what it explains."""
    text = str(diagnose([sigmoid_tower()]))

    assert text.startswith("not healthy: 100 steps of model\nsaturating-activations   error   steps 0-99   act0")
    assert "5.3 of the" in text
    assert "Explains: loss-plateau (step 0), vanishing-gradients (step 0)." in text


def test_raise_for_findings():
    """A diagnosis becomes an exception at the level that is asked for, and only there."""
    mild = Diagnosis(
        run="", subjects=("model",), steps=1, causes=(Cause(finding=finding("dead-units", level="warning")),)
    )

    mild.raise_for_findings("error")
    with pytest.raises(UnhealthyRun, match="dead-units"):
        mild.raise_for_findings()
    with pytest.raises(ValueError, match="'fatal' is no level; levels are info, warning, error"):
        mild.raise_for_findings("fatal")
    assert issubclass(UnhealthyRun, IsogradError)


def test_causes_come_before_symptoms_and_alarms_before_words():
    """The order is: alarms, causes first and upstream first; then what is only worth knowing."""
    history = altered(poisoned(), output_rms=lambda v: np.where(np.arange(v.shape[1]) == 0, 30.0, v))

    diagnosis = diagnose([history, replace(sigmoid_tower(), subject="other")])

    levels = [cause.finding.level for cause in diagnosis.causes]
    firsts = [cause.finding.first_step for cause in diagnosis.causes if cause.finding.level != "info"]
    assert levels == sorted(levels, key=lambda level: level == "info")
    assert firsts == sorted(firsts)
