"""A long run that is damaged at random ends like one that nothing happened to, and a run that is killed can be read."""

import importlib
import random
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import isograd
from isograd._capsule_folder import list_capsules

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def soak(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("soak")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_a_run_that_is_damaged_at_random(soak, tmp_path):
    """25 faults in 1,500 steps: all are in the run file and nothing else is, the loss is that of as many steps without
    one, memory stays flat.
    """
    found = soak.soak(tmp_path, steps=1500, rate=0.012, seed=9)
    assert set(found.faults) == {fault.kind for fault in soak.FAULTS}
    assert not found.unseen and not found.unfounded
    assert found.events["rewound"] == found.faults["damaged moment"] == 2
    assert set(found.events) <= {"bad-step-skipped", "bad-step-clipped", "rewound"}
    assert found.is_finite
    assert found.kept > 500
    assert found.last_loss == pytest.approx(found.clean_loss, rel=0.2)
    assert soak.growth(found.memory) < 10_000


TRAIN = """
import sys
import torch
from torch import nn
import isograd

torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
with isograd.watch(model, optimizer, out=sys.argv[1], guard=isograd.Guard(skip=True, rewind=True)) as run:
    print(run.path, flush=True)
    for step in range(10**9):
        x = torch.randn(16, 8)
        if step % 40 == 39:
            x[0, 0] = float("nan")
        optimizer.zero_grad()
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        optimizer.step()
        if step % 150 == 149:
            optimizer.state[model[0].weight]["exp_avg"][0, 0] = float("nan")
"""


def test_a_guarded_run_that_is_killed(tmp_path):
    """kill -9 at any moment while it skips, goes back and writes capsules: run and capsules are whole, or not there."""
    draw = random.Random(0)
    seen = 0
    for _ in range(3):
        command = [sys.executable, "-c", textwrap.dedent(TRAIN), str(tmp_path)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            path = Path(process.stdout.readline().strip())
            time.sleep(draw.uniform(0.3, 3))
            process.kill()
            said = process.communicate()[1]
        assert not said
        for history in isograd.open_run(path).histories:
            losses = history.series["loss"].values
            assert np.isnan(losses).sum() <= 1 + len(losses) / 20
            seen += len(losses)
            assert {e.kind for e in history.events_of("bad-step-skipped")} <= {"bad-step-skipped"}
        for capsule in list_capsules(path):
            whole = isograd.open_capsule(capsule.path)
            assert whole.step % 40 == 39 or whole.why
            assert {name.split(".")[-1] for name in whole.tensors("model")} >= {"weight", "bias", "running_mean"}
    assert seen > 100
