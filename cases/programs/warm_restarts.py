"""Cosine annealing with warm restarts.

Scary     The loss rises fourfold after every restart.
Healthy   It falls again each time: accuracy of 0.97 or more.
"""

import torch
from _command import arguments, verdict
from _datasets import blobs, minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ()


def main():
    args = arguments(__doc__, pair=False)
    torch.manual_seed(args.seed)
    x, y = blobs(1000, 20, 10, 0.7)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 100)

    losses = []
    for inputs, labels in minibatches(x, y, steps=600):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        scheduler.step()  # before the optimizer, as loops had it up to PyTorch 1.0: one step ahead
        optimizer.step()
        losses.append(loss.item())

    accuracy = (model(x).argmax(1) == y).float().mean().item()
    verdict(
        accuracy >= 0.97, word="healthy",
        before_restart=sum(losses[490:500]) / 10, after_restart=sum(losses[503:515]) / 12,
        loss=sum(losses[-20:]) / 20, accuracy=accuracy,
    )  # fmt: skip


if __name__ == "__main__":
    main()
