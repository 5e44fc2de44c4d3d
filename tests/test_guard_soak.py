"""A long run that is damaged at random ends like one that nothing happened to, and a run that is killed can be read."""

import collections
import importlib
import itertools
import multiprocessing
import random
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

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


def train_forever(folder, told):
    """A guarded training with a bad batch in 40 and damage in 150 steps."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 64), nn.BatchNorm1d(64), nn.Tanh(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    with isograd.watch(model, optimizer, out=folder, guard=isograd.Guard(skip=True, rewind=True)) as run:
        told.send(run.path)
        for step in itertools.count():
            x = torch.randn(16, 8)
            if step % 40 == 39:
                x[0, 0] = float("nan")
            optimizer.zero_grad()
            (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
            optimizer.step()
            if step % 150 == 149:
                optimizer.state[model[0].weight]["exp_avg"][0, 0] = float("nan")


def test_a_guarded_run_that_is_killed(tmp_path):
    """kill -9 at any moment while it skips, goes back and writes capsules: what is there of the run can be read, and
    every capsule is whole.
    """
    starting = multiprocessing.get_context("forkserver")
    starting.set_forkserver_preload(["torch._dynamo", "isograd._watch"])
    draw, seen = random.Random(0), collections.Counter()
    for _ in range(5):
        here, there = starting.Pipe()
        process = starting.Process(target=train_forever, args=(tmp_path, there))
        process.start()
        path = here.recv()
        time.sleep(draw.uniform(0.2, 2))
        process.kill()
        process.join()
        seen += look_at(path)
    assert seen["steps"] > 100 and seen["events"] and seen["capsules"]


def look_at(path):
    """How much of a run that was killed is there."""
    seen = collections.Counter()
    for history in isograd.open_run(path).histories:
        if "loss" not in history.series:
            continue  # killed before its first readings were written
        losses = history.series["loss"].values
        assert np.isnan(losses).sum() <= 1 + len(losses) / 30
        bad = {event.step for event in history.events if event.kind in ("bad-step-skipped", "rewound")}
        assert all(step % 40 == 39 or step % 150 == 0 for step in bad)
        seen += collections.Counter(steps=len(losses), events=len(bad))
    for capsule in list_capsules(path):
        whole = isograd.open_capsule(capsule.path)
        assert whole.why and {"0.weight", "1.running_mean", "3.bias"} <= {*whole.tensors("model")}
        seen["capsules"] += 1
    return seen
