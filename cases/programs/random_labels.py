"""A classifier on labels that carry no signal.

Scary     The loss stays at ln 2 for ever.
Healthy   Nothing is broken that could be repaired: there is nothing to learn (stackoverflow.com/questions/39217567).
"""

import math

import torch
from _command import arguments, verdict
from _datasets import minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ()


def main():
    args = arguments(__doc__, pair=False)
    torch.manual_seed(args.seed)
    x, y = torch.randn(20000, 10), torch.randint(0, 2, (20000,))
    model = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    losses = []
    for inputs, labels in minibatches(x, y, steps=400):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    loss = sum(losses[-50:]) / 50
    verdict(abs(loss - math.log(2)) < 0.02, word="healthy", loss=loss)


if __name__ == "__main__":
    main()
