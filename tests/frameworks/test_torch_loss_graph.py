"""What the observer reads from the graph of a loss: its head, its clamps, and parameters that nobody optimizes."""

import gc
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import isograd
from isograd._loss_graph import loss_graphs
from isograd._record import read_run


def graphs(tmp_path, loop, *things):
    """The loss graphs of the one subject of `loop()`, read at every step."""
    with isograd.watch(*things, out=tmp_path, every=1) as run:
        loop()
    (history,) = read_run(run.path).histories
    return loss_graphs(history)


def steps(model, loss_of, optimizer, count=2):
    """A loop of a few steps on the same random batch."""
    torch.manual_seed(0)
    x = torch.randn(8, 4)

    def loop():
        for _ in range(count):
            optimizer.zero_grad()
            loss_of(model(x)).backward()
            optimizer.step()

    return loop


def graph_of(tmp_path, loss_of, *tail, units=3):
    """The loss graph of a linear layer with `tail` behind it."""
    model = nn.Sequential(nn.Linear(4, units), *tail)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    return graphs(tmp_path, steps(model, loss_of, optimizer), model, optimizer)[0]


def labels(count=3):
    return torch.arange(8) % count


HEADS = {
    "softmax": ((nn.Softmax(1),), lambda z: F.nll_loss(z.log(), labels()), "Softmax"),
    "sigmoid": ((nn.Sigmoid(),), lambda z: F.mse_loss(z, torch.zeros(8, 3)), "Sigmoid"),
    "relu, squeezed": ((nn.ReLU(),), lambda z: (z[:, 0] - 1).square().mean(), "Relu"),
    "tanh, functional": ((), lambda z: torch.tanh(z).sum(), "Tanh"),
    "scores": ((), lambda z: F.cross_entropy(z, labels()), "LogSoftmax"),
}


@pytest.mark.parametrize("tail, loss_of, expected", HEADS.values(), ids=HEADS)
def test_output_operation(tmp_path, tail, loss_of, expected):
    """The first thing that is done to the last layer's output is known, as a module or as a function."""
    assert expected == graph_of(tmp_path, loss_of, *tail).output_operation


@pytest.mark.parametrize("dimension, size", [(1, 3), (-1, 3), (0, 8), (-2, 8)])
def test_softmax_sizes(tmp_path, dimension, size):
    """The number of entries that a softmax goes over is that of its dimension, however this is counted."""
    graph = graph_of(tmp_path, lambda z: z.softmax(dimension).square().sum())

    assert (size,) == graph.softmax_sizes


def test_shapes(tmp_path):
    """Every operation of the head has the shape of its result."""
    graph = graph_of(tmp_path, lambda z: (z - torch.zeros(8)).square().mean(), units=1)

    found = dict(zip(graph.operations, graph.shapes, strict=True))
    assert ((8, 8), (8, 1)) == (found["Sub"], found["Addmm"])


@pytest.mark.parametrize("low, high", [(-1.0, 1.0), (0.2, None), (None, -0.1)])
def test_flat_share(tmp_path, low, high):
    """The share of entries beyond the ends of a clamp is counted, an end that is not given beyond nothing."""
    seen = []

    def loss_of(z):
        seen.append(3 * z.detach())
        return (3 * z).clamp(low, high).square().mean()

    graph = graph_of(tmp_path, loss_of)
    outside = ((seen[0] < low) if low is not None else False) | ((seen[0] > high) if high is not None else False)

    assert outside.any()
    assert graph.flat_share == pytest.approx(float(outside.float().mean()))


class ListOfLayers(nn.Module):
    """Layers in a Python list, which `parameters()` does not see."""

    def __init__(self):
        super().__init__()
        self.first, self.hidden, self.last = nn.Linear(4, 5), [nn.Linear(5, 5)], nn.Linear(5, 3)

    def forward(self, x):
        return self.last(self.hidden[0](self.first(x)))


def test_unregistered_layers_are_not_optimized(tmp_path):
    """Parameters that the loss depends on and no optimizer holds are named by where they are kept, and those alone."""
    model = ListOfLayers()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    found = graphs(tmp_path, steps(model, lambda z: z.square().mean(), optimizer), model, optimizer)

    assert {"ListOfLayers.hidden[0].weight", "ListOfLayers.hidden[0].bias"} == set(found[-1].unoptimized)
    assert found[-1].unoptimized == found[-1].unregistered


def test_layers_replaced_after_the_optimizer_was_made(tmp_path):
    """The parameters of layers that the optimizer does not know are named."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model[1] = nn.Linear(5, 3)

    found = graphs(tmp_path, steps(model, lambda z: z.square().mean(), optimizer), model, optimizer)

    assert {"Sequential.1.weight", "Sequential.1.bias"} == set(found[-1].unoptimized)
    assert () == found[-1].unregistered


def test_what_another_optimizer_holds_is_optimized(tmp_path):
    """A second model's parameters, held by an optimizer that is not watched, are not called unoptimized."""
    model, judge = nn.Linear(4, 3), nn.Linear(3, 1)
    other = torch.optim.SGD(judge.parameters(), 0.1)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    found = graphs(tmp_path, steps(model, lambda z: judge(z).mean(), optimizer), model, optimizer)

    assert () == found[-1].unoptimized
    assert other.param_groups


def test_the_process_is_searched_once_for_what_nobody_holds(tmp_path, monkeypatch):
    """To find names for parameters that no optimizer holds, what is alive is listed at the first step and never again:
    not at the same ones later, and not when an optimizer has taken them. In a large process that is a second each time.
    """
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model[0].parameters(), 0.1)
    searches, listed = [], gc.get_objects
    monkeypatch.setattr(gc, "get_objects", lambda: (searches.append(1), listed())[1])
    with isograd.watch(model, optimizer, out=tmp_path, every=1, budget=math.inf):
        loop = steps(model, lambda z: z.square().mean(), optimizer, count=1)
        loop()
        first = len(searches)
        loop()
        optimizer.add_param_group({"params": [*model[1].parameters()]})
        loop()

    assert 2 == first  # for optimizers, and for modules
    assert first == len(searches)


def test_what_another_optimizer_left_behind_is_not_carried(tmp_path):
    """Gradients left by another model's backward pass, and cleared before the own one, were not carried over."""
    torch.manual_seed(0)
    maker, judge = nn.Linear(2, 2), nn.Linear(2, 1)
    with isograd.watch(out=tmp_path, every=1, budget=math.inf) as run:
        makes, judges = torch.optim.SGD(maker.parameters(), 0.01), torch.optim.SGD(judge.parameters(), 0.01)
        for _ in range(5):
            made = maker(torch.randn(8, 2))
            judges.zero_grad()
            judge(made.detach()).mean().backward()
            judges.step()
            makes.zero_grad()
            judge(made).mean().backward()
            makes.step()
    histories = read_run(run.path).histories

    assert [[0.0] * 5] * 2 == [history["carried_grad_norm"].values.tolist() for history in histories]


def test_inputs_and_frozen_parameters_are_no_parameters_to_optimize(tmp_path):
    """An input that requires a gradient, and a parameter that does not, are not called unoptimized."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), 0.1)

    def loop():
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.randn(8, 4, requires_grad=True)).square().mean().backward()
            optimizer.step()

    assert () == graphs(tmp_path, loop, model, optimizer)[-1].unoptimized
