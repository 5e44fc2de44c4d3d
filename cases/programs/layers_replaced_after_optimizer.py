"""Layers that are replaced after the optimizer was built.

Seen      The loss is constant, though the gradients are large.
Cause     The optimizer holds the tensors of the old layers.
Fix       The optimizer is built anew (or `add_param_group`).
Source    github.com/microsoft/nni/issues/4521, github.com/zjunlp/HVPNeT/issues/5
Sure      A: the maintainer's advice
Repaired  Weights that move, and an accuracy of 0.95 or more
"""

import torch
from _command import arguments, verdict
from _datasets import blobs, minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("parameters-not-optimized",)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = blobs(600, 20, 10, 1.0)
    model = nn.Sequential(nn.Linear(20, 64), nn.ReLU(), nn.Linear(64, 5))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    model[2] = nn.Linear(64, 10)
    model[0] = nn.Linear(20, 64)
    if args.fixed:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    before = model[0].weight.detach().clone()

    losses = []
    for inputs, labels in minibatches(x, y, steps=300):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    accuracy = (model(x).argmax(1) == y).float().mean().item()
    moved = (model[0].weight - before).norm().item()
    verdict(moved > 0 and accuracy >= 0.95, first_loss=losses[0], loss=losses[-1], accuracy=accuracy, moved=moved)


if __name__ == "__main__":
    main()
