"""The healthy programs: they are what the report says they are, its numbers are right, and a sample raises no alarm."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

ZOO = Path(__file__).parents[1] / "zoo"
sys.path.append(str(ZOO))  # also for the processes that are forked


def load(name):
    spec = importlib.util.spec_from_file_location(f"zoo_{name}", ZOO / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


recording = importlib.import_module("recording")
run = load("run")
GOALS = recording.read_goals()

# Innocent things that look like faults: targets at the ends of a sigmoid, a masked similarity, NaN for missing values,
# columns that are almost never set, a loss that ends at zero, a loss with a floor, a saturated ratio of two networks.
SAMPLE = [
    "autoencoder.py",
    "simclr_digits.py",
    "missing_values.py",
    "variational_autoencoder.py --beta 2",
    "early_convergence.py",
    "noisy_labels.py",
    "gan_ring.py",
]


# ---- the programs --------------------------------------------------------------------------------------------------


def test_every_program_has_a_goal():
    """No file escapes the zoo, and no goal is left without its program."""
    assert {path.name for path in recording.PROGRAMS.glob("*.py")} == {command.split()[0] for command in GOALS}


@pytest.mark.parametrize("path", sorted(recording.PROGRAMS.glob("*.py")), ids=lambda path: path.stem)
def test_programs_are_plain(path):
    """A program knows nothing of isograd, takes a seed, asserts nothing and ends with a metric that a goal names."""
    text = path.read_text(encoding="utf-8")
    metrics = {goal.metric for command, goal in GOALS.items() if command.split()[0] == path.name}

    assert "isograd" not in text
    assert '"--seed"' in text
    assert "assert " not in text
    assert all(f'"{metric}:"' in text for metric in metrics)


def test_there_are_enough():
    """At least forty programs and two hundred runs, as many as a bound of 1.5 % on false alarms takes."""
    assert len(list(recording.PROGRAMS.glob("*.py"))) >= 40
    assert len(recording.jobs(range(5))) >= 200
    assert run.upper_bound(0, 200) < 0.015


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    """Outcomes of the sample, seed 0."""
    wanted = [recording.Job(command, 0, GOALS[command]) for command in SAMPLE]
    rows = run.outcomes(wanted, tmp_path_factory.mktemp("zoo"), workers=2, fresh=False)
    return {row.command: row for row in rows}


@pytest.mark.parametrize("command", SAMPLE)
def test_sample_is_healthy(sample, command):
    """Each program of the sample trains to its goal under `isograd run`, which raises no alarm."""
    row = sample[command]

    assert (True, ()) == (row.trained, row.alarms)
    assert row.steps > 100


# ---- the figures ---------------------------------------------------------------------------------------------------


@given(trials=st.integers(1, 300), share=st.floats(0, 1))
def test_upper_bound(trials, share):
    """At the bound, as few events as were seen have a probability of 5 %: the sum of the binomial's tail."""
    events = int(share * (trials - 1))
    p = run.upper_bound(events, trials)

    tail = sum(math.comb(trials, k) * p**k * (1 - p) ** (trials - k) for k in range(events + 1))
    assert 0.05 == pytest.approx(tail, rel=1e-6)


def test_upper_bound_of_certain_failure():
    """Where every trial was an event, nothing below 1 is excluded."""
    assert 1.0 == run.upper_bound(7, 7)


@pytest.mark.parametrize(
    "goal, value, reached",
    [
        ("accuracy >= 0.9", 0.9, True),
        ("accuracy >= 0.9", 0.89, False),
        ("loss per character <= 2.5", 2.4, True),
        ("loss per character <= 2.5", 2.6, False),
        ("accuracy >= 0.9", math.nan, False),
        ("mean squared error <= 0.1", math.nan, False),
    ],
)
def test_goals(goal, value, reached):
    """A goal is reached at its limit and beyond, on its own side, and never by NaN."""
    assert reached == recording.Goal.parse(goal).reached(value)


@pytest.mark.parametrize("text", ["accuracy", "accuracy > 0.9", ">= 0.9", "accuracy >= high", "accuracy >= "])
def test_goal_that_cannot_be_read(text):
    """Anything but a name, a comparison and a number is refused."""
    with pytest.raises(ValueError, match=r"a goal reads like|could not convert"):
        recording.Goal.parse(text)


def test_last_metric():
    """The last line of the form "name: number" counts, whatever is printed around it."""
    output = "loss: 3.5\nepoch 3  loss 0.2\naccuracy of the probe: 0.875\ndone\n"

    assert ("accuracy of the probe", 0.875) == recording.last_metric(output)
    assert recording.last_metric("nothing\n")[0] == ""


def test_record_of_a_changed_program_does_not_count(tmp_path, monkeypatch):
    """What was recorded is used again only while the program's text is the same."""
    monkeypatch.setattr(recording, "PROGRAMS", tmp_path / "programs")
    shutil.copytree(ZOO / "programs", tmp_path / "programs", ignore=shutil.ignore_patterns("__pycache__"))
    job = recording.Job("mlp_wine.py", 0, GOALS["mlp_wine.py"])
    kept = recording.Recorded(0, "accuracy", 0.95, 3.0, recording.digest(job))
    job.folder(tmp_path).mkdir(parents=True)
    (job.folder(tmp_path) / "recorded.json").write_text(json.dumps(kept.__dict__), encoding="utf-8")

    assert kept == recording.recorded(job, tmp_path)
    job.script.write_text(job.script.read_text(encoding="utf-8") + "\n", encoding="utf-8")
    assert recording.recorded(job, tmp_path) is None


def outcome(command, seed, *alarms, trained=True):
    return run.Outcome(command, seed, "accuracy", 0.9, trained, 300, 4.0, alarms)


def test_summary_counts_runs_and_programs():
    """A program is flagged once however many of its seeds are; an error is a warning too."""
    warning, error = (run.Alarm("loss-plateau", level, "model", "It is flat.") for level in ("warning", "error"))
    rows = [outcome("a.py", 0, warning), outcome("a.py", 1, warning, error), outcome("b.py", 0, trained=False)]
    found = run.summary(rows)

    assert (2, 3, 2) == (found["programs"], found["runs"], found["trained"])
    assert (2, 1, 1) == (found["runs_with_warning"], found["runs_with_error"], found["programs_with_warning"])


def test_report_shows_every_alarm():
    """Each alarm stands in the report with program, seed, level and message, and each program has its line."""
    alarm = run.Alarm("loss-plateau", "warning", "model", "The loss is flat from step 30.")
    text = run.report([outcome("a.py", 0), outcome("a.py", 1, alarm), outcome("b.py --deep", 0, trained=False)])

    assert "- `a.py` seed 1: **loss-plateau** (warning, model). The loss is flat from step 30." in text
    assert "| `a.py` | 300 | 4 | accuracy | 0.9, 0.9 | 1 |" in text
    assert "| `b.py --deep` | 300 | 4 | accuracy | 0.9 (short of its goal) |  |" in text


def published():
    """The outcomes in results.json."""
    content = json.loads((ZOO / "results.json").read_text(encoding="utf-8"))
    alarms = [tuple(run.Alarm(**alarm) for alarm in row.pop("alarms")) for row in content["outcomes"]]
    return [run.Outcome(**row, alarms=found) for row, found in zip(content["outcomes"], alarms, strict=True)]


def test_published_results_are_of_this_zoo():
    """RESULTS.md is what results.json says, and both cover every program under five seeds."""
    rows = published()

    assert {(job.command, job.seed) for job in recording.jobs(range(5))} == {(row.command, row.seed) for row in rows}
    assert run.report(rows) == (ZOO / "RESULTS.md").read_text(encoding="utf-8")


def test_published_results_are_good_enough():
    """Every program reaches its goal under every seed, none has an error, and at most 1 % of the runs has a warning."""
    found = run.summary(published())

    assert found["runs"] == found["trained"]
    assert 0 == found["runs_with_error"]
    assert found["share_of_runs"] <= 0.01


def test_readme_has_the_published_figures():
    """The README's sentence on healthy programs states what was measured."""
    found = run.summary(published())
    text = " ".join((ZOO.parent / "README.md").read_text(encoding="utf-8").split())

    assert f"Of {found['runs']} runs of healthy programs ({found['programs']} programs" in text
    assert f"{found['runs_with_warning']} got a warning or an error" in text
    assert (
        f"at most {100 * found['upper_bound_of_runs']:.1f} % of runs "
        f"and {100 * found['upper_bound_of_programs']:.1f} % of programs"
    ) in text
