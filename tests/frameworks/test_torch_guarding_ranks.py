"""All ranks decide alike: what one of them finds bad is bad for all, and all end in the same bits.

Each test starts ranks of its own, forked from a process that has imported PyTorch already.
"""

from __future__ import annotations

import contextlib
import gc
import io
import math
import multiprocessing
import os
import time

import pytest
import torch
import torch.distributed as dist
from torch import multiprocessing as processes
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import isograd

LEARNED = 40
"""Steps after which the guard knows the run's ranges."""


# ---- ranks ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def on_ranks(tmp_path, monkeypatch):
    """`on_ranks(world, function, *args)`: what `function(*args)` returned on each rank. Fails where a rank hangs."""
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    starting = multiprocessing.get_context("forkserver")
    starting.set_forkserver_preload(["torch._dynamo", "torch.distributed.fsdp", "isograd._watch", "pytest"])
    count = iter(range(100))

    def run(world, function, *args, seconds=60):
        folder = tmp_path / f"ranks-{next(count)}"
        folder.mkdir()
        ranks = processes.start_processes(
            _rank, (world, str(folder), function, args), nprocs=world, start_method="forkserver", join=False
        )
        end = time.monotonic() + seconds
        while not ranks.join(0.05):
            if time.monotonic() > end:
                for process in ranks.processes:
                    process.kill()
                pytest.fail(f"a rank hangs: {[path.name for path in folder.glob('end-*')]} have ended")
        return [torch.load(folder / f"end-{rank}", weights_only=False) for rank in range(world)]

    return run


def _rank(rank, world, folder, function, args):
    torch.set_num_threads(1)
    gc.freeze()  # what was imported needs not be looked through for models
    os.chdir(folder)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world)
    torch.save(function(*args), f"{folder}/end-{rank}")
    dist.barrier()  # a rank that leaves early takes the connections of the others with it
    dist.destroy_process_group()


# ---- the program ----------------------------------------------------------------------------------------------------


class Net(nn.Module):
    """A hidden layer, and a branch with running statistics beside it."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 2)
        self.side, self.norm = nn.Linear(6, 2), nn.BatchNorm1d(2)

    def forward(self, x):
        return self.second(torch.relu(self.first(x))) + self.norm(torch.tanh(self.side(x)))


def build(kind, rule="sgd", **how):
    """The network, the same on every rank, and its optimizer."""
    torch.manual_seed(0)
    model = Net()
    if kind == "ddp":
        model = DistributedDataParallel(model, **how)
    elif kind == "fsdp":
        for module in (model.first, model.second, model):
            fully_shard(module, **how)
    return model, RULES[rule](model.parameters())


RULES = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, foreach=False),
}


def batch(step):
    """This rank's batch of a step."""
    draw = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    x = torch.randn(8, 6, generator=draw)
    return x, torch.stack([x[:, 0] * x[:, 1], x[:, 2:].sum(1)], 1) + 0.1 * torch.randn(8, 2, generator=draw)


def local(tensor):
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor):
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def state_of(model, optimizer):
    """Everything that training changes, whole: (what all ranks have alike, this rank's own buffers)."""
    held = [value for state in optimizer.state.values() for value in state.values() if isinstance(value, torch.Tensor)]
    return [whole(t) for t in (*model.parameters(), *held)], [t.clone() for t in model.buffers()]


class Fault:
    """`value` in the input, the loss or a gradient of one rank. "overflow": a gradient that a loss scale makes
    infinite, of a loss like any other.
    """

    def __init__(self, where, value, rank):
        self.where, self.value, self.rank = where, value, rank

    def is_at(self, where):
        return self.where == where and dist.get_rank() == self.rank


NONE = Fault("", 0.0, -1)


def take_step(model, optimizer, step, fault=NONE, scaler=None):
    x, y = batch(step)
    if fault.is_at("input"):
        x[0, 0] = fault.value
    optimizer.zero_grad()
    out = model(x)
    loss = (out - y).square().mean()
    if fault.is_at("loss"):
        loss = loss * fault.value
    if fault.is_at("overflow"):
        loss = loss + ((out - out.detach()) * fault.value).sum()
    (loss if scaler is None else scaler.scale(loss)).backward()
    if fault.is_at("gradient"):
        gradient = next(local(p.grad) for p in model.parameters() if local(p.grad).numel())
        gradient.view(-1)[0] = fault.value
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def watched(model, optimizer, guard, **how):
    return isograd.watch(model, optimizer, out="runs", guard=guard, **how)


def told(watch):
    """What the guard did, as the run of this rank has it: (step, kind, what else is known)."""
    events = watch.histories()[0].events
    kinds = ("guard", "bad-step", "rewound")
    return [
        (e.step, e.kind, {k: v for k, v in e.data.items() if k != "capsule"})
        for e in events
        if e.kind.startswith(kinds)
    ]


def steps_of(events, kind="bad-step-skipped"):
    return [step for step, found, _ in events if found == kind]


def same(left, right):
    return len(left) == len(right) and all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def alike(ends, key):
    return all(repr(end[key]) == repr(ends[0][key]) for end in ends)  # a NaN is not equal to itself


# ---- faults on one rank ---------------------------------------------------------------------------------------------

FAULTS = {
    LEARNED + 2: Fault("input", math.nan, 0),
    LEARNED + 5: Fault("loss", math.nan, 1),
    LEARNED + 8: Fault("gradient", math.nan, 0),
    LEARNED + 11: Fault("input", 1e30, 1),
    LEARNED + 14: Fault("loss", 1e30, 0),
    LEARNED + 17: Fault("gradient", 1e30, 1),
    LEARNED + 20: Fault("gradient", -math.inf, 0),
    LEARNED + 23: Fault("loss", 1e4, 1),
}


def train(kind, rule, steps, faults=(), guard=None, scaler=None, damage=None, **how):
    """What a run comes to: `shared` by all ranks, this rank's `own` buffers, what the guard told."""
    model, optimizer = build(kind, rule)
    watch = watched(model, optimizer, guard, **how) if guard is not None else None
    for step in steps:
        take_step(model, optimizer, step, dict(faults).get(step, NONE), scaler)
        if damage is not None:
            damage(optimizer, step)
    shared, own = state_of(model, optimizer)
    end = {"shared": shared, "own": own, "scale": scaler and scaler.state_dict()}
    if watch is not None:
        watch.close()
        end |= {"events": told(watch), "path": watch.path, "in memory": watch.is_in_memory}
    return end


def with_and_without(kind, rule, faults):
    steps = range(LEARNED + 28)
    guarded = train(kind, rule, steps, faults, isograd.Guard(skip=True))
    return guarded, train(kind, rule, [step for step in steps if step not in faults])


@pytest.mark.parametrize("world, kind, rule", [
    (2, "ddp", "adamw"), (2, "fsdp", "rmsprop"), (4, "ddp", "sgd"), (4, "fsdp", "adamw"),
])  # fmt: skip
def test_a_fault_on_one_rank_is_left_out_on_all(on_ranks, world, kind, rule):
    """All ranks end in the bits of a run without those steps, and each has told the same."""
    ends = on_ranks(world, with_and_without, kind, rule, FAULTS)
    first = ends[0][0]
    assert steps_of(first["events"]) == list(FAULTS) and len(first["events"]) == len(FAULTS)
    for guarded, never in ends:
        assert repr(guarded["events"]) == repr(first["events"])  # a NaN is not equal to itself
        assert same(guarded["shared"], first["shared"])
        assert same(guarded["shared"], never["shared"]) and same(guarded["own"], never["own"])
        assert all(t.isfinite().all() for t in guarded["shared"])
    layers = {reason["layer"] for _, _, facts in first["events"] for reason in facts["reasons"]}
    assert layers <= {None, *(name for name, _ in Net().named_parameters())}  # without the wrapper's segment
    assert first["path"] is not None
    assert all(guarded["path"] is None and guarded["in memory"] for guarded, _ in ends[1:])


# ---- clipping -------------------------------------------------------------------------------------------------------


def clip(kind):
    """The whole gradients of the last step, whose loss is too large on some ranks, before and after the guard."""
    model, optimizer = build(kind)
    watch = watched(model, optimizer, isograd.Guard(clip=True))
    for step in range(LEARNED + 2):
        take_step(model, optimizer, step)
    optimizer.zero_grad()
    x, y = batch(step + 1)
    ((model(x) - y).square().mean() * (1e4 if dist.get_rank() else 1)).backward()
    before = [whole(p.grad).double() for p in model.parameters()]
    optimizer.step()
    after = [whole(p.grad).double() for p in model.parameters()]
    watch.close()
    return {"before": before, "after": after, "events": told(watch), "shared": state_of(model, optimizer)[0]}


@pytest.mark.parametrize("world, kind", [(2, "fsdp"), (2, "ddp")])
def test_clipping_goes_by_the_norm_of_the_whole_gradient(on_ranks, world, kind):
    """It is told and used as that of the gradient put together from its shards."""
    ends = on_ranks(world, clip, kind)
    ((_, action, facts),) = ends[0]["events"]
    (reason,) = [one for one in facts["reasons"] if one["channel"] == "global_grad_norm"]
    length = math.sqrt(sum(float(g.square().sum()) for g in ends[0]["before"]))
    shorter = math.sqrt(sum(float(g.square().sum()) for g in ends[0]["after"]))
    assert action == "bad-step-clipped"
    assert reason["observed"] == pytest.approx(length, rel=1e-6)
    assert shorter <= reason["limit"] / 10 * (1 + 1e-6) < length  # a limit is ten times the upper end of its range
    for end in ends:
        assert repr(end["events"]) == repr(ends[0]["events"])
        assert same(end["after"], ends[0]["after"]) and same(end["shared"], ends[0]["shared"])
        for before, after in zip(end["before"], end["after"], strict=True):
            assert torch.allclose(before * (shorter / length), after, rtol=1e-5, atol=0)


# ---- rewinding ------------------------------------------------------------------------------------------------------


def damaged(optimizer, step):
    """NaN in a piece of optimizer state of the last rank."""
    if step == LEARNED + 20 and dist.get_rank() == dist.get_world_size() - 1:
        held = [v for state in optimizer.state.values() for v in state.values() if local(v).dim() and local(v).numel()]
        local(held[0]).view(-1)[0] = math.nan


def rewind(kind, rule, memory):
    """A run that is damaged on one rank, and one without the steps that were gone back over."""
    limits = {dist.get_world_size() - 1: memory}
    guard = isograd.Guard(skip=True, rewind=True, memory=limits.get(dist.get_rank()))
    steps = range(LEARNED + 40)
    end = train(kind, rule, steps, guard=guard, damage=damaged)
    gone = [(step, facts["steps"]) for step, action, facts in end["events"] if action == "rewound"]
    left_out = {s for step, back in gone for s in range(step - back, step + 1)}
    return end | {"gone": gone}, train(kind, rule, [step for step in steps if step not in left_out])


@pytest.mark.parametrize("world, kind, rule, memory", [
    (2, "ddp", "adamw", None), (2, "ddp", "adamw", 4000), (2, "fsdp", "sgd", None),
])  # fmt: skip
def test_all_ranks_go_back_to_the_same_state(on_ranks, world, kind, rule, memory):
    """A damage on one rank; also where that one has memory for a single snapshot only. What follows is what would have
    followed that state.
    """
    ends = on_ranks(world, rewind, kind, rule, memory)
    assert len(ends[0][0]["gone"]) == 1 and ends[0][0]["gone"][0][0] >= LEARNED + 20
    for end, never in ends:
        assert repr(end["events"]) == repr(ends[0][0]["events"])
        assert same(end["shared"], ends[0][0]["shared"])
        assert same(end["shared"], never["shared"]) and same(end["own"], never["own"])
        assert all(t.isfinite().all() for t in end["shared"])


def test_where_one_rank_has_no_room_none_rewinds(on_ranks):
    """All say so, and go on skipping."""
    ends = on_ranks(2, no_room)
    for end in ends:
        kinds = [kind for _, kind, _ in end["events"]]
        assert kinds.count("guard-refused") == 1 and steps_of(end["events"]) == [45]
        assert end["said"].count("cannot rewind") == 1
    assert "another rank" in ends[0]["said"].lower() and "allow more" in ends[1]["said"]


def no_room():
    with contextlib.redirect_stderr(io.StringIO()) as said:
        guard = isograd.Guard(skip=True, rewind=True, memory=100 if dist.get_rank() else None)
        end = train("ddp", "adamw", range(50), {45: Fault("loss", math.nan, 0)}, guard)
    return end | {"said": said.getvalue()}


# ---- loss scaling ---------------------------------------------------------------------------------------------------


def scaled(kind, rule, faults, without):
    def scaler():
        return torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=10)

    steps = range(LEARNED + 20)
    guarded = train(kind, rule, steps, faults, isograd.Guard(skip=True), scaler=scaler())
    left = [step for step in steps if step not in without]
    return guarded, train(kind, rule, left, {s: f for s, f in faults.items() if s not in without}, scaler=scaler())


NAN, TOO_LARGE = Fault("loss", math.nan, 1), Fault("overflow", 1e34, 1)


@pytest.mark.parametrize("kind, rule, faults, left_out", [
    ("ddp", "adamw", {45: TOO_LARGE, 50: NAN}, [50]),
    ("fsdp", "sgd", {45: TOO_LARGE, 50: NAN}, [50]),
    ("ddp", "sgd", {45: Fault("gradient", math.inf, 1)}, [45]),
    ("ddp", "adamw", {45: Fault("gradient", math.inf, 1)}, [45]),
])  # fmt: skip
def test_loss_scaling_on_ranks(on_ranks, kind, rule, faults, left_out):
    """A batch that is left out leaves the scale as it was; where the scale was too large, it is lowered on all ranks.
    A gradient that is infinite on one rank only, which that one's scaler alone leaves out, is left out on all.
    """
    ends = on_ranks(2, scaled, kind, rule, faults, left_out)
    for guarded, never in ends:
        assert repr(guarded["events"]) == repr(ends[0][0]["events"])
        assert steps_of(guarded["events"]) == left_out
        assert same(guarded["shared"], ends[0][0]["shared"])
        assert same(guarded["shared"], never["shared"]) and same(guarded["own"], never["own"])
        assert guarded["scale"] == never["scale"] == ends[0][0]["scale"]


# ---- what is refused ------------------------------------------------------------------------------------------------


def two_dimensions():
    model = Net()
    fully_shard(model, mesh=init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard")))
    return model


def some_ranks(join):
    """Two halves of the ranks, each training a model of its own size."""
    halves = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    half = dist.get_rank() // 2
    return join(nn.Sequential(*(nn.Linear(6, 6) for _ in range(half)), nn.Linear(6, 2)), halves[half])


def sharded_over_some():
    return some_ranks(lambda model, group: fully_shard(model, mesh=DeviceMesh.from_group(group, "cpu")))


def wrapped_over_some():
    return some_ranks(lambda model, group: DistributedDataParallel(model, process_group=group))


def partly_sharded():
    model = Net()
    fully_shard(model.first)
    return model


def own_part(model):
    """Each rank steps its own part of the parameters, as optimizers do that are spread by hand."""
    return list(model.parameters())[: 1 + dist.get_rank()]


SETTINGS = {
    "two dimensions": (4, two_dimensions, nn.Module.parameters, "sharded over several dimensions"),
    "sharded over some": (4, sharded_over_some, nn.Module.parameters, "sharded over some of the ranks"),
    "wrapped over some": (4, wrapped_over_some, nn.Module.parameters, "joins some of the ranks only"),
    "alone": (2, Net, nn.Module.parameters, "none of DistributedDataParallel and fully_shard joins them"),
    "partly": (2, partly_sharded, nn.Module.parameters, "only some of the parameters are sharded"),
    "own part": (2, lambda: DistributedDataParallel(Net()), own_part, "do not hold equally many tensors"),
}


def unsupported(name, guard):
    _, make, chosen, _ = SETTINGS[name]
    torch.manual_seed(0)
    model = make()
    optimizer = torch.optim.SGD(chosen(model), lr=0.05, momentum=0.9)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        watch = watched(model, optimizer, guard) if guard is not None else contextlib.nullcontext()
        with watch:
            # Ranks that train alone need not take equally many steps.
            for step in range(12 + 5 * dist.get_rank() * (name == "alone")):
                take_step(model, optimizer, step)
    end = {"whole": [local(t).clone() for t in model.parameters()], "said": said.getvalue()}
    return end | ({"events": told(watch)} if guard is not None else {})


def both(name):
    return unsupported(name, isograd.Guard(skip=True, clip=True, rewind=True)), unsupported(name, None)


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_not_supported_is_refused_in_one_sentence(on_ranks, name):
    """On every rank, with the training as it is without a guard."""
    world, _, _, sentence = SETTINGS[name]
    for guarded, plain in on_ranks(world, both, name):
        assert [kind for _, kind, _ in guarded["events"]] == ["guard-refused"]
        assert sentence in guarded["events"][0][2]["why"]
        assert guarded["said"].count("isograd: ") == 1 and "the guard leaves SGD alone" in guarded["said"]
        assert same(guarded["whole"], plain["whole"])


# ---- nobody waits ---------------------------------------------------------------------------------------------------


def on_rank_0_only(kind):
    from isograd.frameworks.torch import _rank_group

    _rank_group.WAIT = 0.5
    model, optimizer = build(kind)
    guard = isograd.Guard(skip=True)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        watch = watched(model, optimizer, guard) if dist.get_rank() == 0 else None
        for step in range(12):
            take_step(model, optimizer, step)
        if watch is not None:
            watch.close()
    return said.getvalue()


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_watch_on_rank_0_alone_does_not_wait_for_the_others(on_ranks, kind):
    first, second = on_ranks(2, on_rank_0_only, kind)
    assert "not every rank guards" in first and not second


def closed_early(kind):
    model, optimizer = build(kind)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        watch = watched(model, optimizer, isograd.Guard(skip=True))
        for step in range(30):
            if step == 10 and dist.get_rank() == 1:
                watch.close()
            take_step(model, optimizer, step)
        watch.close()
    return said.getvalue(), state_of(model, optimizer)[0]


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_watch_that_ends_on_one_rank_ends_the_guard_of_the_others(on_ranks, kind):
    (first, left), (second, right) = on_ranks(2, closed_early, kind)
    assert "another rank has stopped" in first and not second
    assert same(left, right)


class Secret(float):
    """A number that only C++ can read."""

    def __float__(self):
        raise OSError("not to be read")


def failing_on_one_rank():
    model, optimizer = build("ddp")
    with contextlib.redirect_stderr(io.StringIO()) as said:
        watch = watched(model, optimizer, isograd.Guard(skip=True))
        for step in range(20):
            if step == 10 and dist.get_rank() == 1:
                optimizer.param_groups[0]["momentum"] = Secret(0.9)
            take_step(model, optimizer, step)
        watch.close()
    return said.getvalue(), [kind for _, kind, _ in told(watch)], state_of(model, optimizer)[0]


def test_an_error_of_one_rank_does_not_make_the_others_wait(on_ranks):
    """The guard is over on all of them."""
    (first, *told_first, left), (second, *told_second, right) = on_ranks(2, failing_on_one_rank)
    assert first.count("isograd: ") == 1 and "stopped guarding at step 10" in first
    assert second.count("isograd: ") == 1 and "stopped guarding at step 10" in second
    assert "another rank has stopped" in first and "not to be read" in second
    assert told_first == told_second == [["guard-detached"]]
    assert same(left, right)


def grown(everywhere):
    model, optimizer = build("ddp")
    later = [model.module.second.bias]
    held = [p for p in model.parameters() if p is not later[0]]
    optimizer = torch.optim.SGD(held, lr=0.05, momentum=0.9)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        watch = watched(model, optimizer, isograd.Guard(skip=True))
        for step in range(20):
            if step == 8 and (everywhere or dist.get_rank() == 1):
                optimizer.add_param_group({"params": later})
            take_step(model, optimizer, step, Fault("gradient", math.nan, 1) if step == 14 else NONE)
        watch.close()
    return said.getvalue(), steps_of(told(watch))


def test_parameters_that_come_later(on_ranks):
    """Messages of different lengths would end the program: what comes on all ranks is guarded, else none is."""
    for said, steps in on_ranks(2, grown, True):
        assert not said and steps == [14]
    for said, steps in on_ranks(2, grown, False):
        assert said.count("stopped guarding") == 1 and "equally many tensors" in said and steps == []


def uneven():
    model, optimizer = build("ddp")
    guard = isograd.Guard(skip=True)
    with contextlib.redirect_stderr(io.StringIO()) as said, watched(model, optimizer, guard), model.join():
        for step in range(10 + 5 * dist.get_rank()):
            take_step(model, optimizer, step)
    return said.getvalue()


def test_ranks_with_different_numbers_of_batches(on_ranks):
    """Within `join` of DistributedDataParallel: refused, and no rank waits for the step of one that has none left."""
    for said in on_ranks(2, uneven):
        assert said.count("isograd: ") == 1 and "within `join`" in said


# ---- what it costs --------------------------------------------------------------------------------------------------


def reductions(kind, guard):
    """The lengths of all reductions in a run of 34 healthy steps."""
    model, optimizer = build(kind)
    lengths, reduce = [], dist.all_reduce

    def noted(tensor, *args, **kwargs):
        lengths.append(tensor.numel())
        return reduce(tensor, *args, **kwargs)

    dist.all_reduce = noted
    with watched(model, optimizer, guard):
        for step in range(34):
            take_step(model, optimizer, step)
    dist.all_reduce = reduce
    return lengths


def all_reductions(kind, guards):
    return [reductions(kind, guard) for guard in guards]


def test_one_small_reduction_a_step(on_ranks):
    """Of four numbers a tensor and nine; one more when it begins, and two at each snapshot, one in 16 steps at most."""
    largest = 4 * len(list(Net().parameters())) + 9
    skipping, rewinding = isograd.Guard(skip=True, clip=True), isograd.Guard(skip=True, rewind=True)
    for (lengths,) in on_ranks(2, all_reductions, "ddp", [skipping]):  # among those of the watch
        assert lengths.count(largest) == 34
    for plain, skipped, rewound in on_ranks(2, all_reductions, "fsdp", [None, skipping, rewinding]):
        assert not plain and skipped == [2] + [largest] * 34
        assert rewound.count(largest) == 34 and 35 < len(rewound) <= 35 + 2 * (1 + 34 // 16)
