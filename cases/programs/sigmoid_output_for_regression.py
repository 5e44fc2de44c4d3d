"""A sigmoid output that has to fit a straight line up to 31.

Seen      The prediction is flat and never exceeds 1.
Cause     The range of the output, (0, 1), does not hold the targets.
Fix       A linear output unit.
Source    stackoverflow.com/questions/48221692
Sure      A: the accepted answer
Repaired  Mean squared error below 5 % of the targets' variance
"""

import torch
from _command import arguments, verdict
from _datasets import minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("bounded-output",)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x = torch.linspace(0, 10, 200)[:, None]
    y = 3 * x + 1
    model = nn.Sequential(nn.Linear(1, 5), nn.Sigmoid(), nn.Linear(5, 1), nn.Identity() if args.fixed else nn.Sigmoid())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)

    for inputs, targets in minibatches(x, y, size=200, steps=1500):
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()

    share = loss.item() / y.var().item()
    verdict(share < 0.05, loss=loss.item(), share_of_variance=share)


if __name__ == "__main__":
    main()
