"""A linear regression on budgets of up to 300.

Seen      The loss is NaN in every epoch.
Cause     The curvature grows with the square of the inputs, to 3e4: the step is beyond 2 over the largest eigenvalue.
Fix       Standardized inputs (without them only a learning rate of 1e-7 worked).
Source    stats.stackexchange.com/questions/284189
Sure      A: the accepted answer
Repaired  Everything finite, and a mean squared error below a tenth of the variance
"""

import math

import torch
from _command import arguments, verdict
from _datasets import minibatches, standardized
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("unscaled-inputs", "learning-rate-too-high")


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    draw = torch.Generator().manual_seed(0)
    x = torch.rand(100, 1, generator=draw) * 300
    y = 0.05 * x + 7 + torch.randn(100, 1, generator=draw)
    if args.fixed:
        x = standardized(x)
    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    losses = []
    for inputs, targets in minibatches(x, y, size=1, steps=400):
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    share = (F.mse_loss(model(x), y) / y.var()).item()
    finite = all(map(math.isfinite, losses))
    verdict(finite and share < 0.1, loss=losses[-1], first_loss=losses[0], share_of_variance=share, finite=finite)


if __name__ == "__main__":
    main()
