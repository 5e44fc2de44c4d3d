"""What `isograd run --apply` does to an unchanged script, and what it says of it."""

import json
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest

from isograd import open_run
from isograd._history import Event, History
from isograd._wording import interventions
from isograd.remedies import REMEDIES

SCRIPT = """
import torch
from torch import nn

torch.manual_seed(0)
torch.set_num_threads(1)
net = nn.Sequential(nn.Linear(4, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Sigmoid(), nn.Linear(8, 2), nn.Softmax(dim=1))
net = net.to(torch.bfloat16)
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
for step in range(12):
    optimizer.zero_grad()
    for half in range(2):
        x = (torch.randn(8, 4) * 3 + 1).to(torch.bfloat16)
        loss = nn.functional.mse_loss(net(x), x[:, :2] * 10)
        loss.backward()
    optimizer.step()
print("weights", sum(p.double().abs().sum() for p in net.parameters()).item())
"""


# Runs `isograd run` once for each list of texts, each in a fork of a process that has imported torch already.
DRIVER = """
import json, os, sys, torch
import isograd._report, isograd._treat, isograd._watch, isograd.frameworks.torch
from isograd._cli import main

torch.set_num_threads(1)
for number, texts in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if child == 0:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{number}.{name}", os.O_CREAT | os.O_WRONLY), stream)
        status = main(["run", *(one for text in texts for one in ("--apply", text)), "train.py"])
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def run(folder, *wanted):
    """`isograd run --apply TEXT … train.py` for each tuple of texts, in their order: {texts: what came of it}."""
    command = [sys.executable, "-c", DRIVER, json.dumps(wanted)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300, check=True)
    statuses = [int(line) for line in done.stdout.split()]
    return {
        texts: SimpleNamespace(
            returncode=statuses[number],
            stdout=(folder / f"{number}.out").read_text(),
            stderr=(folder / f"{number}.err").read_text(),
        )
        for number, texts in enumerate(wanted)
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a script that has a place for most remedies."""
    folder = tmp_path_factory.mktemp("apply")
    (folder / "train.py").write_text(SCRIPT)
    return folder


@pytest.fixture(scope="module")
def ended(folder):
    """What came of every run below. The first is without remedies: the others know the program by it."""
    return run(folder, (), *((name,) for name in AUTOMATIC), *((text,) for text, _ in CANNOT), TWO)


def told(ended):
    """stderr as one line: terminals wrap."""
    return " ".join(ended.stderr.split())


TWO = ("replace-activations:target=gelu", "lower-learning-rate:factor=0.5")


def test_the_run_says_what_was_applied_and_the_run_file_holds_it(folder, ended):
    """Two remedies, one with an option: both act, both are told with their fields and places."""
    assert ended[TWO].returncode == 0
    assert ended[TWO].stdout != ended[()].stdout
    said = told(ended[TWO])
    assert "Applied from step 0 on: replace activations (sources sigmoid, target gelu), 2 modules." in said
    assert "Applied from step 0 on: set hyperparameter (name lr, factor 0.5)." in said
    latest = max((folder / "isograd-runs").iterdir(), key=lambda run: run.stat().st_mtime_ns)
    events = [event for history in open_run(latest).histories for event in history.events]
    applied = [event.data["change"]["change"] for event in events if event.kind == "treatment-applied"]
    assert applied == ["ReplaceActivations", "SetHyperparameter"]


CANNOT = [
    ("clip-gradient-nrom", "There is no remedy 'clip-gradient-nrom'; nearest: clip-gradient-norm"),
    ("clip-gradient-norm:max=1", "clip-gradient-norm has no option 'max'"),
    ("clip-gradient-norm:max_norm", "write option=value, as in max_norm=1.0"),
    ("clip-gradient-norm:max_norm=abc", "max_norm takes a number, not 'abc'"),
    ("clip-gradient-norm:max_norm=-1", "must be a finite number above 0, not -1.0"),
    ("scale-loss:scale=nan", "must be a finite number above 0, not nan"),
    ("warm-up-learning-rate:steps=-3", "must be 1 or more, not -3"),
    ("lower-learning-rate:factor=-1", "must be a finite number of 0 or more, not -1.0"),
    ("penalize-weights:l1=-1", "must be a finite number of 0 or more, not -1.0"),
    ("stabilize-optimizer:beta2=2", "beta2"),
    ("reinitialize-layers:method=foo", "method is one of xavier"),
    ("reinitialize-layers:method=chrono", "recurrent"),
    ("check-labels", "check-labels is advice that only a human can follow"),
]


@pytest.mark.parametrize("text, sentence", CANNOT)
def test_what_cannot_be_applied_is_one_sentence_and_status_2(ended, text, sentence):
    """Unknown names, unknown options, bad values, advice, and remedies without a place: no traceback, no training."""
    assert ended[text,].returncode == 2
    assert sentence in ended[text,].stderr
    assert ended[text,].stdout == ""
    assert re.fullmatch(r"isograd: [^\n]+\.\n", ended[text,].stderr)


AUTOMATIC = sorted(name for name, remedy in REMEDIES.items() if remedy.applicability == "automatic")
IDLE = {"find-learning-rate", "skip-bad-steps", "zero-gradients", "scale-loss"}
"""By default the factor 1; nothing to skip; the script clears gradients itself; a power of two rounds nothing."""
PLACELESS = {"stabilize-optimizer", "register-parameters"}
"""Steps of SGD are not normalized; the optimizer holds every parameter already."""


@pytest.mark.parametrize("name", AUTOMATIC)
def test_every_automatic_remedy_acts_on_an_unchanged_script_or_says_why_not(ended, name):
    """The script ends normally with other weights and the change is told; or it does not begin, for a reason."""
    one = ended[name,]
    if name in PLACELESS:
        assert one.returncode == 2
        assert re.fullmatch(r"isograd: [^\n]+\.\n", one.stderr)
    else:
        assert one.returncode == 0
        assert "Applied from step 0 on: " in told(one)
        assert (one.stdout == ended[()].stdout) == (name in IDLE)


# ---- the report -------------------------------------------------------------------------------------------------


def told_of(*events):
    return [line.strip() for line in interventions(History(events=tuple(events)))]


def test_a_change_of_several_optimizers_is_told_once():
    """With the step of the first."""
    data = {"change": {"change": "ClipGradients", "method": "norm", "limit": 1.0}, "detail": ""}
    events = [Event(step=step, kind="treatment-applied", data=data) for step in (0, 0, 5)]
    assert told_of(*events) == ["Applied from step 0 on: clip gradients (method norm, limit 1)."]


def test_what_was_undone_and_applied_again_is_told_again():
    """In the order of events, with what stays."""
    data = {"change": {"change": "ScaleLoss", "scale": 2.0}, "detail": ""}
    undone = Event(step=3, kind="treatment-undone", data={"left": ["Weights stay."]})
    again = Event(step=7, kind="treatment-applied", data=data)
    assert told_of(Event(step=1, kind="treatment-applied", data=data), undone, again) == [
        "Applied from step 1 on: scale loss (scale 2).",
        "Undone at step 3. Weights stay.",
        "Applied from step 7 on: scale loss (scale 2).",
    ]


def test_skipped_steps_and_refusals_are_told():
    """How many were skipped and the first; the reason of a refusal as it is."""
    skips = [Event(step=step, kind="bad-step-skipped", data={"optimizer": "SGD"}) for step in (4, 9)]
    refused = Event(step=0, kind="treatment-refused", data={"why": "There is no ReLU."})
    assert told_of(refused, *skips) == [
        "Not applied (step 0): There is no ReLU.",
        "Skipped: 2 steps, the first 4: gradients hold NaN or Inf.",
    ]
    assert told_of(skips[0]) == ["Skipped: step 4: gradients hold NaN or Inf."]
