"""The device decides: tried on the CPU, whose fused optimizers read the same two numbers as those on accelerators."""

from __future__ import annotations

import gc
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from isograd._guard import Guard
from isograd._watch import Shield
from isograd.frameworks.torch import _taps as taps
from isograd.frameworks.torch._guarding import Guarding

FUSED = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, fused=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
}


@pytest.fixture(scope="module", autouse=True)
def small_heap():
    """What other tests have left behind is not looked through for models at the beginning of every training."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


class Training:
    """A small program, guarded where `guard` is given; `bad` changes the batches of the steps that it names."""

    def __init__(self, optimizer, guard=None, *, waits="never"):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))
        self.optimizer = FUSED[optimizer](self.model.parameters())
        self.scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 500)
        self.events, self.failures = [], []
        self.guarding = None
        if guard is not None:
            self.guarding = Guarding(
                guard,
                Shield(self.failures.append),
                on_event=lambda kind, data, _: self.events.append((kind, data)),
                on_warning=lambda sentence: self.events.append(("warning", sentence)),
                lower=lambda factor: self.events.append(("lower", factor)),
                waits=waits,
            )
            self.guarding.listen()

    def close(self):
        if self.guarding is not None:
            self.guarding.stop()
        assert not self.failures

    def train(self, batches, bad=1.0, at=(), follow=True):
        for index, (x, y) in enumerate(batches):
            factor = bad if index in at else 1.0
            if math.isfinite(factor):  # batch normalization would hide a finite one in the batch itself
                loss = factor * F.cross_entropy(self.model(x), y)
            else:
                loss = F.cross_entropy(self.model(x * factor), y)
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
            if follow:
                self.scheduler.step()

    def state(self):
        return self.model.state_dict(), self.optimizer.state_dict(), self.scheduler.state_dict()


def batches(count, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)) for _ in range(count)
    ]


def assert_same(one, other):
    (weights, optimizer, scheduler), (others, other_optimizer, other_scheduler) = one, other
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    assert scheduler == other_scheduler
    assert optimizer["param_groups"] == other_optimizer["param_groups"]
    for index, held in optimizer["state"].items():
        assert held.keys() == other_optimizer["state"][index].keys()
        for key, value in held.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(other_optimizer["state"][index][key])), key


@pytest.mark.parametrize("name", FUSED)
@pytest.mark.parametrize("value, at", [(math.nan, 0), (math.inf, 1), (-math.inf, 70), (1e30, 70)])
def test_a_bad_batch_leaves_no_bit(name, value, at):
    some = batches(80)
    guarded, without = Training(name, Guard(skip=True)), Training(name)
    guarded.train(some, bad=value, at=(at,))
    guarded.close()
    without.train(some[:at] + some[at + 1 :])
    assert [kind for kind, _ in guarded.events] == ["bad-step-skipped"]
    assert_same(guarded.state(), without.state())


class Waits(TorchDispatchMode):
    """Counts what would make a host wait for its device."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["momentum", "adam", "adamw", "adagrad"])
@pytest.mark.parametrize("waits, expected", [("never", False), ("always", True)])
def test_nothing_waits_for_the_device(name, waits, expected):
    training = Training(name, Guard(skip=True, clip=True), waits=waits)
    training.train(batches(60))
    guarding, optimizer = training.guarding, training.optimizer
    taps.unsubscribe(guarding)  # its hooks are called by hand, so that nothing else is counted
    x, y = batches(1)[0]
    optimizer.zero_grad()
    loss = F.cross_entropy(training.model(x), y)
    guarding.before_backward([loss], None)
    loss.backward()
    guarding.after_backward()
    with Waits() as mode:
        guarding.before_step(optimizer, False)
    optimizer.step()
    guarded = guarding._guarded[optimizer]
    arrive, guarded.gate._queue.drain = guarded.gate._queue.drain, lambda **_: None
    with mode:
        guarding.after_step(optimizer)
    guarded.gate._queue.drain = arrive
    training.close()
    assert bool(mode.count) is expected


@pytest.mark.parametrize("name", FUSED)
def test_a_spike_is_clipped_inside_the_step(name):
    """As if the program had scaled the gradients itself, but for rounding."""
    some = batches(80)
    found = []
    for waits in ("never", "always"):
        found.append(Training(name, Guard(clip=True), waits=waits))
        found[-1].train(some, bad=1e4, at=(70,))
        found[-1].close()
    gated, host = found
    assert [kind for kind, _ in gated.events] == [kind for kind, _ in host.events] == ["bad-step-clipped"]
    for path, one in gated.model.named_parameters():
        if path != "0.bias":  # before batch normalization: its gradient is rounding, which Adam makes a step of
            torch.testing.assert_close(one, host.model.get_parameter(path), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("waits", ["always", "never"])
def test_lane_by_lane_the_same_is_told(waits):
    guard = Guard(skip=True, patience=3)
    training = Training("adam", guard, waits=waits)
    training.train(batches(100), bad=math.nan, at=(10, 50, 51, 80, 81, 82, 83, 84))
    training.close()
    kinds = [kind for kind, _ in training.events]
    assert kinds == ["bad-step-skipped"] * 6 + ["guard-gave-up", "warning"]


def test_a_healthy_run_keeps_its_bits():
    some = batches(150)
    guarded, without = Training("adamw", Guard(skip=True, rewind=True, stop=True)), Training("adamw")
    guarded.train(some)
    guarded.close()
    without.train(some)
    assert not [kind for kind, _ in guarded.events if kind != "snapshots"]
    for name, value in guarded.model.state_dict().items():
        assert torch.equal(value, without.model.state_dict()[name])


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_damaged_moment_moves_no_weight_and_is_rewound(moment, value):
    training = Training("adam", Guard(skip=True, rewind=True))
    some = batches(120)
    training.train(some[:60], follow=False)
    next(iter(training.optimizer.state.values()))[moment].fill_(value)
    training.train(some[60:], follow=False)
    training.close()
    assert [kind for kind, _ in training.events] == ["snapshots", "bad-step-skipped", "rewound"], training.events
    assert all(torch.isfinite(parameter).all() for parameter in training.model.parameters())


def test_what_was_set_before_is_there_again():
    training = Training("adam", Guard(skip=True))
    training.train(batches(5))
    assert not hasattr(training.optimizer, "found_inf") and not hasattr(training.optimizer, "grad_scale")
    training.close()
