"""A softmax layer before `cross_entropy`, which applies one of its own.

Seen      The loss stays at a high constant, though the accuracy can be perfect.
Cause     The softmax of probabilities is bounded: with K classes the loss cannot fall below ln(e + K - 1) - 1.
Fix       Without the softmax layer.
Source    github.com/ariecattan/SciCo/issues/2 (fixed), github.com/Lightning-Universe/lightning-bolts/issues/654,
          discuss.pytorch.org/t/cross-entropy-loss-is-not-decreasing/43814
Sure      A: fixed by the authors
Repaired  Loss below a tenth of that floor
"""

import math

import torch
from _command import arguments, verdict
from _datasets import blobs, minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("double-activation",)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = blobs(1000, 20, 4, 1.0)
    model = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 4), nn.Identity() if args.fixed else nn.Softmax(1)
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    losses = []
    for inputs, labels in minibatches(x, y, steps=1500):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    loss, floor = sum(losses[-50:]) / 50, math.log(math.e + 3) - 1
    accuracy = (model(x).argmax(1) == y).float().mean().item()
    verdict(loss < floor / 10, loss=loss, accuracy=accuracy, floor=floor)


if __name__ == "__main__":
    main()
