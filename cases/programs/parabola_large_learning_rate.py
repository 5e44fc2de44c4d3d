"""y = 5 x^2 with cubed noise, and plain SGD at 0.1.

Seen      NaN, or a flat line.
Cause     The step overshoots: the loss becomes NaN, or every ReLU dies.
Fix       A learning rate of 0.001.
Source    stackoverflow.com/questions/48934338
Sure      A: the accepted answer
Repaired  Everything finite, and the last batch's error below 0.4 of the variance
"""

import math

import torch
from _command import arguments, verdict
from _datasets import minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("learning-rate-too-high",)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x = torch.arange(0, 5, 0.1)[:, None]
    y = 5 * x**2 + torch.randn(50, 1, generator=torch.Generator().manual_seed(0)) ** 3
    model = nn.Sequential(nn.Linear(1, 50), nn.ReLU(), nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 1))
    nn.init.uniform_(model[2].weight, -0.05, 0.05)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.001 if args.fixed else 0.1)

    losses = []
    for inputs, targets in minibatches(x, y, size=32, steps=1000):
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    dead = (model[:4](x) <= 0).all(0).float().mean().item()
    share = losses[-1] / y.var().item()
    finite = all(map(math.isfinite, losses))
    verdict(finite and share < 0.4, first_loss=losses[0], loss=losses[-1], finite=finite, dead_units=dead)


if __name__ == "__main__":
    main()
