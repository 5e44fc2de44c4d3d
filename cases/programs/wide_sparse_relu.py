"""A layer of 2000 ReLU units whose biases start at -1.5.

Scary     87 % of all activations are zero, and 1.6 % of the units are dead.
Healthy   The others suffice: accuracy of 0.98 or more.
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
    x, y = blobs(600, 20, 10, 1.5)
    model = nn.Sequential(nn.Linear(20, 2000), nn.ReLU(), nn.Linear(2000, 10))
    model[0].bias.data.sub_(1.5)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    for inputs, labels in minibatches(x, y, steps=200):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()

    accuracy = (model(x).argmax(1) == y).float().mean().item()
    active = model[:2](x)
    dead = (active <= 0).all(0).float().mean().item()
    zeros = (active == 0).float().mean().item()
    verdict(accuracy >= 0.98, word="healthy", loss=loss.item(), accuracy=accuracy, zeros=zeros, dead_units=dead)


if __name__ == "__main__":
    main()
