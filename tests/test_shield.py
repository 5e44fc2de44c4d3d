"""An error of isograd's own never reaches training: one warning, the same bits, and what was seen can be diagnosed.

The error is raised inside every entry point in turn, while everything is read at every step.
"""

import copy
import math
import random
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import isograd
from isograd import _watch
from isograd._record import RunFile
from isograd._schedule import Schedule
from isograd.frameworks import _names
from isograd.frameworks.torch import _calls, _describe, _kernels, _nonfinite, _taps, _trace
from isograd.frameworks.torch._observe import Observer
from isograd.frameworks.torch._parameters import ParameterReading
from isograd.frameworks.torch._row import Row
from isograd.frameworks.torch._writer import Writer

STEPS = 5

# What each entry into isograd's code comes to first, and what lies deeper behind it.
POINTS = {
    "made_optimizer": (Observer, "_note_optimizer"),
    "before_backward": (Observer, "_before_backward"),
    "after_backward": (Observer, "_after_backward"),
    "before_step": (Observer, "_before_step"),
    "after_step": (Observer, "_after_step"),
    "clipped": (Observer, "_note_clip"),
    "before_scaled_step": (Observer, "_note_scale"),
    "after_scaled_step": (Observer, "_skipped_step"),
    "output-hook": (Observer, "_read_output"),
    "signal-hook": (_calls.Call, "take_signal"),
    "graph-hook": (Observer, "_take_signal"),
    "graph": (_trace, "read_graph"),
    "operation": (_trace, "read_operation"),
    "activation": (_kernels, "activation"),
    "nonfinite": (_nonfinite, "first_bad_operation"),
    "gradients": (ParameterReading, "read_gradients"),
    "weights": (ParameterReading, "read_weights"),
    "update": (ParameterReading, "read_update"),
    "commit": (Observer, "_commit"),
    "row": (Row, "send"),
    "write": (Writer, "_write"),
    "layers": (_describe, "walk"),
    "write_row": (RunFile, "write_row"),
    "write_profile": (RunFile, "write_profile"),
    "schedule-observe": (Schedule, "observe"),
    "schedule-is_deep": (Schedule, "is_deep"),
    "subscribe": (_taps, "subscribe"),
    "names": (_names, "variable_name"),
}

# Only called when the watch begins, or only at the first steps: no later step can fail there.
AT_THE_START = {"subscribe", "names"}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.act, self.drop = nn.Linear(6, 8), nn.ReLU(inplace=True), nn.Dropout(0.2)
        self.shared, self.last = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        hidden = self.drop(self.act(self.first(x)))
        return self.last(torch.tanh(self.shared(torch.sigmoid(self.shared(hidden)))))


class Clock:
    """Which step the training loop is at; -1 before it begins."""

    step = -1


def train(clock, **options):
    """Every entry point at every step: a new optimizer, clipping, a step that a scaler leaves out, one it does not."""
    torch.manual_seed(0)
    random.seed(0)
    np.random.seed(0)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=3)
    clock.step = -1
    run = isograd.watch(model, every=1, budget=math.inf, **options) if options else None
    for step in range(STEPS):
        clock.step = step
        extra = torch.optim.SGD([model.last.bias], 1e-3)
        for factor in (math.inf, 1.0):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(torch.randn(4, 6)), torch.randint(0, 3, (4,))) * factor
            scaler.scale(loss).backward()
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            scaler.step(optimizer)
            scaler.update()
        extra.step()
    clock.step = STEPS
    return model, optimizer, run


def outcome(model, optimizer):
    return {
        "model": {name: tensor.clone() for name, tensor in model.state_dict().items()},
        "optimizer": copy.deepcopy(optimizer.state_dict()),
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].tolist(),
    }


def same(left, right):
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


@pytest.fixture
def fail(monkeypatch):
    """`fail(owner, name, clock, step)`: from that step on, calling it raises an error of several lines."""

    def install(owner, name, clock, step):
        original = getattr(owner, name)
        raised = []

        def failing(*args, **kwargs):
            if clock.step >= step:
                raised.append(clock.step)
                raise RuntimeError("broken\nover several lines")
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, failing)
        return raised

    return install


def cases():
    for point in POINTS:
        for step in (-1,) if point in AT_THE_START else (0, 1, 3):
            yield pytest.param(point, step, id=f"{point}-{step}")


@pytest.mark.parametrize("point, step", list(cases()))
def test_an_error_inside_detaches_and_training_goes_on(point, step, tmp_path, monkeypatch, fail, capfd):
    """One line on stderr, the same bits as unwatched, no hook left, and a run that closes and can be diagnosed."""
    clock = Clock()
    unwatched = outcome(*train(clock)[:2])
    capfd.readouterr()
    with monkeypatch.context():
        raised = fail(*POINTS[point], clock, step)
        model, optimizer, run = train(clock, out=tmp_path)
        watched = outcome(model, optimizer)
        run.close()
    lines = capfd.readouterr().err.splitlines()

    assert len(raised) == 1
    # Compared as a list, so that a line of somebody else's is seen where the test fails.
    assert [line for line in lines if re.match("isograd: .*RuntimeError: broken over several lines", line)] == lines
    assert len(lines) == 1
    assert same(unwatched, watched)
    assert not any(module._forward_hooks for module in model.modules())
    assert run.diagnose().steps <= 3 * STEPS
    assert all(history.events_of("watch-detached") for history in run.histories())


@pytest.mark.parametrize("point", POINTS)
def test_the_entry_points_are_reached(point, tmp_path, monkeypatch):
    """Each place where an error is injected is really run by the loop: otherwise the test above would prove nothing."""
    owner, name = POINTS[point]
    original, calls = getattr(owner, name), []
    monkeypatch.setattr(owner, name, lambda *a, **k: (calls.append(1), original(*a, **k))[1])
    _, _, run = train(Clock(), out=tmp_path)
    run.close()

    assert calls
    assert 2 * STEPS <= run.step


def test_a_watch_after_a_failure_sees_everything(tmp_path, monkeypatch, fail, capfd):
    """Once a broken watch is closed, the next one in the same process records every step."""
    clock = Clock()
    with monkeypatch.context() as patch:
        fail(Observer, "_after_step", clock, 0)
        _, _, broken = train(clock, out=tmp_path)
        broken.close()
        patch.undo()
    monkeypatch.undo()
    capfd.readouterr()
    _, _, run = train(clock, out=tmp_path)
    run.close()

    assert "" == capfd.readouterr().err
    assert all(not history.events_of("watch-detached") for history in run.histories())
    assert 2 * STEPS <= run.step


def test_what_was_seen_before_the_failure_is_kept(tmp_path, fail, capfd):
    """Steps recorded before the failure stay in the run and are part of its diagnosis."""
    clock = Clock()
    raised = fail(Observer, "_before_backward", clock, 3)
    _, _, run = train(clock, out=tmp_path)
    run.close()
    history = run.histories()[0]

    assert [3] == raised
    assert 3 * 2 < history.num_steps <= 3 * 3
    assert history.num_steps <= run.diagnose().steps + 1
    assert 1 == len(capfd.readouterr().err.splitlines())


def test_an_error_while_finishing_is_told_too(tmp_path, fail, capfd):
    """An error in the last moment, when the watch is closed, is one line as well and raises nothing."""
    clock = Clock()
    fail(Observer, "settle", clock, STEPS)
    _, _, run = train(clock, out=tmp_path)
    run.close()
    run.close()

    assert 1 == len(capfd.readouterr().err.splitlines())
    assert run.diagnose().steps >= 2 * STEPS - 1


def test_ctrl_c_inside_is_the_users(tmp_path, monkeypatch):
    """Ctrl-C that arrives while isograd's code runs ends the program as it would anywhere else."""

    def interrupted(*_):
        raise KeyboardInterrupt

    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    monkeypatch.setattr(Observer, "_before_step", interrupted)
    run = isograd.watch(model, optimizer, out=tmp_path)
    model(torch.randn(2, 6)).sum().backward()
    with pytest.raises(KeyboardInterrupt), run:
        optimizer.step()

    assert "interrupted" == run.run().meta["state"]


def test_an_optimizer_that_cannot_be_hashed_is_no_error_in_training(tmp_path, capfd):
    """Even an object of the user's that isograd cannot handle only ends the watching."""

    class Odd(torch.optim.SGD):
        __hash__ = None

        def __eq__(self, other):
            return NotImplemented

    model = Model()
    with isograd.watch(out=tmp_path) as run:
        optimizer = Odd(model.parameters(), 0.1)
        model(torch.randn(2, 6)).sum().backward()
        optimizer.step()

    assert 1 == len(capfd.readouterr().err.splitlines())
    assert run.diagnose().healthy


def test_a_shield_times_what_it_runs(monkeypatch):
    """The seconds spent inside are counted once, nested calls and failed ones included."""
    times = iter([10.0, 10.5, 20.0, 21.0, 30.0, 32.0])
    monkeypatch.setattr(_watch.time, "perf_counter", lambda: next(times))
    told = []
    shield = _watch.Shield(told.append)

    assert 3 == shield.call(lambda: 3)
    assert 4 == shield.call(lambda: shield.call(lambda: 4))
    assert shield.call(lambda: 1 / 0) is None
    assert shield.call(lambda: 5) is None
    assert 3.5 == shield.seconds
    assert 1 == len(told)
    assert told[0].startswith("ZeroDivisionError: division by zero (test_shield.py:")
