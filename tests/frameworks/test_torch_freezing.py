"""What is frozen and thawed while a program trains, and what was meant to be frozen and is not."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

import isograd
from isograd._record import read_run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def network():
    return nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 5), nn.Tanh()), "head": nn.Linear(5, 3)})


def trained(tmp_path, model, optimizer, before_step, *, steps=6, every=1):
    """The history of a loop that calls `before_step(step)` first in every step."""
    with isograd.watch(model, optimizer, out=tmp_path, every=every, budget=math.inf) as run:
        for step in range(steps):
            before_step(step)
            optimizer.zero_grad(set_to_none=False)
            model["head"](model["body"](torch.randn(8, 4))).square().mean().backward()
            optimizer.step()
    (history,) = read_run(run.path).histories
    assert not history.events_of("watch-detached")
    return history


def changes(history):
    return [(e.step, e.data["parameter"], e.data["value"]) for e in history.events_of("requires-grad")]


def trainable(history):
    return {parameter.name: parameter.trainable for parameter in history.parameters}


@pytest.mark.parametrize("held", [True, False], ids=["held by the optimizer", "held by none"])
def test_freezing_and_thawing(tmp_path, held):
    """A change of `requires_grad` is an event at the first step that runs with it; the table has the last value."""
    model = network()
    optimizer = torch.optim.SGD((model if held else model["head"]).parameters(), 0.1)

    def before_step(step):
        if step in (2, 4):
            model["body"][0].weight.requires_grad_(step == 4)
        if step == 5:
            model["body"].requires_grad_(False)

    history = trained(tmp_path, model, optimizer, before_step)

    assert [
        (2, "body.0.weight", False), (4, "body.0.weight", True), (5, "body.0.weight", False), (5, "body.0.bias", False),
    ] == changes(history)  # fmt: skip
    frozen = {"body.0.weight", "body.0.bias"}
    assert {name: name not in frozen for name in trainable(history)} == trainable(history)


def test_what_is_frozen_from_the_start_is_no_change(tmp_path):
    """Parameters frozen before the first step are known as frozen, without an event."""
    model = network()
    model["body"].requires_grad_(False)
    optimizer = torch.optim.SGD(model["head"].parameters(), 0.1)

    history = trained(tmp_path, model, optimizer, lambda step: None)

    assert [] == changes(history)
    assert {"body.0.weight": False, "body.0.bias": False, "head.weight": True, "head.bias": True} == trainable(history)


def test_between_deep_steps_the_optimizers_parameters_are_looked_at(tmp_path):
    """A parameter that an optimizer holds is seen to freeze at the very step, whether that step is deep or not."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    history = trained(
        tmp_path,
        model,
        optimizer,
        lambda step: model["head"].bias.requires_grad_(False) if step == 57 else None,
        steps=60,
        every=1000,
    )

    assert 57 not in history["weight_norm"].steps
    assert [(57, "head.bias", False)] == changes(history)


def test_frozen_parameters_that_still_move(tmp_path):
    """A parameter frozen under momentum goes on moving, and the update is read."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    moved = []

    def before_step(step):
        if step == 3:
            model["head"].weight.requires_grad_(False)
        moved.append(model["head"].weight.detach().clone())

    history = trained(tmp_path, model, optimizer, before_step)
    column = [parameter.name for parameter in history.parameters].index("head.weight")
    updates = history["update_norm"].values[:, column]
    expected = [float((b - a).norm()) for a, b in pairwise(moved)]

    assert expected == pytest.approx(updates[:-1], rel=1e-4)
    assert updates[4] > 0


@pytest.mark.parametrize("name", ["body", "body.0", "head"])
def test_an_attribute_freezes_nothing(tmp_path, name):
    """`module.requires_grad = False` is told once, and only while the module's parameters do require gradients."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model.get_submodule(name).requires_grad = False

    history = trained(tmp_path, model, optimizer, lambda step: None)

    assert [{"module": name}] == [dict(event.data) for event in history.events_of("freeze-attribute")]
    assert all(trainable(history).values())


def test_an_attribute_beside_a_true_freeze_is_no_fault(tmp_path):
    """A module that is frozen and also carries the attribute is not told of; nor is one whose attribute is True."""
    model = network()
    model["body"].requires_grad_(False)
    model["body"].requires_grad = False
    model["head"].requires_grad = True
    optimizer = torch.optim.SGD(model["head"].parameters(), 0.1)

    history = trained(tmp_path, model, optimizer, lambda step: None)

    assert () == history.events_of("freeze-attribute")


def test_a_gradient_from_a_later_step_is_not_taken_for_this_one(tmp_path):
    """Where a later backward pass goes through an earlier step's graph, each step keeps the signals of its own."""
    layer = nn.Linear(2, 3)
    optimizer = torch.optim.SGD(layer.parameters(), 0.0)
    expected = []
    with isograd.watch(layer, optimizer, out=tmp_path, every=1, budget=math.inf) as run:
        state = torch.zeros(1, 3)
        for _ in range(4):
            out = layer(torch.randn(1, 2))
            state = 0.5 * state + torch.tanh(out)
            out.retain_grad()
            state.square().sum().backward(retain_graph=True)
            expected.append(float(out.grad.norm()))
            optimizer.step()
    (history,) = read_run(run.path).histories
    column = [entry.name for entry in history.layers].index("layer")

    assert not history.events_of("watch-detached")
    assert expected == pytest.approx(history["signal_norm"].values[:, column], rel=1e-5)
