"""The scoreboard: its counting is right, its baselines do what they are said to do, and the score does not fall."""

import dataclasses
import importlib
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given as over
from hypothesis import strategies as st

from isograd._history import Event, History, Layer, Parameter, Series
from isograd.rules import RULES
from isograd.testing import altered, plain_network

CASES = Path(__file__).parents[1] / "cases"
sys.path.append(str(CASES))  # also for the processes that are forked
baselines, catalog, judge, record, repair, score, scoreboard, tables = map(
    importlib.import_module, ("baselines", "catalog", "judge", "record", "repair", "score", "scoreboard", "tables")
)

ALL = {case.name: case for case in catalog.read_cases()}


# ---- the programs --------------------------------------------------------------------------------------------------


def test_there_are_51_faults_and_12_controls():
    """Every reported fault has its program, and so has every healthy program that looks alarming."""
    assert (51, 12) == (sum(bool(c.accepted) for c in ALL.values()), sum(not c.accepted for c in ALL.values()))


@pytest.mark.parametrize("name", [name for name, case in ALL.items() if case.accepted])
def test_accepted_causes_are_rules(name):
    """What counts as right for a fault can be said: each accepted cause is the name of a rule."""
    assert [] == [cause for cause in ALL[name].accepted if cause not in RULES]


@pytest.mark.parametrize("name", ALL)
def test_programs_say_what_they_are(name):
    """A fault's docstring tells what was seen, cause, fix, source, certainty and repair; a control's why it is none."""
    case = ALL[name]
    docstring = case.script.read_text(encoding="utf-8").split('"""')[1]
    words = ("Seen", "Cause", "Fix", "Source", "Sure", "Repaired") if case.accepted else ("Scary", "Healthy")

    assert [*words] == re.findall(r"^([A-Z][a-z]+)  +\S", docstring, re.MULTILINE)
    if case.accepted:
        assert re.search(r"^Sure +[ABC]: ", docstring, re.MULTILINE)
        assert re.search(r"^Source +(\w+\.)?\w+\.com/", docstring, re.MULTILINE)


def test_program_without_accepted_causes_is_refused(tmp_path):
    """A file that does not say what is right cannot be scored, and is told so in a sentence."""
    (tmp_path / "new.py").write_text("print('hello')\n")

    with pytest.raises(ValueError, match=r"new\.py has no line ACCEPTED"):
        catalog.read_cases(tmp_path)


def test_jobs_are_every_variant_once_a_seed():
    """A fault is run faulty and fixed, a control once, all with every seed."""
    cases = (catalog.Case(name="a", accepted=("x",)), catalog.Case(name="b"))
    jobs = catalog.jobs_of(cases, (3, 4))

    assert [(n, v, s) for s in (3, 4) for n, v in (("a", "faulty"), ("a", "fixed"), ("b", "healthy"))] == [
        (job.case.name, job.variant, job.seed) for job in jobs
    ]
    assert ["--seed", "3", "--fixed"] == jobs[1].arguments


# ---- judging -------------------------------------------------------------------------------------------------------


@over(steps=st.lists(st.integers(0, 50), unique=True, min_size=1).map(sorted), cut=st.integers(0, 60))
def test_truncated_history_ends_before_the_cut(steps, cut):
    """Cut after n steps, a history has the readings and events of steps below n, and nothing else has changed."""
    values = np.arange(len(steps), dtype=float)
    history = History(
        series={"loss": Series(steps, values)},
        profiles={"signal_norm": {"rnn": Series(steps, values[:, None])}},
        events=tuple(Event(step=step, kind="x") for step in steps),
    )
    short = judge.truncated(history, cut)
    kept = [step for step in steps if step < cut]

    assert kept == [event.step for event in short.events]
    assert kept == (short["loss"].steps.tolist() if kept else [])
    assert bool(kept) == ("loss" in short.series) == ("rnn" in short.profiles["signal_norm"])
    assert history.num_steps == steps[-1] + 1


@pytest.mark.parametrize("step", [0, 1, 7, 41, 99])
def test_first_alarm_is_given_at_the_step_of_the_fault(step):
    """A loss that is NaN from a step on is an alarm once that step has been seen, and not before."""
    bad = np.arange(100) >= step
    sick = altered(plain_network(), loss=lambda v: np.where(bad, np.nan, v), loss_nonfinite=bad.astype(float))

    assert step + 1 == judge.first_alarm([sick])
    assert judge.first_alarm([plain_network()]) is None


# ---- counting ------------------------------------------------------------------------------------------------------


def named(cause, level="warning", confidence=0.8, stage="output"):
    return judge.Named(cause=cause, stage=stage, level=level, confidence=confidence)


def outcome(case, variant, *causes, seed=0, after=None, flagged=None):
    alarm = after if after is not None else (1 if any(c.is_alarm for c in causes) else None)
    return judge.Outcome(
        case=case, variant=variant, seed=seed, steps=100, causes=causes, alarm_after=alarm, flagged={"b": flagged}
    )


SMALL = {
    "a": catalog.Case(name="a", accepted=("relu-output", "dead-units")),
    "b": catalog.Case(name="b", accepted=("invalid-operation",), harmless=True),
    "c": catalog.Case(name="c"),
}


def test_score_counts_what_was_said():
    """Five runs counted by hand: rates, pairs, moments of alarm and the median time."""
    outcomes = [
        outcome("a", "faulty", named("flat-loss"), named("dead-units"), after=5),
        outcome("a", "fixed"),
        outcome("b", "faulty", named("invalid-operation"), after=8),
        outcome("b", "fixed", named("flat-loss")),
        outcome("c", "healthy", after=20),
    ]
    found = scoreboard.score(outcomes, SMALL)

    assert (2, 2, 1, 2) == (found.faulty, found.detected, found.top1, found.top3)
    assert (2, 1, 1) == (found.fixed, found.silent, found.pairs)
    assert (1, 1, 1) == (found.controls, found.controls_silent, found.calm)
    assert 6.5 == found.median_steps
    assert {"detected": 1.0, "top1": 0.5, "top3": 1.0, "silent": 0.5, "controls_silent": 1.0} == found.rates


@pytest.mark.parametrize(
    "causes, first, third",
    {
        "first": ([named("relu-output")], True, True),
        "second accepted": ([named("dead-units")], True, True),
        "third place": ([named("flat-loss"), named("bounded-output"), named("relu-output")], False, True),
        "fourth place": ([named("flat-loss")] * 3 + [named("relu-output")], False, False),
        "only worth knowing": ([named("relu-output", level="info")], False, False),
        "info does not take a place": ([named("flat-loss", level="info"), named("relu-output")], True, True),
        "nothing": ([], False, False),
    }.values(),
)
def test_right_is_an_accepted_cause_in_time(causes, first, third):
    """An accepted cause must be the first alarm, or among the first three; what is only worth knowing is no alarm."""
    said = outcome("a", "faulty", *causes)

    assert (first, third) == (scoreboard.is_right(said, SMALL["a"], 1), scoreboard.is_right(said, SMALL["a"], 3))


def test_error_about_a_harmless_fault_is_wrong():
    """The right name for a harmless fault is right as a warning and wrong as an error."""
    warned, alarmed = (outcome("b", "faulty", named("invalid-operation", level=x)) for x in ("warning", "error"))

    assert scoreboard.is_right(warned, SMALL["b"], 1)
    assert not scoreboard.is_right(alarmed, SMALL["b"], 3)


@over(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=30))
def test_calibration_loses_no_cause(entries):
    """Each cause is counted in exactly one row, and as right exactly if it was."""
    outcomes = [
        outcome("a", "faulty" if right else "fixed", named("relu-output", confidence=confidence))
        for confidence, right in entries
    ]
    rows = scoreboard.calibration(scoreboard.given(outcomes, SMALL))

    assert len(entries) == sum(row.count for row in rows)
    assert sum(right for _, right in entries) == sum(row.right for row in rows)
    assert len(entries) - sum(row.right for row in rows) == sum(row.on_healthy for row in rows)
    assert all(row.low <= row.mean_confidence <= row.high for row in rows)


def test_symptoms_claim_no_cause():
    """A symptom that nothing explains is an alarm, and claims no cause, unless some fault is called like it."""
    said = outcome("a", "faulty", named("loss-plateau", stage="symptom"), named("dead-units"))

    assert [("dead-units", 2, True)] == [(g.cause, g.place, g.right) for g in scoreboard.given([said], SMALL)]
    assert 1 == scoreboard.score([said], SMALL).detected
    drift = outcome("d", "faulty", named("replica-drift", stage="symptom"))
    assert [True] == [
        g.right for g in scoreboard.given([drift], {"d": catalog.Case(name="d", accepted=("replica-drift",))})
    ]


def test_confusion_has_the_family_of_what_was_named_first():
    """A fault of one family is counted under the family of the first alarm, or as silent."""
    outcomes = [outcome("a", "faulty", named("x", stage="data")), outcome("a", "faulty", seed=1), outcome("a", "fixed")]

    assert {"output": {"data": 1, "silent": 1}} == {
        k: dict(v) for k, v in scoreboard.confusion(outcomes, SMALL).items()
    }


def test_baseline_is_scored_by_its_flags():
    """A baseline that flags a faulty run at step 4 and a control has that detection, that time and that noise."""
    outcomes = [
        outcome("a", "faulty", flagged=4),
        outcome("a", "fixed"),
        outcome("b", "faulty"),
        outcome("b", "fixed"),
        outcome("c", "healthy", flagged=9),
    ]
    found = scoreboard.baseline_score(outcomes, "b")

    assert (1, 2, 1, 0, 2, 4) == (
        found.detected,
        found.silent,
        found.pairs,
        found.controls_silent,
        found.calm,
        found.median_steps,
    )


def test_tables_show_every_faulty_program_and_survive_being_written_twice():
    """Each faulty program has its row; the README's table is replaced between its markers, whatever stood there."""
    outcomes = [
        dataclasses.replace(outcome(name, variant), flagged=dict.fromkeys(baselines.BASELINES))
        for name, case in SMALL.items()
        for variant in case.variants
    ]
    document = tables.document(outcomes, SMALL)
    text = f"before\n{tables.BEGIN}\nold\n{tables.END}\nafter"
    once = tables.replaced(text, "new")

    assert all(f"[{name}](programs/{name}.py)" in document for name in "ab")
    assert f"before\n{tables.BEGIN}\nnew\n{tables.END}\nafter" == once == tables.replaced(once, "new")
    assert "no markers" == tables.replaced("no markers", "new")


# ---- baselines -----------------------------------------------------------------------------------------------------


def network(**changes):
    """Two weights and a ReLU between, learning for 100 steps; `changes` replace statistics."""
    steps = np.arange(100)
    ones = np.ones((100, 2))
    series = {
        "loss": 2.0 * 0.9**steps,
        "loss_nonfinite": np.zeros(100),
        "grad_norm": ones,
        "grad_nonfinite": 0 * ones,
        "grad_zero_fraction": 0 * ones,
        "weight_norm": ones,
        "weight_nonfinite": 0 * ones,
        "update_ratio": 1e-3 * ones,
        "dead_fraction": 0 * ones,
        "saturation": 0 * ones,
        "output_nonfinite": 0 * ones,
        "output_max": 0.5 * ones,
        "output_min": -0.5 * ones,
    }
    return History(
        layers=(Layer(name="act", kind="relu", position=0), Layer(name="out", kind="tanh", position=1)),
        parameters=(Parameter(name="first", shape=(4, 4)), Parameter(name="last", shape=(4, 4))),
        series={name: Series(steps, np.asarray(values)) for name, values in {**series, **changes}.items()},
    )


def since(step, value, usual=0.0, column=slice(None)):
    """[100, 2]: `value` from `step` on in some columns."""
    values = np.full((100, 2), float(usual))
    values[step:, column] = value
    return values


LOSS = 2.0 * 0.9 ** np.arange(100)
FIRES = {
    "non-finite loss": (baselines.nonfinite_loss, {"loss_nonfinite": since(30, 1)[:, 0]}, 31),
    "mean gradient 1e-8": (baselines.vanishing_gradient, {"grad_norm": since(12, 4e-8, 1, 0)}, 13),
    "NaN in a weight": (baselines.exploding_tensor, {"weight_nonfinite": since(4, 1, 0, 1)}, 5),
    "60 % of a ReLU dead": (baselines.dead_relu, {"dead_fraction": since(8, 0.6, 0, 0)}, 9),
    "tanh at its ends": (
        baselines.saturated_activation,
        {"saturation": since(0, 0.9, 0, 1), "output_max": since(5, 1.0, 0.5, 1)},
        6,
    ),
    "one weight ten times as wide": (baselines.poor_weight_initialization, {"weight_norm": since(0, 4, 1, 0)}, 1),
    "gradient within 1e-4": (baselines.poor_weight_initialization, {"grad_norm": since(3, 1e-4, 1, 0)}, 4),
    "no new low in five steps": (
        baselines.poor_weight_initialization,
        {"loss": np.where(np.arange(100) < 2, LOSS, 2.0)},
        7,
    ),
    "update of 20 times the weight": (baselines.weight_update_ratio, {"update_ratio": since(6, 20, 1e-3, 1)}, 7),
    "loss as it was": (baselines.loss_not_decreasing, {"loss": np.where(np.arange(100) < 40, LOSS, LOSS[40])}, 51),
    "AutoTrainer: NaN": (baselines.autotrainer, {"grad_nonfinite": since(22, 1)}, 25),
    "AutoTrainer: slow": (baselines.autotrainer, {"loss": np.full(100, 0.7)}, 30),
    "AutoTrainer: vanishing": (
        baselines.autotrainer,
        {"loss": 2.0 - 0.01 * np.arange(100), "grad_norm": since(0, 1e-5, 1, 0)},
        30,
    ),
    "AutoTrainer: exploding": (
        baselines.autotrainer,
        {"loss": 2.0 - 0.01 * np.arange(100), "grad_norm": since(50, 100, 1, 0)},
        55,
    ),
    "AutoTrainer: dying": (
        baselines.autotrainer,
        {"loss": 2.0 - 0.01 * np.arange(100), "grad_zero_fraction": since(0, 0.8)},
        30,
    ),
    # every second epoch of five steps lies 0.12 of the first one's loss higher; once the fall between two epochs is
    # smaller than that, epochs 4 and 6 are high, 5 and 7 low: two swings, a fifth of nine epochs
    "AutoTrainer: unstable": (
        baselines.autotrainer,
        {"loss": 2.0 * 0.9 ** np.arange(100) + 0.2 * (np.arange(100) // 5 % 2)},
        45,
    ),
}
STAYS_SILENT = {
    "half of a ReLU dead": (baselines.dead_relu, {"dead_fraction": since(0, 0.5, 0, 0)}),
    "a dead tanh is none": (baselines.dead_relu, {"dead_fraction": since(0, 1.0, 0, 1)}),
    "flat but within the cut": (baselines.saturated_activation, {"saturation": since(0, 0.9, 0, 1)}),
    "gradient shrinks late": (baselines.poor_weight_initialization, {"grad_norm": since(10, 1e-4, 1)}),
    "small gradient, yet learning": (baselines.autotrainer, {"grad_norm": since(0, 1e-5, 1, 0)}),
    "zero share in a run that learns": (baselines.autotrainer, {"grad_zero_fraction": since(0, 0.9)}),
}


@pytest.mark.parametrize("baseline, changes, after", FIRES.values(), ids=FIRES)
def test_baseline_fires(baseline, changes, after):
    """A planted fault is flagged after as many steps as the rule says."""
    sick = network(**changes)
    takes_runs = baseline in baselines.BASELINES.values()

    assert after == baseline([sick] if takes_runs else sick)
    assert baseline([network()] if takes_runs else network()) is None


@pytest.mark.parametrize("baseline, changes", STAYS_SILENT.values(), ids=STAYS_SILENT)
def test_baseline_stays_silent(baseline, changes):
    """What lies on the innocent side of a rule's limit is not flagged."""
    history = network(**changes)

    assert baseline([history] if baseline in baselines.BASELINES.values() else history) is None


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_baselines_look_at_every_subject(name):
    """The earliest alarm of any subject counts, and a run without readings has none."""
    sick = network(loss_nonfinite=since(30, 1)[:, 0], loss=since(30, np.nan, 1)[:, 0])

    assert baselines.BASELINES[name]([network(), sick]) is not None
    assert baselines.BASELINES[name]([History()]) is None


# ---- the score -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def outcomes(tmp_path_factory):
    """Every program with seed 0, recorded and judged anew."""
    root = tmp_path_factory.mktemp("cases")
    jobs = catalog.jobs_of(tuple(ALL.values()), (0,))
    problems = score.recorded(jobs, root, workers=2)
    assert [] == [(job.case.name, job.variant, problem) for job, problem in problems]
    return [judge.judge(job, root) for job in jobs]


@pytest.fixture(scope="session")
def achieved(repository):
    """What `make cases` wrote last."""
    return json.loads((repository / "cases" / "results.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("rate", ["detected", "top1", "top3", "silent", "controls_silent"])
def test_score_does_not_fall(outcomes, achieved, rate):
    """With seed 0 each rate is at least what was last achieved."""
    assert achieved["score"]["0"]["rates"][rate] <= scoreboard.score(outcomes, ALL).rates[rate]


def test_every_program_does_what_it_says(outcomes):
    """Faulty programs end broken (but one of the harmless ones), repaired and healthy ones as they should."""
    held = {(o.case, o.variant) for o in outcomes if o.held}
    broken = {(o.case, "faulty") for o in outcomes if o.variant == "faulty" and not ALL[o.case].harmless}

    assert set() == held & broken
    assert [] == [(o.case, o.variant) for o in outcomes if o.variant != "faulty" and not o.held]


def test_results_are_complete(achieved):
    """results.json holds every run of every program for each of its seeds, and scores for each seed and for all."""
    runs = [(run["case"], run["variant"], run["seed"]) for run in achieved["runs"]]
    expected = [(j.case.name, j.variant, j.seed) for j in catalog.jobs_of(tuple(ALL.values()), achieved["seeds"])]

    assert sorted(expected) == sorted(runs)
    assert {"all", *map(str, achieved["seeds"])} == set(achieved["score"])


def test_forked_program_is_recorded_like_a_command(tmp_path, repository):
    """What a program leaves when it is forked from a warm process is what `isograd run` leaves of it."""
    job = catalog.Job(case=ALL["advantage_of_one_sample"], variant="faulty", seed=1)
    (problem,) = (problem for _, problem in record.record([job], tmp_path))
    command = [sys.executable, "-m", "isograd", "run", "--out", tmp_path / "plain", job.case.script, *job.arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    forked = record.run_folder(job.folder(tmp_path))
    plain = record.run_folder(tmp_path / "plain")
    a, b = (judge.read_run(path).histories[0] for path in (forked, plain))

    assert ("", 0) == (problem, done.returncode)
    assert set(a.series) == set(b.series)
    timed = {"step_seconds", "watch_seconds"}
    for name in set(a.series) - timed:
        np.testing.assert_array_equal(a[name].values, b[name].values, err_msg=name)


# ---- repairs -------------------------------------------------------------------------------------------------------


def repaired(name, *verdicts, **others):
    """A program whose recommended treatment had these verdicts; without any, nothing was recommended."""
    treatments = {"recommended": [["zero-gradients"]] * len(verdicts), **{arm: [["x"]] for arm in repair.ARMS[1:]}}
    told = {"recommended": list(verdicts), **{arm: [others.get(arm, False)] for arm in repair.ARMS[1:]}}
    return repair.Repair(case=name, status=0, seconds=20.0, ratio=4.0, treatments=treatments, repaired=told)


def test_repairs_are_counted_by_program():
    """A program is repaired if every seed is; what is out of reach is told with the reason."""
    repairs = [repaired("a", True, True), repaired("b", True, False, clip=True), repaired("c"), repaired("d", False)]
    page = repair.document(repairs, [("e", 1, 2.0)], {"a": "", "b": "", "c": "It is too late.", "d": ""})

    assert "| `isograd fix` | 1 of 3 (33%) | 1 |" in page
    assert "| clip at 1.0 | 1 of 3 (33%) | 1 |" in page
    assert "It repairs with no seed: d; with some seeds only: b." in page
    assert "| c | It is too late. |" in page
    assert "median 4.0, worst 4.0" in page


def test_what_is_out_of_reach_says_why():
    """Each program that no change from outside can repair says so in a sentence."""
    assert [] == [case.name for case in ALL.values() if case.unreachable and not case.unreachable.endswith(".")]


def test_published_repairs_are_of_these_programs(repository):
    """repairs.json has every program once, and REPAIRS.md is what is made of it."""
    repairs, healthy = repair.read_results()
    page = repair.document(repairs, healthy, {name: case.unreachable for name, case in ALL.items()})

    assert sorted(ALL) == sorted([*(one.case for one in repairs), *(name for name, *_ in healthy)])
    assert page == (repository / "cases" / "REPAIRS.md").read_text(encoding="utf-8")
    assert all(status == 1 for _, status, _ in healthy)
