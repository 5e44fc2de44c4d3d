"""Hidden layers kept in a plain Python list.

Seen      The hidden layers never train.
Cause     `parameters()` does not find what stands in a list.
Fix       `nn.ModuleList`.
Source    github.com/pytorch/pytorch/issues/715, 666, 1053, github.com/twitter/the-algorithm-ml/issues/136
Sure      A: confirmed by maintainers
Repaired  3330 parameters, and an accuracy of 0.98 or more
"""

import torch
from _command import arguments, verdict
from _datasets import minibatches, moons
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("parameters-not-optimized",)


class Network(nn.Module):
    def __init__(self, *, registered):
        super().__init__()
        hidden = [nn.Linear(32, 32) for _ in range(3)]
        self.first = nn.Linear(2, 32)
        self.hidden = nn.ModuleList(hidden) if registered else hidden
        self.last = nn.Linear(32, 2)

    def forward(self, x):
        x = F.relu(self.first(x))
        for layer in self.hidden:
            x = F.relu(layer(x))
        return self.last(x)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = moons(noise=0.05)
    model = Network(registered=args.fixed)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    losses = []
    for inputs, labels in minibatches(x, y, steps=400):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    accuracy = (model(x).argmax(1) == y).float().mean().item()
    count = sum(parameter.numel() for parameter in model.parameters())
    verdict(accuracy >= 0.98 and count == 3330, loss=sum(losses[-20:]) / 20, accuracy=accuracy, parameters=count)


if __name__ == "__main__":
    main()
