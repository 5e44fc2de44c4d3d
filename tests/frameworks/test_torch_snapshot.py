"""Snapshots of a training program and going back to them: the same bits as in a run that never left."""

import copy
import gc
import itertools
import math
import random
import subprocess
import sys
import textwrap
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedules
from torch.optim.swa_utils import AveragedModel

from isograd._changes import ReplaceOptimizer
from isograd.frameworks.torch import _free_memory as free_memory
from isograd.frameworks.torch._delegation import Delegation
from isograd.frameworks.torch._snapshot import Snapshots
from isograd.frameworks.torch._tensor_copies import DoesNotFit
from isograd.frameworks.torch._training_state import TrainingState

O = torch.optim


class Net(nn.Module):
    """Tied, frozen and masked: one of each thing that a state may hold."""

    def __init__(self, sparse=False, momentum=0.1):
        super().__init__()
        self.embedding = nn.Embedding(6, 4, sparse=sparse)
        self.frozen = nn.Linear(4, 4)
        self.frozen.requires_grad_(False)
        self.hidden = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.hidden.weight
        self.norm = nn.BatchNorm1d(4, momentum=momentum)
        self.dropout = nn.Dropout(0.2)
        self.out = nn.Linear(4, 6)
        self.register_buffer("mask", torch.full((4, 4), -math.inf).triu(1), persistent=False)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("lazy", None)
        self.is_lazy = True

    def forward(self, tokens):
        x = self.dropout(self.frozen(self.embedding(tokens)))
        x = torch.softmax(self.mask.to(x.dtype), -1) @ x  # over four tokens
        x = x.mean(1)
        x = self.norm(self.tied(torch.tanh(self.hidden(x))))
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * x.detach().mean(0)  # a new tensor each time
            self.lazy = x.detach().mean(0) if self.is_lazy else None
        return self.out(x)


class Program:
    """A training loop that draws its batches and dropout masks from torch's global generator."""

    def __init__(
        self, make=lambda p: O.Adam(p, lr=0.01), schedule=None, dtype=torch.float32, sparse=False, scaled=False,
        averaged=False, trained=lambda model: model.parameters(),
    ):  # fmt: skip
        torch.manual_seed(0)
        self.model = Net(sparse).to(dtype)
        self.model.is_lazy = not averaged  # torch's averages want as many buffers as there were
        self.loose = nn.Parameter(torch.full((6,), 0.1, dtype=dtype))
        self.optimizer = make([*trained(self.model), self.loose])
        self.scheduler = schedule and schedule(self.optimizer)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127, growth_interval=3) if scaled else None
        self.average = AveragedModel(self.model) if averaged else None
        self.is_lbfgs = isinstance(self.optimizer, O.LBFGS)

    @property
    def state(self):
        return TrainingState([self.model], [self.optimizer])

    def loss(self, tokens, labels, factor):
        logits = self.model(tokens) + self.loose
        return factor * F.cross_entropy(logits.float(), labels)

    def step(self, factor=1.0):
        tokens, labels = torch.randint(6, (8, 4)), torch.randint(6, (8,))

        def closure():
            self.optimizer.zero_grad()
            loss = self.loss(tokens, labels, factor)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
            return loss

        if self.is_lbfgs:
            loss = self.optimizer.step(closure)
        else:
            loss = closure()
            if self.scaler is None:
                self.optimizer.step()
            else:
                self.scaler.step(self.optimizer)
                self.scaler.update()
        if self.scheduler is not None:
            is_plateau = isinstance(self.scheduler, schedules.ReduceLROnPlateau)
            self.scheduler.step(*[float(loss.detach())] * is_plateau)
        if self.average is not None:
            self.average.update_parameters(self.model)

    def train(self, steps):
        for _ in range(steps):
            self.step()
        return self

    def tensors(self):
        yield from (*self.model.parameters(), self.loose)

    def addresses(self):
        """Where parameters and the statistics of normalization live; where optimizer state does, by its place."""
        held = [t.data_ptr() for t in (*self.tensors(), *self.model.norm.buffers())]
        state = {
            (i, key): value.data_ptr()
            for i, entry in enumerate(self.optimizer.state.values())
            for key, value in entry.items()
            if isinstance(value, torch.Tensor)
        }
        return held, state

    def bits(self):
        """Everything that training changes, down to the bit, and which keys there are."""
        order = {id(p): i for i, p in enumerate(self.tensors())}
        groups = [
            {key: value for key, value in group.items() if key != "params"} for group in self.optimizer.param_groups
        ]
        state = [(order.get(id(p), -1), held) for p, held in self.optimizer.state.items()]
        parts = {
            "parameters": list(self.tensors()),
            "buffers": [list(module._buffers.items()) for module in self.model.modules()],
            "state": sorted(state, key=itemgetter(0)),
            "groups": groups,
            "scheduler": self.scheduler and self.scheduler.state_dict(),
            "scaler": self.scaler and self.scaler.state_dict(),
            "average": self.average and dict(self.average.state_dict()),
        }
        return {name: flat(part) for name, part in parts.items()}


def flat(thing):
    """Everything in nested containers, tensors by their bits."""
    if isinstance(thing, torch.Tensor):
        plain = thing.detach().contiguous()
        return (
            str(thing.dtype),
            tuple(thing.shape),
            plain.view(-1).view(torch.uint8).numpy().tobytes() if thing.numel() else b"",
        )
    if isinstance(thing, dict):
        return {key: flat(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [flat(value) for value in thing]
    return repr(thing)


def generators():
    return (
        flat(torch.get_rng_state()),
        random.getstate(),
        flat(np.random.get_state()[1].tolist()),
        np.random.get_state()[2:],
    )


def check_going_back(make, *, before=3, between=4, after=4):
    """Leave, go back and go on; then a second time from the same snapshot."""
    program = make().train(before)
    snapshots = Snapshots(program.state)
    here, at = program.bits(), generators()
    assert snapshots.take(before)
    assert program.bits() == here and generators() == at  # taking one has changed nothing
    drawn = torch.get_rng_state()
    for again in range(2):
        program.train(between - again)
        assert program.bits() != here
        elsewhere, places = generators(), program.addresses()
        assert snapshots.go_back(before + between) == before
        assert program.bits() == here
        assert generators() == elsewhere  # the batches between are skipped
        now = program.addresses()
        assert now[0] == places[0]
        assert now[1].items() <= places[1].items()  # those that stay are where they were
        torch.set_rng_state(drawn)
        program.train(after)
        there = program.bits()
        assert there == make().train(before + after).bits()
    return program


EPS = 1e-4  # representable in half precision
OPTIMIZERS = {
    "sgd": lambda p: O.SGD(p, lr=0.1),
    "sgd-foreach": lambda p: O.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    "sgd-fused": lambda p: O.SGD(p, lr=0.1, momentum=0.9, fused=True),
    "nesterov": lambda p: O.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: O.Adam(p, lr=0.01, eps=EPS, foreach=False),
    "adam-foreach": lambda p: O.Adam(p, lr=0.01, eps=EPS, foreach=True),
    "adam-fused": lambda p: O.Adam(p, lr=0.01, fused=True),
    "adam-tensor-lr": lambda p: O.Adam(p, lr=torch.tensor(0.01), fused=True),
    "amsgrad": lambda p: O.Adam(p, lr=0.01, eps=EPS, amsgrad=True),
    "adamw": lambda p: O.AdamW(p, lr=0.01, eps=EPS, weight_decay=0.1),
    "adamw-fused": lambda p: O.AdamW(p, lr=0.01, fused=True),
    "adagrad": lambda p: O.Adagrad(p, lr=0.05),
    "adagrad-fused": lambda p: O.Adagrad(p, lr=0.05, fused=True),
    "rmsprop": lambda p: O.RMSprop(p, lr=0.01, eps=EPS, momentum=0.9, centered=True),
    "nadam": lambda p: O.NAdam(p, lr=0.01, eps=EPS),
    "radam": lambda p: O.RAdam(p, lr=0.01),
    "adamax": lambda p: O.Adamax(p, lr=0.01),
    "adadelta": O.Adadelta,
    "asgd": lambda p: O.ASGD(p, lr=0.01),
    "rprop": lambda p: O.Rprop(p, lr=0.01),
    "adafactor": lambda p: O.Adafactor(p, lr=0.01),
    "lbfgs": lambda p: O.LBFGS(p, lr=0.1, max_iter=3, history_size=4),
    "lbfgs-wolfe": lambda p: O.LBFGS(p, lr=0.1, max_iter=3, history_size=4, line_search_fn="strong_wolfe"),
}  # fmt: skip
HALVES = (torch.bfloat16, torch.float16)
COMBINATIONS = [
    *itertools.product(OPTIMIZERS, [torch.float32]),
    *((name, torch.float64) for name in ("sgd-fused", "adam-foreach", "lbfgs")),
    # In half precision L-BFGS diverges, and two runs of torch's fused SGD with momentum differ on the CPU.
    *itertools.product(sorted(OPTIMIZERS.keys() - {"lbfgs", "lbfgs-wolfe", "sgd-fused"}), HALVES),
]


@pytest.mark.parametrize("name, dtype", COMBINATIONS, ids=lambda part: str(part).removeprefix("torch."))
def test_the_same_bits_as_in_a_run_that_never_left(name, dtype):
    """Every optimizer, every number type."""
    check_going_back(lambda: Program(OPTIMIZERS[name], dtype=dtype))


@pytest.mark.parametrize("name", ["sgd", "sgd-fused", "adam", "adam-fused", "nadam", "rmsprop", "adagrad", "lbfgs"])
def test_going_back_before_the_first_step_removes_what_steps_have_made(name):
    """State that is created lazily is gone again: momentum begins anew, as it did."""
    check_going_back(lambda: Program(OPTIMIZERS[name]), before=0)


SCHEDULES = {
    "step": lambda o: schedules.StepLR(o, 2, gamma=0.5),
    "lambda": lambda o: schedules.LambdaLR(o, Halving()),
    "multiplicative": lambda o: schedules.MultiplicativeLR(o, lambda epoch: 0.9),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.9),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 5),
    "restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 3, T_mult=2),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=0, factor=0.5),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=4), schedules.ExponentialLR(o, 0.8)], [4]
    ),
    "chained": lambda o: schedules.ChainedScheduler([schedules.ConstantLR(o, 0.1, 4), schedules.ExponentialLR(o, 0.9)]),
    "one-cycle": lambda o: schedules.OneCycleLR(o, 0.1, total_steps=12),
    "cyclic": lambda o: schedules.CyclicLR(o, 0.001, 0.1, step_size_up=2, cycle_momentum="momentum" in o.defaults),
}  # fmt: skip


class Halving:
    """A rate that is itself a state, as callables of schedulers may be."""

    def __init__(self):
        self.calls = 0

    def __call__(self, epoch):
        self.calls += 1
        return 0.5 ** (self.calls // 3)


@pytest.mark.parametrize("optimizer", ["sgd-foreach", "adam", "adam-tensor-lr"])
@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_are_found_and_go_back_as_well(name, optimizer):
    """Rates, counters, the best loss so far, momenta that a cycle moves, schedulers inside of schedulers."""
    check_going_back(lambda: Program(OPTIMIZERS[optimizer], SCHEDULES[name]), before=3, between=4, after=4)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # after a skipped step
@pytest.mark.parametrize("before", [0, 1, 4])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adam-fused"])
def test_loss_scalers_and_averages_go_back_as_well(optimizer, before):
    """Also where the scaler had not made its tensors yet. The first scales overflow; the addresses stay."""
    make = lambda: Program(OPTIMIZERS[optimizer], SCHEDULES["step"], scaled=True, averaged=True)  # noqa: E731
    program = check_going_back(make, before=before)
    places = program.scaler._scale.data_ptr(), [t.data_ptr() for t in program.average.parameters()]
    state = program.state
    captured, here = state.capture(), program.bits()
    program.scaler.set_growth_factor(3.0)
    program.scaler.update(4.0)
    state.restore(captured)
    assert program.bits() == here
    assert places == (program.scaler._scale.data_ptr(), [t.data_ptr() for t in program.average.parameters()])


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")
@pytest.mark.parametrize(
    "make", [lambda p: O.SparseAdam(p, lr=0.01), lambda p: O.SGD(p, lr=0.1), OPTIMIZERS["adagrad"]]
)
def test_embeddings_with_sparse_gradients(make):
    """SparseAdam, and those that take sparse gradients too; the rest of the model is not trained."""
    sparse_only = lambda model: model.embedding.parameters()  # noqa: E731

    check_going_back(lambda: Program(lambda p: make(p[:1]), sparse=True, trained=sparse_only))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step:UserWarning")  # after a skipped step
@pytest.mark.parametrize("first", [1, 3])
@pytest.mark.parametrize("optimizer", ["adam", "adam-fused", "sgd-foreach"])
def test_taken_and_gone_back_to_inside_of_a_step(optimizer, first):
    """Where a guard does it: the rest of the step, scheduler and scaler, then happens to the state that was."""
    program = Program(OPTIMIZERS[optimizer], SCHEDULES["exponential"], scaled=True)
    program.scaler.load_state_dict({**program.scaler.state_dict(), "scale": 8.0})
    snapshots, count = Snapshots(program.state), 0

    def after_step(*_):
        nonlocal count
        count += 1
        if count == first:
            assert snapshots.take(count)
        if count == first + 2:
            assert snapshots.go_back(count) == first

    program.optimizer.register_step_post_hook(after_step)
    program.train(first)
    here = program.bits()
    program.train(2)
    assert program.bits() == here
    program.train(1)


class Lookahead(O.Optimizer):
    """An optimizer of the program's own: around another one, with a counter and slow weights beside its state."""

    def __init__(self, params):
        params = list(params)
        super().__init__(params, {"lr": 0.05})
        self.inner = O.SGD(params, lr=0.05, momentum=0.9)
        self.taken, self.slow = 0, [p.detach().clone() for p in params]

    @torch.no_grad()
    def step(self, closure=None):
        self.inner.step()
        self.taken += 1
        if self.taken % 2 == 0:
            for p, slow in zip(self.param_groups[0]["params"], self.slow, strict=True):
                slow.lerp_(p, 0.5)
                p.copy_(slow)
                self.state[p].setdefault("syncs", 0)
                self.state[p]["syncs"] += 1


@pytest.mark.parametrize("before", [0, 1, 3])
def test_optimizers_of_the_programs_own(before):
    """Counters and tensors beside the state, an optimizer inside of an optimizer."""

    class Wrapped(Program):
        def bits(self):
            order = {id(p): i for i, p in enumerate(self.tensors())}
            inner = {order[id(p)]: held for p, held in self.optimizer.inner.state.items()}
            return super().bits() | {"own": flat([self.optimizer.taken, self.optimizer.slow, inner])}

    check_going_back(lambda: Wrapped(Lookahead), before=before)


def test_an_optimizer_that_was_replaced_behind_the_programs_own():
    """State and groups are the replacement's; one that was replaced since does not fit."""

    def make():
        program = Program(OPTIMIZERS["adam"])
        Delegation(ReplaceOptimizer(optimizer="RMSprop", hyperparameters=(("momentum", 0.9),))).adopt(
            program.optimizer, []
        )
        return program

    check_going_back(make)
    check_going_back(make, before=0)
    program = Program(OPTIMIZERS["adam"]).train(2)
    snapshots = Snapshots(program.state)
    assert snapshots.take(2)
    Delegation(ReplaceOptimizer(optimizer="SGD")).adopt(program.optimizer, [])
    program.train(1)
    here = program.bits()
    assert snapshots.go_back(3) is None and snapshots.steps == ()
    assert program.bits() == here


# ---- what is refused ----------------------------------------------------------------------------------------------


def entries(program):
    """Every tensor that must be finite, by name."""
    yield from program.model.named_parameters()
    yield "loose", program.loose
    yield from ((name, b) for name, b in program.model.named_buffers() if b.is_floating_point())
    for i, held in enumerate(program.optimizer.state.values()):
        yield from ((f"{i}.{key}", value) for key, value in held.items() if isinstance(value, torch.Tensor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_state_that_is_not_finite_is_refused_and_the_older_ones_are_kept(bad, dtype):
    """In turn in every parameter, buffer, moment and counter."""
    program = Program(OPTIMIZERS["adam"], dtype=dtype)
    state = program.state  # notes that the mask is infinite from the start
    snapshots = Snapshots(state, keep=2)
    assert snapshots.take(1) and snapshots.take(2) if program.train(2) else None
    sound = program.bits()
    names = []
    for name, tensor in list(entries(program)):
        entry = tensor.detach()
        entry = entry.reshape(-1)[-1:]
        before = entry.clone()
        entry.copy_(torch.full_like(entry, bad))
        if name != "mask" or math.isnan(bad):
            assert not state.all_finite(), name
            assert not snapshots.take(3), name
            assert snapshots.steps == (1, 2) and snapshots.refusal == ""
        entry.copy_(before)
        names.append(name)
    assert len(names) > 20
    assert program.bits() == sound and state.all_finite()
    program.train(1)
    assert snapshots.go_back(2) == 2 and program.bits() == sound  # what was refused has not touched them
    assert snapshots.take(3) and snapshots.steps == (2, 3)


def test_large_values_are_finite():
    """A norm that overflows is looked at again."""
    program = Program(OPTIMIZERS["adam"]).train(1)
    with torch.no_grad():
        program.model.out.weight.fill_(3e38)
        program.model.hidden.weight.fill_(-3e38)
    assert program.state.all_finite()
    half = Program(OPTIMIZERS["sgd"], dtype=torch.float16)
    with torch.no_grad():
        half.model.out.weight.fill_(6e4)
    assert half.state.all_finite()
    double = Program(OPTIMIZERS["sgd"], dtype=torch.float64)
    with torch.no_grad():
        double.model.out.weight.fill_(1e300)
    assert double.state.all_finite()


def test_a_buffer_may_stay_infinite_but_not_become_more_so():
    """Masks hold -inf for good, and trackers of a minimum begin with inf."""
    model = nn.Linear(2, 2)
    model.register_buffer("lowest", torch.tensor([math.inf, 1.0]))
    state = TrainingState([model], [O.SGD(model.parameters(), lr=0.1)])
    assert state.all_finite()
    model.lowest[0] = 3.0
    assert state.all_finite()
    model.lowest[0] = -math.inf
    assert state.all_finite()
    model.lowest[1] = math.inf
    assert not state.all_finite()
    model.lowest = torch.tensor([math.nan, 1.0])
    assert not state.all_finite()


# ---- memory -------------------------------------------------------------------------------------------------------


def copies_of(snapshots):
    return [tensor for snapshot in snapshots._held for tensor in snapshot.captured.tensors]


def test_what_they_take_is_known_in_advance_and_is_what_is_held():
    """Counted by the storages themselves, and no byte of the program's own is held instead of a copy."""
    gc.collect()  # averages of other tests
    program = Program(OPTIMIZERS["adam"], SCHEDULES["step"], averaged=True).train(1)
    snapshots = Snapshots(program.state, keep=2)
    stated = snapshots.bytes_each
    unique = {t.data_ptr(): t.nbytes for t in (*program.tensors(), *program.average.parameters())}
    buffers = [*program.model.buffers(), *program.average.buffers()]
    unique |= {b.data_ptr(): b.untyped_storage().nbytes() for b in buffers}
    unique |= {t.data_ptr(): t.nbytes for held in program.optimizer.state.values() for t in held.values()}
    assert stated == sum(unique.values())  # tied weights and expanded buffers once
    for number in range(1, 5):
        assert snapshots.take(number)
        storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in copies_of(snapshots)}
        assert sum(storages.values()) == snapshots.bytes_held == min(number, 2) * stated
        assert not storages.keys() & unique.keys()
        program.train(1)
    assert snapshots.steps == (3, 4)


def test_the_memory_of_the_oldest_is_used_again():
    """Once there are enough, taking one allocates nothing."""
    program = Program(OPTIMIZERS["adam"]).train(1)
    snapshots = Snapshots(program.state, keep=3)
    assert all(snapshots.take(step) for step in range(3))
    places = {t.data_ptr() for t in copies_of(snapshots)}
    assert all(snapshots.take(step) for step in range(3, 7))
    assert {t.data_ptr() for t in copies_of(snapshots)} == places


@pytest.mark.parametrize(
    "room, steps", [(0.5, ()), (1, (4,)), (1.9, (4,)), (2, (3, 4)), (3.5, (2, 3, 4)), (9, (2, 3, 4))]
)
def test_the_limit_is_kept(room, steps):
    """As many as fit, and a sentence where not one does."""
    gc.collect()  # averages of other tests
    program = Program(OPTIMIZERS["adam"]).train(1)
    each = Snapshots(program.state).bytes_each
    snapshots = Snapshots(program.state, memory=int(room * each))
    for step in range(1, 5):
        assert snapshots.take(step) is bool(steps)
        assert snapshots.bytes_held <= snapshots.limit == int(room * each)
    assert snapshots.steps == steps
    told = "A snapshot takes 1.25 kB, and all of them together may take 626 bytes: allow more, or do without rewinding."
    assert snapshots.refusal == ("" if steps else told)


def test_the_limit_is_kept_while_the_state_grows():
    """L-BFGS remembers more and more: fewer fit."""
    program = Program(OPTIMIZERS["lbfgs"]).train(1)
    snapshots = Snapshots(program.state, keep=5, memory=6 * Snapshots(program.state).bytes_each)
    held = []
    for step in range(1, 8):
        assert snapshots.take(step)
        assert snapshots.bytes_held <= snapshots.limit
        held.append(len(snapshots.steps))
        program.train(1)
    assert max(held) > held[-1] > 0


def test_the_default_limit_is_a_quarter_of_what_is_free_on_the_host():
    """As the operating system tells, and never more than a container's limit."""
    free = free_memory.free_bytes(torch.device("cpu"))
    lines = Path("/proc/meminfo").read_text().splitlines()
    total = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemTotal"))
    assert 0 < free < total
    assert 0.5 * free < 4 * Snapshots(Program().state).limit < 2 * free


def test_at_least_one_is_kept():
    """A mistake is told."""
    with pytest.raises(ValueError, match="at least 1, not 0"):
        Snapshots(Program().state, keep=0)


# ---- several of them ----------------------------------------------------------------------------------------------


def test_the_newest_at_or_before_a_step_is_gone_back_to_and_the_later_ones_are_dropped():
    """And it stays: one can go back to it again."""
    program = Program()
    snapshots = Snapshots(program.state, keep=4)
    at = {}
    for step in range(1, 9):
        program.train(1)
        if step % 2 == 0:
            assert snapshots.take(step)
            at[step] = program.bits()
    assert snapshots.go_back(7) == 6 and snapshots.steps == (2, 4, 6) and program.bits() == at[6]
    assert snapshots.go_back(6) == 6 and program.bits() == at[6]
    assert snapshots.go_back(3) == 2 and snapshots.steps == (2,) and program.bits() == at[2]
    assert snapshots.go_back(1) is None and snapshots.steps == () and program.bits() == at[2]
    assert Snapshots(program.state).go_back(9) is None


OPERATIONS = st.lists(
    st.one_of(
        st.tuples(st.just("train"), st.integers(1, 2)),
        st.tuples(st.just("bad"), st.sampled_from([math.nan, math.inf, 1e30])),
        st.tuples(st.just("take"), st.just(0)),
        st.tuples(st.just("back"), st.integers(0, 6)),
    ),
    max_size=14,
)


@settings(max_examples=25)
@given(OPERATIONS, st.sampled_from(["sgd-foreach", "adam-fused", "nadam", "lbfgs"]), st.integers(1, 3))
def test_any_order_of_training_taking_and_going_back_equals_a_replay_of_what_was_kept(operations, optimizer, keep):
    """The state is always that of a fresh program which is trained on the batches that were not gone back behind."""
    make = lambda: Program(OPTIMIZERS[optimizer], SCHEDULES["one-cycle" if optimizer == "sgd-foreach" else "step"])  # noqa: E731
    program = make()
    if optimizer == "sgd-foreach":
        program.scheduler.total_steps = 100
    snapshots = Snapshots(program.state, keep=keep)
    kept, held, step = [], [], 0  # the batches behind the state, those behind each snapshot, the program's own count

    def train(subject, batch):
        torch.manual_seed(batch[0])
        subject.step(batch[1])

    for kind, value in operations:
        if kind in ("train", "bad"):
            for _ in range(value if kind == "train" else 1):
                step += 1
                kept.append((step, 1.0 if kind == "train" else value))
                train(program, kept[-1])
        elif kind == "take":
            is_finite = all(t.isfinite().all() for name, t in entries(program) if name != "mask")
            is_finite &= all(t.isfinite().all() for s in program.optimizer.state.values() for v in s.values()
                             if isinstance(v, list) for t in v if isinstance(t, torch.Tensor))  # fmt: skip
            assert snapshots.take(step) is is_finite
            if is_finite:
                held = [*held, (step, list(kept))][-keep:]
        else:
            held = [pair for pair in held if pair[0] <= step - value]
            found = snapshots.go_back(step - value)
            assert found == (held[-1][0] if held else None)
            if held:
                kept = list(held[-1][1])
        assert list(snapshots.steps) == [taken for taken, _ in held]
    fresh = make()
    if optimizer == "sgd-foreach":
        fresh.scheduler.total_steps = 100
    for batch in kept:
        train(fresh, batch)
    assert program.bits() == fresh.bits()


# ---- generators and things that the program hands over ------------------------------------------------------------


class Averages:
    """Averages of weights as small libraries keep them: no module, with `state_dict`."""

    def __init__(self, model):
        self.shadow = [p.detach().clone() for p in model.parameters()]
        self.updates = 0

    def update(self, model):
        self.updates += 1
        for shadow, p in zip(self.shadow, model.parameters(), strict=True):
            shadow.lerp_(p.detach(), 0.1)

    def state_dict(self):
        np.random.rand()  # rude: it draws
        random.random()
        torch.rand(1)
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state):
        torch.rand(1)
        self.shadow, self.updates = state["shadow"], state["updates"]


class Batches:
    """A data loader that can go on where it was."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        while True:
            self.position += 1
            yield self.position

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def test_what_the_program_hands_over_goes_back_and_sources_of_data_only_when_asked():
    """No generator is advanced, not even by a `state_dict` that draws."""
    program = Program().train(1)
    averages, batches = Averages(program.model), Batches()
    state = TrainingState([program.model], [program.optimizer], [averages, batches])
    loader = iter(batches)
    next(loader)
    at = generators()
    captured = state.capture()
    assert generators() == at
    here = program.bits(), flat(averages.shadow)
    for _ in range(3):
        program.train(1)
        averages.update(program.model)
        next(loader)
        random.random(), np.random.rand()
    there = generators()
    state.restore(captured)
    assert (program.bits(), flat(averages.shadow)) == here and averages.updates == 0
    assert batches.position == 4 and generators() == there
    averages.update(program.model)  # what it holds now is its own, not our copy
    state.restore(captured, generators=True)
    assert (program.bits(), flat(averages.shadow)) == here
    assert batches.position == 1 and generators() == at


def test_a_network_among_the_things_handed_over_is_written_in_place():
    """A target network, as Q-learning has it."""
    program = Program().train(1)
    target = copy.deepcopy(program.model)
    state = TrainingState([program.model], [program.optimizer], [target])
    captured, here = state.capture(), flat(dict(target.state_dict()))
    places = [p.data_ptr() for p in target.parameters()]
    target.load_state_dict(program.train(2).model.state_dict())
    state.restore(captured)
    assert flat(dict(target.state_dict())) == here and places == [p.data_ptr() for p in target.parameters()]


def test_things_of_other_programs_are_left_alone():
    """Schedulers and averages that belong to other models stay where they are, and nothing found is kept alive."""
    mine, other = Program(schedule=SCHEDULES["step"], averaged=True), Program(schedule=SCHEDULES["step"])
    bystander = SimpleNamespace(model=nn.Linear(3, 3))
    average = AveragedModel(bystander.model)
    gc.collect()  # averages of other tests
    state = mine.state
    captured = state.capture()
    mine.train(3), other.train(3)
    average.update_parameters(bystander.model)
    before = other.bits(), flat(dict(average.state_dict()))
    state.restore(captured)
    assert (other.bits(), flat(dict(average.state_dict()))) == before
    count = len(state._found)
    mine.scheduler = mine.average = None
    gc.collect()
    assert sum(ref() is not None for ref in state._found) == count - 2
    mine.train(1)
    state.restore(captured)  # what is gone is not missed


class Scheduler:
    """The base class of a library of its own."""

    def __init__(self, optimizer):
        self.optimizer, self.epoch = optimizer, 0

    def step(self):
        self.epoch += 1
        for group in self.optimizer.param_groups:
            group["lr"] *= 0.5

    def state_dict(self):
        return {key: value for key, value in vars(self).items() if key != "optimizer"}

    def load_state_dict(self, state):
        vars(self).update(state)


def test_schedulers_of_libraries_are_found():
    """By the name of their base class and the optimizer that they hold."""
    program = Program()
    program.scheduler = type("PlateauScheduler", (Scheduler,), {})(program.optimizer)
    snapshots = Snapshots(program.state)
    program.train(2)
    here = program.bits()
    assert snapshots.take(2)
    program.train(2)
    assert snapshots.go_back(4) == 2 and program.bits() == here and program.scheduler.epoch == 2


# ---- programs that change -----------------------------------------------------------------------------------------


def test_what_the_program_has_added_since_stays():
    """A group that is unfrozen later goes on with its state; a later scheduler finds its keys."""
    program = Program(trained=lambda model: [p for p in model.parameters() if p.requires_grad]).train(2)
    snapshots = Snapshots(program.state)
    assert snapshots.take(2)
    here = flat(list(program.tensors()))
    program.model.frozen.requires_grad_(True)
    program.optimizer.add_param_group({"params": list(program.model.frozen.parameters()), "lr": 0.5})
    program.scheduler = torch.optim.swa_utils.SWALR(program.optimizer, swa_lr=0.2)
    program.train(2)
    assert snapshots.go_back(4) == 2
    assert flat(list(program.tensors())) == here
    assert len(program.optimizer.param_groups) == 2
    program.train(2)
    assert snapshots.take(4) and snapshots.go_back(4) == 4


def test_parameters_of_another_shape_do_not_fit_and_nothing_is_changed():
    """All or nothing; an older snapshot that fits as little goes too."""
    program = Program().train(1)
    snapshots, state = Snapshots(program.state), program.state
    assert snapshots.take(1) and snapshots.take(2)
    captured = state.capture()
    program.train(1)
    program.model.out = nn.Linear(4, 6, bias=False)
    here = program.bits()
    assert snapshots.go_back(9) == 2  # the layer that was is still there to be written to, the new one is unknown
    program.model.hidden.weight = nn.Parameter(torch.ones(5, 4))
    here = program.bits()
    assert snapshots.go_back(9) is None and snapshots.steps == ()
    with pytest.raises(DoesNotFit, match=r"Linear\.weight is not the tensor that it was"):
        state.restore(captured)
    assert program.bits() == here


def test_tables_that_grow_keep_their_size():
    """A buffer that is no state, and that the program counts on, is not shrunk again."""
    program = Program().train(1)
    program.model.register_buffer("table", torch.arange(3.0), persistent=False)
    state = program.state
    captured = state.capture()
    program.model.table = torch.arange(5.0)
    state.restore(captured)
    assert program.model.table.tolist() == [0, 1, 2, 3, 4]
    program.model.table = torch.tensor([7.0, 7.0, 7.0])
    state.restore(captured)
    assert program.model.table.tolist() == [0, 1, 2]


def test_a_checkpoint_that_is_loaded_since_is_no_hindrance():
    """`load_state_dict` gives an optimizer new groups, new state and new tensors."""
    program = Program(OPTIMIZERS["adam-fused"], SCHEDULES["step"]).train(2)
    snapshots, here = Snapshots(program.state), program.bits()
    assert snapshots.take(2)
    program.train(2)
    program.optimizer.load_state_dict(copy.deepcopy(program.optimizer.state_dict()))
    assert snapshots.go_back(4) == 2 and program.bits() == here
    program.train(2).optimizer.state.clear()
    for _ in range(2):
        assert snapshots.go_back(4) == 2 and program.bits() == here
        program.train(1)


def test_tensors_that_share_memory_since_are_two_again():
    """And two names for one tensor stay one."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = O.SGD([weight], lr=0.1)
    optimizer.state[weight] = {"a": torch.tensor([1.0]), "b": torch.tensor([2.0]), "c": torch.tensor([3.0])}
    held = optimizer.state[weight]
    held["d"] = held["c"]
    state = TrainingState([], [optimizer])
    captured = state.capture()
    held["b"] = held["a"]
    held["d"] = torch.tensor([9.0])
    held["e"] = torch.tensor([9.0])  # made since, in an entry that was there
    state.restore(captured)
    assert held.keys() == set("abcd")
    assert [float(held[key]) for key in "abcd"] == [1, 2, 3, 3]
    assert held["a"] is not held["b"]


def test_a_graph_that_the_program_keeps_can_still_go_backward():
    """Going back writes past autograd: the program's own backward pass is not stopped."""
    program = Program().train(1)
    snapshots = Snapshots(program.state)
    assert snapshots.take(1)
    program.train(1)
    loss = program.loss(torch.zeros(8, 4, dtype=torch.long), torch.zeros(8, dtype=torch.long), 1.0)
    assert snapshots.go_back(1) == 1
    loss.backward()


def test_in_inference_mode_and_without_gradients():
    """What surrounds the call changes nothing about it."""
    program = Program().train(1)
    snapshots, here = Snapshots(program.state, keep=1), program.bits()
    with torch.inference_mode():
        assert snapshots.take(1)
    program.train(1)
    assert snapshots.take(2) and snapshots.go_back(2) == 2
    program = Program().train(1)
    snapshots = Snapshots(program.state)
    assert snapshots.take(1)
    program.train(1)
    with torch.inference_mode():
        assert snapshots.go_back(1) == 1
    assert program.bits() == here
    program.train(1)


# ---- what cannot be copied ----------------------------------------------------------------------------------------


def test_what_cannot_be_copied_is_refused_in_one_sentence():
    """State in objects of a library's own, sharded elsewhere, nothing at all, a `state_dict` that fails."""
    program = Program().train(1)
    program.optimizer.state[program.loose]["blocks"] = [SimpleNamespace()]
    snapshots = Snapshots(program.state)
    assert not snapshots.take(1)
    assert snapshots.refusal == "The state of Adam holds a SimpleNamespace: it cannot be rewound."

    model = nn.Linear(2, 2)
    model.weight.ds_id = 7
    refusal = Snapshots(TrainingState([model], [])).refusal
    assert refusal == "The parameters are sharded by a library that keeps them elsewhere: they cannot be rewound."

    wrapped = type("FullyShardedDataParallel", (nn.Module,), {})()
    assert Snapshots(TrainingState([wrapped], [])).refusal.startswith("FullyShardedDataParallel moves")

    empty = Snapshots(TrainingState([nn.Tanh()], []))
    assert empty.refusal == "There are no parameters to rewind." and not empty.take(0)

    broken = SimpleNamespace(state_dict=lambda: 1 / 0, load_state_dict=None)
    snapshots = Snapshots(TrainingState([nn.Linear(2, 2)], [], [broken]))
    assert snapshots.refusal == "No snapshot can be taken: ZeroDivisionError: division by zero."
    assert not snapshots.take(0) and not snapshots.take(1)


def test_running_out_of_memory_is_no_error_of_the_program(monkeypatch):
    """The older ones stay, and it is said why there are no more."""
    program = Program().train(1)
    snapshots = Snapshots(program.state)
    assert snapshots.take(1)
    here = program.bits()

    def full(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty_like", full)
        assert not snapshots.take(2)
    assert (
        snapshots.refusal == "No snapshot can be taken: OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB."
    )
    program.train(1)
    assert snapshots.go_back(2) == 1 and program.bits() == here


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support:UserWarning")
def test_sparse_quantized_and_complex_tensors_and_empty_ones():
    """Whatever can be a buffer comes back; the pieces of a tensor are copied in place."""
    model = nn.Linear(2, 2)
    dense = torch.tensor([[0.0, 2.0], [3.0, 0.0]])
    model.register_buffer("coo", dense.to_sparse())
    model.register_buffer("csr", dense.to_sparse_csr())
    model.register_buffer("complex", torch.complex(dense, dense))
    model.register_buffer("empty", torch.empty(0, 3))
    model.register_buffer("nothing", torch.empty(0))
    model.register_buffer("flags", torch.tensor([True, False]))
    model.register_buffer("small", torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn))
    model.register_buffer("transposed", torch.arange(6.0).reshape(2, 3).t())
    model.register_buffer("expanded", torch.ones(1, 4).expand(3, 4))
    state = TrainingState([model], [O.SGD(model.parameters(), lr=0.1)])
    assert state.all_finite()
    captured = state.capture()
    model.expanded[:1].mul_(7)
    places = model.coo._values().data_ptr(), model.csr.values().data_ptr()
    model.coo._values().mul_(5)
    model.csr.values().mul_(5)
    model.complex.mul_(2j)
    model.flags.logical_not_()
    model.small.copy_(torch.tensor([4.0, 4.0]))
    model.transposed.zero_()
    state.restore(captured)
    assert model.coo.to_dense().equal(dense) and model.csr.to_dense().equal(dense)
    assert model.expanded.equal(torch.ones(3, 4)) and model.expanded.stride() == (0, 1)
    assert places == (model.coo._values().data_ptr(), model.csr.values().data_ptr())
    assert model.complex.equal(torch.complex(dense, dense)) and model.flags.tolist() == [True, False]
    assert model.small.float().tolist() == [1, 2] and model.transposed.equal(torch.arange(6.0).reshape(2, 3).t())
    model.coo = (dense + 1).to_sparse()  # as many entries no longer: made anew
    model.csr = (dense + 1).to_sparse_csr()
    state.restore(captured)
    assert model.coo.to_dense().equal(dense) and model.csr.to_dense().equal(dense)


# ---- several processes --------------------------------------------------------------------------------------------

SHARDED = """
    import sys
    import torch
    import torch.distributed as dist
    from torch import nn
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor
    from isograd.frameworks.torch._snapshot import Snapshots
    from isograd.frameworks.torch._training_state import TrainingState

    def agreed(count):
        common = torch.tensor(count)
        dist.all_reduce(common, dist.ReduceOp.MIN)
        return int(common)

    def make(kind):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1))
        if kind == "ddp":
            model = nn.parallel.DistributedDataParallel(model)
        else:
            for layer in (model[0], model[3]):
                fully_shard(layer)
            fully_shard(model)
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=kind == "fused")

    def train(model, optimizer, steps):
        for step in steps:
            torch.manual_seed(100 * step + dist.get_rank())
            model(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def local(tensor):
        return tensor.to_local() if isinstance(tensor, DTensor) else tensor

    def tensors(model, optimizer):
        state = [value for held in optimizer.state.values() for value in held.values()]
        return [local(tensor) for tensor in (*model.parameters(), *model.buffers(), *state)]

    def check(kind):
        model, optimizer = make(kind)
        train(model, optimizer, range(2))
        state = TrainingState([model], [optimizer])
        snapshots = Snapshots(state, smallest=agreed)
        stated = snapshots.bytes_each
        assert snapshots.take(2)
        assert snapshots.bytes_held == stated == sum(t.nbytes for t in tensors(model, optimizer))
        here = [t.clone() for t in tensors(model, optimizer)]
        places = [t.data_ptr() for t in tensors(model, optimizer)]
        train(model, optimizer, range(2, 5))
        if dist.get_rank() == 1:
            next(t for t in tensors(model, optimizer) if t.numel()).detach()[0] = float("nan")
        assert not snapshots.take(5)  # on no rank, though only one of them sees it
        assert snapshots.go_back(5) == 2
        assert places == [t.data_ptr() for t in tensors(model, optimizer)]
        assert all(a.equal(b) for a, b in zip(here, tensors(model, optimizer), strict=True))
        train(model, optimizer, range(7, 9))
        never = make(kind)
        train(*never, [0, 1, 7, 8])
        assert all(a.equal(b) for a, b in zip(tensors(model, optimizer), tensors(*never), strict=True))
        captured = state.capture()
        here = [t.clone() for t in tensors(model, optimizer)]
        optimizer.state.clear()  # shards of moments are made anew
        state.restore(captured)
        assert all(a.equal(b) for a, b in zip(here, tensors(model, optimizer), strict=True))
        train(model, optimizer, [9])

    def main(rank, store):
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
        for kind in ("ddp", "plain", "fused"):
            check(kind)
        dist.destroy_process_group()

    if __name__ == "__main__":
        torch.set_num_threads(1)
        torch.multiprocessing.spawn(main, (sys.argv[1],), nprocs=2)
        print("fine")
"""


def test_shards_go_back_alike_on_all_ranks(tmp_path):
    """DDP and `fully_shard` on two processes: local tensors in place, and what one refuses all refuse."""
    script = tmp_path / "train.py"
    script.write_text(textwrap.dedent(SHARDED))
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "store")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stdout == "fine\n", done.stderr[-3000:]


def test_seconds_are_those_of_the_last_one():
    """0 before any."""
    snapshots = Snapshots(Program().state)
    assert snapshots.seconds == 0
    assert snapshots.take(0) and 0 < snapshots.seconds < 5


def test_every_tensor_is_listed_once():
    """Parameters, buffers and state, by their memory."""
    gc.collect()  # averages of other tests
    program = Program().train(1)
    listed = [t.data_ptr() for t in program.state.tensors()]
    assert len(listed) == len(set(listed))
    wanted = [
        *program.tensors(),
        *program.model.buffers(),
        *itertools.chain(*(s.values() for s in program.optimizer.state.values())),
    ]
    assert {t.data_ptr() for t in wanted} == set(listed)
