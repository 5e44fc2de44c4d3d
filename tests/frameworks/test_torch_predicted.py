from __future__ import annotations

import pytest
import torch
from torch import nn

from isograd.frameworks.torch._predicted import SAMPLE, predicted_update

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "sgd-decay": lambda p: torch.optim.SGD(p, lr=0.1, weight_decay=0.3),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam-decay": lambda p: torch.optim.Adam(p, lr=0.01, weight_decay=0.3),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0),
    "fused": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.0, fused=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01),
    "rmsprop-centered": lambda p: torch.optim.RMSprop(p, lr=0.01, centered=True, momentum=0.5),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, lr_decay=0.1),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_update_is_known_before_it_is_made(name):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 3))
    optimizer = OPTIMIZERS[name](model.parameters())
    for step in range(6):
        optimizer.zero_grad()
        model(torch.randn(4, 6)).square().sum().mul(10.0 ** (step % 3)).backward()
        told = predicted_update(optimizer)
        before = [p.detach().double() for p in model.parameters()]
        optimizer.step()
        made = torch.cat([(p.detach() - b).reshape(-1) for p, b in zip(model.parameters(), before, strict=True)]).norm()
        if told is None:
            assert step == 0 and "sgd" not in name and name not in {"momentum", "nesterov"}
        else:
            assert told.item() == pytest.approx(made.item(), rel=2e-3)


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if not name.startswith("sgd")])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_with_state_that_is_not_finite_neither_is_the_update(name, value):
    """Also where the formula divides by it: 1 / inf would be no update at all."""
    weight = nn.Parameter(torch.randn(5))
    optimizer = OPTIMIZERS[name]([weight])
    weight.grad = torch.randn(5)
    optimizer.step()
    held = [v for v in optimizer.state[weight].values() if torch.is_tensor(v) and v.dim()]
    for tensor in held:
        before = tensor[2].item()
        tensor[2] = value
        assert not predicted_update(optimizer).isfinite()
        tensor[2] = before
    assert held and predicted_update(optimizer).isfinite()


def test_of_large_tensors_samples_tell_it_about():
    torch.manual_seed(0)
    weight = nn.Parameter(torch.randn(300, 300))
    assert weight.numel() > 300 * SAMPLE
    optimizer = torch.optim.SGD([weight], lr=0.5)
    weight.grad = torch.randn(300, 300)
    told = predicted_update(optimizer)
    assert told.item() == pytest.approx(0.5 * weight.grad.norm().item(), rel=5 / (2 * SAMPLE) ** 0.5)


def test_what_is_not_known_is_not_told():
    weight = nn.Parameter(torch.randn(3))
    weight.grad = torch.randn(3)

    class Adam(torch.optim.Adam):
        """Of the user's own: it may do anything."""

    assert predicted_update(torch.optim.Rprop([weight])) is None
    assert predicted_update(Adam([weight])) is None
    assert predicted_update(torch.optim.Adam([weight])) is None  # no state before the first step
    assert predicted_update(torch.optim.SGD([nn.Parameter(torch.randn(2))])) is None  # no gradient
