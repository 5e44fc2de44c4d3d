"""Trials and the search for a treatment, on real programs in processes of their own."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from isograd import _fix
from isograd._changes import RegisterParameters, SetHyperparameter
from isograd._diagnose import Diagnosis
from isograd._fix import Tried, _compared, _ranked
from isograd._remedy import Treatment
from isograd._treat import parse
from isograd._trial import Program, Trial, run_trial
from isograd._verify import Arm, Effect, Verdict

PROGRAM = """
import torch
from torch import nn
torch.manual_seed(0)
x = torch.randn(256, 8)
y = (x[:, 0] * x[:, 1] > 0).long()
{layers}
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for step in range({steps}):
    batch = torch.randint(0, 256, (64,))
    loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    {extra}
"""
HEALTHY = "model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 2))"
SICK = (
    "blocks = [m for _ in range(8) for m in (nn.Linear(32, 32), nn.Sigmoid())]\n"
    "model = nn.Sequential(nn.Linear(8, 32), nn.Sigmoid(), *blocks, nn.Linear(32, 2))"
)


@pytest.fixture
def program(tmp_path):
    """A function that writes a training script and gives the program."""

    def write(layers=HEALTHY, steps=60, extra="pass"):
        script = tmp_path / "train.py"
        script.write_text(PROGRAM.format(layers=layers, steps=steps, extra=extra))
        return Program(args=(str(script),))

    return write


def test_the_same_trial_has_the_same_losses_and_another_seed_has_others(program):
    """A reproducible program repeats bit for bit; a shifted seed gives another run although it sets its own."""
    first, again, other = (run_trial(Trial(program=program(), seed=seed)) for seed in (0, 0, 1))

    assert (60, "") == (first.steps, first.error)
    assert np.array_equal(first.losses, again.losses)
    assert not np.array_equal(first.losses, other.losses)


def test_a_change_takes_effect_from_the_first_step(program):
    """With a rate of 0 no step moves a weight: the loss of the first step is the same, and the run does not learn."""
    plain = run_trial(Trial(program=program()))
    frozen = run_trial(Trial(program=program(), changes=(SetHyperparameter(name="lr", value=0.0),)))

    assert plain.losses[0] == frozen.losses[0]
    assert plain.losses[-10:].mean() < 0.9 * frozen.losses[-10:].mean()


def test_a_program_that_raises_says_so(program):
    """The exception that ended a trial is its error, and the steps before it are kept."""
    arm = run_trial(Trial(program=program(extra="assert step < 30, 'too far'")))

    assert "AssertionError: too far" == arm.error
    assert 30 <= arm.steps <= 31


LOADING = """
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

torch.manual_seed(0)
x = torch.randn(32, 4)
model = nn.Linear(4, 1)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
for inputs, targets in DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), 8, num_workers=1):
    optimizer.zero_grad()
    nn.functional.mse_loss(model(inputs), targets).backward()
    optimizer.step()
"""


def test_a_program_that_loads_with_processes_of_its_own_runs_as_ever(tmp_path):
    """Without a `__main__` guard, which scripts need where processes are spawned anew."""
    (tmp_path / "train.py").write_text(LOADING)
    arm = run_trial(Trial(program=Program(args=(str(tmp_path / "train.py"),))))
    assert not arm.error
    assert arm.steps == 4


def test_a_program_that_hangs_is_ended_with_its_children(program):
    """At the time limit the program and what it started are killed; what it recorded is kept."""
    hang = (
        "if step == 20: import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; time.sleep(600)'])"
    )
    began = time.monotonic()

    arm = run_trial(Trial(program=program(extra=hang), seconds=20))

    assert "it was ended at the time limit of 20 s" == arm.error
    assert arm.steps >= 20
    assert time.monotonic() - began < 90


def screened(*rows):
    """Treatments of one cause in the order in which they are ranked; rows of (text, score, effect, cured)."""
    tried = [
        Tried(
            treatment=Treatment(remedies=tuple(map(parse, text.split(" + "))), changes=(), cause="c", score=score),
            verdict=Verdict(
                outcome="inconclusive",
                effect=Effect(value=effect, low=-math.inf, high=math.inf),
                resolved=("c",) if cured else (),
                remaining=() if cured else ("c",),
            ),
            seconds=1.0,
        )
        for text, score, effect, cured in rows
    ]
    return [str(one.treatment) for one in _ranked(tried)]


def test_what_suits_the_cause_goes_before_what_is_merely_faster():
    """Equal within a factor of ten, the rule's own first choice is verified first; below that it is not."""
    fits, other = ("standardize-inputs", 0.9, 0.2, True), ("insert-normalization", 0.45, 1.0, True)

    assert ["standardize-inputs", "insert-normalization"] == screened(other, fits)
    assert ["insert-normalization", "standardize-inputs"] == screened(other, (*fits[:2], 0.05, True))


def test_a_larger_rate_does_not_set_the_measure():
    """It starts faster whatever is wrong: what suits the cause is not small beside it."""
    assert (
        "raise-precision" == screened(("raise-learning-rate", 0.4, 1.0, True), ("raise-precision", 0.85, 0.05, True))[0]
    )


def test_what_cures_goes_before_what_helps():
    """A cause that is gone weighs more than a lower loss, as long as the loss is lower by what matters."""
    assert "clip-weights" == screened(("skip-bad-steps", 0.9, 1.0, False), ("clip-weights", 0.1, 0.3, True))[0]
    assert "skip-bad-steps" == screened(("skip-bad-steps", 0.9, 1.0, False), ("clip-weights", 0.1, -0.3, True))[0]


def test_of_one_remedy_the_form_that_does_most_goes_first():
    """Its first form stays first while it has half of the largest effect."""
    ten, hundred = "raise-learning-rate", "raise-learning-rate:factor=100.0"

    assert [hundred, ten] == screened((ten, 0.6, 0.2, True), (hundred, 0.3, 1.0, True))
    assert [ten, hundred] == screened((ten, 0.6, 0.7, True), (hundred, 0.3, 1.0, True))


def test_forms_of_a_remedy_share_a_measure_that_others_do_not_take_from_it():
    """Ten and a hundred times the rate are told apart; what is no rate is measured without them."""

    def run(end):
        losses = np.r_[np.full(10, 2.3), np.linspace(2.3, end, 90)]
        return Arm(seed=0, losses=losses, diagnosis=Diagnosis(run="", subjects=("m",), steps=100))

    texts = ("raise-learning-rate", "raise-learning-rate:factor=100.0", "raise-precision")
    treatments = [Treatment(remedies=(parse(text),), changes=(), cause="c") for text in texts]
    ten, hundred, precision = _compared(run(2.3), list(zip(treatments, map(run, (2.2, 0.1, 1.9)), strict=True)))

    assert ten.verdict.effect.value < 0.1
    assert hundred.verdict.effect.value == precision.verdict.effect.value == pytest.approx(1.0)


def test_every_remedy_is_tried_once_before_its_other_forms(monkeypatch):
    """The first wave has different remedies, in the order of their scores."""
    clip = "clip-gradient-norm"
    texts = (clip, f"{clip}:max_norm=2.0", "skip-bad-steps", f"{clip}:max_norm=3.0", "scale-loss")
    proposals = [
        Treatment(remedies=(parse(text),), changes=(SetHyperparameter(name="lr", factor=0.5),)) for text in texts
    ]
    monkeypatch.setattr(_fix, "treat", lambda diagnosis: proposals)
    search = _fix.Search(program=Program(args=("x.py",)), executor=None)

    assert [texts[i] for i in (0, 2, 4, 1, 3)] == [str(t) for t in search._candidates(None)]


def fixed(program, *options):
    """(status, JSON) of `isograd fix --json`."""
    command = [sys.executable, "-m", "isograd", "fix", "--json", *options, *program.args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(program.args[0]).parent)
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def test_a_healthy_program_has_nothing_to_fix(program):
    """A program that learns is run once, and nothing is tried."""
    status, told = fixed(program(steps=200))

    assert (1, [], None) == (status, told["trials"], told["best"])
    assert told["baseline"]["healthy"]


def test_a_sigmoid_tower_is_cured(program):
    """Ten sigmoid layers that learn nothing: a treatment is found and verified on other seeds, and `run` applies it."""
    sick = program(layers=SICK, steps=300)
    status, told = fixed(sick)

    best = told["trials"][told["best"]]
    assert 0 == status
    assert best["outcome"] in ("resolved", "improved")
    assert best["effect"]["low"] > 0
    assert 3 == best["pairs"]
    assert best["code"]
    assert told["seconds"] > told["baseline_seconds"] > 0

    texts = [best["treatment"]] if isinstance(best["treatment"], str) else best["treatment"]
    applied = subprocess.run(
        [sys.executable, "-m", "isograd", "run", *[part for text in texts for part in ("--apply", text)], "train.py"],
        capture_output=True, text=True, cwd=Path(sick.args[0]).parent,
    )  # fmt: skip
    assert "Applied from step 0 on" in applied.stderr


def test_a_long_program_is_tried_as_far_as_its_fault_shows(program, monkeypatch):
    """Where the first minute (here a few seconds) shows a fault the program is stopped there, and cured as well."""
    monkeypatch.setattr(_fix, "MINUTE", 8.0)
    endless = program(layers=SICK, steps=10**9, extra="import time; time.sleep(0.01)")
    found = _fix.fix(endless, jobs=2, limit=300.0)

    assert "time limit of 8 s" in found.error
    assert found.best is not None
    assert max(tried.steps for tried in found.trials) <= found.steps < 10_000


def test_what_the_program_has_no_place_for_is_not_told_as_harm(program, monkeypatch):
    """Where every parameter is held, registering them is refused when the program runs: no row, and no verdict."""
    refused = run_trial(Trial(program=program(), changes=(RegisterParameters(),)))
    assert (0, True) == (refused.steps, refused.refused)
    assert "held by an optimizer already" in refused.error

    proposals = [
        Treatment(remedies=(parse("register-parameters"),), changes=(RegisterParameters(),), cause="c"),
        Treatment(remedies=(parse("lower-learning-rate"),), changes=(SetHyperparameter(name="lr", factor=0.1),)),
    ]
    monkeypatch.setattr(_fix, "treat", lambda diagnosis: proposals)
    found = _fix.fix(program(layers=SICK, steps=60), jobs=2)
    assert ["lower-learning-rate"] == [str(tried.treatment) for tried in found.trials]


def test_chance_is_measured_where_a_program_does_not_repeat(program):
    """A program that seeds itself from the clock differs from itself; the search says by how much."""
    twice = HEALTHY + "\nmodel.append(nn.Softmax(1))"
    _, told = fixed(program(layers="torch.seed()\n" + twice, steps=100), "--seeds", "2")
    _, repeated = fixed(program(layers=twice, steps=100), "--seeds", "2")

    assert told["noise"] > 0
    assert 0 == repeated["noise"]


def test_a_trial_that_takes_too_much_memory_is_ended(program):
    """A run above its memory limit is ended with its words, and what it recorded until then is kept."""
    hungry = program(steps=100_000, extra="kept = globals().setdefault('kept', []); kept.append(torch.ones(2**20))")
    arm = run_trial(Trial(program=hungry, memory=2**30, seconds=120))

    assert "memory limit of 1024 MiB" in arm.error


def test_ctrl_c_does_not_wait_for_what_is_under_way(program, tmp_path):
    """Interrupted in a run of many minutes, the search is over in seconds, and so is the run."""
    mark = tmp_path / "steps"
    endless = program(
        layers=SICK, steps=10**6, extra=f"open({str(mark)!r}, 'a').write('.'); __import__('time').sleep(0.1)"
    )
    process = subprocess.Popen(
        [sys.executable, "-m", "isograd", "fix", *endless.args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline and not mark.exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    taken = mark.stat().st_size
    time.sleep(1.0)

    assert 130 == process.returncode
    assert "Traceback" not in err
    assert taken == mark.stat().st_size


def test_ctrl_c_prints_what_is_known(program, tmp_path):
    """Interrupted after the first runs, the search prints the table of what has been tried, and ends with status 1."""
    mark = tmp_path / "runs"
    extra = f"open({str(mark)!r}, 'a').write('.') if step == 0 else None"
    sick = program(layers=SICK, steps=100, extra=extra)
    process = subprocess.Popen(
        [sys.executable, "-m", "isograd", "fix", "--json", "--jobs", "1", *sick.args],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path,
    )  # fmt: skip
    deadline = time.monotonic() + 240
    # The program as it is, a wave of four, and the first of the verifying runs.
    while process.poll() is None and time.monotonic() < deadline and (not mark.exists() or len(mark.read_text()) < 6):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    told = json.loads(out)

    assert 1 == process.returncode, err
    assert told["interrupted"]
    assert 3 <= len(told["trials"])
    assert told["best"] is None
    assert "Traceback" not in err
