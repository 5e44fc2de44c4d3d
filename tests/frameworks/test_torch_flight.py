"""The flight recorder on real small trainings: what it notes, what a capsule holds, and that nobody notices it."""

import copy
import gc
import io
import json
import pickle
import random
import signal
import struct
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, dataloader

from isograd._capsule import list_capsules, open_capsule
from isograd._capsule_folder import Limits
from isograd._tree import TreeError
from isograd._watch import Shield
from isograd.frameworks.torch import _generators as generators
from isograd.frameworks.torch import _trees as trees
from isograd.frameworks.torch._fingerprint import fingerprint
from isograd.frameworks.torch._flight import FlightRecorder
from isograd.frameworks.torch._named_state import names_of
from isograd.frameworks.torch._notes import Notes, storable

WHY = [SimpleNamespace(channel="loss", layer=None, observed=float("nan"), limit=None)]
NEXT = dataloader._BaseDataLoaderIter.__next__


@pytest.fixture
def said():
    return []


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "runs" / "a-run"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def recorder(run, said):
    """Makes recorders of `run` that listen, and stops them; an error inside of the shield fails the test."""
    made = []

    def make(roots=(), folder=run, **options):
        shield = Shield(said.append)
        made.append(FlightRecorder(folder, on_warning=said.append, shield=shield, **options))
        made[-1].listen()
        made[-1].follow(dict(roots))
        return made[-1]

    yield make
    for each in made:
        each.close()
        assert not each._shield.is_down, said
    assert NEXT is dataloader._BaseDataLoaderIter.__next__


def captured(recorder, model, optimizer=None, step=0, **options):
    """The capsule of a step, once it is written."""
    roots = model if isinstance(model, dict) else {"model": model}
    arguments = {"subject": "model", "why": WHY, "action": "observed", **options}
    path = recorder.capture(step=step, roots=roots, optimizer=optimizer, **arguments)
    recorder.join()
    return open_capsule(path)


def data_of(capsule, what="batches"):
    tensors = trees.tensors_of(capsule, "batch")
    return [trees.decode(tree, tensors) for tree in capsule.facts[what]]


def arguments_of(capsule):
    tensors = trees.tensors_of(capsule, "batch")
    return [trees.decode(call["args"], tensors) for call in capsule.facts["calls"]]


def equal(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and bytes_of(one) == bytes_of(other)


def require_sentence(error):
    assert "\n" not in str(error)


def bytes_of(tensor):
    return storable(tensor).reshape(-1).view(torch.uint8).numpy().tobytes()


# ---- what data loaders yield ----------------------------------------------------------------------------------------


class Pair(NamedTuple):
    image: Tensor
    label: Tensor


@dataclass
class Example:
    image: Tensor
    label: Tensor


class Counted(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, index):
        return torch.full((3,), float(index)), index


class Stream(IterableDataset):
    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        start, step = (0, 1) if info is None else (info.id, info.num_workers)
        return iter([(torch.full((3,), float(i)), i) for i in range(start, 12, step)])


def as_dict(items):
    return {"image": torch.stack([x for x, _ in items]), "label": torch.tensor([y for _, y in items]), "n": len(items)}


def as_pair(items):
    return Pair(**{k: v for k, v in as_dict(items).items() if k != "n"})


def as_example(items):
    return Example(**{k: v for k, v in as_dict(items).items() if k != "n"})


def as_arrays(items):
    return np.stack([x.numpy() for x, _ in items]), [f"text {y}" for _, y in items]


LOADERS = {
    "plain": lambda: DataLoader(Counted(), batch_size=4),
    "workers": lambda: DataLoader(Counted(), batch_size=4, num_workers=2),
    "persistent": lambda: DataLoader(Counted(), batch_size=4, num_workers=1, persistent_workers=True),
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "stream-workers": lambda: DataLoader(Stream(), batch_size=4, num_workers=2),
    "no-batches": lambda: DataLoader(Counted(), batch_size=None),
    "dict": lambda: DataLoader(Counted(), batch_size=4, collate_fn=as_dict),
    "named-tuple": lambda: DataLoader(Counted(), batch_size=4, collate_fn=as_pair),
    "dataclass": lambda: DataLoader(Counted(), batch_size=4, collate_fn=as_example, num_workers=1),
    "arrays": lambda: DataLoader(Counted(), batch_size=4, collate_fn=as_arrays),
}


def flat(batch):
    """The leaves of a batch, whatever it is made of."""
    if isinstance(batch, dict):
        return [leaf for value in batch.values() for leaf in flat(value)]
    if hasattr(batch, "image") and not isinstance(batch, tuple):
        return flat([batch.image, batch.label])
    if isinstance(batch, (tuple, list)):
        return [leaf for value in batch for leaf in flat(value)]
    return [torch.from_numpy(batch) if isinstance(batch, np.ndarray) else batch]


@pytest.mark.parametrize("make", LOADERS.values(), ids=LOADERS)
def test_batches_of_loaders(recorder, said, make):
    """Whatever a loader yields, from whatever process, in two epochs: the capsule holds what the step was given."""
    model, flight, loader = nn.Linear(3, 1), recorder(), make()
    step = 0
    for _ in range(2):
        for batch in loader:
            seen = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in flat(batch)]
            if step in (1, 4):
                capsule = captured(flight, model, step=step)
                (kept,) = data_of(capsule)
                if isinstance(batch, tuple) or hasattr(batch, "image"):
                    assert getattr(batch, "_fields", None) is None or torch.equal(kept.image, batch.image)
                for expected, found in zip(seen, flat(kept), strict=True):
                    assert equal(expected, found) if isinstance(expected, Tensor) else expected == found
                assert not capsule.facts["modified"] and not capsule.facts["left_out"]
            flight.end_step(step)
            step += 1
    assert 6 <= step and [] == said


def test_two_loaders_zipped(recorder):
    """A step that takes a batch from each of two loaders has both, in order; so do micro-batches."""
    a, b = DataLoader(torch.arange(6.0), batch_size=2), DataLoader(10 * torch.arange(6.0), batch_size=2)
    model, flight = nn.Linear(2, 1), recorder()
    for step, (x, y) in enumerate(zip(a, b, strict=True)):
        if step == 1:
            found = data_of(captured(flight, model, step=step))
            assert [x.tolist(), y.tolist()] == [t.tolist() for t in found]
        flight.end_step(step)


def test_two_loaders_zipped_of_which_one_meets_the_model(recorder):
    """Targets from a second loader never reach the model, and belong to the step all the same."""
    model = nn.Linear(2, 1)
    flight = recorder({"model": model})
    a, b = DataLoader(torch.randn(6, 2), batch_size=2), DataLoader(torch.randn(6, 1), batch_size=2)
    for step, (x, y) in enumerate(zip(a, b, strict=True)):
        F.mse_loss(model(x), y).backward()
        assert 2 == len(data_of(captured(flight, model, step=step)))
        flight.end_step(step)


def test_micro_batches(recorder):
    """All micro-batches of a step belong to it, with the generators at each."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Dropout())
    flight = recorder({"model": model})
    for index, x in enumerate(DataLoader(torch.randn(12, 2), batch_size=2)):
        model(x).sum().backward()
        if index % 3 == 2:
            capsule = captured(flight, model, step=index // 3)
            assert 3 == len(capsule.facts["batches"]) == len(capsule.facts["calls"])
            states = capsule.facts["generators"]
            assert 3 == len({state["torch"]["cpu"] for state in states["calls"]})
            flight.end_step(index // 3)


def test_a_batch_fetched_ahead(recorder):
    """A program that fetches one batch ahead: each step has the batch that it is trained on, not the next one's."""
    model = nn.Linear(2, 1)
    flight = recorder({"model": model})
    batches = iter(DataLoader(torch.arange(16.0).reshape(8, 2), batch_size=2))
    ahead = next(batches)
    for step in range(4):
        x, ahead = ahead, next(batches, None)
        model(x).sum().backward()
        (found,) = data_of(captured(flight, model, step=step))
        assert x.tolist() == found.tolist()
        flight.end_step(step)


def test_an_iterator_in_the_place_of_one_that_was_freed_is_another(recorder):
    """One look at a validation batch, and a training loop whose iterator lies where that one was in memory."""
    model = nn.Linear(2, 1)
    flight = recorder({"model": model})
    train, valid = DataLoader(torch.ones(2, 2), batch_size=2), DataLoader(torch.zeros(2, 2), batch_size=2)
    look = iter(valid)
    with torch.no_grad():
        next(look)
    place = id(look)
    del look
    others = []
    while id(batches := iter(train)) != place:
        others.append(batches)
        assert len(others) < 10_000
    for x in batches:
        model(x).sum().backward()
        assert [found.tolist() for found in data_of(captured(flight, model))] == [x.tolist()]


@pytest.mark.parametrize("how", ["eval", "no-grad", "both"])
def test_validation_between_steps(recorder, how):
    """What a validation between two steps is given is no part of the next step."""
    model = nn.Linear(2, 1)
    flight = recorder({"model": model})
    train, valid = DataLoader(torch.randn(6, 2), batch_size=2), DataLoader(torch.zeros(40, 2), batch_size=2)
    for step, x in enumerate(train):
        model(x).sum().backward()
        found = data_of(captured(flight, model, step=step))
        assert [x.tolist()] == [t.tolist() for t in found]
        assert 1 == len(data_of(list_capsules(flight._folder.parent)[-1], "locals") or [1])
        flight.end_step(step)
        model.train(how == "no-grad")
        with torch.set_grad_enabled(how == "eval"):
            for y in valid:
                model(y)
        model.train()


def test_two_steps_on_one_batch(recorder):
    """A GAN's second step, for which no new batch came, has the batch of the first, and its own calls."""
    generator, critic = nn.Linear(2, 2), nn.Linear(2, 1)
    roots = {"generator": generator, "critic": critic}
    flight = recorder(roots)
    for step, real in enumerate(DataLoader(torch.randn(6, 2), batch_size=2)):
        with torch.no_grad():
            fake = generator(torch.randn(2, 2))
        (critic(fake).mean() - critic(real).mean()).backward()
        first = captured(flight, roots, step=step, subject="critic", several=True)
        flight.end_step(step, "critic")
        noise = torch.randn(2, 2)
        critic(generator(noise)).mean().backward()
        second = captured(flight, roots, step=step, subject="generator", several=True)
        flight.end_step(step, "generator")

        assert [[real.tolist()]] * 2 == [[t.tolist() for t in data_of(capsule)] for capsule in (first, second)]
        assert ["critic", "critic"] == [call["root"] for call in first.facts["calls"]]
        assert ["generator", "critic"] == [call["root"] for call in second.facts["calls"]]
        tensors = trees.tensors_of(second, "batch")
        assert torch.equal(noise, trees.decode(second.facts["calls"][0]["args"], tensors)[0])
    assert {"generator.weight", "generator.bias", "critic.weight", "critic.bias"} == {*second.tensors("model")}
    assert "step-000002-generator" == second.path.name


@pytest.mark.parametrize("size", [100, 2_000_000], ids=["small", "large"])
def test_batches_changed_in_place(recorder, size):
    """A small batch is held as it was delivered; of a large one it is told that the program has written to it."""
    model, flight = nn.Linear(2, 1), recorder()
    for step, x in enumerate(DataLoader(torch.ones(2, size), batch_size=1)):
        if step:
            x.mul_(7)
        capsule = captured(flight, model, step=step)
        assert (step > 0 and size > 1000) == capsule.facts["modified"]
        assert (7.0 if capsule.facts["modified"] else 1.0) == data_of(capsule)[0][0, 0].item()
        flight.end_step(step)


def test_large_arrays_changed_in_place(recorder):
    """Likewise NumPy arrays, whose changes nobody counts."""
    model, flight = nn.Linear(2, 1), recorder()
    loader = DataLoader(np.ones((2, 1_000_000), np.float32), batch_size=1, collate_fn=lambda rows: rows[0].copy())
    for step, x in enumerate(loader):
        if step:
            np.multiply(x, 7, out=x)
        assert (step > 0) == captured(flight, model, step=step).facts["modified"]
        flight.end_step(step)


def test_memory_that_is_used_again(recorder):
    """Batches that lie where earlier ones of the same step lay are others; the allocator uses memory again."""
    model = nn.Linear(4, 1)
    flight = recorder({"model": model})
    for step in range(3):
        for x in DataLoader(torch.randn(8, 4), batch_size=1):
            model(x * 2).sum().backward()
            del x
        gc.collect()
        capsule = captured(flight, model, step=step)
        inputs = [args[0] for args in arguments_of(capsule)]
        assert all(torch.equal(2 * x, y) for x, y in zip(data_of(capsule), inputs, strict=True))
        flight.end_step(step)


# ---- the ring -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [25_000, 1_000_000], ids=["copied", "by-reference"])
def test_the_limit_of_the_ring(recorder, rows):
    """The last steps are held up to the limit in bytes, and no more; older ones leave first."""
    each = rows * 4
    model, flight = nn.Linear(2, 1), recorder(ring=5 * each + 100)
    for step, _ in enumerate(DataLoader(Rows(rows, 12), batch_size=None)):
        flight.end_step(step, "model")
        assert flight.ring.bytes <= 5 * each + 100
    assert [7, 8, 9, 10, 11] == [entry.step for entry in flight.ring.entries]
    (found,) = data_of(captured(flight, model, step=8))  # a step that has ended
    assert 8.0 == found[0].item() == found[-1].item()


class Rows(Dataset):
    def __init__(self, size, count):
        self.size, self.count = size, count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        if index >= self.count:
            raise IndexError
        return torch.full((self.size,), float(index))


def test_the_ring_holds_no_graph(recorder):
    """What a root is called with may have a history; it is held without it, and freed when its step leaves."""
    generator, critic = nn.Linear(3, 3), nn.Linear(3, 1)
    flight = recorder({"generator": generator, "critic": critic}, ring=1000)
    alive = []
    for step in range(20):
        fake = generator(torch.randn(50, 3))
        alive.append(torch._C._autograd._saved_tensors_hooks_get_top() if False else fake.grad_fn)
        critic(fake).sum().backward()
        flight.end_step(step)
    assert not [leaf for entry in flight.ring.entries for leaf in entry.moments.leaves().values() if leaf.data.grad_fn]
    assert flight.ring.bytes <= 1000


def test_memory_stays_flat(recorder):
    """Two thousand steps hold no more than two hundred."""
    model = nn.Linear(64, 1)
    flight = recorder({"model": model}, ring=100_000)
    sizes = []
    for step in range(2000):
        for x in DataLoader(torch.randn(32, 64), batch_size=32):
            model(x).sum().backward()
        flight.end_step(step)
        if step in (200, 1999):
            gc.collect()
            sizes.append(sum(1 for thing in gc.get_objects() if issubclass(type(thing), Tensor)))
    assert sizes[1] <= sizes[0] + 3
    assert flight.ring.bytes <= 100_000


def test_large_batches_in_shared_memory_are_let_go(recorder):
    """What workers share is not held beyond its step: shared memory is scarce, and every piece an open file."""
    flight = recorder()
    files = []
    for step, _ in enumerate(DataLoader(Rows(500_000, 40), batch_size=None, num_workers=1)):
        flight.end_step(step)
        files.append(len([*Path("/proc/self/fd").iterdir()]))
    assert max(files[5:-3]) <= files[4] + 4
    assert 0 == flight.ring.bytes


# ---- what a capsule holds -------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Everything at once: tied weights, buffers, dropout, an embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.norm = nn.BatchNorm1d(8)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, ids):
        return self.head(self.drop(self.norm(self.embedding(ids).mean(1)))) * self.scale


class Words(Dataset):
    """Draws from all three generators, as augmentation does."""

    def __len__(self):
        return 40

    def __getitem__(self, index):
        ids = torch.randint(0, 20, (5,))
        return ids, (random.randrange(20) + int(np.random.randint(20))) % 20


def seed():
    torch.manual_seed(3)
    np.random.seed(3)
    random.seed(3)


def step_of(model, batch):
    ids, y = batch
    noisy = ids if random.random() < 0.5 else ids.flip(1)
    mix = float(np.random.beta(2, 2))
    return F.cross_entropy(model(noisy), y) * mix


OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "adamw": lambda p: torch.optim.AdamW(p, 0.01),
    "fused": lambda p: torch.optim.AdamW(p, 0.01, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, 0.01),
    "lr-tensor": lambda p: torch.optim.Adam(p, torch.tensor(0.01)),
}


def train(steps, make_optimizer, flight=None, dtype=torch.float32, at=None):
    """Train, optionally recorded; what capturing gave, the loss of that step, and the state before and after it."""
    seed()
    model = Tied().to(dtype)
    optimizer = make_optimizer(list(model.parameters()))
    if flight is not None:
        flight.follow({"model": model})
    seen, step = {}, 0
    while step < steps:
        for batch in DataLoader(Words(), batch_size=8, shuffle=True):
            optimizer.zero_grad()
            before = {name: t.clone() for name, t in model.named_buffers()}
            loss = step_of(model, batch)
            loss.backward()
            if flight is not None and step == at:
                seen["before"] = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
                seen["path"] = flight.capture(subject="model", step=step, why=WHY, action="observed",
                    roots={"model": model}, optimizer=optimizer, buffers=before, loss=loss)  # fmt: skip
            optimizer.step()
            if flight is not None:
                flight.end_step(step)
                if step == at:
                    seen["after"] = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
            step += 1
    return model, optimizer, seen


def restored(capsule, dtype, make_optimizer):
    """A model and an optimizer built anew and filled from a capsule alone."""
    model = Tied().to(dtype)
    optimizer = make_optimizer(list(model.parameters()))
    stored, held = trees.tensors_of(capsule, "model"), names_of({"model": model})
    for name, facts in {**capsule.facts["parameters"], **capsule.facts["buffers"]}.items():
        tensor = {**held.parameters, **held.buffers}[name]
        tensor.data.copy_(stored[facts.get("tied_to", name)])
    values = trees.tensors_of(capsule, "optimizer")
    for name, state in capsule.facts["optimizer"]["state"].items():
        optimizer.state[held.parameters[name]] = {key: trees.decode(tree, values) for key, tree in state.items()}
    for group, kept in zip(optimizer.param_groups, capsule.facts["optimizer"]["param_groups"], strict=True):
        assert [id(held.parameters[name]) for name in kept["params"]] == [id(p) for p in group["params"]]
        group |= {key: trees.decode(tree, values) for key, tree in kept.items() if key != "params"}
    return model, optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_a_step_from_its_capsule_alone(recorder, said, make, dtype):
    """From the capsule alone, in a process whose generators stand elsewhere, the step is taken again: the same loss,
    the same gradients and the same weights and optimizer state after it, bit for bit.
    """
    *_, seen = train(8, make, recorder(), dtype, at=6)
    seen_facts = open_capsule(wait_for(seen["path"])).facts
    capsule = open_capsule(seen["path"])
    torch.manual_seed(99)
    random.seed(99)
    np.random.seed(99)

    model, optimizer = restored(capsule, dtype, make)
    (batch,) = data_of(capsule)
    generators.put_back(capsule.facts["generators"]["batches"][0], trees.tensors_of(capsule, "generators"))
    loss = step_of(model, batch)
    loss.backward()
    gradients = names_of({"model": model}).parameters
    optimizer.step()

    assert [] == said and seen_facts == capsule.facts
    assert capsule.loss == float(loss.detach())
    for name, digest in capsule.facts["grad_hashes"].items():
        norm, found = fingerprint(gradients[name].grad)
        assert (digest, capsule.facts["grad_norms"][name]) == (found, norm)
    after_model, after_optimizer = seen["after"]
    assert all(equal(t, model.state_dict()[name]) for name, t in after_model.items())
    for index, state in after_optimizer["state"].items():
        for key, value in state.items():
            again = optimizer.state_dict()["state"][index][key]
            assert equal(value, again) if isinstance(value, Tensor) else value == again


def wait_for(path):
    while not path.exists():
        time.sleep(0.01)
    return path


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_run_is_the_same(recorder, said, make):
    """Recorded and captured, a training that draws from every generator ends in the same bits, as do the generators."""
    plain_model, plain_optimizer, _ = train(10, make)
    plain = torch.get_rng_state(), random.getstate(), np.random.get_state()[1:]
    model, optimizer, seen = train(10, make, recorder(), at=4)

    assert all(equal(a, b) for a, b in zip(plain_model.parameters(), model.parameters(), strict=True))
    assert repr(plain_optimizer.state_dict()) == repr(optimizer.state_dict())
    assert torch.equal(plain[0], torch.get_rng_state()) and plain[1] == random.getstate()
    assert str(plain[2]) == str(np.random.get_state()[1:])
    assert seen["path"] is not None and [] == said


def test_tied_and_loose_parameters(recorder):
    """Tied weights are stored once; what only the optimizer holds has the name of its place there."""
    model, loose = Tied(), torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.SGD([*model.parameters(), loose], 0.1)
    capsule = captured(recorder(), model, optimizer)

    assert "embedding.weight" == capsule.facts["parameters"]["head.weight"]["tied_to"]
    assert {"embedding.weight", "norm.weight", "norm.bias", "parameter.3"} <= {*capsule.tensors("model")}
    assert "head.weight" not in capsule.tensors("model")
    assert "parameter.3" == capsule.facts["optimizer"]["param_groups"][0]["params"][-1]
    assert {"type": "BatchNorm1d", "training": True} == capsule.facts["modules"]["norm"]


def test_buffers_from_before_the_forward_pass(recorder):
    """Where the caller knows a buffer's value before the forward pass, that is stored, and said to be."""
    model = nn.BatchNorm1d(2)
    before = {"running_mean": model.running_mean.clone()}
    model(torch.randn(8, 2) + 5)
    capsule = captured(recorder(), model, buffers=before)

    assert [0.0, 0.0] == trees.tensors_of(capsule, "model")["running_mean"].tolist()
    assert capsule.facts["buffers"]["running_mean"]["before"] and not capsule.facts["buffers"]["running_var"]["before"]


def test_lbfgs(recorder):
    """An optimizer whose state has lists of tensors, and whose closure calls the model many times."""
    model = nn.Linear(4, 1)
    flight = recorder({"model": model})
    x, y = torch.randn(30, 4), torch.randn(30, 1)
    optimizer = torch.optim.LBFGS(model.parameters(), max_iter=100, tolerance_grad=0, tolerance_change=0, lr=0.01)

    def closure():
        optimizer.zero_grad()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)
    capsule = captured(flight, model, optimizer)
    state = capsule.facts["optimizer"]["state"]["weight"]
    found = trees.decode(state["old_dirs"], trees.tensors_of(capsule, "optimizer"))

    assert all(torch.equal(a, b) for a, b in zip(optimizer.state[model.weight]["old_dirs"], found, strict=True))
    assert 64 == len(capsule.facts["calls"]) and "calls" in capsule.facts["left_out"][0]
    assert 1 == len({call["args"]["tuple"][0]["tensor"] for call in capsule.facts["calls"]})


def test_what_else_there_is(recorder):
    """Scaler, schedulers, settings, versions, why, and what the caller adds, at once or on the writer's thread."""
    model = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=10)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.ones(()))
    thread = []

    def later():
        thread.append(threading.current_thread().name)
        return {"diagnosis": {"causes": [], "worst": float("inf")}}

    why = [SimpleNamespace(channel="grad_norm", layer="0.weight", observed=12.0, limit=3.0)]
    with torch.autocast("cpu", torch.bfloat16):
        flight = recorder({"model": model})
        model(torch.randn(3, 2))
    more = {"statistics": {"loss": np.array([1.0, np.nan])}}
    capsule = captured(flight, model, optimizer, why=why, action="skipped", loss=torch.tensor(float("nan")),
        scaler=scaler, schedulers=[schedule], facts=more, later=later)  # fmt: skip
    facts = capsule.facts

    assert ({"channel": "grad_norm", "layer": "0.weight", "observed": 12.0, "limit": 3.0},) == capsule.why
    assert "skipped" == capsule.action and capsule.loss != capsule.loss
    assert 1024.0 == {k["value"]: v for k, v in facts["scaler"]["dict"]}["scale"]["value"]
    assert "OneCycleLR" == facts["schedulers"][0]["type"]
    assert {"loss": [1.0, "nan"]} == facts["statistics"] and "inf" == facts["diagnosis"]["worst"]
    assert {"cpu": "bfloat16"} == facts["settings"]["autocast"] == facts["calls"][0]["autocast"]
    assert torch.get_num_threads() == facts["settings"]["threads"] and torch.__version__ == facts["versions"]["torch"]
    assert ["isograd-capsule"] == thread


def test_programs_without_a_loader(recorder):
    """Without a data loader, the data in the frames of the program that takes the step is kept, and no more than that:
    parameters, losses and what has a history is left out.
    """
    model = nn.Linear(3, 1)
    flight = recorder({"model": model})

    def one_step(x, scale):
        targets, pair = np.ones((4, 1)), {"a": torch.ones(2), "b": [torch.zeros(1)]}
        weights = list(model.parameters())
        loss = (model(x) - torch.from_numpy(targets)).pow(2).mean() * scale
        loss.backward()
        assert weights and pair
        return captured(flight, model, step=3)

    outer = torch.arange(5)
    capsule = one_step(torch.randn(4, 3), 0.5)
    tensors = trees.tensors_of(capsule, "batch")
    found = {name: trees.decode(tree, tensors) for name, tree in capsule.facts["locals"].items()}

    assert {"x", "scale", "targets", "pair", "outer"} <= {*found}
    assert not {"weights", "loss", "model", "flight"} & {*found}
    assert 0.5 == found["scale"] and torch.equal(outer, found["outer"]) and (np.ones((4, 1)) == found["targets"]).all()
    assert torch.equal(trees.decode(capsule.facts["calls"][0]["args"], tensors)[0], found["x"])
    assert {"torch", "numpy", "python"} == {*capsule.facts["generators"]["calls"][0]}
    assert [] == capsule.facts["batches"]


def test_large_data_in_frames(recorder):
    """Data in frames beyond the ring's limit is left out, the largest first, and said to be."""
    flight = recorder(ring=1_000_000)
    small, large = torch.ones(1000), torch.ones(1_000_000)
    capsule = captured(flight, nn.Linear(1, 1))

    assert "small" in capsule.facts["locals"] and "large" not in capsule.facts["locals"]
    assert any(sentence.startswith("large") for sentence in capsule.facts["left_out"])
    assert small.numel() < large.numel()


# ---- tensors of all kinds -------------------------------------------------------------------------------------------


class Marked(Tensor):
    """A subclass with a name of its own, as image tensors are."""


def odd_tensors():
    plain = torch.randn(2, 3, 4, 4)
    return {
        "channels-last": plain.to(memory_format=torch.channels_last),
        "transposed": plain.transpose(1, 2),
        "expanded": torch.randn(1, 3).expand(5, 3),
        "slice": torch.arange(20)[::3],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(3.5),
        "bfloat16": torch.randn(3).bfloat16(),
        "float8": torch.randn(4).to(torch.float8_e4m3fn),
        "complex": torch.randn(3, dtype=torch.complex128),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "bool": torch.tensor([True, False]),
        "uint16": torch.tensor([1, 65535], dtype=torch.uint16),
        "nan": torch.tensor([float("nan"), float("inf")]),
        "coo": torch.eye(3).to_sparse(),
        "csr": torch.eye(3).to_sparse_csr(),
        "subclass": torch.randn(3).as_subclass(Marked),
        "parameter": nn.Parameter(torch.randn(3)),
    }


KINDS = {
    *("channels-last", "transposed", "expanded", "slice", "empty", "scalar", "subclass", "parameter", "coo", "csr"),
    *("bfloat16", "float8", "complex", "conjugate", "bool", "uint16", "nan"),
}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("name", sorted(KINDS))
def test_tensors_of_all_kinds(recorder, name):
    """Layouts, strides, number types and subclasses come back as they were."""
    tensor, flight = odd_tensors()[name], recorder()
    for batch in DataLoader([0], collate_fn=lambda _: [tensor]):
        (found,) = data_of(captured(flight, nn.Linear(1, 1)))[0]
        expected = batch[0].detach()
        if name == "subclass":
            expected = expected.as_subclass(Tensor)
        assert expected.layout == found.layout and expected.dtype == found.dtype
        if expected.layout == torch.strided:
            assert equal(expected, found)
            assert name in {"expanded", "slice"} or expected.stride() == found.stride()
        else:
            assert torch.equal(expected.to_dense(), found.to_dense())
        assert found.requires_grad == (name == "parameter")


def test_what_cannot_be_kept(recorder, said):
    """Objects, quantized and nested tensors are named by their type, and the capsule is written all the same."""
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    flight = recorder()
    for _ in DataLoader([0], collate_fn=lambda _: [nested, object(), lambda: 0, torch.ones(2, device="meta")]):
        capsule = captured(flight, nn.Linear(1, 1))
        assert all("opaque" in tree for tree in capsule.facts["batches"][0]["list"])
        assert [None] * 4 == data_of(capsule)[0]
    assert [] == said


def test_tensors_that_lie_anywhere(recorder):
    """Where a file's header has an odd length, no number in it is aligned: they are read all the same."""
    capsule = captured(recorder(), nn.Linear(2, 2))
    numbers = np.arange(1.0, 9.0)
    text = json.dumps({name: {"dtype": "F64", "shape": [8], "data_offsets": [64 * i, 64 * (i + 1)]}
                       for i, name in enumerate("ab")}).encode()  # fmt: skip
    text += b" " * (1 - len(text) % 2)
    data = struct.pack("<Q", len(text)) + text + numbers.tobytes() * 2
    (capsule.path / "batch.safetensors").write_bytes(data)
    tree = {"tensor": "a", "complex": True}
    found = trees.decode(tree, {"a": trees.tensors_of(capsule, "batch")["a"].reshape(4, 2)})

    assert len(text) % 2 == 1
    assert [1 + 2j, 3 + 4j, 5 + 6j, 7 + 8j] == (found * 1).tolist()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(["0", "1", "cpu", "<f4", "sparse_coo"]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(
        st.sampled_from(["tensor", "array", "dtype", "shape", "stride", "device", "sparse", "parts", "size", "complex",
                         "indices", "values", "list", "dict", "tuple", "names", "type", "fields", "scalar"]),
        inner, max_size=4),
    max_leaves=8,
)  # fmt: skip


@settings(max_examples=300)
@given(JSON)
def test_no_tree_of_tensors_at_all(tree):
    """Whatever stands in place of a tree of tensors: data, or TreeError; nothing large is made of a few bytes."""
    tensors = {"0": torch.ones(2, 3), "1": torch.zeros(12, dtype=torch.uint8)}
    try:
        found = trees.decode(tree, tensors)
    except TreeError as error:
        require_sentence(error)
    else:
        assert not isinstance(found, Tensor) or found.numel() <= 100


@pytest.mark.parametrize("facts", [
    {"torch": {"cpu": "short"}}, {"torch": {"cpu": "nowhere"}}, {"torch": {"no device": "short", "cuda:99": "short"}},
    {"numpy": {"keys": "short", "pos": 3, "has_gauss": 0, "cached_gaussian": 0.0}},
    {"numpy": {"keys": "numpy", "pos": 10**6, "has_gauss": 0, "cached_gaussian": 0.0}},
    {"python": {"state": "short", "gauss_next": None}}, {"python": {"state": "python", "gauss_next": None}},
], ids=str)  # fmt: skip
def test_states_that_are_none(facts):
    """States of generators of another size or with places outside of them are refused."""
    ones = torch.full((2500,), 255, dtype=torch.uint8)
    tensors = {"short": torch.zeros(8, dtype=torch.uint8), "numpy": ones[:2496], "python": ones}
    state = random.getstate()
    if "no device" in facts.get("torch", {}):
        generators.put_back(facts, tensors)
        return
    with pytest.raises((ValueError, KeyError, TypeError, RuntimeError)):
        generators.put_back(facts, tensors)
    assert state == random.getstate()


# ---- nobody notices -------------------------------------------------------------------------------------------------


def test_nothing_is_left(recorder):
    """After it has stopped, no hook and no replaced function is left; a copy of a followed model never had one."""
    model = nn.Linear(2, 1)
    flight = recorder({"model": model})
    assert NEXT is not dataloader._BaseDataLoaderIter.__next__
    twin, saved = copy.deepcopy(model), io.BytesIO()
    torch.save(model, saved)
    pickle.loads(pickle.dumps(model))(torch.ones(2))
    twin(torch.ones(2))
    flight.end_step(0)
    assert () == tuple(flight.ring.entries)
    flight.stop()

    assert NEXT is dataloader._BaseDataLoaderIter.__next__
    assert not model._forward_pre_hooks and not model._forward_pre_hooks_with_kwargs


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 1)

    def forward(self, x):
        return self.two(torch.tanh(self.one(x)))


def called_by(model, x):
    return model(x)


@pytest.mark.parametrize("how", ["module", "method", "function"])
def test_compiled_models(recorder, how):
    """A compiled model is left alone or compiled once, with the same bits; its batches are noted all the same."""
    seed()
    plain = Small()
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model = copy.deepcopy(plain)
    called = model
    if how == "module":
        called = torch.compile(model, backend=backend, fullgraph=True)
    elif how == "method":
        model.compile(backend=backend, fullgraph=True)
    else:
        called = torch.compile(partial(called_by, model), backend=backend, fullgraph=True)
    flight = recorder({"model": called if how == "module" else model})
    for step, x in enumerate(DataLoader(torch.randn(8, 4), batch_size=4)):
        assert equal(plain(x), called(x))
        capsule = captured(flight, {"model": called if how == "module" else model}, step=step)
        assert x.tolist() == data_of(capsule)[0].tolist()
        assert {"one.weight", "one.bias", "two.weight", "two.bias"} == {*capsule.tensors("model")}
        flight.end_step(step)
    assert 1 == len(graphs)


def test_checkpointing(recorder):
    """A root that is run again in the backward pass was called once."""
    model = nn.Linear(2, 2)
    flight = recorder({"model": model})
    x = torch.randn(3, 2, requires_grad=True)
    torch.utils.checkpoint.checkpoint(model, x, use_reentrant=False).sum().backward()

    assert 1 == len(captured(flight, model).facts["calls"])


def test_a_thread_that_fetches(recorder):
    """Batches that another thread takes are not confused with those of the training."""
    flight, taken = recorder(), []
    thread = threading.Thread(target=lambda: taken.extend(DataLoader(torch.randn(4, 2), batch_size=2)))
    thread.start()
    thread.join()

    assert 2 == len(taken) and [] == captured(flight, nn.Linear(2, 1)).facts["batches"]


def test_evil_batches(recorder, said):
    """Batches whose classes raise at every touch are passed on, and named by their type."""

    class Evil(dict):
        def __getattribute__(self, name):
            raise RuntimeError(name)

    @dataclass
    class Raising:
        @property
        def x(self):
            raise RuntimeError

    flight = recorder()
    for batch in DataLoader([0], collate_fn=lambda _: [Evil(a=1), Raising()]):
        assert 2 == len(batch)
        captured(flight, nn.Linear(1, 1))
    assert [] == said


# ---- the disk -------------------------------------------------------------------------------------------------------


def test_capture_does_not_wait_for_the_disk(recorder, run):
    """Capturing copies and comes back; the program's own tensors may change at once. At most two are on their way."""
    model = nn.Linear(1000, 1000)
    flight = recorder(limits=Limits(number=20))
    gate = threading.Event()
    paths = []
    for step in range(4):
        roots = {"model": model}
        later = (lambda: gate.wait(30) and {}) if step == 0 else None
        arguments = {"subject": "m", "why": WHY, "action": "observed", "optimizer": None, "later": later}
        paths.append(flight.capture(step=step, roots=roots, **arguments))
        with torch.no_grad():
            model.weight.fill_(step + 1.0)
    gate.set()
    flight.join()

    assert [False, False, True, True] == [path is None for path in paths]
    assert 1.0 == trees.tensors_of(open_capsule(paths[1]), "model")["weight"].unique().item()
    assert [0, 1] == [capsule.step for capsule in list_capsules(run)]


def test_as_many_as_there_may_be(recorder, run):
    """The number of capsules holds while a run goes wrong again and again; the first and the last are there."""
    flight = recorder(limits=Limits(number=3))
    for step in range(8):
        captured(flight, nn.Linear(2, 1), step=step)

    assert [0, 6, 7] == [capsule.step for capsule in list_capsules(run)]


def test_a_capsule_that_is_too_large(recorder, run, said):
    """One that alone is more than all may take is not written, and not copied; said once."""
    flight = recorder(limits=Limits(bytes=1000))
    for step in range(3):
        arguments = {"subject": "m", "why": WHY, "action": "observed", "optimizer": None}
        assert flight.capture(step=step, roots={"model": nn.Linear(100, 100)}, **arguments) is None

    assert 1 == len(said) and "none is written" in said[0]
    assert () == list_capsules(run)


def test_no_folder(recorder):
    """A run that is kept in memory has no capsules."""
    flight = recorder(folder=None)
    arguments = {"subject": "m", "why": WHY, "action": "observed", "optimizer": None}

    assert flight.capture(step=0, roots={}, **arguments) is None


HEAD = """
import os, sys, time, signal, resource, shutil
from pathlib import Path
from types import SimpleNamespace
import torch
from torch import nn
from torch.utils.data import DataLoader
from isograd._watch import Shield
from isograd._capsule_folder import Limits
from isograd.frameworks.torch._flight import FlightRecorder
torch.manual_seed(0)
run, said = Path(sys.argv[1]), []
model = nn.Linear(200, 100)
optimizer = torch.optim.AdamW(model.parameters())
flight = FlightRecorder(run, on_warning=said.append, shield=Shield(said.append), limits=Limits(number=5))
flight.listen()
flight.follow({"model": model})
why = [SimpleNamespace(channel="loss", layer=None, observed=9.0, limit=1.0)]
def train(steps, captured=lambda step: True):
    step = 0
    while step < steps:
        for x in DataLoader(torch.randn(64, 200), batch_size=8):
            optimizer.zero_grad()
            model(x).square().mean().backward()
            if captured(step):
                flight.capture(subject="model", step=step, why=why, action="observed", roots={"model": model},
                               optimizer=optimizer)
            optimizer.step()
            flight.end_step(step)
            step += 1
"""


def python(code, *arguments):
    command = [sys.executable, "-c", HEAD + textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_the_end_of_a_program(run):
    """A program that ends right after a capture waits for it."""
    out, err = python("train(8, lambda step: step == 7)", run).communicate()

    assert ("", "") == (out, err)
    assert [7] == [open_capsule(capsule.path).step for capsule in list_capsules(run)]


def test_a_training_that_is_killed(run):
    """kill -9 in the middle of a training that captures all the time, 4 times: whole capsules and nothing else."""
    draw = random.Random(1)
    for _ in range(4):
        process = python("print('ready', flush=True)\ntrain(10**9)", run)
        assert "ready\n" == process.stdout.readline()
        time.sleep(draw.uniform(0.05, 0.5))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        for capsule in list_capsules(run):
            assert {"weight", "bias"} == {*open_capsule(capsule.path).tensors("model")}
    FlightRecorder(run, on_warning=print, shield=Shield(print)).listen()
    for _ in range(100):
        if not [path for path in (run / "capsules").iterdir() if path.name.startswith(".")]:
            break
        time.sleep(0.05)
    else:
        pytest.fail("leftovers are swept when the next recorder begins")


FULL = """
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), resource.RLIM_INFINITY))
train(40)
flight.close()
print(len(said), said, float(model.weight.detach().sum()))
"""

PLAIN = """
train(40, lambda step: False)
print(float(model.weight.detach().sum()))
"""


@pytest.mark.parametrize("size", [0, 1000, 100_000])
def test_a_full_disk(run, size):
    """A full disk: one warning, nothing half written, and the training ends in the same weights."""
    out, err = python(FULL, run, size).communicate()
    plain, _ = python(PLAIN, run).communicate()

    assert "" == err and out.startswith("1 [")
    assert "training goes on" in out and plain.strip() in out
    # Before the first step there is no optimizer state: that capsule fits into 100 kB, the next does not.
    assert [0] * (size == 100_000) == [open_capsule(capsule.path).step for capsule in list_capsules(run)]
    assert not [path for path in (run / "capsules").iterdir() if path.name.startswith(".")]


READ_ONLY = """
run.chmod(0o555)
if os.geteuid() == 0:
    os.setuid(65534)  # no file mode stops root
train(40)
flight.close()
print(len(said), said, float(model.weight.detach().sum()))
"""


def test_a_read_only_folder():
    """A folder that may not be written: one warning, and the training goes on."""
    root = Path(tempfile.mkdtemp())
    root.chmod(0o755)
    out, err = python(READ_ONLY, root).communicate()
    root.chmod(0o755)
    plain, _ = python(PLAIN, root).communicate()

    assert "" == err and out.startswith("1 [") and "Permission denied" in out and plain.strip() in out


# ---- noting ---------------------------------------------------------------------------------------------------------


def test_the_same_tensor_is_kept_once():
    """A tensor that is met again unchanged has the same key; changed in place, another."""
    notes, x = Notes(), torch.randn(4)
    first, again = notes.note([x, x]), notes.note((x,))
    x.add_(1)
    changed = notes.note(x)

    assert first.tree["list"][0] == first.tree["list"][1] == again.tree["tuple"][0] != changed.tree
    assert first.places == changed.places
