"""What each summand of a loss sends alone into what it shares with the others, against `torch.autograd.grad`."""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import isograd
from isograd._record import read_run


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def history_of(tmp_path, loop, *things):
    with isograd.watch(*things, out=tmp_path, every=1, budget=math.inf) as run:
        loop()
    (history,) = read_run(run.path).histories
    assert not history.events_of("watch-detached")
    return history


def terms_of(history, row=-1):
    """Name -> (type, gradient norm) of every summand."""
    norms = history["signal_norm"].values[row]
    return {
        layer.name: (layer.type, norm)
        for layer, norm in zip(history.layers, norms, strict=True)
        if layer.role == "term"
    }


def norm_of(*gradients):
    return math.sqrt(sum(float(g.double().square().sum()) for g in gradients))


class Shared(nn.Module):
    """A trunk with two heads."""

    def __init__(self):
        super().__init__()
        self.trunk, self.left, self.right = nn.Linear(4, 6), nn.Linear(6, 3), nn.Linear(6, 2)

    def forward(self, x):
        self.hidden = torch.tanh(self.trunk(x))
        return self.left(self.hidden), self.right(self.hidden)


x, y, labels = torch.linspace(-1, 1, 32).reshape(8, 4), torch.linspace(0, 1, 24).reshape(8, 3), torch.arange(8) % 2

SUMS = {
    "added": lambda a, b: a + 0.01 * b,
    "subtracted": lambda a, b: a - b / 20,
    "accumulated": lambda a, b: (b * 0.1 + 3.0 + a) / 4,
    "summed list": lambda a, b: sum([a, 5 * b]),
    "stacked": lambda a, b: torch.stack([a, 1e3 * b]).sum(),
    "stacked mean": lambda a, b: torch.stack([a, b]).mean(),
    "scaled": lambda a, b: torch.tensor(1024.0) * (a + torch.tensor(0.3) * b),
}


@pytest.mark.parametrize("total", SUMS.values(), ids=SUMS)
def test_two_terms(tmp_path, total):
    """Each term's norm is that of the gradient that it alone, weight included, sends into the shared activation."""
    model = Shared()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    expected = []

    def parts():
        left, right = model(x)
        return F.mse_loss(left, y), F.cross_entropy(right, labels)

    def alone(index):
        a, b = parts()
        mixed = total(a, b.detach()) if index == 0 else total(a.detach(), b)
        return norm_of(*torch.autograd.grad(mixed, [model.hidden]))

    def loop():
        for _ in range(3):
            expected.append(sorted([alone(0), alone(1)]))
            optimizer.zero_grad()
            total(*parts()).backward()
            optimizer.step()

    history = history_of(tmp_path, loop, model, optimizer)
    for row in range(3):
        found = terms_of(history, row)
        assert {"loss.term-1", "loss.term-2"} == found.keys()
        assert {"MseLoss", "NllLoss"} == {kind for kind, _ in found.values()}
        assert expected[row] == pytest.approx(sorted(norm for _, norm in found.values()), rel=1e-4)


def test_terms_stand_in_the_order_of_the_sum(tmp_path):
    """Three terms are named from left to right, and each has its own operation."""
    model = Shared()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def loop():
        left, right = model(x)
        (F.cross_entropy(right, labels) + F.mse_loss(left, y) + 0.5 * model.hidden.abs().mean()).backward()
        optimizer.step()

    found = terms_of(history_of(tmp_path, loop, model, optimizer))

    assert ["NllLoss", "MseLoss", "Mean"] == [found[f"loss.term-{i}"][0] for i in (1, 2, 3)]


def test_a_penalty_on_weights_meets_the_data_in_the_weights(tmp_path):
    """A sum of squared weights shares nothing but the weights: both terms are compared there."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    weights = [model[0].weight, model[2].weight]
    penalty = 0.1 * sum(w.square().sum() for w in weights)
    expected = [norm_of(*torch.autograd.grad(loss, weights)) for loss in (F.mse_loss(model(x), y), penalty)]

    def loop():
        (F.mse_loss(model(x), y) + 0.1 * torch.cat([w.reshape(-1) for w in weights]).square().sum()).backward()
        optimizer.step()

    found = terms_of(history_of(tmp_path, loop, model, optimizer))

    assert expected == pytest.approx([found["loss.term-1"][1], found["loss.term-2"][1]], rel=1e-4)


def test_terms_of_every_sample(tmp_path):
    """One loss per sample, averaged at the end, is taken apart; the formula of a divergence is not."""
    encode, decode = nn.Linear(4, 6), nn.Linear(3, 4)
    optimizer = torch.optim.SGD([*encode.parameters(), *decode.parameters()], 0.0)
    noise, expected = torch.randn(8, 3), []

    def losses():
        code = encode(x)
        code.retain_grad()
        mean, logvar = code.chunk(2, 1)
        again = decode(mean + noise * (logvar / 2).exp())
        divergence = -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(1)
        return code, (again - x).square().sum(1), 1e-3 * divergence

    for index in (0, 1):
        code, *parts = losses()
        parts[index].mean().backward()
        expected.append(norm_of(code.grad))

    def loop():
        _, error, divergence = losses()
        optimizer.zero_grad()
        (error + divergence).mean().backward()
        optimizer.step()

    model = nn.ModuleList([encode, decode])
    history = history_of(tmp_path, loop, model, optimizer)
    # What is shared begins with the two halves of the code.
    found = [norm for _, norm in terms_of(history, -1).values()]
    assert 2 == len(found)
    assert expected == pytest.approx(found, rel=1e-3)


SINGLE = {
    "one loss": lambda model: F.mse_loss(model(x)[0], y),
    "a constant": lambda model: 2 * F.mse_loss(model(x)[0], y) + 7.0,
    "a written-out formula": lambda model: (model(x)[0] - y).square().mean(),
    "a contrast": lambda model: (model(x)[0].logsumexp(1) - model(x)[0][:, 0]).mean(),
}


@pytest.mark.parametrize("loss_of", SINGLE.values(), ids=SINGLE)
def test_one_term_is_no_sum(tmp_path, loss_of):
    """A loss of one term has no summands, however many operations it takes."""
    model = Shared()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def loop():
        loss_of(model).backward()
        optimizer.step()

    assert {} == terms_of(history_of(tmp_path, loop, model, optimizer))


def test_two_models_share_nothing(tmp_path):
    """Of a sum that trains two separate models the terms are named, and their gradients are missing."""
    one, other = nn.Linear(4, 3), nn.Linear(4, 3)
    optimizer = torch.optim.SGD([*one.parameters(), *other.parameters()], 0.1)

    def loop():
        (F.mse_loss(one(x), y) + F.l1_loss(other(x), y)).backward()
        optimizer.step()

    found = terms_of(history_of(tmp_path, loop, nn.ModuleList([one, other]), optimizer))

    assert 2 == len(found)
    assert all(math.isnan(norm) for _, norm in found.values())


def test_a_long_sum_keeps_its_rest_together(tmp_path):
    """Of thirty summands eight terms are made: the last ones, and the sum of all before them."""
    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    first = sum(F.mse_loss(model(x), y * k) for k in range(23))
    expected = norm_of(*torch.autograd.grad(first, list(model.parameters())))

    def loop():
        sum(F.mse_loss(model(x), y * k) for k in range(30)).backward()
        optimizer.step()

    found = terms_of(history_of(tmp_path, loop, model, optimizer))

    assert 8 == len(found)
    assert "Add" == found["loss.term-1"][0]
    assert expected == pytest.approx(found["loss.term-1"][1], rel=1e-4)
