"""A guard at bad steps: what is left out leaves no bit behind, what is damaged is gone back on, all else is untouched.

The oracle of every skip is the same program, trained without a guard on the batches that remain.
"""

import contextlib
import copy
import gc
import math
import re
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import isograd
from isograd import Guard

STEPS = 260
GENERATOR = torch.Generator().manual_seed(5)
X = torch.randn(STEPS, 3, 8, 6, generator=GENERATOR)
Y = torch.tanh(X @ torch.randn(6, 3, generator=GENERATOR))

VALUES = (math.nan, math.inf, -math.inf, 1e30)
RANGED = 60
"""Steps after which every range judges: 40, and those that a loss scaler leaves out."""


SKIP = Guard(skip=True, capsules=0)
"""Writing capsules takes longer than these trainings."""


class Net(nn.Module):
    """Its buffers change at every forward pass, and one of them shifts what it sees.

    No tensor has 32 entries: of those, torch's fused SGD with momentum makes other bits every time in half precision.
    """

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 4), nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("seen", torch.tensor(0))

    def forward(self, x):
        x = x - self.mean
        with torch.no_grad():
            self.mean.lerp_(x.mean(0).to(self.mean.dtype), 0.01)
            self.seen += 1
        return self.second(F.gelu(self.first(x)))


# A large epsilon: half precision rounds the usual ones to zero.
OPTIMIZERS = {
    "SGD": lambda p, **how: torch.optim.SGD(p, lr=1e-2, **how),
    "momentum": lambda p, **how: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=1e-3, **how),
    "Adam": lambda p, **how: torch.optim.Adam(p, lr=1e-3, eps=1e-4, **how),
    "AdamW": lambda p, **how: torch.optim.AdamW(p, lr=1e-3, eps=1e-4, **how),
    "Adagrad": lambda p, **how: torch.optim.Adagrad(p, lr=1e-2, eps=1e-4, **how),
    "RMSprop": lambda p, **how: torch.optim.RMSprop(p, lr=1e-3, eps=1e-4, momentum=0.5, **how),
    "NAdam": lambda p, **how: torch.optim.NAdam(p, lr=1e-3, eps=1e-4, **how),
}
WITHOUT_FUSED = ("RMSprop", "NAdam")
FORMS = {"plain": {"foreach": False}, "foreach": {"foreach": True}, "fused": {"fused": True}}
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "scaler": torch.float32}


@dataclass(frozen=True)
class Fault:
    """A value that gets into one batch: into a gradient by a hook or by hand, the loss, the input, or a buffer."""

    where: str
    value: float
    parameter: int = 0
    how: str = "hook"

    @property
    def is_overflow(self):
        """Whether a loss scaler takes it for a scale that is too large."""
        return self.where == "gradient" and not math.isfinite(self.value)


class Program:
    """A training loop over fixed batches, with a scheduler that steps with the optimizer and averaged weights."""

    def __init__(self, optimizer="AdamW", form="plain", precision="fp32", *, passes=1, backend=None, grows=5):
        torch.manual_seed(0)
        self.dtype, self.passes = PRECISIONS[precision], passes
        self.model = Net().to(self.dtype)
        self.compiled = self.model if backend is None else torch.compile(self.model, backend=backend)
        self.parameters = list(self.model.parameters())
        self.optimizer = OPTIMIZERS[optimizer](self.parameters, **FORMS[form])
        self.scaler = (
            torch.amp.GradScaler("cpu", init_scale=2.0**14, growth_interval=grows) if precision == "scaler" else None
        )
        self.scheduler = schedulers.LambdaLR(self.optimizer, lambda n: 0.999**n)
        self.average = AveragedModel(self.model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        self.fault = None
        for index, parameter in enumerate(self.parameters):
            parameter.register_hook(lambda gradient, index=index: self.poisoned(gradient, index))

    def poisoned(self, gradient, index):
        fault = self.fault
        if fault is None or (fault.where, fault.how, fault.parameter) != ("gradient", "hook", index):
            return None
        gradient = gradient.clone()
        gradient.view(-1)[0] = fault.value
        return gradient

    def loss(self, step, index, fault=None):
        x = X[step, index].to(self.dtype, copy=True)
        if fault is not None and fault.where == "input":
            x[0, 0] = fault.value
        if fault is not None and fault.where == "buffer":
            self.model.mean[1] = fault.value
        with torch.autocast("cpu", torch.float16, enabled=self.scaler is not None):
            out = self.compiled(x)
        loss = F.mse_loss(out.float(), Y[step, index]) / self.passes
        return loss * fault.value if fault is not None and fault.where == "loss" else loss

    def step(self, step, fault=None):
        self.optimizer.zero_grad()
        for index in range(self.passes):
            self.fault = fault if index == self.passes // 2 else None
            loss = self.loss(step, index, self.fault)
            (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.fault = None
        if fault is not None and (fault.where, fault.how) == ("gradient", "write"):
            self.parameters[fault.parameter].grad.view(-1)[-1] = fault.value
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.scheduler.step()
        self.average.update_parameters(self.model)

    def state(self):
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {name: value for name, value in self.scheduler.state_dict().items() if name != "lr_lambdas"},
            "average": self.average.state_dict(),
            "scaler": None if self.scaler is None else self.scaler.state_dict(),
            "random": torch.get_rng_state(),
        }


def bits(thing):
    """What nested containers hold, tensors and numbers by their bits."""
    if isinstance(thing, torch.Tensor):
        return (
            str(thing.dtype),
            thing.shape,
            thing.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes(),
        )
    if isinstance(thing, dict):
        return {key: bits(value) for key, value in thing.items()}
    if isinstance(thing, (list, tuple)):
        return [bits(value) for value in thing]
    return repr(thing)


def is_finite(thing):
    if isinstance(thing, torch.Tensor):
        return bool(torch.isfinite(thing).all())
    values = thing.values() if isinstance(thing, dict) else thing if isinstance(thing, (list, tuple)) else ()
    return all(map(is_finite, values))


def differing(one, other, path=""):
    """Where two states differ."""
    if isinstance(one, dict):
        return [found for key in one for found in differing(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, list):
        return [
            found for i, (a, b) in enumerate(zip(one, other, strict=True)) for found in differing(a, b, f"{path}/{i}")
        ]
    return [] if one == other else [path]


def watched(*things, out, guard):
    """A guarded run; without a guard nothing at all."""
    return contextlib.nullcontext() if guard is None else isograd.watch(*things, out=out, guard=guard)


def events(run, *kinds):
    if run is None:
        return []
    found = [event for history in run.histories() for event in history.events]
    return [event for event in found if not kinds or event.kind in kinds]


ACTIONS = ("bad-step", "bad-step-skipped", "bad-step-clipped", "bad-step-stopped", "rewound")
ACTIONS += ("guard-gave-up", "guard-relearned", "guard-refused", "guard-detached")


@pytest.fixture(scope="module", autouse=True)
def _fewer_objects():
    """Looking for models among all objects alive takes as long as there are many: what is older is no part of it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


# ---- what is left out leaves no bit behind --------------------------------------------------------------------------


def every_fault(turn):
    """Every value in every place, every other step from `RANGED` on; two of them in the first two steps."""
    found = [Fault("gradient", value, parameter) for parameter in range(4) for value in VALUES]
    found = [replace(fault, how=("hook", "write")[(i + turn) % 2]) for i, fault in enumerate(found)]
    found += [Fault(where, value) for where in ("loss", "input", "buffer") for value in VALUES]
    early = [fault for fault in found if not math.isfinite(fault.value)]
    return {
        0: early[turn % len(early)],
        1: early[(7 * turn + 3) % len(early)],
        **{RANGED + 2 * index: fault for index, fault in enumerate(found)},
    }


def combinations():
    """Each optimizer in each precision, in each form, with and without accumulation, compiled and not; the forms and
    the others in turn, so that over all optimizers each stands with each.
    """
    for o, optimizer in enumerate(OPTIMIZERS):
        forms = [form for form in FORMS if form != "fused" or optimizer not in WITHOUT_FUSED]
        for p, precision in enumerate(PRECISIONS):
            backend = ("eager", "aot_eager")[o % 2] if p == o % 4 else None
            yield optimizer, forms[(o + p) % len(forms)], precision, (1, 3)[(o + p // 2) % 2], backend


@pytest.mark.filterwarnings(
    "ignore:Detected call of `lr_scheduler"
)  # torch's, where a scaler leaves out the first step
@pytest.mark.parametrize("optimizer, form, precision, passes, backend", list(combinations()))
def test_a_batch_that_is_left_out_leaves_no_bit_behind(tmp_path, optimizer, form, precision, passes, backend):
    """After every step the state is that of a program that has never seen the bad batches."""
    faults = every_fault(list(combinations()).index((optimizer, form, precision, passes, backend)))
    steps = range(max(faults) + 2)
    expected = Program(optimizer, form, precision, passes=passes, backend=backend)
    wanted = []
    for step in steps:
        if step not in faults:
            expected.step(step)
        elif expected.scaler is not None and faults[step].is_overflow:
            expected.step(step, faults[step])  # a scaler leaves it out itself, in its own way
        wanted.append(bits(expected.state()))

    program = Program(optimizer, form, precision, passes=passes, backend=backend)
    with isograd.watch(program.model, program.optimizer, out=tmp_path, guard=SKIP) as run:
        for step in steps:
            program.step(step, faults.get(step))
            found = bits(program.state())
            assert found == wanted[step], (step, faults.get(step), differing(found, wanted[step]))
        skipped = events(run, *ACTIONS)
    own = [step for step, fault in faults.items() if program.scaler is not None and fault.is_overflow]
    assert [(event.kind, event.step) for event in skipped] == [
        ("bad-step-skipped", step) for step in faults if step not in own
    ]
    assert all(event.data["reasons"] and event.data["why"] for event in skipped)
    assert is_finite(program.state())


def test_the_combinations_miss_nothing():
    """Every optimizer stands with every precision, form, kind of accumulation, and compiled."""
    for optimizer in OPTIMIZERS:
        mine = [combination[1:] for combination in combinations() if combination[0] == optimizer]
        forms, precisions, passes, backends = (set(column) for column in zip(*mine, strict=True))
        assert forms == set(FORMS) - ({"fused"} if optimizer in WITHOUT_FUSED else set())
        assert precisions == set(PRECISIONS) and passes == {1, 3} and len(backends) == 2


# ---- what is damaged is gone back on --------------------------------------------------------------------------------

MOMENTS = {
    "momentum": ("momentum_buffer",),
    "Adam": ("exp_avg", "exp_avg_sq"),
    "AdamW": ("exp_avg", "exp_avg_sq"),
    "Adagrad": ("sum",),
    "RMSprop": ("square_avg", "momentum_buffer"),
    "NAdam": ("exp_avg", "exp_avg_sq"),
}


@pytest.mark.parametrize("optimizer", MOMENTS)
def test_no_weight_breaks_whatever_gets_into_the_moments(tmp_path, optimizer):
    """The state that it got into is gone back on before a weight has moved; bad batches in between are left out."""
    forms = [form for form in FORMS if form != "fused" or optimizer not in WITHOUT_FUSED]
    program = Program(optimizer, forms[len(optimizer) % len(forms)])
    kinds = [(name, value) for name in MOMENTS[optimizer] for value in VALUES]
    at = {RANGED + 25 * index: kind for index, kind in enumerate(kinds)}
    guard = replace(SKIP, rewind=True, rewinds=len(kinds))
    with watched(program.model, program.optimizer, out=tmp_path, guard=guard) as run:
        for step in range(RANGED + 25 * len(kinds)):
            if step in at:
                name, value = at[step]
                program.optimizer.state[program.parameters[step % 4]][name].view(-1)[0] = value
            program.step(step % STEPS, Fault("loss", math.nan) if step % 40 == 7 else None)
            assert is_finite(program.parameters), (step, at.get(step))
        told = events(run, *ACTIONS)
    rewound = [event.step for event in told if event.kind == "rewound"]
    assert {step for step, (_, value) in at.items() if not math.isfinite(value)} <= set(rewound)
    assert {event.kind for event in told} == {"bad-step-skipped", "rewound"}


@pytest.mark.parametrize("rewinds", [1, 0])
def test_damage_that_no_reading_shows_is_found_by_the_next_snapshot(tmp_path, capsys, rewinds):
    """An infinite second moment among many entries: its weight never moves again, and nothing else happens."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(40, 50), nn.Tanh(), nn.Linear(50, 1))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    data = torch.randn(64, 40)
    guard = replace(SKIP, rewind=True, rewinds=rewinds)
    with isograd.watch(model, optimizer, out=tmp_path, guard=guard) as run:
        # Snapshots are as far apart as their share of the time wants it; another comes in any case.
        for step in range(4000):
            if step == 60:
                moment = optimizer.state[model[0].weight]["exp_avg_sq"]
                moment.view(-1)[1] = math.inf  # of 2000 entries every seventh is looked at
            loss = model(data).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if step % 200 == 0 and events(run, *ACTIONS):
                break
        told = events(run, *ACTIONS)
    if rewinds:
        assert [event.kind for event in told] == ["rewound"]
        assert told[0].data["reasons"][0]["channel"] == "state"
        assert moment.isfinite().all()
    else:
        assert [event.kind for event in told] == ["guard-gave-up"]
        lines = [line for line in capsys.readouterr().err.splitlines() if "guard" in line]
        assert len(lines) == 1 and "optimizer state are not finite, also after 0 rewinds" in lines[0]


@pytest.mark.parametrize(
    "optimizer, form, precision",
    [("momentum", "foreach", "bf16"), ("AdamW", "fused", "fp32"), ("RMSprop", "plain", "scaler")],
)
@pytest.mark.parametrize("bad", [70, 0])
def test_going_back_leaves_out_what_lies_between(tmp_path, optimizer, form, precision, bad):
    """Trouble that lasts is ended by an earlier state: all is as if the batches since had not existed."""
    lasting = range(bad, bad + 11)  # one more than the patience
    program = Program(optimizer, form, precision, grows=999)
    with isograd.watch(program.model, program.optimizer, out=tmp_path, guard=replace(SKIP, rewind=True)) as run:
        for step in range(bad + 30):
            program.step(step, Fault("input", math.inf) if step in lasting else None)
        (rewound,) = events(run, "rewound")
    assert rewound.step == lasting[-1]
    back = rewound.step - rewound.data["steps"]
    assert back <= max(0, bad - 10) and (back == 0) == (bad == 0)

    expected = Program(optimizer, form, precision, grows=999)
    for step in [*range(back), *range(lasting[-1] + 1, bad + 30)]:
        expected.step(step)
    # How long a scale has been good is counted anew from the snapshot, which is of before the count.
    differences = differing(bits(program.state()), bits(expected.state()))
    assert set(differences) <= {"/scaler/_growth_tracker"}


def test_the_oldest_state_there_is_serves_where_none_is_older(tmp_path):
    """With room for one snapshot, trouble right after it goes back there, again and again."""
    memory = None
    for expected in (None, [16, 16]):
        program = Program("Adam")
        gc.collect()  # averages of programs like this one that have ended are told from its own by nothing
        guard = replace(SKIP, rewind=True, memory=memory)
        with isograd.watch(program.model, program.optimizer, out=tmp_path, guard=guard) as run:
            for step in range(24):
                if step in (19, 22):
                    program.optimizer.state[program.parameters[0]]["exp_avg"][0, 0] = math.nan
                program.step(step)
            back = [event.step - event.data["steps"] for event in events(run, "rewound")]
            memory = int(1.5 * events(run, "snapshots")[0].data["bytes"])
        assert expected in (None, back)
        assert is_finite(program.state()["model"])


def test_what_cannot_be_held_in_memory_is_said_before_it_is_needed(tmp_path, capsys):
    """One sentence with the sizes; skipping goes on, and the run is that of a guard that only skips."""
    ends = []
    for guard in (replace(SKIP, rewind=True, memory=64), SKIP):
        program = Program("Adam")
        with isograd.watch(program.model, program.optimizer, out=tmp_path, guard=guard) as run:
            for step in range(20):
                program.step(step, Fault("loss", math.nan) if step == 10 else None)
            told = [(event.kind, event.step) for event in events(run, *ACTIONS)]
        ends.append(bits(program.state()))
        assert told[-1] == ("bad-step-skipped", 10)
        assert [kind for kind, _ in told[:-1]] == ["guard-refused"] * (guard.memory is not None)
    assert differing(*ends) == []
    lines = [line for line in capsys.readouterr().err.splitlines() if "guard" in line]
    assert len(lines) == 1 and "the guard cannot rewind: A snapshot takes" in lines[0] and "64 bytes" in lines[0]


def test_without_going_back_a_broken_moment_is_said_to_be_beyond_skipping(tmp_path, capsys):
    """No batch that is left out brings it back: said once, and the training goes on as without a guard."""
    ends = []
    for guard in (SKIP, None):
        program = Program("Adam")
        with watched(program.model, program.optimizer, out=tmp_path, guard=guard) as run:
            for step in range(40):
                if step == 20:
                    program.optimizer.state[program.parameters[1]]["exp_avg"][0] = math.nan
                program.step(step)
            told = events(run, *ACTIONS)
        ends.append(bits(program.state()))
        if guard is not None:
            assert [(event.kind, event.step) for event in told] == [("guard-gave-up", 20)]
            assert told[0].data["why"] == "the update norm is not finite"
    assert differing(*ends) == []
    lines = [line for line in capsys.readouterr().err.splitlines() if "guard" in line]
    assert len(lines) == 1 and "rewinding does" in lines[0]


# ---- what follows the steps -----------------------------------------------------------------------------------------

S = schedulers
PER_STEP = {
    "step": lambda o: S.StepLR(o, 3, 0.5),
    "multi-step": lambda o: S.MultiStepLR(o, [2, 5, 11], 0.5),
    "exponential": lambda o: S.ExponentialLR(o, 0.9),
    "cosine": lambda o: S.CosineAnnealingLR(o, 20),
    "warm restarts": lambda o: S.CosineAnnealingWarmRestarts(o, 4, 2),
    "one cycle": lambda o: S.OneCycleLR(o, 0.02, total_steps=60),
    "cyclic": lambda o: S.CyclicLR(o, 0.001, 0.02, step_size_up=3),
    "sequential": lambda o: S.SequentialLR(o, [S.LinearLR(o, 0.1, 1.0, 5), S.CosineAnnealingLR(o, 20)], [5]),
    "chained": lambda o: S.ChainedScheduler([S.LinearLR(o, 0.1, 1.0, 5), S.ExponentialLR(o, 0.9)]),
    "lambda": lambda o: S.LambdaLR(o, lambda n: 1 / (1 + n)),
    "averaging": lambda o: SWALR(o, 0.001, anneal_epochs=7),
}
PER_EPOCH = {
    **{name: PER_STEP[name] for name in ("step", "cosine", "sequential", "chained", "lambda")},
    "plateau": lambda o: S.ReduceLROnPlateau(o, factor=0.5, patience=1),
}
LENGTH = 5
"""Batches of an epoch."""

# The first steps, in the middle, at the end of an epoch, the whole third epoch, two in a row.
BAD = (0, 1, 7, 9, 10, 11, 12, 13, 14, 21, 22)


def scheduled(make, *, every, first=0, bad=(), leave_out=(), guard=None, out=None):
    """(state after each epoch, events) of a training whose scheduler steps with every step or every epoch."""
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    average, ends, scheduler = AveragedModel(model), [], None
    with watched(model, optimizer, out=out, guard=guard) as run:
        for epoch in range(6):
            if epoch == first:
                scheduler = make(optimizer)
            for step in range(LENGTH * epoch, LENGTH * (epoch + 1)):
                if step in leave_out:
                    continue
                loss = F.mse_loss(model(X[step, 0]), Y[step, 0]) * (math.nan if step in bad else 1)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                if every == "step":
                    _ = None if scheduler is None else scheduler.step()
                    average.update_parameters(model)
            if every == "epoch":
                metrics = (max(1.0, 3.0 - epoch),) if isinstance(scheduler, S.ReduceLROnPlateau) else ()
                scheduler.step(*metrics)
                average.update_parameters(model)
            state = [
                model.state_dict(),
                optimizer.state_dict(),
                average.state_dict(),
                plain(scheduler.state_dict()) if scheduler else None,
            ]
            ends.append(bits(state))
        return ends, events(run, *ACTIONS)


def plain(state):
    """Without functions, whose addresses are no state."""
    if isinstance(state, dict):
        return {key: plain(value) for key, value in state.items() if not callable(value)}
    return [plain(value) for value in state if not callable(value)] if isinstance(state, list) else state


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")  # torch's: the reference has no step before
@pytest.mark.parametrize("every, name", [("step", n) for n in PER_STEP] + [("epoch", n) for n in PER_EPOCH])
def test_a_scheduler_never_saw_a_batch_that_was_left_out(tmp_path, every, name):
    """One that follows the steps is held back with them, one that follows the epochs never is; averages likewise."""
    make, first = (PER_STEP if every == "step" else PER_EPOCH)[name], 2 * (name == "averaging")
    ends, told = scheduled(make, every=every, first=first, bad=BAD, guard=SKIP, out=tmp_path)
    assert [event.step for event in told] == list(BAD)
    expected, _ = scheduled(make, every=every, first=first, leave_out=BAD, out=tmp_path)
    for epoch, (found, wanted) in enumerate(zip(ends, expected, strict=True)):
        assert found == wanted, (epoch, differing(found, wanted))


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@pytest.mark.parametrize("form", ["plain", "fused"])
def test_a_scale_is_lowered_by_an_overflow_and_by_no_bad_loss(tmp_path, form):
    """A scale that is too large is the scaler's to find, at the same steps as without a guard."""
    scales = {}
    for guard in (SKIP, None):
        program = Program("Adam", form, "scaler", grows=4)
        program.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**30, growth_interval=4)
        with watched(program.model, program.optimizer, out=tmp_path, guard=guard) as run:
            scales[guard] = []
            for step in range(40):
                program.step(step)
                scales[guard].append(program.scaler.get_scale())
            assert not events(run, *ACTIONS)
    assert scales[SKIP] == scales[None] and scales[None][0] == 2.0**29

    program = Program("Adam", form, "scaler", grows=3)
    with isograd.watch(program.model, program.optimizer, out=tmp_path, guard=SKIP):
        for step in range(2):
            program.step(step)
        before = program.scaler.state_dict()
        for fault in (Fault("loss", math.nan), Fault("input", math.inf), Fault("loss", -math.inf)):
            program.step(2, fault)
            assert program.scaler.state_dict() == before
        program.step(3)
        assert program.scaler.get_scale() == 2 * before["scale"]


# ---- clip, stop, lower ----------------------------------------------------------------------------------------------


def upper_end(norms):
    """Of the logarithms of a window that ended eight steps before its last renewal, and is renewed every eight."""
    logs = np.log(np.array(norms)[: (len(norms) // 8) * 8 - 8])
    middle = np.median(logs)
    return math.exp(max(middle + 6 * 1.482602218505602 * np.median(abs(logs - middle)), logs.max()))


@pytest.mark.parametrize("fault", [Fault("loss", 1e4), Fault("gradient", 1e6, 2), Fault("loss", 1e30)])
def test_a_spike_is_clipped_to_the_upper_end_of_its_range(tmp_path, fault):
    """The direction is kept, and neither all gradients together nor one alone stand above what the run has had."""
    program = Program("SGD")
    norms, gradients = [], []

    def note(*_):
        gradients[:] = [parameter.grad.double() for parameter in program.parameters]
        norms.append([float(gradient.norm()) for gradient in gradients])

    program.optimizer.register_step_pre_hook(note)
    with isograd.watch(program.model, program.optimizer, out=tmp_path, guard=Guard(clip=True, capsules=0)) as run:
        for step in range(60):
            program.step(step)
        before = [parameter.detach().double() for parameter in program.parameters]
        rate = program.optimizer.param_groups[0]["lr"]
        program.step(60, fault)
        (told,) = events(run, *ACTIONS)
    assert (told.kind, told.step) == ("bad-step-clipped", 60)

    moved = torch.cat([(b - p.detach()).flatten() for b, p in zip(before, program.parameters, strict=True)]) / rate
    true = torch.cat([gradient.flatten() for gradient in gradients])
    assert float(moved @ (true / true.norm()) / moved.norm()) == pytest.approx(1, abs=1e-6)
    good, bad = np.array(norms[:60]), np.array(norms[60])
    ends = [upper_end(np.linalg.norm(good, axis=1)), *map(upper_end, good.T)]
    shares = np.array(ends) / [np.linalg.norm(bad), *bad]
    assert float(moved.norm()) == pytest.approx(float(true.norm()) * shares.min(), rel=1e-3)


@pytest.mark.parametrize("precision", ["fp32", "scaler"])
@pytest.mark.parametrize("fault", [Fault("input", math.nan), Fault("loss", 1e6)])
def test_stop_raises_before_anything_has_moved(tmp_path, fault, precision):
    """`BadStep` says where and why; weights, optimizer state and buffers are as before the batch."""
    program = Program("AdamW", "fused", precision)
    with isograd.watch(program.model, program.optimizer, out=tmp_path, guard=Guard(stop=True, capsules=0)) as run:
        for step in range(60):
            program.step(step)
        before = bits([program.model.state_dict(), program.optimizer.state_dict()])
        with pytest.raises(isograd.BadStep, match=r"stopped the run before step 60 was taken: the .*\.") as raised:
            program.step(60, fault)
    assert bits([program.model.state_dict(), program.optimizer.state_dict()]) == before
    assert "\n" not in str(raised.value)
    assert [(event.kind, event.step) for event in events(run, *ACTIONS)] == [("bad-step-stopped", 60)]


def test_a_rate_is_lowered_where_trouble_lasts(tmp_path):
    """For the rest of the run, and visibly; the program's own rate and schedule stay what they are."""
    program = Program("SGD")
    guard = replace(SKIP, lower_learning_rate=0.25)
    with watched(program.model, program.optimizer, out=tmp_path, guard=guard) as run:
        for step in range(30):
            program.step(step, Fault("input", math.nan) if 10 <= step < 20 else None)
        assert not events(run, "treatment-applied")
        before = [parameter.detach().clone() for parameter in program.parameters]
        for step in range(30, 41):
            program.step(step, Fault("loss", math.nan))
            if step < 40:
                assert bits(program.parameters) == bits(before)
        # The eleventh is let pass: what is bad so often is not the batch. Put the weights back as a user would.
        with torch.no_grad():
            for parameter, value in zip(program.parameters, before, strict=True):
                parameter.copy_(value)
        rate = program.optimizer.param_groups[0]["lr"]
        program.step(41)
        moved = [b - p.detach() for b, p in zip(before, program.parameters, strict=True)]
        (gave_up,), (applied,) = events(run, "guard-gave-up"), events(run, "treatment-applied")
    assert gave_up.step == 40 and applied.step in (40, 41)
    assert "lr" in str(applied.data)
    assert rate == pytest.approx(0.01 * 0.999 ** (program.scheduler.last_epoch - 1))
    for change, parameter in zip(moved, program.parameters, strict=True):
        assert torch.allclose(change, 0.25 * rate * parameter.grad, rtol=1e-3, atol=1e-7)


# ---- what is told ---------------------------------------------------------------------------------------------------


def test_every_reason_names_its_channel_and_place(tmp_path):
    """Events carry the readings and the limits that they left; a sentence says the same."""
    program = Program("SGD")
    faults = {
        60: (Fault("loss", math.nan), ("loss", None), r"the loss is not finite"),
        62: (Fault("gradient", math.inf, 1), ("grad_norm", "first.bias"), r"gradient norm of first.bias is not finite"),
        64: (Fault("gradient", 1e30, 2), ("grad_norm", "second.weight"), r"gradient norm is 1e\+30, above [0-9.e-]+, "),
        66: (Fault("loss", 1e4), ("loss", None), r"the loss is [0-9.e+]+, above [0-9.e-]+, "),
    }
    with isograd.watch(program.model, program.optimizer, out=tmp_path, guard=SKIP) as run:
        for step in range(70):
            program.step(step, faults[step][0] if step in faults else None)
        told = events(run, *ACTIONS)
    assert [event.step for event in told] == list(faults)
    for event, (_, place, why) in zip(told, faults.values(), strict=True):
        assert place in [(reason["channel"], reason["layer"]) for reason in event.data["reasons"]]
        assert all(not reason["observed"] <= reason["limit"] for reason in event.data["reasons"])
        assert event.data["optimizer"] == "SGD"
        assert re.search(why, event.data["why"])


def test_what_is_bad_for_good_is_learned_anew(tmp_path, capsys):
    """A loss that stays a thousand times as large is how the run is now: after the patience, its range is learned."""
    program = Program("AdamW")
    with isograd.watch(program.model, program.optimizer, out=tmp_path, guard=SKIP) as run:
        for step in range(100):
            program.step(step, Fault("loss", 1e3) if step >= 60 else None)
        told = [(event.kind, event.step) for event in events(run, *ACTIONS)]
    assert told == [*(("bad-step-skipped", step) for step in range(60, 70)), ("guard-relearned", 70)]


def test_a_guard_that_may_do_nothing_only_tells(tmp_path):
    """`Guard()` is observation: the same bits as without one, also at bad steps."""
    ends = []
    for guard in (Guard(capsules=0), None):
        program = Program("AdamW")
        with watched(program.model, program.optimizer, out=tmp_path, guard=guard) as run:
            for step in range(64):
                program.step(step, Fault("loss", 1e4) if step == 62 else None)
            told = [(event.kind, event.step) for event in events(run, *ACTIONS)]
        ends.append(bits(program.state()))
        assert told == ([] if guard is None else [("bad-step", 62)])
    assert differing(*ends) == []


# ---- what is left alone ---------------------------------------------------------------------------------------------


def lbfgs(model):
    optimizer = torch.optim.LBFGS(model.parameters(), lr=0.1, max_iter=4)

    def step(index, factor):
        def closure():
            optimizer.zero_grad()
            loss = F.mse_loss(model(X[index, 0]), Y[index, 0]) * factor
            loss.backward()
            return loss

        optimizer.step(closure)

    return step, [optimizer]


def inside_backward(model):
    optimizers = {parameter: torch.optim.Adam([parameter], lr=1e-3) for parameter in model.parameters()}

    def finish(parameter):
        optimizers[parameter].step()
        optimizers[parameter].zero_grad()

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(finish)

    def step(index, factor):
        (F.mse_loss(model(X[index, 0]), Y[index, 0]) * factor).backward()

    return step, list(optimizers.values())


@pytest.mark.parametrize(
    "make, why",
    [(lbfgs, "the guard leaves LBFGS alone: it "), (inside_backward, "alone: it steps inside the backward pass")],
)
def test_what_cannot_be_left_out_is_refused_and_trained_as_ever(tmp_path, capsys, make, why):
    """One sentence and one event; the run is that without a guard, bad steps included."""
    ends = []
    for guard in (Guard(skip=True, clip=True, rewind=True, capsules=0), None):
        torch.manual_seed(0)
        model = Net()
        step, optimizers = make(model)
        with watched(model, *optimizers, out=tmp_path, guard=guard) as run:
            for index in range(60):
                step(index, 1e5 if index == 55 else 1)
            told = events(run, *ACTIONS)
        ends.append(bits([model.state_dict(), *(optimizer.state_dict() for optimizer in optimizers)]))
        if guard is not None:
            assert {event.kind for event in told} == {"guard-refused"}
            assert len({event.data["why"] for event in told}) == 1
    assert differing(*ends) == []
    lines = [line for line in capsys.readouterr().err.splitlines() if "guard" in line]
    assert len(lines) == 1 and why in lines[0]


class Stubborn(torch.optim.SGD):
    """A program's own optimizer, whose step fails where it is told to."""

    fails = False

    def step(self, closure=None):
        if self.fails:
            raise RuntimeError("no step today")
        return super().step(closure)


def test_a_step_that_raises_leaves_nothing_hidden(tmp_path):
    """The program goes on after an error of its own inside a step that was to be left out, as if it had not been."""
    ends = []
    for faulty in (True, False):
        torch.manual_seed(0)
        model = Net()
        optimizer = Stubborn(model.parameters(), lr=0.01, momentum=0.9)
        with isograd.watch(model, optimizer, out=tmp_path, guard=SKIP) as run:
            for step in range(20):
                bad = step in (0, 7, 13)
                if bad and not faulty:
                    continue
                optimizer.zero_grad()
                (F.mse_loss(model(X[step, 0]), Y[step, 0]) * (math.nan if bad else 1)).backward()
                optimizer.fails = bad
                if not bad:
                    optimizer.step()
                    continue
                with pytest.raises(RuntimeError, match="no step today"):
                    optimizer.step()
                if step == 7:  # a second attempt, without a backward pass before
                    optimizer.fails = False
                    optimizer.step()
                    assert all(not is_finite(parameter.grad) for parameter in model.parameters())
            ends.append(bits([model.state_dict(), optimizer.state_dict()]))
            # Of the four attempts, three are at steps of their own.
            assert [e.kind for e in events(run, *ACTIONS)] == ["bad-step-skipped"] * (4 * faulty)
            if faulty:  # the last one, before the end of the run
                optimizer.zero_grad()
                (F.mse_loss(model(X[0, 0]), Y[0, 0]) * math.nan).backward()
                optimizer.fails = True
                with pytest.raises(RuntimeError, match="no step today"):
                    optimizer.step()
        if faulty:
            assert all(not is_finite(parameter.grad) for parameter in model.parameters())
    assert differing(*ends) == []


class Brittle(torch.Tensor):
    """A tensor that cannot be written to any more once it is `broken`, but by what shifts it a little."""

    broken = False

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if cls.broken and function is torch.Tensor.copy_:
            raise RuntimeError("this tensor is brittle")
        return super().__torch_function__(function, types, args, kwargs or {})


def test_an_error_of_its_own_ends_the_guard_and_nothing_else(tmp_path, capsys):
    """In the middle of leaving a step out: the gradients are given back, and the step is made as without a guard."""
    ends = []
    for guard in (SKIP, None):
        torch.manual_seed(0)
        model = Net()
        model.mean = model.mean.as_subclass(Brittle)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        with watched(model, optimizer, out=tmp_path, guard=guard) as run:
            for step in range(70):
                if guard is None and step == 60:
                    continue
                Brittle.broken = step == 62
                optimizer.zero_grad()
                loss = F.mse_loss(model(X[step, 0]), Y[step, 0]) * (1e4 if step in (60, 62, 65) else 1)
                loss.backward()
                optimizer.step()
            told = [(event.kind, event.step) for event in events(run, *ACTIONS)]
        ends.append(bits([model.state_dict(), optimizer.state_dict()]))
        if guard is not None:
            assert [kind for kind, _ in told] == ["bad-step-skipped", "bad-step-skipped", "guard-detached"]
    assert differing(*ends) == []
    lines = [line for line in capsys.readouterr().err.splitlines() if "guard" in line]
    assert len(lines) == 1
    assert "stopped guarding at step 62 because of an error of its own, training goes on: RuntimeError" in lines[0]


# ---- several optimizers ---------------------------------------------------------------------------------------------


class Adversaries:
    """A generator and a discriminator, each with an optimizer and a schedule of its own."""

    def __init__(self):
        torch.manual_seed(0)
        self.generator = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3))
        self.discriminator = nn.Sequential(nn.Linear(3, 8), nn.LeakyReLU(0.2), nn.Linear(8, 1))
        self.g = torch.optim.Adam(self.generator.parameters(), lr=1e-3, betas=(0.5, 0.999))
        self.d = torch.optim.Adam(self.discriminator.parameters(), lr=1e-3, betas=(0.5, 0.999), fused=True)
        self.rates = S.ExponentialLR(self.g, 0.99), S.ExponentialLR(self.d, 0.99)

    def step(self, index, *, d=1.0, g=1.0):
        """`d`, `g`: what the losses are multiplied with; None leaves the step of one out."""
        seen = copy.deepcopy(self.generator[1].state_dict())
        fake = self.generator(X[index, 0])
        if d is not None:
            logits = torch.cat([self.discriminator(Y[index, 0]), self.discriminator(fake.detach())])
            truth = (torch.arange(16) < 8).float()[:, None]
            self.d.zero_grad()
            (F.binary_cross_entropy_with_logits(logits, truth) * d).backward()
            self.d.step()
            self.rates[1].step()
        if g is not None:
            self.g.zero_grad()
            (F.softplus(-self.discriminator(fake)).mean() * g).backward()
            self.g.step()
            self.rates[0].step()
        else:
            self.generator[1].load_state_dict(seen)

    def state(self):
        things = (self.generator, self.discriminator, self.g, self.d, *self.rates)
        return bits([thing.state_dict() for thing in things])


def test_each_of_two_optimizers_is_judged_by_itself(tmp_path):
    """A bad loss of one leaves out its step alone: its weights, state and schedule stay, the other's go on."""
    faults = {0: {"d": math.nan}, 20: {"d": math.inf}, 60: {"d": 1e4}, 64: {"g": 1e6}}
    program, expected = Adversaries(), Adversaries()
    with isograd.watch(program.generator, program.discriminator, program.g, program.d, out=tmp_path, guard=SKIP) as run:
        for step in range(80):
            program.step(step, **faults.get(step, {}))
        told = sorted((event.step, event.data["optimizer"]) for event in events(run, *ACTIONS))
        subjects = {
            history.subject: [event.step for event in history.events if event.kind in ACTIONS]
            for history in run.histories()
        }
    for step in range(80):
        expected.step(step, **dict.fromkeys(faults.get(step, {})))
    assert differing(program.state(), expected.state()) == []
    assert [step for step, _ in told] == list(faults)
    assert sorted(subjects.values()) == [[0, 20, 60], [64]]


# ---- between runs ---------------------------------------------------------------------------------------------------


def test_a_restart_is_protected_at_once(tmp_path):
    """What a guard has learned travels in a checkpoint, which any version of torch reads without running code."""
    program = Program("AdamW")
    with isograd.watch(program.model, program.optimizer, out=tmp_path, guard=SKIP) as run:
        for step in range(60):
            program.step(step)
        torch.save({"watch": run.state_dict(), "model": program.model.state_dict()}, tmp_path / "checkpoint.pt")
    checkpoint = torch.load(tmp_path / "checkpoint.pt", weights_only=True)

    told = []
    for resumed in (True, False):
        again = copy.deepcopy(program.model)
        again.load_state_dict(checkpoint["model"])
        optimizer = torch.optim.AdamW(again.parameters(), lr=1e-3)
        optimizer.load_state_dict(program.optimizer.state_dict())
        with isograd.watch(again, optimizer, out=tmp_path, guard=SKIP) as run:
            if resumed:
                run.load_state_dict(checkpoint["watch"])
            for step in range(60, 64):
                optimizer.zero_grad()
                (F.mse_loss(again(X[step, 0]), Y[step, 0]) * (1e4 if step == 60 else 1)).backward()
                optimizer.step()
            told.append([event.kind for event in events(run, *ACTIONS)])
    assert told == [["bad-step-skipped"], []]


def test_a_state_that_was_taken_up_is_the_state(tmp_path):
    """Saving, loading and saving gives the same; what is no state of a watch is refused with a sentence."""
    states = []
    for load in (False, True):
        program = Program("Adam")
        with isograd.watch(program.model, program.optimizer, out=tmp_path, guard=SKIP) as run:
            if load:
                run.load_state_dict(states[0])
            else:
                for step in range(45):
                    program.step(step, Fault("loss", math.nan) if step in (3, 44) else None)
            states.append(run.state_dict())
            with pytest.raises(ValueError, match="not the state_dict of a watch"):
                run.load_state_dict({"model": 1})
    assert set(states[0]) == set(states[1])


# ---- a healthy run --------------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Convolution, in-place activation, batch normalization, dropout, recurrence, a tied and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.act = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.rnn = nn.GRU(6, 12, batch_first=True)
        self.tied, self.frozen = nn.Linear(12, 12), nn.Linear(12, 12).requires_grad_(False)
        self.drop, self.out = nn.Dropout(0.2), nn.Linear(12, 3)

    def forward(self, x):
        h = self.act(self.norm(self.conv(x[:, None].expand(-1, 6, -1)[:, None]))).mean(1)
        h = self.rnn(h)[0]
        h = checkpoint(lambda h: torch.tanh(self.tied(F.gelu(self.tied(h)))), h, use_reentrant=False)
        return self.out(self.drop(h + self.frozen(h))[:, -1])


class Words(nn.Module):
    """Sparse gradients."""

    def __init__(self):
        super().__init__()
        self.table, self.out = nn.Embedding(20, 8, sparse=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.table((x.abs() * 9).long().clamp(max=19)).mean(1))


HEALTHY = {
    "mixed": (Mixed, lambda p: torch.optim.AdamW(p, lr=1e-2)),
    "fused": (Mixed, lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9, nesterov=True, fused=True)),
    "sparse": (Words, lambda p: torch.optim.SGD(p, lr=1e-2)),
    "signs": (Mixed, lambda p: torch.optim.Rprop(p, lr=1e-3)),
    "centered": (Net, lambda p: torch.optim.RMSprop(p, lr=1e-3, centered=True, weight_decay=0.1)),
    "own": (Net, lambda p: Stubborn(p, lr=1e-2, momentum=0.9)),
    "lbfgs": (Net, lambda p: torch.optim.LBFGS(p, lr=0.1, max_iter=3)),
    "compiled": (lambda: torch.compile(Net(), backend="aot_eager"), lambda p: torch.optim.NAdam(p, lr=1e-3)),
    "scaled": (Net, lambda p: torch.optim.Adam(p, lr=1e-3, fused=True)),
}


def healthy(name, out, guard):
    """The end of a training, its random numbers included."""
    make, optimize = HEALTHY[name]
    torch.manual_seed(0)
    model = make()
    optimizer = optimize(model.parameters())
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=7, enabled=name == "scaled")
    rate, average = S.CosineAnnealingLR(optimizer, 200), AveragedModel(model)

    def backward(step):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16, enabled=name == "scaled"):
            predicted = model(X[step, 0] + 0.1 * torch.randn(8, 6))
        loss = F.mse_loss(predicted.float(), Y[step, 0])
        scaler.scale(loss).backward()
        return loss

    with watched(model, optimizer, out=out, guard=guard) as run:
        for step in range(70):
            if name == "lbfgs":
                optimizer.step(partial(backward, step))
            else:
                backward(step)
                scaler.unscale_(optimizer)
                if name != "sparse":
                    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                scaler.step(optimizer)
                scaler.update()
            rate.step()
            average.update_parameters(model)
        assert {event.kind for event in events(run, *ACTIONS)} <= ({"guard-refused"} if name == "lbfgs" else set())
    return bits([*(thing.state_dict() for thing in (model, optimizer, rate, average, scaler)), torch.get_rng_state()])


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler")
@pytest.mark.parametrize("name", HEALTHY)
def test_a_healthy_run_is_the_same_in_every_bit(tmp_path, name):
    """With everything that a guard may do: weights, buffers, optimizer, schedule, averages, scale, random numbers."""
    everything = Guard(skip=True, clip=True, rewind=True, stop=True, lower_learning_rate=True)
    found, expected = (healthy(name, tmp_path, guard) for guard in (everything, None))
    assert differing(found, expected) == []
