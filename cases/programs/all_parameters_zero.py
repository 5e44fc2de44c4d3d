"""A network whose weights and biases all start at zero.

Seen      The loss stays at ln 4; only the output's bias moves.
Cause     A ReLU of 0 is 0, and a gradient through a weight of 0 is 0: no layer can begin.
Fix       Random weights.
Source    github.com/wagonhelm/NaNmnist/issues/2, github.com/davharris/mistnet/issues/87
Sure      B: advice in the threads. For a linear model a start at zero is fine
Repaired  Accuracy of 0.98 or more, and a gradient in every weight
"""

import torch
from _command import arguments, verdict
from _datasets import blobs, minibatches
from torch import nn
from torch.nn import functional as F

ACCEPTED = ("zero-initialization",)


def main():
    args = arguments(__doc__)
    torch.manual_seed(args.seed)
    x, y = blobs(600, 20, 4, 1.5)
    model = nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4))
    if not args.fixed:
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)

    for inputs, labels in minibatches(x, y, steps=200):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()

    accuracy = (model(x).argmax(1) == y).float().mean().item()
    smallest = min(layer.weight.grad.norm().item() for layer in model[::2])
    verdict(accuracy >= 0.98 and smallest > 0, loss=loss.item(), accuracy=accuracy, smallest_grad_norm=smallest)


if __name__ == "__main__":
    main()
