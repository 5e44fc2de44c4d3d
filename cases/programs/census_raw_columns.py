"""Census rows whose columns span five orders of magnitude.

Seen      The accuracy is frozen at the share of the larger class, 0.76.
Cause     Columns of 1e5 beside columns of 10, none of them scaled.
Fix       Standardized columns, and Adam with 0.01.
Source    stackoverflow.com/questions/47724077
Sure      A: the accepted answer
Repaired  Accuracy above the share of the larger class by 0.15 or more
"""

import torch
from _command import arguments, verdict
from _datasets import minibatches, standardized
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("unscaled-inputs",)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    hidden = torch.randn(1000, 6, generator=torch.Generator().manual_seed(0))
    y = ((hidden[:, 0] + hidden[:, 1]) > 1.0).long()
    # Age, years of schooling, sampling weight, capital gain, capital loss, hours a week.
    width = torch.tensor([14.0, 3.0, 1e5, 7000.0, 400.0, 12.0])
    x = hidden * width + torch.tensor([38.0, 10.0, 1.9e5, 1000.0, 87.0, 40.0])
    if args.fixed:
        x = standardized(x)
    model = nn.Sequential(nn.Linear(6, 21), nn.ReLU(), nn.Linear(21, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2 if args.fixed else 1e-3)

    losses = []
    for inputs, labels in minibatches(x, y, size=100, steps=500):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    accuracy = (model(x).argmax(1) == y).float().mean().item()
    majority = torch.bincount(y).max().item() / len(y)
    verdict(accuracy > majority + 0.15, loss=sum(losses[-20:]) / 20, accuracy=accuracy, majority=majority)


if __name__ == "__main__":
    main()
