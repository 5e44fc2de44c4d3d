"""y = x^4 on [-100, 100], neither of them scaled.

Seen      A loss of 1e15 and a flat prediction; x^3 seems to work.
Cause     Inputs of 100 saturate the first sigmoid, and targets of 1e8 need 1e8 steps of Adam's size.
Fix       Both standardized (and a ReLU in the first layer).
Source    stackoverflow.com/questions/52800582
Sure      A: the accepted answer
Repaired  Mean squared error below 1 % of the variance
"""

import torch
from _command import arguments, verdict
from _datasets import minibatches, standardized
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("unscaled-targets", "unscaled-inputs")


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x = torch.arange(-100, 100, 0.5)[:, None]
    y = x**4
    if args.fixed:
        x, y = standardized(x), standardized(y)
    model = nn.Sequential(
        nn.Linear(1, 50), nn.ReLU() if args.fixed else nn.Sigmoid(), nn.Linear(50, 50), nn.ELU(), nn.Linear(50, 1)
    )
    optimizer = torch.optim.Adam(model.parameters())

    for inputs, targets in minibatches(x, y, size=400, steps=1000):
        optimizer.zero_grad()
        loss = F.mse_loss(model(inputs), targets)
        loss.backward()
        optimizer.step()

    share = loss.item() / y.var().item()
    verdict(share < 0.01, loss=loss.item(), share_of_variance=share)


if __name__ == "__main__":
    main()
